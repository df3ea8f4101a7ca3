"""Temporal and position measures, each with its null, from the sums of `temporal_sums`."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tcsae.evaluate.measures.latent_terms import (
    BY_LATENT,
    MEAN,
    MEDIAN,
    MIN_FIRINGS,
    Pooled,
    Terms,
    latent_terms,
    pool,
    pooled_measures,
)
from tcsae.evaluate.measures.positions import FAR, N_LABELS
from tcsae.evaluate.measures.temporal_sums import N_BINS, N_LAGS, TemporalSums

PERMUTED, PARTNERS, MEMORYLESS, SILENT, HALVED, COMMONEST, CHANCE = (
    "permuted",
    "partners",
    "memoryless",
    "silent labels",
    "halved",
    "commonest",
    "chance",
)
NULL_DEFINITIONS = {
    PERMUTED: "positions permuted within a document",
    PARTNERS: "pairs with a token of another document",
    MEMORYLESS: "firing without memory, at the same rates",
    SILENT: "labels that say nothing: 0, as the share is bias-corrected",
    HALVED: "the same code halved",
    COMMONEST: "always naming the class that most of the tested tokens have",
    CHANCE: "1/2: a join changes the code no more than the restart of the context does",
}
POOLED = {
    "jaccard_adjacent": PARTNERS,
    "jaccard_corrected": PERMUTED,
    "rho_1": PERMUTED,
    "rho_1_within": PERMUTED,
    f"rho_{FAR}_within": PERMUTED,
    "slowness": PERMUTED,
    "slowness_to_x": PERMUTED,
    "slowness_to_pca": PERMUTED,
    "dwell": MEMORYLESS,
    "position_share": PERMUTED,
    "token_share": PERMUTED,
    "document_share": SILENT,
    "boundary_auc": PERMUTED,
    "restart_auc": PERMUTED,
    "join_auc": CHANCE,
    "boundary_ratio": PERMUTED,
    "adjacent_difference": HALVED,
}
SPREAD = tuple("slowness_to_x" if name == "slowness" else name for name in BY_LATENT)
"""Measures that are pooled over latents, each beside its median and its unweighted mean over them."""
NULLS = {
    name + ending: PERMUTED if ending and name == "dwell" else null
    for name, null in POOLED.items()
    for ending in ("", *((MEDIAN, MEAN) if name in SPREAD else ()))
}
"""What each measure is compared with."""

DEFINITIONS = {
    "jaccard_adjacent": "mean over adjacent tokens t, t + 1 of |A_t and A_t+1| / |A_t or A_t+1|, A the active latents; "
    "partners: tokens at the same counted position of the first sequences of consecutive documents",
    "jaccard_corrected": "(J - J0) / (1 - J0), J0 that of the partners",
    "rho_1": "sum over latents of cov(f_t, f_t+k) / sum of var(f), k = 1, around the mean of the split; curves has "
    f"k = 1..{N_LAGS}, pooled and median over latents with at least {MIN_FIRINGS} firings",
    "rho_1_within": "the same around the document's own mean",
    f"rho_{FAR}_within": f"the same at k = {FAR}; its null is that of k = 1, as permuted positions know no lag",
    "slowness": "sum over latents of E(f_t+1 - f_t)^2 / (2 sum of var(f)): 1 for a code without memory, less where "
    "documents differ, as its null says",
    "slowness_to_x": "relative change: slowness over that of x itself; lower is slower, 1 = as fast as x",
    "slowness_to_pca": "slowness over that of x on as many principal components as the SAE has active latents",
    "dwell": "mean length of a latent's runs of firing, over what firing without memory at the same rates gives",
    "dwell_median": "median over latents of (1 - p) / (1 - q): p firing rate, q the chance to fire again",
    "dwell_mean": "unweighted mean of the same",
    "position_share": "share of the code's variance that lies between absolute positions (at most "
    f"{N_LABELS} bins), pooled over latents; bias-corrected: 1 - (1 - eta^2)(N - 1) / (N - P)",
    "token_share": f"the same between the {N_LABELS} most frequent token ids, over their tokens",
    "document_share": "the same between documents",
    "boundary_auc": "chance that |f - f'|^2 / (|f|^2 + |f'|^2) is larger across a document join (last token, first of "
    "the next document) than between adjacent tokens; null: than between permuted ones. Of x it depends on the "
    "centre: the train mean",
    "restart_auc": "the same across a restart, from the last token of a sequence to the first of the next one of the "
    "same document: there, too, the context begins anew and the position jumps",
    "join_auc": "chance that it is larger across a document join than across a restart inside a document: what is left "
    "of boundary_auc once both ends are of one kind; null: 1/2",
    "boundary_ratio": "its mean at joins over its mean inside; null: over its mean between permuted tokens",
    "adjacent_difference": "E|f_t+1 - f_t|^2: the paper's loss at w = 2; halving the code quarters it and moves no "
    "other measure",
}
DEFINITIONS = {
    f"{name}{ending}": f"{what} over latents with at least {MIN_FIRINGS} firings of each one's {name}"
    for name in SPREAD
    for ending, what in ((MEDIAN, "median"), (MEAN, "unweighted mean"))
} | DEFINITIONS


class Measures(NamedTuple):
    """Figures of one code, and what each is compared with."""

    values: dict[str, float]
    nulls: dict[str, float]
    curves: dict[str, list[float]]
    """rho at lag 1, 2, ...: raw or within-document, pooled or median."""


def slowness(sums: TemporalSums, which: Bool[Tensor, " d_sae"]) -> tuple[float, float]:
    """Sum of E(f' - f)^2 over twice the sum of variances, for adjacent tokens and for permuted ones."""
    terms = latent_terms(sums, sums)["slowness"]
    return terms.value.pooled(which), terms.null.pooled(which)


def latent_measures(
    sums: TemporalSums,
    everything: TemporalSums,
    which: Bool[Tensor, " d_sae"],
    terms: Mapping[str, Terms] | None = None,
) -> Measures:
    """The measures that are made of single latents, for the latents `which`; `terms` are theirs (`latent_terms`), if
    they are known.
    """
    terms = terms or latent_terms(sums, everything)
    live = sums.active[0] >= MIN_FIRINGS
    values, nulls = pooled_measures(terms, which, live)
    curves = _curves(pool(sums), which, which & live)
    values |= {name: curve[0] for name, curve in curves.items()}
    values[f"rho_{FAR}_within"] = curves["rho_1_within"][FAR - 1]
    return Measures(values, nulls, curves)


def _curves(moments: Pooled, which: Tensor, often: Tensor) -> dict[str, list[float]]:
    """Over lags, by the name of their first value."""
    curves = {}
    kinds = {
        "rho_1": (moments.covariance, moments.variance),
        "rho_1_within": (moments.covariance_within, moments.variance_within),
    }
    for name, (covariance, variance) in kinds.items():
        curves[name] = (covariance[:, which].sum(1) / variance[which].sum()).tolist()
        middle = (covariance / variance)[:, often].median(1).values if often.any() else covariance[:, 0] * torch.nan
        curves[name + MEDIAN] = middle.tolist()
    return curves


def token_measures(sums: TemporalSums) -> Measures:
    """The measures that compare whole codes: of all latents together."""
    jaccard = sums.jaccard[0, :, 0] / sums.jaccard[0, :, 1]
    adjacent, permuted, partners = jaccard.tolist()
    difference = float(sums.difference[0, 0] / sums.n_pairs[0, 0])
    inside, mixed, joins, restarts = sums.distances[0]
    centres = (torch.arange(N_BINS) + 0.5) * (2 / N_BINS)

    def mean(histogram: Tensor) -> Tensor:
        return histogram @ centres.double() / histogram.sum()

    values = {
        "jaccard_adjacent": adjacent,
        "jaccard_corrected": (adjacent - partners) / (1 - partners) if partners < 1 else torch.nan,
        "boundary_auc": _auc(joins, inside),
        "restart_auc": _auc(restarts, inside),
        "join_auc": _auc(joins, restarts),
        "boundary_ratio": float(mean(joins) / mean(inside)),
        "adjacent_difference": difference,
    }
    nulls = {
        "jaccard_adjacent": partners,
        "jaccard_corrected": (permuted - partners) / (1 - partners) if partners < 1 else torch.nan,
        "boundary_auc": _auc(joins, mixed),
        "restart_auc": _auc(restarts, mixed),
        "join_auc": 0.5,
        "boundary_ratio": float(mean(joins) / mean(mixed)),
        "adjacent_difference": difference / 4,
    }
    return Measures(values, nulls, {})


def _auc(larger: Tensor, smaller: Tensor) -> float:
    """Chance that a draw from one histogram exceeds one from the other; ties count half."""
    below = smaller.cumsum(0) - smaller / 2
    return float((larger @ below) / (larger.sum() * smaller.sum()))
