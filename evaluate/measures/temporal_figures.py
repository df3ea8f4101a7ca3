"""Temporal and position measures, each with its null, from the sums of `temporal_sums`."""

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tcsae.evaluate.measures.positions import N_LABELS
from tcsae.evaluate.measures.temporal_sums import N_BINS, N_LAGS, TemporalSums

FAR = 8
"""A lag that is a measure of its own, with an interval."""
MIN_FIRINGS = 50
"""A median is over the latents that fire at least so often."""

PERMUTED, PARTNERS, MEMORYLESS, SILENT, HALVED, COMMONEST = (
    "permuted",
    "partners",
    "memoryless",
    "silent labels",
    "halved",
    "commonest",
)
NULL_DEFINITIONS = {
    PERMUTED: "positions permuted within a document",
    PARTNERS: "pairs with a token of another document",
    MEMORYLESS: "firing without memory, at the same rates",
    SILENT: "labels that say nothing: 0, as the share is bias-corrected",
    HALVED: "the same code halved",
    COMMONEST: "always naming the class that most of the tested tokens have",
}
NULLS = {
    "jaccard_adjacent": PARTNERS,
    "jaccard_corrected": PERMUTED,
    "rho_1": PERMUTED,
    "rho_1_median": PERMUTED,
    "rho_1_within": PERMUTED,
    "rho_1_within_median": PERMUTED,
    f"rho_{FAR}_within": PERMUTED,
    "slowness": PERMUTED,
    "slowness_to_x": PERMUTED,
    "slowness_to_pca": PERMUTED,
    "dwell": MEMORYLESS,
    "dwell_median": PERMUTED,
    "position_share": PERMUTED,
    "token_share": PERMUTED,
    "document_share": SILENT,
    "boundary_auc": PERMUTED,
    "boundary_ratio": PERMUTED,
    "adjacent_difference": HALVED,
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
    "slowness": "sum over latents of E(f_t+1 - f_t)^2 / (2 sum of var(f)): 1 for a code without memory",
    "slowness_to_x": "slowness over that of x itself",
    "slowness_to_pca": "slowness over that of x on as many principal components as the SAE has active latents",
    "dwell": "mean length of a latent's runs of firing, over what firing without memory at the same rates gives",
    "dwell_median": "median over latents of (1 - p) / (1 - q): p firing rate, q the chance to fire again",
    "position_share": "share of the code's variance that lies between absolute positions (at most "
    f"{N_LABELS} bins), pooled over latents; bias-corrected: 1 - (1 - eta^2)(N - 1) / (N - P)",
    "token_share": f"the same between the {N_LABELS} most frequent token ids, over their tokens",
    "document_share": "the same between documents",
    "boundary_auc": "chance that |f - f'|^2 / (|f|^2 + |f'|^2) is larger across a document join (last token, first of "
    "the next document) than between adjacent tokens; null: than between permuted ones",
    "boundary_ratio": "its mean at joins over its mean inside; null: over its mean between permuted tokens",
    "adjacent_difference": "E|f_t+1 - f_t|^2: the paper's loss at w = 2; halving the code quarters it and moves no "
    "other measure",
}


class Measures(NamedTuple):
    """Figures of one code, and what each is compared with."""

    values: dict[str, float]
    nulls: dict[str, float]
    curves: dict[str, list[float]]
    """rho at lag 1, 2, ...: raw or within-document, pooled or median."""


class Pooled(NamedTuple):
    """Per latent, from one row of sums."""

    n: Tensor
    mean: Float64[Tensor, " d_sae"]
    variance: Float64[Tensor, " d_sae"]
    variance_within: Float64[Tensor, " d_sae"]
    covariance: Float64[Tensor, "n_lags d_sae"]
    covariance_within: Float64[Tensor, "n_lags d_sae"]
    permuted: Float64[Tensor, " d_sae"]
    """Expected covariance at lag 1 if positions are permuted."""
    permuted_within: Float64[Tensor, " d_sae"]


def pool(sums: TemporalSums) -> Pooled:
    """Moments per latent from sums with one row (`TemporalSums.without`); NaN at a lag at which there is no pair."""
    n, n_pairs = sums.n[0], pair_counts(sums)[:, None]
    mean = sums.f[0] / n
    around = mean * (2 * sums.f[0] - sums.edges[0].cumsum(0))
    around_m = 2 * sums.between[0] - sums.edges_m[0].cumsum(0)
    covariance = (sums.products[0] - around) / n_pairs + mean.square()
    within = (sums.products[0] - around_m + sums.m_squares[0]) / n_pairs
    permuted = (sums.permuted_products[0] - 2 * mean * sums.permuted_m[0]) / n_pairs[0] + mean.square()
    return Pooled(
        n,
        mean,
        sums.squares[0] / n - mean.square(),
        (sums.squares[0] - sums.between[0]) / n,
        covariance,
        within,
        permuted,
        (sums.permuted_products[0] - sums.m_squares[0, 0]) / n_pairs[0],
    )


def pair_counts(sums: TemporalSums) -> Float64[Tensor, " n_lags"]:
    """Pairs at each lag; NaN for none, as a mean over no pair would come out as a figure that looks like any other."""
    return torch.where(sums.n_pairs[0] > 0, sums.n_pairs[0], torch.nan)


def slowness(sums: TemporalSums, which: Bool[Tensor, " d_sae"]) -> tuple[float, float]:
    """Sum of E(f' - f)^2 over twice the sum of variances, for adjacent tokens and for permuted ones."""
    pooled, n_1 = pool(sums), pair_counts(sums)[0]
    adjacent = 2 * sums.squares[0] - sums.edge_squares[0] - 2 * sums.products[0, 0]
    permuted = 2 * (sums.permuted_squares[0] - sums.permuted_products[0])
    total = 2 * n_1 * pooled.variance[which].sum()
    return float(adjacent[which].sum() / total), float(permuted[which].sum() / total)


def latent_measures(sums: TemporalSums, everything: TemporalSums, which: Bool[Tensor, " d_sae"]) -> Measures:
    """The measures that are made of single latents, for the latents `which`.

    `sums` may leave out a group of documents; `everything` does not: the nulls of the position and token shares are
    not kept by group.
    """
    pooled = pool(sums)
    often = which & (sums.active[0] >= MIN_FIRINGS)
    rates, nulls = _rhos(pooled, which, often)
    values = {name: curve[0] for name, curve in rates.items()} | {f"rho_{FAR}_within": rates["rho_1_within"][FAR - 1]}
    values["slowness"], nulls["slowness"] = slowness(sums, which)
    _dwell(sums, which, often, values, nulls)
    values["position_share"] = _share(sums.by_position, sums.n_by_position, sums.squares, which)
    values["token_share"] = _share(sums.by_token, sums.n_by_token, sums.token_squares, which)
    nulls["position_share"] = _share(
        everything.permuted_by_position[None], everything.n_by_position, everything.squares, which
    )
    nulls["token_share"] = _share(
        everything.permuted_by_token[None], everything.n_by_token, everything.permuted_token_squares, which
    )
    between = (sums.between[0] - sums.f[0].square() / pooled.n)[which].sum()
    total = (sums.squares[0] - sums.f[0].square() / pooled.n)[which].sum()
    values["document_share"] = _corrected(between / total, pooled.n, sums.n_documents[0])
    nulls["document_share"] = 0.0
    return Measures(values, nulls, rates)


def _rhos(pooled: Pooled, which: Tensor, often: Tensor) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Curves over lags by the name of their first value, and that value's null."""
    curves, nulls = {}, {}
    kinds = {
        "rho_1": (pooled.covariance, pooled.permuted, pooled.variance),
        "rho_1_within": (pooled.covariance_within, pooled.permuted_within, pooled.variance_within),
    }
    for name, (covariance, permuted, variance) in kinds.items():
        total = variance[which].sum()
        curves[name] = (covariance[:, which].sum(1) / total).tolist()
        nulls[name] = float(permuted[which].sum() / total)
        if often.any():
            curves[f"{name}_median"] = (covariance / variance)[:, often].median(1).values.tolist()
            nulls[f"{name}_median"] = float((permuted / variance)[often].median())
        else:
            curves[f"{name}_median"], nulls[f"{name}_median"] = [torch.nan] * len(covariance), torch.nan
    nulls[f"rho_{FAR}_within"] = nulls["rho_1_within"]
    return curves, nulls


def _dwell(sums: TemporalSums, which: Tensor, often: Tensor, values: dict[str, float], nulls: dict[str, float]) -> None:
    p, first, both = sums.active[0] / sums.n[0], sums.active_first[0], sums.both[0]
    ending = (first - both)[which].sum()
    values["dwell"] = float((first * (1 - p))[which].sum() / ending) if ending > 0 else torch.nan
    nulls["dwell"] = 1.0
    again, permuted = both / first, sums.permuted_both[0] / sums.permuted_active[0]
    some = often & (again < 1)
    values["dwell_median"] = float(((1 - p) / (1 - again))[some].median()) if some.any() else torch.nan
    nulls["dwell_median"] = float(((1 - p) / (1 - permuted))[some].median()) if some.any() else torch.nan


def _share(by_label: Tensor, n_by_label: Tensor, squares: Tensor, which: Tensor) -> float:
    """Bias-corrected share of variance between labels, pooled over the latents `which`."""
    n_label, cells = n_by_label[0], by_label[0].double()
    n, centre = n_label.sum(), cells.sum(0).square() / n_label.sum()
    between = (1 / n_label.clamp(min=1)) @ cells.square_() - centre
    return _corrected(between[which].sum() / (squares[0] - centre)[which].sum(), n, (n_label > 0).sum())


def _corrected(share: Tensor, n: Tensor, n_labels: Tensor) -> float:
    """NaN with one label, which no variance lies between, or as many as tokens."""
    return float(1 - (1 - share) * (n - 1) / (n - n_labels)) if n > n_labels > 1 else torch.nan


def token_measures(sums: TemporalSums) -> Measures:
    """The measures that compare whole codes: of all latents together."""
    jaccard = sums.jaccard[0, :, 0] / sums.jaccard[0, :, 1]
    adjacent, permuted, partners = jaccard.tolist()
    difference = float(sums.difference[0, 0] / sums.n_pairs[0, 0])
    inside, mixed, joins = sums.distances[0]
    centres = (torch.arange(N_BINS) + 0.5) * (2 / N_BINS)

    def mean(histogram: Tensor) -> Tensor:
        return histogram @ centres.double() / histogram.sum()

    values = {
        "jaccard_adjacent": adjacent,
        "jaccard_corrected": (adjacent - partners) / (1 - partners) if partners < 1 else torch.nan,
        "boundary_auc": _auc(joins, inside),
        "boundary_ratio": float(mean(joins) / mean(inside)),
        "adjacent_difference": difference,
    }
    nulls = {
        "jaccard_adjacent": partners,
        "jaccard_corrected": (permuted - partners) / (1 - partners) if partners < 1 else torch.nan,
        "boundary_auc": _auc(joins, mixed),
        "boundary_ratio": float(mean(joins) / mean(mixed)),
        "adjacent_difference": difference / 4,
    }
    return Measures(values, nulls, {})


def _auc(larger: Tensor, smaller: Tensor) -> float:
    """Chance that a draw from one histogram exceeds one from the other; ties count half."""
    below = smaller.cumsum(0) - smaller / 2
    return float((larger @ below) / (larger.sum() * smaller.sum()))


def scaled(sums: TemporalSums, factor: float) -> TemporalSums:
    """The sums of the code times `factor`: of second order in f, or of first order, or counts."""
    first = "f edges permuted_m by_position by_token permuted_by_position permuted_by_token magnitude"
    second = "squares edge_squares products edges_m m_squares between permuted_squares permuted_products token_squares"
    second += " permuted_token_squares difference energy"
    powers = dict.fromkeys(first.split(), 1) | dict.fromkeys(second.split(), 2)
    return replace(
        sums, **{one.name: getattr(sums, one.name) * factor ** powers.get(one.name, 0) for one in fields(sums)}
    )
