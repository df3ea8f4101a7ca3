"""What a step is trained on."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.device import to_device
from tcsae.shared.base.windows import positions, tiles
from tcsae.train.collectives import ONE_PROCESS, Collectives


class Whole(NamedTuple):
    """All segments of a batch, where several processes have a part of it each."""

    lengths: Int[ndarray, " n_segments"]
    documents: Int[ndarray, " n_segments"]
    n_before: int
    """Tokens before this process's own."""
    starts: Int[ndarray, " n_segments"]


class Text(NamedTuple):
    """What stands at each token of the whole batch."""

    tokens: Int[ndarray, " n_whole"]
    """Token ids."""
    places: Int[ndarray, " n_whole"]
    """Number of each token within its document."""


class Batch(NamedTuple):
    """Segments packed end to end, without padding."""

    x: Float[Tensor, "n d_model"]
    """float32; the loader's own buffer, overwritten by the next batch."""
    lengths: Int[ndarray, " n_segments"]
    starts: Int[ndarray, " n_segments"]
    """Position of each segment's first token in its sequence."""
    documents: Int[ndarray, " n_segments"]
    n_left_out: int = 0
    """Tokens of the whole batch that are not in it, as data.max_norm asks."""
    whole: Whole | None = None
    """None: these are all."""
    group: Collectives = ONE_PROCESS
    """The processes that have the other parts."""
    text: Text | None = None
    """Only where a loss reads it (TemporalConfig.reads_text)."""
    partners: Float[Tensor, "n d_model"] | None = None
    """Activations of each token's partner, where a loss takes pairs (t-sae)."""
    stride: int = 1
    """Positions from one row of `x` to the next."""
    order: Int[ndarray, " n_whole"] | None = None
    """Number in the text of the token that stands at each place of the whole batch, where a control has moved them."""

    @property
    def all(self) -> Whole:
        return self.whole or Whole(self.lengths, self.documents, 0, self.starts)

    @property
    def n_whole(self) -> int:
        """Tokens of the whole batch."""
        return len(self.x) if self.whole is None else int(self.whole.lengths.sum())

    @property
    def offset(self) -> int:
        """Where these tokens begin in the whole batch."""
        return self.all.n_before

    @property
    def longest(self) -> int:
        """Tokens of the whole batch's longest segment."""
        return int(self.all.lengths.max(initial=0))

    def positions(self) -> Int[Tensor, " n"]:
        """Each row's position in its sequence, its first where it is a window."""
        position = self.stride * positions(self.lengths) + np.repeat(self.starts, self.lengths)
        return to_device(position, self.x.device)

    def windows(self, window: int, offset: int) -> "Batch":
        """The batch as windows of consecutive positions laid end to end, side by side from `offset` of each segment on:
        x is [n_windows, window * d_model].

        Up to `window` - 1 positions at either end of a segment are in none.
        """
        first, lengths = tiles(self.lengths, window, window, offset)
        rows = to_device(first[:, None] + np.arange(window), self.x.device)
        x = self.x[rows].flatten(1)
        whole = self.whole
        if whole is not None:
            counts = tiles(whole.lengths, window, window, offset)[1]
            n_segments_before = int(np.searchsorted(np.cumsum(whole.lengths), whole.n_before, side="right"))
            whole = whole._replace(
                lengths=counts, n_before=int(counts[:n_segments_before].sum()), starts=whole.starts + offset
            )
        return self._replace(x=x, lengths=lengths, starts=self.starts + offset, whole=whole, stride=window, order=None)


# Controls of the temporal term: the same tokens in another order.


def shuffled(
    order: Literal["segment", "document", "batch"], batch: Batch, seed: int
) -> tuple[Int[Tensor, " n"], Batch]:
    """The batch's tokens in random order, drawn by `seed`, within each segment or over the batch; and the batch in this
    order.
    """
    assert order != "document", "the settings refuse it where `far_apart` is not asked"
    lengths = batch.all.lengths
    draws = np.random.default_rng(seed).random(batch.n_whole)
    if order == "segment":
        draws += np.repeat(np.arange(len(lengths)), lengths)
    moved = np.argsort(draws)
    tokens = to_device(moved[batch.offset : batch.offset + len(batch.x)] - batch.offset, batch.x.device)
    return tokens, batch._replace(x=batch.x[tokens], order=moved)


def far_apart(batch: Batch, distance: int) -> tuple[Int[Tensor, " n"], Batch]:
    """The batch's tokens such that neighbours are of one document and `distance` positions or more apart, and the batch
    in this order: what neighbours share is then the document's topic, not their place in it.

    The first half of a document's tokens and the second, one of each in turn. Tokens that are left without a neighbour
    are segments of one.
    """
    assert batch.text is not None, "the loader was not asked for places"
    document = np.repeat(batch.documents, batch.lengths)
    tokens = np.lexsort((batch.text.places, document))
    counts = np.unique(document, return_counts=True)[1]
    rank, half = positions(counts), np.repeat(counts // 2, counts)
    turn = np.where(rank < half, 2 * rank, 2 * (rank - half) + 1)
    tokens = tokens[np.lexsort((turn, document[tokens]))]
    places, document = batch.text.places[tokens], document[tokens]
    follows = (document[1:] == document[:-1]) & (np.abs(np.diff(places)) >= distance)
    runs = np.diff(np.flatnonzero(np.concatenate([[True], ~follows, [True]])))
    pieces = np.maximum(1, -(-runs // batch.longest))  # no longer than the batch's own segments
    lengths = np.minimum(batch.longest, np.repeat(runs, pieces) - batch.longest * positions(pieces))
    first = np.cumsum(lengths) - lengths
    order = to_device(tokens, batch.x.device)
    ordered = batch._replace(
        x=batch.x[order], lengths=lengths, starts=np.zeros_like(lengths), documents=document[first], text=None
    )
    return order, ordered
