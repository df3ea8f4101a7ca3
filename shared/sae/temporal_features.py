"""Temporal feature analysis (TFA; Lubana et al. 2025, arXiv:2511.01836), on whole sequences.

Attention over the codes of earlier positions makes a dense *predicted* code of each token; a TopK code of what it
leaves is the *novel* code. Both are decoded by one dictionary D = W_dec, whose transpose encodes. With r = x - b_dec
and lam = 1 / (4 d_model), for each attention layer in turn:

    z = relu(lam r D^T),  c = z one position later,  a = relu(attention(queries z, keys and values c))
    P = a D,  g = <P, r> / (||P|| + 1e-6)^2,  predicted += g a,  r -= g P

and novel = TopK(relu(lam r D^T)), x_hat = (novel + predicted) D + b_dec. Not a forecast: the queries and g read x_t
itself (`predictor="attention"`, the published form). With `predictor="past"` the queries are those of the position
before and g is 1, so that the predicted code is a function of the past alone.

Weights: those of SAELens 6's `temporal` architecture by name and shape; tests/test_temporal_features.py holds its
inference against a restatement of that module.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from tcsae.shared.base.device import to_device
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.activations import Encoded, encoded
from tcsae.shared.sae.layout import SaeConfig, SaeMetadata
from tcsae.shared.sae.ops import decode_code
from tcsae.shared.sae.sparse import SparseCode, select_topk
from tcsae.shared.sae.whole_sequences import SequenceAutoencoder

SMALL = 1e-6


class CodeAttention(nn.Module):
    """Causal attention whose keys and values are codes of earlier positions; rows drawn at fixed norms."""

    def __init__(self, d_sae: int, n_heads: int, bottleneck: int) -> None:
        super().__init__()
        self.n_heads, self.width = n_heads, d_sae // bottleneck
        self.k_ctx = nn.Linear(d_sae, self.width)
        self.q_target = nn.Linear(d_sae, self.width)
        self.v_ctx = nn.Linear(d_sae, d_sae)
        self.c_proj = nn.Linear(d_sae, d_sae)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Rows of random direction: norm 1/sqrt(head width), 1/sqrt(d_sae) for the projection; biases small uniform."""
        d_sae = self.v_ctx.out_features
        sizes = {self.k_ctx: self.width // self.n_heads, self.q_target: self.width // self.n_heads}
        sizes |= {self.v_ctx: d_sae // self.n_heads, self.c_proj: d_sae}
        for linear, size in sizes.items():
            bound = 1 / math.sqrt(linear.in_features)
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.weight.mul_(1 / math.sqrt(size) / (SMALL + linear.weight.norm(dim=1, keepdim=True)))
            linear.bias.uniform_(-bound, bound, generator=generator)

    def forward(
        self, context: Float[Tensor, "batch position d_sae"], target: Float[Tensor, "batch position d_sae"]
    ) -> Float[Tensor, "batch position d_sae"]:
        """Position t reads the context up to t, which holds the codes up to t - 1."""
        batch, length, d_sae = context.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, length, self.n_heads, x.shape[-1] // self.n_heads).transpose(1, 2)  # also of none

        k, q, v = heads(self.k_ctx(context)), heads(self.q_target(target)), heads(self.v_ctx(context))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, d_sae))


class TemporalFeatureAutoencoder(SequenceAutoencoder):
    """Its `encode`, too, takes whole sequences [batch, position, d_model]."""

    def __init__(self, config: SaeConfig, input_scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.config, self.metadata = config, SaeMetadata()
        self.input_scale = input_scale  # attention's biases leave no way to fold it in
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_model))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        self.threshold = None
        layers = [CodeAttention(config.d_sae, config.n_heads, config.bottleneck) for _ in range(config.n_layers)]
        self.attn_layers = nn.ModuleList(layers)

    @property
    def lam(self) -> float:
        return 1 / (4 * self.config.d_model)

    @property
    def W_enc_rows(self) -> Float[Tensor, "d_sae d_model"]:  # type: ignore[override]
        """Tied to the decoder."""
        return self.lam * self.W_dec

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:  # type: ignore[override]
        """There is none."""
        return self.W_dec.new_zeros(self.config.d_sae)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Initial weights as published: a normal dictionary."""
        self.W_dec.normal_(generator=generator)
        for layer in self.attn_layers:
            assert isinstance(layer, CodeAttention)
            layer.draw(generator)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # there is no encoder to turn around

    def predicted(
        self, r: Float[Tensor, "batch position d_model"]
    ) -> tuple[Float[Tensor, "batch position d_sae"], Float[Tensor, "batch position d_model"]]:
        """(predicted code, what it leaves of r = scaled x - b_dec)."""
        total = r.new_zeros(*r.shape[:2], self.config.d_sae)
        for layer in self.attn_layers:
            z = F.relu(r @ self.W_enc)
            context = F.pad(z[:, :-1], (0, 0, 1, 0))
            past_only = self.config.predictor == "past"
            code = F.relu(layer(context, context if past_only else z))
            P = code @ self.W_dec
            if not past_only:
                share = (P * r).sum(-1, keepdim=True) / (P.norm(dim=-1, keepdim=True) + SMALL).square()
                code, P = code * share, P * share
            total, r = total + code, r - P
        return total, r

    def pre_activations(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_sae"]:
        """Of the novel code."""
        return self.predicted(x * self.input_scale - self.b_dec)[1] @ self.W_enc

    def encode(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_sae"]:
        """The novel code, as a dense tensor."""
        return self.kind.dense(self.pre_activations(x), self.config.k, None)

    def encode_sparse(self, x: Float[Tensor, "batch position d_model"]) -> SparseCode:
        """The novel code's entries, of all positions laid end to end."""
        return self.kind.sparse(self.pre_activations(x.to(self.W_dec.dtype)).flatten(0, 1), self.config.k, None)

    def forward(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        """The reconstruction from both codes."""
        predicted, left = self.predicted(x * self.input_scale - self.b_dec)
        novel = self.kind.dense(left @ self.W_enc, self.config.k, None)
        return ((novel + predicted) @ self.W_dec + self.b_dec) / self.input_scale

    def _scaled_back(self, x_hat: Tensor, _x: Tensor | None) -> Tensor:
        return x_hat / self.input_scale

    def fold_scale(self, scale: float) -> None:
        self.input_scale *= scale

    def codes(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[SparseCode, Float[Tensor, "n d_sae"]]:
        """(novel, predicted) codes of sequences laid end to end, with gradients."""
        shape, at = _padded(lengths, x.device)
        r = x * self.input_scale - self.b_dec
        padded = r.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, at, r)
        predicted, left = self.predicted(padded.view(*shape, x.shape[1]))
        pre = left.flatten(0, 1)[at] @ self.W_enc
        with torch.no_grad():
            latents = select_topk(pre, self.config.k)[1]
        offsets = torch.arange(0, latents.numel() + 1, self.config.k, device=x.device)
        values = pre.gather(1, latents).relu().flatten()
        return SparseCode(values, latents.flatten(), offsets, self.config.d_sae), predicted.flatten(0, 1)[at]

    def train_pass(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[Encoded, Float[Tensor, "n d_model"]]:
        """Novel code and reconstruction, with gradients."""
        novel, predicted = self.codes(x, lengths)
        x_hat = decode_code(novel, self.W_dec, self.b_dec) + predicted @ self.W_dec
        return encoded(novel), x_hat / self.input_scale


def _padded(lengths: Int[ndarray, " n_sequences"], device: torch.device) -> tuple[tuple[int, int], Int[Tensor, " n"]]:
    """(sequences, positions) of the padded form of sequences laid end to end, and where each token stands in it."""
    longest = max(int(lengths.max(initial=0)), 1)
    first = longest * np.repeat(np.arange(len(lengths)), lengths)
    return (len(lengths), longest), to_device(first + positions(lengths), device)
