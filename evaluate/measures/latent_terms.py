"""What a pooled measure is a ratio of, latent by latent: whether all latents have a figure, or few make it.

Pooled over latents a measure is sum `over` / sum `under`, so that a latent weighs by its variance (dwell: by its
firings). On a real dictionary sixteen latents of 4,096 held .62 of the variance and made every such figure; the median
latent and the unweighted mean say what the others do.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tcsae.evaluate.measures.positions import FAR
from tcsae.evaluate.measures.temporal_sums import TemporalSums

MIN_FIRINGS = 50
"""Medians and means over latents are over those that fire at least so often."""
WIDEST = 0.01
"""Share of the latents that a figure is also given without."""
BY_LATENT = (
    "rho_1",
    "rho_1_within",
    f"rho_{FAR}_within",
    "slowness",
    "dwell",
    "position_share",
    "token_share",
    "document_share",
)
MEDIAN, MEAN = "_median", "_mean"


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


class Ratio(NamedTuple):
    """Of each latent, two terms; a share's is corrected for its number of labels."""

    over: Float64[Tensor, " d_sae"]
    under: Float64[Tensor, " d_sae"]
    labels: tuple[Tensor, Tensor] | None = None
    """Tokens and labels that a share of variance is between."""

    def pooled(self, which: Bool[Tensor, " d_sae"]) -> float:
        """Over the latents `which`; NaN where undefined."""
        return float(self._corrected(self.over[which].sum() / self.under[which].sum()))

    def each(self) -> Float64[Tensor, " d_sae"]:
        """Each latent's own; NaN or infinite where undefined."""
        return self._corrected(self.over / self.under)

    def _corrected(self, share: Tensor) -> Tensor:
        """NaN with one label, which no variance lies between, or as many as tokens."""
        if self.labels is None:
            return share
        n, n_labels = self.labels
        return 1 - (1 - share) * (n - 1) / (n - n_labels) if n > n_labels > 1 else share * torch.nan


class Terms(NamedTuple):
    """A measure's terms, and its null's."""

    value: Ratio
    null: Ratio

    def spread(self, live: Bool[Tensor, " d_sae"]) -> Iterator[tuple[str, float, float]]:
        """(ending of the name, value, null) of median and mean over the `live` latents that have a figure."""
        values, nulls = self.value.each(), self.null.each()
        some = live & values.isfinite()
        for ending, middle in ((MEDIAN, torch.median), (MEAN, torch.mean)):
            value, null = (float(middle(one[some])) if some.any() else torch.nan for one in (values, nulls))
            yield ending, value, null


def latent_terms(sums: TemporalSums, everything: TemporalSums) -> dict[str, Terms]:
    """Of each measure of BY_LATENT. `sums` may leave out a group of documents; `everything` does not: the nulls of the
    position and token shares are not kept by group.
    """
    moments, n_1 = pool(sums), pair_counts(sums)[0]
    scale = 2 * n_1 * moments.variance
    adjacent = 2 * sums.squares[0] - sums.edge_squares[0] - 2 * sums.products[0, 0]
    permuted = 2 * (sums.permuted_squares[0] - sums.permuted_products[0])
    near, far = moments.covariance_within[0], moments.covariance_within[FAR - 1]
    permuted_within = Ratio(moments.permuted_within, moments.variance_within)
    centre = sums.f[0].square() / moments.n
    between = Ratio(sums.between[0] - centre, sums.squares[0] - centre, (moments.n, sums.n_documents[0]))
    return {
        "rho_1": Terms(Ratio(moments.covariance[0], moments.variance), Ratio(moments.permuted, moments.variance)),
        "rho_1_within": Terms(Ratio(near, moments.variance_within), permuted_within),
        f"rho_{FAR}_within": Terms(Ratio(far, moments.variance_within), permuted_within),
        "slowness": Terms(Ratio(adjacent, scale), Ratio(permuted, scale)),
        "dwell": _dwell(sums),
        "position_share": Terms(
            _share(sums.by_position, sums.n_by_position, sums.squares),
            _share(everything.permuted_by_position[None], everything.n_by_position, everything.squares),
        ),
        "token_share": Terms(
            _share(sums.by_token, sums.n_by_token, sums.token_squares),
            _share(everything.permuted_by_token[None], everything.n_by_token, everything.permuted_token_squares),
        ),
        "document_share": Terms(between, Ratio(torch.zeros_like(centre), torch.ones_like(centre))),
    }


def _dwell(sums: TemporalSums) -> Terms:
    """Each latent's: (1 - p) / (1 - q), p its firing rate, q the chance to fire again."""
    rest, first = 1 - sums.active[0] / sums.n[0], sums.active_first[0]
    again = sums.permuted_both[0] / sums.permuted_active[0]
    return Terms(Ratio(first * rest, first - sums.both[0]), Ratio(rest, 1 - again))


def _share(by_label: Tensor, n_by_label: Tensor, squares: Tensor) -> Ratio:
    """Of variance between labels."""
    n_label, cells = n_by_label[0], by_label[0].double()
    n, centre = n_label.sum(), cells.sum(0).square() / n_label.sum()
    between = (1 / n_label.clamp(min=1)) @ cells.square_() - centre
    return Ratio(between, squares[0] - centre, (n, (n_label > 0).sum()))


def widest(variance: Float64[Tensor, " d_sae"]) -> Bool[Tensor, " d_sae"]:
    """The latents of largest variance, a share of WIDEST of all, one at least."""
    chosen = torch.zeros(len(variance), dtype=torch.bool)
    chosen[variance.topk(max(1, round(WIDEST * len(variance)))).indices] = True
    return chosen


def pooled_measures(
    terms: Mapping[str, Terms], which: Bool[Tensor, " d_sae"], live: Bool[Tensor, " d_sae"]
) -> tuple[dict[str, float], dict[str, float]]:
    """(values, nulls) of each measure pooled over the latents `which`, with median and mean over those that are
    `live`, too.
    """
    values, nulls = {}, {}
    for name, one in terms.items():
        values[name], nulls[name] = one.value.pooled(which), one.null.pooled(which)
        for ending, value, null in one.spread(which & live):
            values[name + ending], nulls[name + ending] = value, null
    nulls["dwell"] = 1.0
    return values, nulls
