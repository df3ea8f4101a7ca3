"""Loss terms of a code. Each returns its value and adds its gradient, with respect to the code, to `grad`.

Tokens lie packed: the segments of a batch end to end, so a pair (i, i + 1) is adjacent unless token i ends a segment,
where its pair weight is 0. Weights count the windows that hold a pair (tcsae.shared.windows.pair_weights).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.codes import SparseCode

ROWS = 128
"""Tokens per slice of a dense difference, so that it stays in cache and no second code-sized tensor is made."""


class Pairs(NamedTuple):
    """The adjacent pairs of a batch, as eq. 3 of the paper weighs them."""

    weights: Float[Tensor, " n"]
    """In how many windows the pair (i, i + 1) lies, over the total (window - 1) * n_windows: sums to 1, or to 0."""


def l1_dense(activations: Float[Tensor, "n d_sae"], weight: float, grad: Float[Tensor, "n d_sae"]) -> Float[Tensor, ""]:
    """weight * mean over tokens of sum |f| (eq. 4, second term)."""
    scale = weight / len(activations)
    grad.add_(torch.sign(activations), alpha=scale)
    return activations.abs().sum() * scale


def l1_sparse(code: SparseCode, weight: float, grad: Float[Tensor, " n_entries"]) -> Float[Tensor, ""]:
    """As `l1_dense`, for the non-negative entries of a sparse code; the caller masks entries that are 0."""
    scale = weight / max(1, code.n_tokens)
    grad.add_(scale)
    return code.values.sum() * scale


def temporal_dense(
    activations: Float[Tensor, "n d_sae"], pairs: Pairs, weight: float, grad: Float[Tensor, "n d_sae"]
) -> Float[Tensor, ""]:
    """weight * mean over windows of 1/(w-1) sum ||f_{t+1} - f_t||^2 (eq. 3), without building a window.

    d/df_i = 2 weight [ c_{i-1} (f_i - f_{i-1}) - c_i (f_{i+1} - f_i) ], c = the pair weights.
    """
    value = activations.new_zeros((), dtype=torch.float64)
    for start in range(0, len(activations) - 1, ROWS):
        stop = min(start + ROWS, len(activations) - 1)
        difference = activations[start + 1 : stop + 1] - activations[start:stop]
        weighted = difference * pairs.weights[start:stop, None]
        value += torch.dot(difference.flatten(), weighted.flatten())
        grad[start + 1 : stop + 1].add_(weighted, alpha=2 * weight)
        grad[start:stop].sub_(weighted, alpha=2 * weight)
    return weight * value.to(activations.dtype)


def temporal_sparse(
    code: SparseCode,
    pairs: Pairs,
    weight: float,
    grad: Float[Tensor, " n_entries"],
    zeros: Float[Tensor, "n d_sae"],
) -> Float[Tensor, ""]:
    """As `temporal_dense`, at a sparse code's entries only: cost of the entries, not of the latents.

    `zeros` is an all-zero buffer of the code's dense shape; it is all zero again on return.
    """
    rows, flat = code.rows, zeros.view(-1)
    at = rows * code.d_sae + code.latents
    flat.index_put_((at,), code.values)
    # Neighbours of the first and last row are never used: their pair weight is 0.
    previous = flat[(at - code.d_sae).clamp_(min=0)]
    following = flat[(at + code.d_sae).clamp_(max=zeros.numel() - 1)]
    flat.index_fill_(0, at, 0.0)
    after = pairs.weights[rows]
    before = torch.where(rows > 0, pairs.weights[rows - 1], 0.0)
    ahead, behind = following - code.values, code.values - previous
    grad.add_(before * behind - after * ahead, alpha=2 * weight)
    # ||f_{i+1} - f_i||^2 = sum over entries of i of (v^2 - 2 v v') plus sum over entries of i + 1 of v'^2.
    squares = code.values.double().square()
    value = (after * (squares - 2 * code.values * following)).sum() + (before * squares).sum()
    return weight * value.to(code.values.dtype)
