"""Temporal measures of what is left of a code once its mean by position is taken out.

In a language model the slowest direction is the position: of a temporal SAE's code a tenth of the variance was
position, and all of its gain at lag 8. Of w, f less its document's mean, the covariance is taken given the position: of
pairs whose first members lie at one position, the mean of the first members is taken out, and that of the second ones.
Jaccard and dwell know only which latents are on, which no mean changes.

Sums by position (`temporal_sums.PositionSums`) are not kept by group of documents: these figures have no interval.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from tcsae.evaluate.measures.latent_terms import Ratio
from tcsae.evaluate.measures.positions import LAGS
from tcsae.evaluate.measures.temporal_sums import PositionSums, TemporalSums

RULE = (
    "once the mean by position is taken out of the code: correlations of f less its document's mean, given the first "
    "token's position; the others of f less its mean at the position; no interval"
)


def figures(positions: PositionSums, sums: TemporalSums) -> dict[str, float]:
    """Measures pooled over latents; `sums` are of all groups of documents added up, with an axis of one."""
    n, n_pairs = positions.n.sum(), sums.n_pairs[0]
    within = sums.squares[0] - sums.between[0] - _square(positions.w, positions.n)
    ratios = {}
    for i, lag in enumerate(LAGS):
        first, second = positions.pairs[i].double()
        shared = (first * second / positions.n_pairs[i].clamp(min=1)[:, None]).sum(0)
        around = 2 * sums.between[0] - sums.edges_m[0, :lag].sum(0)
        products = sums.products[0, lag - 1] - around + sums.m_squares[0, lag - 1] - shared
        ratios[f"rho_{lag}_within"] = Ratio(products / n_pairs[lag - 1], within / n)
    by_position = sums.by_position[0].double()
    variance = sums.squares[0] - _square(by_position, positions.n)
    first, second = positions.pairs[0].double()
    moved = 2 * sums.squares[0] - sums.edge_squares[0] - 2 * sums.products[0, 0]
    moved = moved - _square(second - first, positions.n_pairs[0])
    ratios["slowness"] = Ratio(moved / n_pairs[0], 2 * variance / n)
    mean = by_position / positions.n.clamp(min=1)[:, None]
    of_documents = by_position - positions.w.double()  # m, summed over the tokens at each position
    between = sums.between[0] - 2 * (mean * of_documents).sum(0) + (mean * (positions.overlap @ mean)).sum(0)
    ratios["document_share"] = Ratio(between, variance, (n, sums.n_documents[0]))
    every = torch.ones(len(variance), dtype=torch.bool)
    return {name: ratio.pooled(every) for name, ratio in ratios.items()}


def _square(total: Tensor, n: Tensor) -> Float64[Tensor, " d_sae"]:
    """Sum over positions of total^2 / n."""
    return (1 / n.clamp(min=1)) @ total.double().square()
