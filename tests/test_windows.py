"""Promise: no window crosses a sequence, none is lost, and pair weights equal the average over windows."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from tcsae.shared.base.windows import n_windows, pair_weights, positions, segments

lengths_lists = st.lists(st.integers(0, 12), min_size=0, max_size=8)


def windows_of(lengths: list[int], window: int) -> list[list[int]]:
    """Every window as token numbers, sequence by sequence, in plain Python."""
    result, offset = [], 0
    for length in lengths:
        result += [list(range(offset + i, offset + i + window)) for i in range(length - window + 1)]
        offset += length
    return result


def pair_weights_masked(valid: np.ndarray, window: int, lag: int) -> np.ndarray:
    """`pair_weights` of a mask, window by window: one counts if it is valid throughout. Column t is (t, t + lag)."""
    n, width = valid.shape
    weights = np.zeros((n, width), dtype=np.int64)
    starts = width - window + 1
    if starts < 1:
        return weights
    whole = np.lib.stride_tricks.sliding_window_view(valid, window, axis=1).all(axis=-1)
    for shift in range(window - lag):  # the pair stands `shift` positions after its window's start
        weights[:, shift : shift + starts] += whole
    return weights


@given(lengths_lists, st.integers(2, 6))
@example([2, 0, 2], 3)  # every sequence too short: no window at all
def test_windows_are_counted(lengths, window):
    assert n_windows(np.array(lengths, dtype=np.int64), window).sum() == len(windows_of(lengths, window))


@given(lengths_lists, st.integers(2, 6), st.integers(1, 5))
def test_pair_weights_count_the_windows_that_hold_the_pair(lengths, window, lag):
    counted = np.zeros(sum(lengths), dtype=np.int64)
    for held in windows_of(lengths, window):
        for token in held:
            if token + lag in held:
                counted[token] += 1
    np.testing.assert_array_equal(pair_weights(np.array(lengths, dtype=np.int64), window, lag), counted)


@given(lengths_lists, st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_weighted_pairs_are_the_average_over_windows(lengths, window, seed):
    code = np.random.default_rng(seed).normal(size=(sum(lengths), 3))
    held = windows_of(lengths, window)
    # Eq. 3, window by window: the mean over its w - 1 adjacent pairs.
    naive = [np.square(np.diff(code[one], axis=0)).sum() / (window - 1) for one in held]
    weights = pair_weights(np.array(lengths, dtype=np.int64), window)
    assert weights.sum() == (window - 1) * len(held)
    differences = np.square(np.diff(code, axis=0)).sum(1)
    if held:
        np.testing.assert_allclose((weights[:-1] * differences).sum() / weights.sum(), np.mean(naive))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(2, 5), st.integers(1, 4))
def test_left_aligned_masks_agree_with_lengths(lengths, window, lag):
    width = max(*lengths, 1)
    valid = np.arange(width) < np.array(lengths)[:, None]
    packed = pair_weights(np.array(lengths), window, lag)
    np.testing.assert_array_equal(pair_weights_masked(valid, window, lag)[valid], packed)


@given(lengths_lists)
def test_positions(lengths):
    expected = [p for length in lengths for p in range(length)]
    assert positions(np.array(lengths, dtype=np.int64)).tolist() == expected


@given(lengths_lists, st.integers(1, 7), st.integers(0, 4))
def test_segments_tile_every_sequence_once(lengths, segment_length, skip_first):
    sequence, start, length = segments(np.array(lengths, dtype=np.int64), segment_length, skip_first)
    covered = [(s, p) for s, a, n in zip(sequence, start, length, strict=True) for p in range(a, a + n)]
    assert covered == [(s, p) for s, n in enumerate(lengths) for p in range(skip_first, n)]
    assert all(1 <= n <= segment_length for n in length)
