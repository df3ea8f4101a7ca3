"""Streams of draws that are held for a while, then drawn anew: slow without changing what a single token looks like.

A value is held for D tokens, D after a law of a given mean; a document begins in equilibrium, so no token is special.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

LONGEST = 1 << 14
"""Tokens that a draw is held at most: what is left of a law beyond is cut off."""


@lru_cache(maxsize=256)
def survival(law: str, mean: float, shape: float) -> Float[ndarray, " n"]:
    """P(D >= d) for d = 1, 2, ...; they sum to the mean of D."""
    d = np.arange(1, LONGEST + 1, dtype=np.float64)
    if law == "fixed":
        kept = np.clip(mean - (d - 1), 0, 1)  # between two whole numbers where the mean is
    elif law == "geometric":
        kept = (1 - 1 / mean) ** (d - 1)
    elif law == "pareto":
        kept = _of_mean(lambda scale: (1 + (d - 1) / scale) ** -shape, mean)
    else:
        from scipy.stats import nbinom

        kept = nbinom.sf(d - 2, shape, shape / (shape + mean - 1)) if mean > 1 else (d == 1).astype(float)
    return kept[: max(1, int(np.count_nonzero(kept > 1e-12)))]


def _of_mean(family, mean: float) -> Float[ndarray, " n"]:  # type: ignore[no-untyped-def]
    """The member of a family of survival functions, growing with its scale, that has this mean."""
    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if family(middle).sum() < mean else (low, middle)
    return family(high)


def redraws(
    rng: np.random.Generator, n_tokens: int, n_streams: int, law: str, mean: float, shape: float
) -> Bool[ndarray, "n_tokens n_streams"]:
    """Where each stream draws anew; the first token counts as one."""
    if mean == 1:
        return np.ones((n_tokens, n_streams), bool)
    if law == "geometric":
        drawn = rng.random((n_tokens, n_streams), np.float32) < np.float32(1 / mean)
        drawn[0] = True
        return drawn
    kept = survival(law, mean, shape)
    of_law, of_rest = 1 - np.append(kept[1:], 0), kept.cumsum() / kept.sum()
    left = np.searchsorted(of_rest, rng.random(n_streams), side="right") + 1
    drawn = np.zeros((n_tokens, n_streams), bool)
    drawn[0] = True
    for t in range(1, n_tokens):
        left -= 1
        ended = np.flatnonzero(left == 0)
        drawn[t, ended] = True
        left[ended] = np.searchsorted(of_law, rng.random(len(ended)), side="right") + 1
    return drawn


def held(
    values: Float[ndarray, "n_tokens n_streams"], drawn: Bool[ndarray, "n_tokens n_streams"]
) -> Float[ndarray, "n_tokens n_streams"]:
    """At each token the value of the last token at which the stream drew."""
    since = np.where(drawn, np.arange(len(drawn))[:, None], 0)
    return np.take_along_axis(values, np.maximum.accumulate(since, axis=0), axis=0)
