"""Description length: bits that a code takes to send, at next to no more error than it has.

Each latent's values are rounded to multiples of one step (in units of the reconstruction), and sent by an ideal code
for their frequencies, zero included, latent by latent (MDL-SAEs, arXiv:2410.11179). The step is the one at which
rounding adds ROUNDING to the squared error; so SAEs of any L0 and any activation are compared in one unit.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csr_array

from tcsae.evaluate.latents.material import Coded

ROUNDING = 0.01
"""Share of the squared error that rounding may add."""

DEFINITIONS = {
    "bits": "bits a token to send the code, each latent's rounded values by their own frequencies; rounding adds about "
    f"{ROUNDING:.0%} to the squared error",
    "bits_pattern": "of these, for which latents are on",
    "bits_values": "of these, for the values",
    "bits_pattern_given_last": "bits_pattern where the receiver knows which latents were on at the token before",
    "bits_x": "bits a token that x itself takes at the same squared error, sent by its principal components as a "
    "Gaussian (the least for one)",
    "error_added": "squared error that rounding added, over that of the SAE",
}


def code_length(coded: Coded) -> dict[str, float | None]:
    """The figures of DEFINITIONS; None where the SAE is on at no token."""
    added, n = coded.added, coded.added.shape[0]
    if not added.nnz:
        return dict.fromkeys(DEFINITIONS)
    error = float(np.square(coded.error, dtype=np.float64).sum()) / n
    norms = np.linalg.norm(coded.rows, axis=1)
    step = float(np.sqrt(12 * ROUNDING * max(error, 1e-12) * n / added.nnz))
    sizes = np.rint(added.data * norms[added.indices] / step).astype(np.int64)
    rounded = added.copy()
    rounded.data = (sizes * step / np.maximum(norms[added.indices], 1e-12)).astype(added.data.dtype)
    left = coded.error + (added - rounded) @ coded.rows
    error_after = float(np.square(left, dtype=np.float64).sum()) / n
    shown = csr_array((sizes != 0, added.indices, added.indptr), shape=added.shape, copy=True)
    shown.eliminate_zeros()
    total, pattern = value_bits(added.indices, sizes, n), pattern_bits(shown)
    return {
        "bits": total,
        "bits_pattern": pattern,
        "bits_values": total - pattern,
        "bits_pattern_given_last": pattern_bits_given_last(shown, coded.sequences.sequence),
        "bits_x": gaussian_bits(coded.sequences.x.numpy(), error_after),
        "error_added": error_after / max(error, 1e-12) - 1,
    }


def value_bits(latents: Int[ndarray, " n_entries"], sizes: Int[ndarray, " n_entries"], n_tokens: int) -> float:
    """Sum over latents of the entropy of its values over all tokens, those without an entry being 0; bits a token."""
    on = sizes != 0
    low = int(sizes.min(initial=0))
    keys = latents[on].astype(np.int64) * (int(sizes.max(initial=0)) - low + 1) + sizes[on] - low
    counts = np.unique(keys, return_counts=True)[1]
    silent = n_tokens - np.bincount(latents[on])
    return float(_bits(counts, n_tokens).sum() + _bits(silent, n_tokens).sum())


def pattern_bits(on: csr_array) -> float:
    """Sum over latents of the entropy of being on; bits a token."""
    n, firings = on.shape[0], np.bincount(on.indices, minlength=on.shape[1])
    return float(_bits(firings, n).sum() + _bits(n - firings, n).sum())


def pattern_bits_given_last(on: csr_array, sequence: Int[ndarray, " n"]) -> float:
    """The same given whether the latent was on at the token before; first tokens of sequences are left out."""
    follows: Bool[ndarray, " n_minus_1"] = sequence[1:] == sequence[:-1]
    at = np.flatnonzero(follows)
    n = len(at)
    if not n:
        return pattern_bits(on)
    now, last = on[at + 1].astype(np.int64), on[at].astype(np.int64)
    both = np.asarray(now.multiply(last).sum(0)).ravel()
    ons, befores = (np.asarray(one.sum(0)).ravel() for one in (now, last))
    cells = (both, ons - both, befores - both, n - ons - befores + both)
    joint = sum(_bits(one, n).sum() for one in cells)
    return float(joint - _bits(befores, n).sum() - _bits(n - befores, n).sum())


def gaussian_bits(x: Float[ndarray, "n d_model"], error: float) -> float:
    """Rate of a Gaussian of x's covariance at a squared error, by reverse water-filling; bits a token."""
    sizes = np.maximum(np.linalg.eigvalsh(np.cov(x.astype(np.float64).T, bias=True)), 0)
    if error >= sizes.sum():
        return 0.0
    low, high = 0.0, float(sizes.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level, sizes).sum() < error else (low, level)
    return float(0.5 * np.log2(np.maximum(sizes / max(high, 1e-300), 1)).sum())


def _bits(counts: Int[ndarray, " m"], n: int) -> Float[ndarray, " m"]:
    """-p log2 p of each."""
    share = counts / n
    return -share * np.log2(np.where(share > 0, share, 1))
