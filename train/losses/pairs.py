"""Which tokens of a batch the contrastive terms compare: pairs drawn on a grid, and what each pair is told from.

All processes of a run draw the same pairs of the whole batch, from its lengths and a seed.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from tcsae.shared.base.windows import positions
from tcsae.train.batch import Batch
from tcsae.train.settings.temporal_settings import TemporalConfig


class Pairs(NamedTuple):
    """Tokens t of the whole batch, whose partners are the next ones; on the host, as all that is drawn."""

    first: Int[ndarray, " p"]
    segment: Int[ndarray, " p"]
    negatives: Bool[ndarray, "p p"]
    """[i, j]: whether pair j is what pair i is told from; symmetric, never with itself."""


def choose_pairs(config: TemporalConfig, batch: Batch, seed: int, before: int = 0) -> Pairs:
    """Adjacent pairs (t, t + 1), of tokens that have `before` more in front of them in their segment.

    One a segment, or on a grid: `contrast.gap` apart from a random start. Pairs of one segment are negatives of each
    other at the gap or more; other segments of the same document never are. Told from pairs at the same position, all
    segments share the grid's start: else few would be. The position is the text's, also where a control has moved the
    tokens: these then stand anywhere, and what follows them there is the partner.
    """
    contrast, whole = config.contrast, batch.all
    rng = np.random.default_rng(seed)
    room = whole.lengths - 1 - before
    limit = config.pairs_per_segment
    aligned = config.negatives == "position"
    if limit == 1 and not aligned:
        segment = np.flatnonzero(room >= 1)
        offset = rng.integers(0, np.maximum(room[segment], 1))
    else:
        segment, offset = _grid(room, contrast.gap, limit, aligned, rng)
    first = (np.cumsum(whole.lengths) - whole.lengths)[segment] + before + offset
    place = whole.starts[segment] + batch.stride * (before + offset)
    if aligned and batch.order is not None:
        first = np.argsort(batch.order)[first]
        followed = ~np.isin(first + 1, np.cumsum(whole.lengths))
        first, segment, place = first[followed], segment[followed], place[followed]
    documents = whole.documents[segment]
    other, same = documents[:, None] != documents, segment[:, None] == segment
    np.fill_diagonal(same, False)
    match config.negatives:
        case "sequence":
            negatives = same
        case "batch":
            negatives = same | other
        case "position":
            negatives = other & (place[:, None] == place)
        case _:
            negatives = other
    return Pairs(first, segment, negatives)


def _grid(
    room: Int[ndarray, " n_segments"], gap: int, limit: int | None, aligned: bool, rng: np.random.Generator
) -> tuple[Int[ndarray, " p"], Int[ndarray, " p"]]:
    """(segment, offset) of offsets that are `gap` apart and below each segment's room, at most `limit` a segment."""
    most = max(1, int(room.max(initial=0)))
    shift = np.full(len(room), rng.integers(0, min(gap, most)))
    if not aligned:
        shift = rng.integers(0, np.minimum(gap, np.maximum(room, 1)))
    n = np.maximum(-(-(room - shift) // gap), 0)
    segment, number = np.repeat(np.arange(len(room)), n), positions(n)
    if limit is not None:
        # Where segments share a grid, they also share which of its points are taken.
        draws = rng.random(most)[number] if aligned else rng.random(len(segment))
        order = np.lexsort((draws, segment))
        rank = np.empty(len(segment), np.int64)
        rank[order] = positions(n)
        keep = rank < limit
        segment, number = segment[keep], number[keep]
    return segment, shift[segment] + gap * number
