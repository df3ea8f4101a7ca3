"""Segments: stretches of consecutive tokens at which something is on, and how those of a code lie to the true ones."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray


class Axis(NamedTuple):
    """Places on which neighbours within a run of counted tokens are consecutive numbers, and no others are."""

    place: Int[ndarray, " n_tokens"]
    """Of each token."""
    first: Bool[ndarray, " n_places"]
    """Whether a place is the first of its run: what is on there may have begun before."""
    last: Bool[ndarray, " n_places"]

    @property
    def n(self) -> int:
        return len(self.first)

    def keys(self, features: Int[ndarray, " m"], tokens: Int[ndarray, " m"]) -> Int[ndarray, " m"]:
        """Sorted numbers of (feature, token), consecutive where one feature is on at neighbouring tokens."""
        return np.sort(features.astype(np.int64) * self.n + self.place[tokens])


def axis_of(runs: Int[ndarray, " n_tokens"]) -> Axis:
    """`runs` numbers each token's run, ascending."""
    begins = np.diff(runs, prepend=-1) != 0
    place = np.arange(len(runs)) + begins.cumsum()  # one place is left free before each run
    n = int(place[-1]) + 2 if len(place) else 1
    first, last = np.zeros(n, bool), np.zeros(n, bool)
    first[place[begins]] = True
    last[place[np.append(begins[1:], True)] if len(place) else []] = True
    return Axis(place, first, last)


class Compared(NamedTuple):
    """m true segments against a code."""

    feature: Int[ndarray, " m"]
    missed: Bool[ndarray, " m"]
    """The code is on at none of its tokens."""
    fragments: Int[ndarray, " m"]
    """Segments of the code that it overlaps with."""
    onset: Int[ndarray, " m"]
    """First token of the code's first such segment, minus its own: below 0 is early."""
    offset: Int[ndarray, " m"]
    """Last token of the code's last such segment, minus its own: below 0 is early."""
    has_onset: Bool[ndarray, " m"]
    """Whether it begins inside its run, and is not missed."""
    has_offset: Bool[ndarray, " m"]


def compare_segments(axis: Axis, true: Int[ndarray, " a"], code: Int[ndarray, " b"]) -> Compared:
    """True segments and a code's, both as `Axis.keys`."""
    starts, ends = true[_begins(true)], true[_ends(true)]
    begins = _begins(code)
    number = begins.cumsum() - 1
    code_starts, code_ends = code[begins], code[_ends(code)]
    low, high = np.searchsorted(code, starts), np.searchsorted(code, ends, side="right")
    missed = high == low
    at = [one.clip(0, max(0, len(code) - 1)) for one in (low, high - 1)]
    first, last = (number[one] if len(code) else np.zeros(len(starts), np.int64) for one in at)
    nothing = np.zeros(1, np.int64)
    onset, offset = (
        np.where(missed, 0, (of_code if len(code) else nothing)[run] - ours)
        for of_code, run, ours in ((code_starts, first, starts), (code_ends, last, ends))
    )
    inside = ~axis.first[starts % axis.n] & ~missed, ~axis.last[ends % axis.n] & ~missed
    return Compared(starts // axis.n, missed, np.where(missed, 0, last - first + 1), onset, offset, *inside)


def _begins(keys: Int[ndarray, " m"]) -> Bool[ndarray, " m"]:
    return np.diff(keys, prepend=-2) != 1


def _ends(keys: Int[ndarray, " m"]) -> Bool[ndarray, " m"]:
    return np.append(np.diff(keys) != 1, np.ones(min(1, len(keys)), bool))
