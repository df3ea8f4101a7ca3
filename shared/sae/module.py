"""The sparse autoencoder: one module, whatever the activation function. Training and evaluation live elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tcsae.shared.base.device import matmuls
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.settings import to_dict
from tcsae.shared.sae.activations import KINDS, Kind
from tcsae.shared.sae.layout import SaeConfig, SaeMetadata, saelens_config, write_sae
from tcsae.shared.sae.sparse import SparseCode, decode

__all__ = ["Edit", "SaeConfig", "SparseAutoencoder", "edit_difference", "layer_normed"]


class SparseAutoencoder(nn.Module):
    """f = activation((x - b_dec) W_enc + b_enc); x_hat = f W_dec + b_dec.

    W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model] and, where the activation has one,
    threshold [d_sae]; float32 unless moved. With a layer norm, x is normed before b_dec is taken away. Of a crosscoder,
    d_model is `config.d_in`: `tcsae.shared.sae.crosscoder` takes sequences to windows and back.
    """

    metadata: SaeMetadata
    """Where the SAE comes from: hook, model, store content, position rules."""
    input_scale: float = 1.0
    """What x is multiplied by before it is read, where that cannot be folded into the weights (TFA)."""

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata = SaeMetadata()
        # Latent by latent in memory, as gradients of sparse codes arrive; `W_enc` shows it the field's way round.
        self.W_enc_rows = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.threshold: nn.Parameter | None = None
        if self.kind.threshold != "none":
            self.threshold = nn.Parameter(torch.zeros(config.d_sae))

    @property
    def directions(self) -> Float[Tensor, "d_sae d_model"]:
        """What each latent adds to the activation of the token that its code stands at: the decoder's row, of a
        crosscoder that of the window's last position.
        """
        return self.window_rows[:, -1]

    @property
    def window_rows(self) -> Float[Tensor, "d_sae window d_model"]:
        """The same for each position of a crosscoder's window, whose last is the token's; else of the token alone."""
        return self.W_dec.detach().view(self.config.d_sae, -1, self.config.d_model) / self.input_scale

    @property
    def kind(self) -> Kind:
        return KINDS[self.config.activation]

    @property
    def learned_threshold(self) -> Float[Tensor, " d_sae"]:
        """The threshold of a kind that has one."""
        assert self.threshold is not None, f"{self.config.activation} has no threshold"
        return self.threshold

    @property
    def W_enc(self) -> Float[Tensor, "d_model d_sae"]:
        return self.W_enc_rows.T

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names they are saved under, the field's way round."""
        names = ["W_enc", "b_enc", "W_dec", "b_dec", *([] if self.threshold is None else ["threshold"])]
        return {name: getattr(self, name).detach() for name in names}

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def saelens_config(self) -> dict[str, Any]:
        """cfg.json of this SAE."""
        return saelens_config(self.config, self.metadata.to_saelens(), self.input_scale)

    def save(self, path: str | Path) -> None:
        """Write the SAE into the folder `path`, float32: cfg.json and sae_weights.safetensors in SAELens' layout.

        A run of ours also keeps its tcsae.json, brought up to date. Raises DiskError if the folder cannot be written.
        """
        record = self.metadata.record
        with disk_errors(path):
            Path(path).mkdir(parents=True, exist_ok=True)
            updated = {**record, "sae": to_dict(self.config)} if record else None
            write_sae(Path(path), self.tensors(), self.saelens_config(), updated)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The encoder as W_enc [d_model, d_sae], the name and orientation of every other library."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}W_enc"] = destination.pop(f"{prefix}W_enc_rows").T.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (W_enc := state_dict.pop(f"{prefix}W_enc", None)) is not None:
            state_dict[f"{prefix}W_enc_rows"] = W_enc.T.contiguous()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """(x - b_dec) W_enc + b_enc, after the layer norm if there is one; x of any float dtype."""
        x = x.to(self.W_dec.dtype)
        if self.config.layer_norm != "none":
            x = layer_normed(x)[0]
        with matmuls(x.device):
            pre = nn.functional.linear(x - self.b_dec, self.W_enc_rows, self.b_enc)
        return pre.to(x.dtype)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, as a dense tensor of the weights' dtype."""
        return self.kind.dense(self.pre_activations(x), self.config.k, self.threshold)

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseCode:
        """The code's non-zero entries, the same values as `encode`, of the tokens of all leading axes laid end to end.

        x may be of any float dtype and hold no token; the values are of the weights' dtype.
        """
        x = x.reshape(-1, self.config.d_in)
        return self.kind.sparse(self.pre_activations(x), self.config.k, self.threshold)

    def decode(
        self, code: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction from a dense code. With layer_norm "in_out" it needs the `x` that was encoded."""
        with matmuls(code.device):
            x_hat = code @ self.W_dec
        return self._scaled_back(x_hat + self.b_dec, x)

    def decode_sparse(
        self, code: SparseCode, x: Float[Tensor, "n d_model"] | None = None
    ) -> Float[Tensor, "n d_model"]:
        """The reconstruction from a sparse code; `x` as in `decode`."""
        return self._scaled_back(decode(code, self.W_dec, self.b_dec), x)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of x."""
        return self.decode(self.encode(x), x)

    def _scaled_back(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        if self.config.layer_norm != "in_out":
            return x_hat
        assert x is not None, "layer_norm in_out decodes with the statistics of x"
        _, mean, deviation = layer_normed(x.to(x_hat.dtype))
        return x_hat * deviation + mean

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Take up an input scaling: afterwards the SAE reads x where it read scale * x before, and answers in x.

        Where the activation is positively homogeneous the code shrinks with x and the decoder keeps its norms; gelu is
        not, so there the code stays and the weights take the scale.
        """
        assert scale == 1.0 or self.config.layer_norm == "none", "a layer norm undoes any scale"
        self.b_dec.div_(scale)
        if self.config.activation == "gelu":
            self.W_enc_rows.mul_(scale)
            self.W_dec.div_(scale)
            return
        self.b_enc.div_(scale)
        if self.threshold is not None:
            self.threshold.div_(scale)


def layer_normed(x: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Tensor, Tensor]:
    """((x - mean) / deviation, mean, deviation), over the last axis, without learned weights."""
    mean = x.mean(-1, keepdim=True)
    deviation = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return (x - mean) / deviation, mean, deviation


class Edit(NamedTuple):
    """What becomes of a latent's value."""

    kind: Literal["set", "add"]
    amount: float


def edit_difference(
    sae: SparseAutoencoder, code: SparseCode, x: Float[Tensor, "n d_model"], edits: Mapping[int, Edit]
) -> Float[Tensor, "n d_model"]:
    """What edits of latents change in the reconstruction of x, whose code is `code`."""
    total = torch.zeros_like(x)
    for latent, edit in edits.items():
        amount = torch.full((code.n_tokens,), edit.amount, device=x.device, dtype=x.dtype)
        if edit.kind == "set":
            at = (code.latents == latent).nonzero().squeeze(1)
            amount = amount.index_add(0, code.rows[at], -code.values[at])
        total = total + amount[:, None] * sae.W_dec[latent]
    if sae.config.layer_norm == "in_out":
        total = total * layer_normed(x)[2]
    return total
