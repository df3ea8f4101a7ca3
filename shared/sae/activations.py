"""Kinds of SAE: how pre-activations become a code, in inference and in training.

A new one is a `Kind` in a module of its own and a line in `KINDS`; settings, training, evaluation and the folder on
disk take it from there.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import matmuls, static_shapes
from tcsae.shared.sae.ops import (
    Activity,
    Code,
    Dense,
    EncoderWeights,
    above_threshold,
    activate,
    activity,
    attach_dense,
    attach_entries,
    through_threshold,
)
from tcsae.shared.sae.sparse import (
    ROWS,
    SparseCode,
    batchtopk_code,
    join_codes,
    positive_code,
    threshold_code,
    topk_code,
)

BLOCK_ENTRIES = 1 << 21
"""Pre-activations at a time, where few of them are taken: 8 MB."""
SPARSE_DENSITY = 0.10
"""Below this share of active latents a relu code takes the sparse path (break-even measured at 0.14)."""


class Encoder(NamedTuple):
    """A batch before its code is selected: the encoder's input less b_dec, without a gradient, and its weights."""

    centred: Float[Tensor, "n d_model"]
    weights: EncoderWeights
    k: int
    threshold: Float[Tensor, " d_sae"] | None = None
    bandwidth: float = 0.0
    """Width of the kernel through which thresholds learn."""
    batchtopk: Callable[[Float[Tensor, "n d_sae"], int], SparseCode] = batchtopk_code
    """The n * k largest positive entries of the whole batch, of which this process may have a part."""

    def pre(self) -> Float[Tensor, "n d_sae"]:
        """Pre-activations, without a gradient: `attach` gives one to the entries that are selected."""
        with torch.no_grad(), matmuls(self.centred.device):
            pre = torch.addmm(self.weights.b_enc, self.centred, self.weights.W_enc_rows.T)
        return pre.to(self.centred.dtype)

    def topk(self) -> SparseCode:
        """`topk_code` of the pre-activations, without a gradient; on a CPU by blocks of rows that stay in cache."""
        if static_shapes(self.centred):
            return topk_code(self.pre(), self.k)
        blocks = self.centred.split(max(ROWS, BLOCK_ENTRIES // len(self.weights.b_enc)))
        return join_codes([topk_code(self._replace(centred=rows).pre(), self.k) for rows in blocks])

    def attach(self, code: SparseCode) -> SparseCode:
        """A selection of pre-activations with a gradient to the encoder and both biases."""
        return attach_entries(code, self.centred, self.weights)


class Encoded(NamedTuple):
    """The code of a batch, with a gradient."""

    code: Code
    """What is decoded."""
    tap: Code
    """The same values, for losses of the code (see `attach_dense`)."""
    size: Float[Tensor, ""]
    """sum |f|"""
    activity: Activity
    n_active: Float[Tensor, ""] | None = None
    """Active entries with a gradient to learned thresholds."""


def encoded(code: SparseCode, n_active: Float[Tensor, ""] | None = None) -> Encoded:
    """Of a sparse code without negative entries."""
    return Encoded(code, code, code.values.sum(), activity(code), n_active)


class Kind(NamedTuple):
    """One kind of SAE. `pre` are pre-activations [..., d_sae], `threshold` is [d_sae] or None."""

    dense: Callable[[Tensor, int, Tensor | None], Tensor]
    """(pre, k, threshold) -> the code as a tensor of the same shape."""
    sparse: Callable[[Tensor, int, Tensor | None], SparseCode]
    """(pre [n, d_sae], k, threshold) -> the same code's entries."""
    train: Callable[[Encoder], Encoded]
    saelens: str
    """The architecture that cfg.json names; SAELens refuses one that it does not have, by this name."""
    uses_k: bool = False
    threshold: Literal["none", "learned", "calibrated"] = "none"
    """calibrated: set at the end of training, to the L0 of k."""
    mostly_zero: bool = True
    """Whether dead latents and entries mean anything."""


def _topk_dense(pre: Tensor, k: int, _threshold: Tensor | None) -> Tensor:
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def _topk_train(encoder: Encoder) -> Encoded:
    code = encoder.attach(encoder.topk())
    return encoded(code.with_values(code.values.relu()))  # what is no longer positive has no gradient


def _batchtopk_train(encoder: Encoder) -> Encoded:
    code = encoder.attach(encoder.batchtopk(encoder.pre(), encoder.k))
    # Static shapes have entries that are not positive: they keep no gradient.
    return encoded(code.with_values(code.values.relu()) if static_shapes(code.values) else code)


def _above(pre: Tensor, _k: int, threshold: Tensor | None) -> Tensor:
    assert threshold is not None
    return torch.where(pre > threshold, pre, 0.0)


def _above_sparse(pre: Tensor, _k: int, threshold: Tensor | None) -> SparseCode:
    assert threshold is not None
    return threshold_code(pre, threshold)


def _jumprelu_train(encoder: Encoder) -> Encoded:
    assert encoder.threshold is not None
    if static_shapes(encoder.centred):
        return _jumprelu_matrix(encoder, encoder.threshold)
    near = encoder.attach(threshold_code(encoder.pre(), encoder.threshold.detach(), encoder.bandwidth / 2))
    threshold = encoder.threshold.index_select(0, near.latents)
    code = near.with_values(through_threshold(near.values, threshold, encoder.bandwidth))
    return encoded(code, above_threshold(near.values, threshold, encoder.bandwidth).sum())


def _jumprelu_matrix(encoder: Encoder, threshold: Tensor) -> Encoded:
    """As a dense code: entries above a threshold would have to be counted."""
    W, b_enc, b_dec = encoder.weights
    # Nothing but b_dec's gradient, a matrix product less than through the input.
    shift = W @ (b_dec.detach() - b_dec)
    with matmuls(W.device):
        pre = F.linear(encoder.centred, W, b_enc + shift)
    pre = pre.to(encoder.centred.dtype)
    limit = threshold.expand_as(pre)
    code = through_threshold(pre, limit, encoder.bandwidth)
    active = code.detach() > 0
    n_active = above_threshold(pre, limit, encoder.bandwidth).sum()
    return Encoded(code, code, code.sum(), Activity(active.any(0), active.sum()), n_active)


def _gelu_entries(pre: Tensor, _k: int, _threshold: Tensor | None) -> SparseCode:
    dense = F.gelu(pre)
    latents = torch.arange(pre.shape[1], device=pre.device).repeat(len(dense))
    offsets = torch.arange(0, dense.numel() + 1, pre.shape[1], device=pre.device)
    return SparseCode(dense.flatten(), latents, offsets, pre.shape[1])


def _train_dense(kind: Dense) -> Callable[[Encoder], Encoded]:
    def train(encoder: Encoder) -> Encoded:
        with torch.no_grad():
            with matmuls(encoder.centred.device):
                pre = encoder.centred @ encoder.weights.W_enc_rows.T
            pre = pre.to(encoder.centred.dtype)
            dense = torch.empty_like(pre) if kind == "gelu" else pre
            active, total = activate(kind, pre, encoder.weights.b_enc, dense)
        # On a GPU the count would have to be waited for, and a matrix is fast.
        if kind == "relu" and not static_shapes(pre) and active.n_active < SPARSE_DENSITY * pre.numel():
            code = encoder.attach(positive_code(dense))
            return Encoded(code, code, code.values.sum(), active)
        matrix, tap, size = attach_dense(kind, dense, pre, total, encoder.centred, encoder.weights)
        return Encoded(matrix, tap, size, active)

    return train


KINDS: dict[str, Kind] = {
    "gelu": Kind(lambda pre, *_: F.gelu(pre), _gelu_entries, _train_dense("gelu"), "gelu", mostly_zero=False),
    "relu": Kind(
        lambda pre, *_: pre.relu(), lambda pre, *_: positive_code(pre.relu()), _train_dense("relu"), "standard"
    ),
    "topk": Kind(_topk_dense, lambda pre, k, _: topk_code(pre, k), _topk_train, "topk", uses_k=True),
    # Infers as a jumprelu, with the threshold that gives k entries a token.
    "batchtopk": Kind(_above, _above_sparse, _batchtopk_train, "jumprelu", uses_k=True, threshold="calibrated"),
    "jumprelu": Kind(_above, _above_sparse, _jumprelu_train, "jumprelu", uses_k=True, threshold="learned"),
}
