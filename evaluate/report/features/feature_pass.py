"""One pass over a split for the features of many SAEs: measures, sequences to show, and what fires together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from tcsae.evaluate.batches import batches, check_counted, n_sequences
from tcsae.evaluate.measures.latent_terms import pair_counts, pool
from tcsae.evaluate.measures.positions import FAR, Layout
from tcsae.evaluate.measures.temporal_sums import Collector, TemporalSums
from tcsae.evaluate.report.features.activation_histogram import ActivationHistogram
from tcsae.evaluate.report.features.contexts import ContextCollector
from tcsae.evaluate.report.features.likeness import FiringSample
from tcsae.evaluate.systems import sae_code
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split

# What single latents do over time: the measures of `temporal_figures`, latent by latent instead of pooled.

MEASURES = {
    "density": "share of the counted tokens at which the latent is active (f > 0)",
    "dwell": "mean length of its runs of firing, over what firing without memory at the same rate gives",
    "rho_1": "autocorrelation at lag 1, around the mean of the split",
    "rho_1_within": "autocorrelation at lag 1, around each document's own mean",
    f"rho_{FAR}_within": f"the same at lag {FAR}",
    "slowness": "E(f_t+1 - f_t)^2 / (2 var f): 1 without memory, 0 for what never changes",
    "position_share": "share of its variance between absolute positions; bias-corrected, 0 for labels that say nothing",
    "document_share": "the same between documents",
    "token_share": "the same between the 128 most frequent token ids, over their tokens",
}
"""What each measure of a latent is. NaN where a latent never fires, or not often enough to tell."""


class LatentFigures(NamedTuple):
    """Per latent."""

    measures: dict[str, Float64[Tensor, " d_sae"]]
    """In the order of MEASURES."""
    rho: Float64[Tensor, "n_lags d_sae"]
    """Autocorrelation within documents at lag 1, 2, ..."""
    rho_null: Float64[Tensor, " d_sae"]
    """What is expected at lag 1 if positions are permuted within each document."""


def latent_figures(sums: TemporalSums) -> LatentFigures:
    """The measures of each latent, from sums with one row (`TemporalSums.without(None)`)."""
    pooled, p = pool(sums), sums.active[0] / sums.n[0]
    alive = torch.where(sums.active[0] > 0, 1.0, torch.nan)
    first, both, n_1 = sums.active_first[0], sums.both[0], pair_counts(sums)[0]
    moved = 2 * sums.squares[0] - sums.edge_squares[0] - 2 * sums.products[0, 0]
    rho = alive * pooled.covariance_within / pooled.variance_within
    between = sums.between[0] - sums.f[0].square() / pooled.n
    measures = {
        "density": p,
        # A run ends where an active token has a next one that is not.
        "dwell": first * (1 - p) / (first - both),
        "rho_1": pooled.covariance[0] / pooled.variance,
        "rho_1_within": rho[0],
        f"rho_{FAR}_within": rho[FAR - 1],
        "slowness": moved / (2 * n_1 * pooled.variance),
        "position_share": _shares(sums.by_position, sums.n_by_position, sums.squares),
        "document_share": _corrected(between / (pooled.n * pooled.variance), pooled.n, sums.n_documents[0]),
        "token_share": _shares(sums.by_token, sums.n_by_token, sums.token_squares),
    }
    measures = {name: values if name == "density" else alive * values for name, values in measures.items()}
    return LatentFigures(measures, rho, alive * pooled.permuted_within / pooled.variance_within)


def _shares(by_label: Tensor, n_by_label: Tensor, squares: Tensor) -> Float64[Tensor, " d_sae"]:
    n_label, cells = n_by_label[0], by_label[0].double()
    n, centre = n_label.sum(), cells.sum(0).square() / n_label.sum()
    between = (1 / n_label.clamp(min=1)) @ cells.square() - centre
    return _corrected(between / (squares[0] - centre), n, (n_label > 0).sum())


def _corrected(share: Tensor, n: Tensor, n_labels: Tensor) -> Tensor:
    return 1 - (1 - share) * (n - 1) / (n - n_labels) if n > n_labels > 1 else torch.full_like(share, torch.nan)


class Features(NamedTuple):
    """What a pass found of one SAE's latents."""

    sums: TemporalSums
    """With one row: over all documents."""
    figures: LatentFigures
    contexts: ContextCollector
    firing: FiringSample
    histogram: ActivationHistogram
    n_tokens: int
    """Counted positions that were looked at."""

    @property
    def alive(self) -> Bool[Tensor, " d_sae"]:
        """Latents that fire somewhere."""
        return self.contexts.n_active > 0


class Excerpt(NamedTuple):
    """The positions of a split that features are computed on."""

    split: Split
    hook: str
    rules: CountingRules
    """Which positions are counted."""
    max_tokens: int | None = None
    """About how many tokens; None: all of the split."""

    @property
    def n_sequences(self) -> int:
        return n_sequences(self.split, self.max_tokens)

    @property
    def n_tokens(self) -> int:
        """Valid ones, the first positions included."""
        return int(self.split.lengths[: self.n_sequences].sum())

    @property
    def tokens(self) -> Int[np.ndarray, "n_sequences length"]:
        return self.split.tokens[: self.n_sequences]


@torch.inference_mode()
def collect_features(
    excerpt: Excerpt, saes: Sequence[SparseAutoencoder], advance: Callable[[int], None]
) -> list[Features]:
    """Run every SAE over the excerpt, each batch read once; memory depends on latents and sequence length alone.

    Raises StoreError if no position of it is counted.
    """
    check_counted(excerpt.split, excerpt.rules, excerpt.n_sequences)
    length, layout = excerpt.split.store.sequence_length, Layout(excerpt.split, excerpt.rules)
    makers = [_Maker(sae, layout, length, excerpt.n_tokens) for sae in saes]
    n_tokens = 0
    for batch in batches(excerpt.split, excerpt.hook, excerpt.rules, excerpt.max_tokens):
        x, view = batch.x[batch.counted], layout.view(batch)
        n_tokens += len(x)
        for maker in makers if len(x) else ():
            code = sae_code(maker.sae, x, view.sequence)
            maker.sums.add(view, code)
            maker.contexts.add(batch.start, batch.counted, code)
            maker.firing.add(batch.start, batch.counted, code)
            maker.histogram.add(code)
        advance(int(batch.lengths.sum()))
    return [maker.features(n_tokens) for maker in makers]


class _Maker:
    """What adds up one SAE's features."""

    def __init__(self, sae: SparseAutoencoder, layout: Layout, length: int, n_tokens: int) -> None:
        self.sae = sae
        self.sums = Collector(sae.config.d_sae, layout)
        self.contexts = ContextCollector(sae.config.d_sae, length)
        self.firing = FiringSample(sae.config.d_sae, n_tokens)
        self.histogram = ActivationHistogram(sae.config.d_sae)

    def features(self, n_tokens: int) -> Features:
        sums = self.sums.sums.without(None)
        return Features(sums, latent_figures(sums), self.contexts, self.firing, self.histogram, n_tokens)
