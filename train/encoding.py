"""The forward pass of a step up to the code, a function an activation; a new kind of SAE is one more of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.sae.module import SparseAutoencoder, layer_normed
from tcsae.shared.sae.ops import (
    Activity,
    Code,
    Dense,
    above_threshold,
    activate,
    activity,
    attach_dense,
    attach_entries,
    through_threshold,
)
from tcsae.shared.sae.sparse import positive_code, threshold_code, topk_code
from tcsae.train.batch import Batch

SPARSE_DENSITY = 0.10
"""Below this share of active latents a relu code takes the sparse path (break-even measured at 0.14)."""


class Encoded(NamedTuple):
    """A batch, or this process's part of it, as a code."""

    inputs: Float[Tensor, "n d_model"]
    """What the encoder reads, before b_dec is taken away; no gradient."""
    code: Code
    """What is decoded."""
    tap: Code
    """The same values, for losses of the code (see `attach_dense`)."""
    size: Float[Tensor, ""]
    """sum |f|"""
    activity: Activity
    n_active: Float[Tensor, ""] | None = None
    """Active entries with a gradient to a jumprelu's thresholds."""
    scaling: tuple[Tensor, Tensor] | None = None
    """([n, 1], [n, 1]): what the decoder's output is multiplied by, and what is added to it (layer_norm in_out)."""


def encode(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], batch: Batch, bandwidth: float) -> Encoded:
    """The code of x, with a gradient to the encoder, both biases and, for a jumprelu, the thresholds."""
    inputs, scaling = x, None
    with torch.no_grad():
        if sae.config.layer_norm != "none":
            inputs, mean, spread = layer_normed(x)
            scaling = (spread, mean) if sae.config.layer_norm == "in_out" else None
        centred = inputs - sae.b_dec
    encoded = ENCODERS[sae.config.activation](sae, centred, batch, bandwidth)
    return encoded._replace(inputs=inputs, scaling=scaling)


def _topk(sae: SparseAutoencoder, centred: Float[Tensor, "n d_model"], _batch: Batch, _bandwidth: float) -> Encoded:
    code = attach_entries(topk_code(_pre(sae, centred), sae.config.k), centred, sae)
    code = code.with_values(code.values.relu())  # what is no longer positive has no gradient
    return Encoded(centred, code, code, code.values.sum(), activity(code))


def _batchtopk(sae: SparseAutoencoder, centred: Float[Tensor, "n d_model"], batch: Batch, _bandwidth: float) -> Encoded:
    selected = batch.group.batchtopk(_pre(sae, centred), sae.config.k, batch.n_whole)
    code = attach_entries(selected, centred, sae)
    return Encoded(centred, code, code, code.values.sum(), activity(code))


def _jumprelu(sae: SparseAutoencoder, centred: Float[Tensor, "n d_model"], _batch: Batch, bandwidth: float) -> Encoded:
    near = attach_entries(threshold_code(_pre(sae, centred), sae.threshold.detach(), bandwidth / 2), centred, sae)
    threshold = sae.threshold.index_select(0, near.latents)
    code = near.with_values(through_threshold(near.values, threshold, bandwidth))
    n_active = above_threshold(near.values, threshold, bandwidth).sum()
    return Encoded(centred, code, code, code.values.sum(), activity(code), n_active)


def _dense(sae: SparseAutoencoder, centred: Float[Tensor, "n d_model"], _batch: Batch, _bandwidth: float) -> Encoded:
    kind: Dense = "gelu" if sae.config.activation == "gelu" else "relu"
    with torch.no_grad():
        pre = centred @ sae.W_enc_rows.T
        dense = torch.empty_like(pre) if kind == "gelu" else pre
        active, total = activate(kind, pre, sae.b_enc, dense)
    # On a GPU the count would have to be waited for, and a matrix is fast.
    if kind == "relu" and pre.device.type == "cpu" and active.n_active < SPARSE_DENSITY * pre.numel():
        code = attach_entries(positive_code(dense), centred, sae)
        return Encoded(centred, code, code, code.values.sum(), active)
    matrix, tap, size = attach_dense(kind, dense, pre, total, centred, sae)
    return Encoded(centred, matrix, tap, size, active)


@torch.no_grad()
def _pre(sae: SparseAutoencoder, centred: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_sae"]:
    return torch.addmm(sae.b_enc, centred, sae.W_enc_rows.T)


ENCODERS: dict[str, Callable[[SparseAutoencoder, Tensor, Batch, float], Encoded]] = {
    "topk": _topk,
    "batchtopk": _batchtopk,
    "jumprelu": _jumprelu,
    "relu": _dense,
    "gelu": _dense,
}
