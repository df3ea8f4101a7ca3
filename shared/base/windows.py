"""Index arithmetic of sequences, segments and sliding windows. Integers only; no data is touched here.

A window is w consecutive positions of one segment, so it never crosses from one sequence into another. The window
loss sums over the adjacent pairs of each window; since neighbouring windows share pairs, it is a weighted sum over
pairs, each weighted by the number of windows that hold it (`pair_weights`). Nothing is ever unfolded.
"""

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray


def n_windows(lengths: Int[ndarray, " n"], window: int) -> Int[ndarray, " n"]:
    """How many windows of `window` positions lie in runs of these lengths: length - window + 1, at least 0."""
    return np.maximum(np.asarray(lengths) - window + 1, 0)


def pair_weights(lengths: Int[ndarray, " n_segments"], window: int, lag: int = 1) -> Int[ndarray, " n_tokens"]:
    """In how many windows the pair (i, i + lag) lies, for every token i of segments laid end to end.

    A run of l positions has l - w + 1 windows; the pair at 0-based positions (p, p + lag) is in those that start at
    max(0, p + lag - w + 1) .. min(p, l - w). Zero where p + lag is beyond the run, so no pair crosses into the next.
    Sum over tokens: (w - lag) * number of windows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    position = positions(lengths)
    length = np.repeat(lengths, lengths)
    first = np.maximum(0, position + lag - window + 1)
    last = np.minimum(position, length - window)
    return np.where(position + lag < length, np.maximum(last - first + 1, 0), 0)


def tiles(
    lengths: Int[ndarray, " n_segments"], window: int, stride: int = 1, offset: int = 0
) -> tuple[Int[ndarray, " n_tiles"], Int[ndarray, " n_segments"]]:
    """Windows of runs laid end to end, every `stride` positions from `offset` on, none across two runs.

    Returns the first token of each window and the number of windows of each run.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = np.maximum((lengths - offset - window) // stride + 1, 0)
    first = np.repeat(np.cumsum(lengths) - lengths, counts)
    return first + offset + stride * positions(counts), counts


def positions(lengths: Int[ndarray, " n"]) -> Int[ndarray, " n_tokens"]:
    """0-based position of every token within its run, for runs of these lengths laid end to end."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def segments(
    lengths: Int[ndarray, " n_sequences"], segment_length: int, skip_first: int = 0
) -> tuple[Int[ndarray, " n_segments"], Int[ndarray, " n_segments"], Int[ndarray, " n_segments"]]:
    """Tile every sequence with segments of consecutive positions, from `skip_first` on; the last may be shorter.

    Returns (sequence, start, length) of each segment: every position from `skip_first` to the sequence's end lies in
    exactly one of them.
    """
    usable = np.maximum(np.asarray(lengths, dtype=np.int64) - skip_first, 0)
    per_sequence = -(-usable // segment_length)
    sequence = np.repeat(np.arange(len(usable)), per_sequence)
    offset = positions(per_sequence) * segment_length
    return sequence, offset + skip_first, np.minimum(usable[sequence] - offset, segment_length)


def kept_runs(
    lengths: Int[ndarray, " n"], keep: Bool[ndarray, " n_tokens"]
) -> tuple[Int[ndarray, " n_runs"], Int[ndarray, " n_runs"], Int[ndarray, " n_runs"]]:
    """Runs of kept tokens within runs of these lengths laid end to end: none spans a token that is not kept.

    Returns, of each in order, the number of the run that it lies in, where in that it starts, and its length.
    """
    at = np.flatnonzero(keep)
    run, position = np.repeat(np.arange(len(lengths)), lengths)[at], positions(lengths)[at]
    begins = np.ones(len(at), bool)
    begins[1:] = (np.diff(at) > 1) | (np.diff(run) > 0)
    first = np.flatnonzero(begins)
    return run[first], position[first], np.diff(first, append=len(at))


def masked_segments(
    usable: Bool[ndarray, "n_sequences sequence_length"], segment_length: int
) -> tuple[Int[ndarray, " n_segments"], Int[ndarray, " n_segments"], Int[ndarray, " n_segments"]]:
    """As `segments`, over any usable positions: each lies in exactly one segment, and no segment spans another one."""
    n, width = usable.shape
    sequence, start, run = kept_runs(np.full(n, width), usable.reshape(-1))
    per_run = -(-run // segment_length)
    which = np.repeat(np.arange(len(run)), per_run)
    offset = positions(per_run) * segment_length
    return sequence[which], start[which] + offset, np.minimum(run[which] - offset, segment_length)
