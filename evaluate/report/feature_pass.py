"""One pass over a split for the features of many SAEs: measures, sequences to show, and what fires together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tcsae.evaluate.batches import batches, check_counted, n_sequences
from tcsae.evaluate.measures.core import join_codes
from tcsae.evaluate.measures.latent_figures import LatentFigures, latent_figures
from tcsae.evaluate.measures.positions import Layout
from tcsae.evaluate.measures.temporal_sums import Collector, TemporalSums
from tcsae.evaluate.report.contexts import ContextCollector
from tcsae.evaluate.report.neighbours import FiringSample
from tcsae.evaluate.systems import code_parts
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.reader import Split


class Features(NamedTuple):
    """What a pass found of one SAE's latents."""

    sums: TemporalSums
    """With one row: over all documents."""
    figures: LatentFigures
    contexts: ContextCollector
    firing: FiringSample
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
    skip_first: int
    """First positions of each sequence that are left out."""
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
    check_counted(excerpt.split, excerpt.skip_first, excerpt.n_sequences)
    length, layout = excerpt.split.store.sequence_length, Layout(excerpt.split, excerpt.skip_first)
    makers = [_Maker(sae, layout, length, excerpt.n_tokens) for sae in saes]
    n_tokens = 0
    for batch in batches(excerpt.split, excerpt.hook, excerpt.skip_first, excerpt.max_tokens):
        x, view = batch.x[batch.counted], layout.view(batch)
        n_tokens += len(x)
        for maker in makers if len(x) else ():
            code = join_codes([code for _, code in code_parts(maker.sae, x)])
            maker.sums.add(view, code)
            maker.contexts.add(batch.start, batch.counted, code)
            maker.firing.add(batch.start, batch.counted, code)
        advance(int(batch.lengths.sum()))
    return [maker.features(n_tokens) for maker in makers]


class _Maker:
    """What adds up one SAE's features."""

    def __init__(self, sae: SparseAutoencoder, layout: Layout, length: int, n_tokens: int) -> None:
        self.sae = sae
        self.sums = Collector(sae.config.d_sae, layout)
        self.contexts = ContextCollector(sae.config.d_sae, length)
        self.firing = FiringSample(sae.config.d_sae, n_tokens)

    def features(self, n_tokens: int) -> Features:
        sums = self.sums.sums.without(None)
        return Features(sums, latent_figures(sums), self.contexts, self.firing, n_tokens)
