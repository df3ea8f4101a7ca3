"""The sparse autoencoder: one module, whatever the activation function. Training and evaluation live elsewhere."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.activations import KINDS, Kind
from tcsae.shared.sae.sparse import SparseCode, decode

SAELENS_LAYOUT = "6.0.0"
"""The SAELens version whose file layout is written; from 6 on, cfg.json has nested metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeConfig:
    """What one sparse autoencoder is: enough to rebuild it, nothing about how it was trained."""

    d_model: int
    """Width of the activations it reads."""
    d_sae: int = 4096
    """Number of latents."""
    activation: str = "topk"
    """A name in `tcsae.shared.sae.activations.KINDS`."""
    k: int = 32
    """Latents kept per token: exactly (topk), on average (batchtopk), or aimed at (jumprelu)."""
    groups: tuple[float, ...] = (1.0,)
    """Shares of the latents, first to last; with several, each prefix learns to reconstruct alone (matryoshka)."""
    layer_norm: Literal["none", "in", "in_out"] = "none"
    """in: the encoder reads layer-normed x (the paper's run 4); in_out: the decoder's output is also scaled back."""
    window: int = 1
    """Consecutive positions that one code stands for; above 1 a temporal crosscoder, with an encoder and a decoder row
    for each latent and position."""
    predictor: Literal["none", "attention", "past"] = "none"
    """attention: a code predicted from earlier positions' codes besides the novel TopK code (TFA); past: the same
    without a look at the present position."""
    n_heads: int = 4
    """Of the predictor, as the two below."""
    n_layers: int = 1
    bottleneck: int = 1
    """How many times narrower than d_sae queries and keys are."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_sae", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sae.{name}={getattr(self, name)}: must be at least 1.")
        if self.activation not in KINDS:
            raise ConfigError(unknown("sae.activation", self.activation, KINDS))
        if KINDS[self.activation].uses_k and not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"sae.k={self.k}: must lie in 1..sae.d_sae={self.d_sae}. Lower k or raise d_sae.")
        whole = all(share > 0 for share in self.groups) and math.isclose(sum(self.groups), 1.0, abs_tol=1e-6)
        if not whole or any(first == stop for first, stop in self.group_ranges()):
            raise ConfigError(
                f"sae.groups={self.groups}: shares of {self.d_sae} latents, each at least one latent, that sum to 1."
            )

        self._check_predictor()
        if self.window > 1 and self.layer_norm != "none":
            raise ConfigError(
                f"sae.window={self.window} with sae.layer_norm={self.layer_norm!r}: a crosscoder has no layer norm. "
                "Set sae.layer_norm=none."
            )

    def _check_predictor(self) -> None:
        for name in ("n_heads", "n_layers", "bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sae.{name}={getattr(self, name)}: must be at least 1.")
        if self.predictor == "none":
            return
        if self.d_sae % (self.n_heads * self.bottleneck):
            raise ConfigError(
                f"sae.d_sae={self.d_sae} is no multiple of sae.n_heads={self.n_heads} times sae.bottleneck="
                f"{self.bottleneck}. Change one of them."
            )
        plain = {"activation": "topk", "groups": (1.0,), "layer_norm": "none", "window": 1}
        if other := next((name for name, value in plain.items() if getattr(self, name) != value), None):
            raise ConfigError(
                f"sae.predictor={self.predictor!r} with sae.{other}={getattr(self, other)!r}: it is for "
                f"sae.{other}={plain[other]!r} alone."
            )

    @property
    def d_in(self) -> int:
        """Width of what the module reads: the window's activations laid end to end."""
        return self.window * self.d_model

    def group_ranges(self) -> list[tuple[int, int]]:
        """(first, stop) of each group's latents."""
        ends = [round(self.d_sae * share) for share in itertools.accumulate(self.groups)]
        return list(itertools.pairwise([0, *ends]))


class SparseAutoencoder(nn.Module):
    """f = activation((x - b_dec) W_enc + b_enc); x_hat = f W_dec + b_dec.

    W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model] and, where the activation has one,
    threshold [d_sae]; all float32. With a layer norm, x is normed before b_dec is taken away. Of a crosscoder, d_model
    is `config.d_in`: `tcsae.shared.sae.crosscoder` takes sequences to windows and back.
    """

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        # Latent by latent in memory, as gradients of sparse codes arrive; `W_enc` shows it the field's way round.
        self.W_enc_rows = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.threshold: nn.Parameter | None = None
        if self.kind.threshold != "none":
            self.threshold = nn.Parameter(torch.zeros(config.d_sae))

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

    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """(x - b_dec) W_enc + b_enc, after the layer norm if there is one."""
        if self.config.layer_norm != "none":
            x = layer_normed(x)[0]
        return nn.functional.linear(x - self.b_dec, self.W_enc_rows, self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, as a dense tensor."""
        return self.kind.dense(self.pre_activations(x), self.config.k, self.threshold)

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseCode:
        """The code's non-zero entries, the same values as `encode`, of the tokens of all leading axes laid end to end.

        x may be of any float dtype and hold no token; the values are of the weights' dtype.
        """
        x = x.reshape(-1, self.config.d_in).to(self.W_dec.dtype)
        return self.kind.sparse(self.pre_activations(x), self.config.k, self.threshold)

    def decode(
        self, code: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction from a dense code. With layer_norm "in_out" it needs the `x` that was encoded."""
        return self._scaled_back(code @ self.W_dec + self.b_dec, x)

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
        _, mean, deviation = layer_normed(x)
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
