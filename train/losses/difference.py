"""Loss terms of a code. Each returns its value and adds its gradient, with respect to the code, to `grad`.

Tokens lie packed: the segments of a batch end to end, so a pair (i, i + lag) is real unless it leaves its segment,
where its weight is 0. Weights count the windows that hold a pair (tcsae.shared.windows.pair_weights).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import sum_dtype
from tcsae.shared.sae.sparse import ROWS, SparseCode


class Pairs(NamedTuple):
    """The pairs (i, i + lag) of a batch."""

    lag: int
    weights: Float[Tensor, " n"]
    """Share of pair (i, i + lag) in the mean over windows and their pairs: over all lags they sum to 1, or to 0."""


def l1_sparse(code: SparseCode, weight: float, grad: Float[Tensor, " n_entries"], n: int | None = None) -> Tensor:
    """weight * mean over tokens of sum |f| (eq. 4, second term), for non-negative entries; the caller masks zeros.

    `n`: tokens that the mean is over, where the code is of a part of them. That of a dense code is part of its
    backward pass (tcsae.train.dense).
    """
    scale = weight / max(1, code.n_tokens if n is None else n)
    grad.add_(scale)
    return code.values.sum() * scale


def difference_dense(
    activations: Float[Tensor, "n d"], pairs: Sequence[Pairs], grad: Float[Tensor, "n d"], scale: float = 1.0
) -> Tensor:
    """Mean over windows and their pairs of ||f_j - f_i||^2 (eq. 3), without building a window.

    The value is unscaled, the gradient is added `scale` times:

    d/df_i = 2 [ c_{i-lag} (f_i - f_{i-lag}) - c_i (f_{i+lag} - f_i) ], c = the pair weights.
    """
    value = activations.new_zeros((), dtype=sum_dtype(activations.device))
    n = len(activations)
    for lag, weights in pairs:
        for start in range(0, n - lag, ROWS):
            stop = min(start + ROWS, n - lag)
            difference = activations[start + lag : stop + lag] - activations[start:stop]
            weighted = difference * weights[start:stop, None]
            value += torch.dot(difference.flatten(), weighted.flatten())
            grad[start + lag : stop + lag].add_(weighted, alpha=2 * scale)
            grad[start:stop].sub_(weighted, alpha=2 * scale)
    return value


def difference_sparse(
    code: SparseCode, pairs: Sequence[Pairs], grad: Float[Tensor, " n_entries"], zeros: Float[Tensor, "n d_sae"]
) -> Tensor:
    """As `difference_dense`, at a sparse code's entries only: cost of the entries, not of the latents.

    `zeros` is an all-zero buffer of the code's dense shape; it is all zero again on return.
    """
    rows, flat, v = code.rows, zeros.view(-1), code.values
    at = rows * code.d_sae + code.latents
    flat.scatter_(0, at, v)
    wide = sum_dtype(v.device)
    value = v.new_zeros((), dtype=wide)
    for lag, weights in pairs:
        # Neighbours beyond the first and last row are never used: their pair weight is 0.
        previous = flat.index_select(0, (at - lag * code.d_sae).clamp_(min=0))
        following = flat.index_select(0, (at + lag * code.d_sae).clamp_(max=zeros.numel() - 1))
        after = weights.index_select(0, rows)
        before = F.pad(weights, (lag, 0))[: len(weights)].index_select(0, rows)
        ahead = after * (following - v)
        grad.add_(before * (v - previous), alpha=2).sub_(ahead, alpha=2)
        # ||f_{i+lag} - f_i||^2: over entries of i, v^2 - 2 v v', and over entries of i + lag, v'^2.
        value += torch.dot((before * v - after * following - ahead).to(wide), v.to(wide))
    flat.scatter_(0, at, 0.0)
    return value


def energy_share(pairs: Sequence[Pairs]) -> Float[Tensor, " n"]:
    """Weight of each token's ||f_i||^2 in the mean over windows and their pairs of ||f_i||^2 + ||f_j||^2."""
    share = torch.zeros_like(pairs[0].weights)
    for lag, weights in pairs:
        share += weights
        share[lag:] += weights[: len(share) - lag]
    return share
