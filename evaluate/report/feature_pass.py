"""One pass over a split for the features of many SAEs: measures, sequences to show, and what fires together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from tcsae.evaluate.batches import batches, check_counted, n_sequences
from tcsae.evaluate.measures.core import Code
from tcsae.evaluate.measures.positions import Layout
from tcsae.evaluate.measures.temporal_figures import FAR, pair_counts, pool
from tcsae.evaluate.measures.temporal_sums import Collector, TemporalSums
from tcsae.evaluate.report.contexts import ContextCollector
from tcsae.evaluate.systems import sae_code
from tcsae.shared.base.errors import NoTailError
from tcsae.shared.lm.tail import Tail, TailError
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, positive_code
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split, Store

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


# Which latents are alike: by the direction that they write, and by when they fire.

N_NEAREST = 6
DECODER_BLOCK = 512
"""Latents compared with all others at a time: 8 MB at 4096 latents."""
SAMPLE_TOKENS = 65_536
"""Tokens that firing together is counted on, at most: whole sequences, evenly spaced."""
SAMPLE_PAIRS = 1 << 28
"""Pairs of latents firing at one token, over the whole sample, at most: bounds the time for dense codes."""
PAIR_BLOCK = 1 << 20


class Nearest(NamedTuple):
    """For each latent the most alike others, best first; likeness 0 where there are fewer."""

    latents: Int[Tensor, "d_sae n"]
    likeness: Float[Tensor, "d_sae n"]


def nearest_by_decoder(W_dec: Float[Tensor, "d_sae d_model"], alive: Bool[Tensor, " d_sae"]) -> Nearest:
    """By the cosine of decoder rows, among the latents that are alive."""
    unit = functional.normalize(W_dec.detach(), dim=1)
    return _nearest(len(unit), alive, lambda first, stop: unit[first:stop] @ unit.T)


class FiringSample:
    """Which latents fire at the tokens of a sample of sequences."""

    def __init__(self, d_sae: int, n_tokens: int) -> None:
        self.d_sae = d_sae
        self.every = -(-n_tokens // SAMPLE_TOKENS)
        """One sequence in so many is looked at."""
        self.n_tokens = self._pairs = 0
        self._latents: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, start: int, counted: Bool[Tensor, "batch length"], code: Code) -> None:
        """The code of a batch's counted positions; `start` is the number of its first sequence."""
        sparse = code if isinstance(code, SparseCode) else positive_code(code)
        chosen = ((start + counted.nonzero()[:, 0]) % self.every) == 0
        on = (sparse.values > 0) & chosen[sparse.rows]
        counts = torch.bincount(sparse.rows[on], minlength=sparse.n_tokens)[chosen]
        if self._pairs + int(counts.square().sum()) > SAMPLE_PAIRS:
            return
        self._pairs += int(counts.square().sum())
        self.n_tokens += len(counts)
        self._latents.append(sparse.latents[on].int())
        self._counts.append(counts.int())

    def nearest(self, alive: Bool[Tensor, " d_sae"]) -> Nearest:
        """By firing at the same tokens: those at which both fire, over those at which either does."""
        if not self._latents:
            return _nearest(self.d_sae, alive, lambda first, stop: torch.zeros(stop - first, self.d_sae))
        latents, counts = torch.cat(self._latents).long(), torch.cat(self._counts).long()
        offsets = counts.cumsum(0) - counts
        token = torch.repeat_interleave(torch.arange(len(counts)), counts)
        by_latent, order = latents.sort()
        firings = torch.bincount(latents, minlength=self.d_sae).float()

        def likeness(first: int, stop: int) -> Tensor:
            both = torch.zeros(stop - first, self.d_sae)
            low, high = torch.searchsorted(by_latent, torch.tensor([first, stop])).tolist()
            # Each firing of a latent of the block meets all that fire at its token.
            step = max(1, PAIR_BLOCK // max(1, int(counts.max()) if len(counts) else 1))
            for at in range(low, high, step):
                entries = order[at : min(at + step, high)]
                n = counts[token[entries]]
                pair = torch.repeat_interleave(torch.arange(len(entries)), n)
                other = torch.arange(len(pair)) + (offsets[token[entries]] - (n.cumsum(0) - n))[pair]
                keys = (latents[entries][pair] - first) * self.d_sae + latents[other]
                both.view(-1).index_add_(0, keys, torch.ones(len(keys)))
            return both / (firings[first:stop, None] + firings - both).clamp(min=1)

        return _nearest(self.d_sae, alive, likeness)


def _nearest(d_sae: int, alive: Tensor, likeness: Callable[[int, int], Tensor]) -> Nearest:
    n = min(N_NEAREST, d_sae - 1)
    latents, values = torch.zeros(d_sae, n, dtype=torch.int64), torch.zeros(d_sae, n)
    for first in range(0, d_sae, DECODER_BLOCK):
        stop = min(first + DECODER_BLOCK, d_sae)
        block = likeness(first, stop).masked_fill(~alive, -torch.inf)
        block[torch.arange(stop - first), torch.arange(first, stop)] = -torch.inf
        best = block.topk(n, dim=1)
        latents[first:stop], values[first:stop] = best.indices, best.values.clamp(min=0)
    return Nearest(latents, values)


# What a latent does to the next token, as far as the tail knows: a logit lens through all that follows the hook.

N_TOKENS = 8
LENS_BLOCK = 256
"""Directions that go through the tail at a time."""
DEFINITION = (
    "Change of each token's logit, minus the mean change over the vocabulary, when the latent's decoder row times its "
    "largest activation is added to the mean activation, in a sequence of one position, through every layer after the "
    "hook, the final norm and the unembedding. Only tokens that occur in the text looked at: the rest may never have "
    "been learned."
)


class Lens(NamedTuple):
    """Per direction, strongest first."""

    promoted: Int[Tensor, "n k"]
    gains: Float[Tensor, "n k"]
    suppressed: Int[Tensor, "n k"]
    losses: Float[Tensor, "n k"]


@torch.inference_mode()
def logit_lens(
    tail: Tail,
    mean: Float[Tensor, " d_model"],
    directions: Float[Tensor, "n d_model"],
    tokens: Int[Tensor, " n_tokens"],
) -> Lens:
    """Which of `tokens` each direction, added to the mean activation, promotes and suppresses most (DEFINITION)."""
    k = min(N_TOKENS, len(tokens))
    plain = tail.logits(mean.view(1, 1, -1))[0]
    parts = []
    for block in directions.split(LENS_BLOCK):
        hidden = tail.hidden((mean + block)[:, None])[:, 0]
        for _, (logits,) in tail.slices(hidden):
            change = logits - plain
            change = change[:, tokens] - change.mean(1, keepdim=True)
            up, down = change.topk(k, dim=1), change.topk(k, dim=1, largest=False)
            parts.append((tokens[up.indices], up.values, tokens[down.indices], down.values))
    if not parts:
        return Lens(*(torch.zeros(0, k, dtype=kind) for kind in (torch.int64, torch.float32) * 2))
    return Lens(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


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
    skip_first: CountingRules | int
    """Positions that count; a number: those from it on."""
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
            code = sae_code(maker.sae, x, batch.counted.nonzero()[:, 0])
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


class Lenses:
    """The lens after each hook of a store, or why there is none."""

    def __init__(self, store: Store, part: Excerpt) -> None:
        self.store = store
        lengths = torch.from_numpy(part.split.lengths[: part.n_sequences])
        valid = torch.arange(store.sequence_length) < lengths[:, None]
        self.tokens = torch.from_numpy(part.tokens)[valid].unique().long()
        self._tails: dict[str, Tail | str] = {}

    def tail(self, hook: str) -> Tail | str:
        """The tail, or why there is none. Raises StoreError for one that is damaged."""
        if hook not in self._tails:
            try:
                self._tails[hook] = Tail.load(self.store.tail_path(hook))
            except (NoTailError, TailError) as error:
                self._tails[hook] = str(error)
        return self._tails[hook]

    def of(self, hook: str, directions: Float[Tensor, "n d_model"]) -> Lens | None:
        """`logit_lens` of directions after a hook; None without a tail."""
        tail = self.tail(hook)
        if isinstance(tail, str):
            return None
        mean = torch.from_numpy(self.store.array(f"statistics/{hook}/mean")[:]).float()
        return logit_lens(tail, mean, directions, self.tokens)
