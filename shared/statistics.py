"""Sums over tokens that add up, shard by shard, to the statistics of a whole split."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

N_NORM_BINS = 322
"""Bin 0: norms below 2**-20. Bin i: [2**((i - 1) / 8 - 20), 2**(i / 8 - 20)). The last: all from 2**20 on."""
NORM_EDGES = 2.0 ** (np.arange(N_NORM_BINS) / 8 - 20)
"""Upper edge of each bin (the last bin has none)."""

BLOCK_TOKENS = 256
"""Widened at a time: what stays in the cache costs a third of fresh memory for a whole shard."""


def partial_sums(x: Float[ndarray, "n d_model"]) -> Float[ndarray, " n_sums"]:
    """float64 [1 + 2 d_model + n_bins]: count, sum, sum of squares, norm histogram; partial sums add up."""
    first, second, norms = np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.empty(len(x))
    for start in range(0, len(x), BLOCK_TOKENS):
        wide = x[start : start + BLOCK_TOKENS].astype(np.float64)
        first += wide.sum(0)
        np.square(wide, out=wide)
        second += wide.sum(0)
        norms[start : start + BLOCK_TOKENS] = np.sqrt(wide.sum(1))
    bins = np.clip(np.floor((np.log2(np.maximum(norms, 2.0**-30)) + 20) * 8).astype(np.int64) + 1, 0, N_NORM_BINS - 1)
    histogram = np.bincount(bins, minlength=N_NORM_BINS).astype(np.float64)
    return np.concatenate([[len(x)], first, second, histogram])


def n_sums(d_model: int) -> int:
    """Length of `partial_sums`."""
    return 1 + 2 * d_model + N_NORM_BINS


def finished(sums: Float[ndarray, " n_sums"], d_model: int) -> dict[str, ndarray]:
    """mean and variance [d_model], float64, and norm_histogram [n_bins], int64, from added `partial_sums`."""
    count = max(float(sums[0]), 1.0)
    mean = sums[1 : 1 + d_model] / count
    variance = np.maximum(sums[1 + d_model : 1 + 2 * d_model] / count - mean**2, 0.0)
    return {"mean": mean, "variance": variance, "norm_histogram": sums[1 + 2 * d_model :].astype(np.int64)}
