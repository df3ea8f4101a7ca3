"""Latents that fire together: how much more often than independent ones of the same rates."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from scipy.sparse import coo_array, csr_array, triu

DENSE = 0.1
MIN_FIRINGS, MIN_JOINT = 25, 10
TWIN, FOLLOWS = 0.5, 0.9
MAX_PRODUCTS = 5e7
"""Pairs of firings that are counted, at most: of more, evenly spaced tokens."""

COFIRING = {
    "dense": f"latents on at more than {DENSE:.0%} of tokens",
    "cofiring_lift": f"median over latents of the largest lift with another, of those with {MIN_JOINT} joint firings: "
    "how many times more often both are on than if they were independent",
    "twins": f"share of latents with a twin: each of the two is on at more than {TWIN:.0%} of the other's tokens",
    "followers": f"share of latents that are on almost only ({FOLLOWS:.0%}) where one other, not dense, is on as well",
}
"""Of latents with MIN_FIRINGS."""


def cofiring(on: csr_array) -> dict[str, float | None]:
    """The figures of COFIRING of a matrix [n_tokens, n_latents] whose entries are the firings. None where undefined."""
    firings = np.bincount(on.indices, minlength=on.shape[1])
    dense = int((firings > DENSE * on.shape[0]).sum())
    products = float(np.square(np.diff(on.indptr), dtype=np.float64).sum())
    if products > MAX_PRODUCTS:
        on = on[np.arange(0, on.shape[0], int(np.ceil(products / MAX_PRODUCTS)))]
    firings = np.bincount(on.indices, minlength=on.shape[1])
    able = np.flatnonzero(firings >= MIN_FIRINGS)
    if len(able) < 2:
        return dict.fromkeys(COFIRING) | {"dense": dense}
    n_on, n = firings[able], on.shape[0]
    # In int32: a count in the data's own type would overflow.
    here = csr_array((np.ones(on.nnz, np.int32), on.indices, on.indptr), shape=on.shape)[:, able]
    pairs: coo_array = coo_array(triu(here.T @ here, 1))
    i, j, joint = pairs.row, pairs.col, pairs.data
    lift = joint * n / (n_on[i].astype(np.float64) * n_on[j])
    often = joint >= MIN_JOINT
    best = _largest(i[often], j[often], lift[often], lift[often], len(able))
    given_i, given_j = joint / n_on[i], joint / n_on[j]
    less = np.minimum(given_i, given_j)
    rare = n_on <= DENSE * n
    followed = _largest(i, j, given_i * rare[j], given_j * rare[i], len(able))
    return {
        "dense": dense,
        "cofiring_lift": float(np.median(best[best > 0])) if (best > 0).any() else None,
        "twins": float((_largest(i, j, less, less, len(able)) > TWIN).mean()),
        "followers": float((followed > FOLLOWS).mean()),
    }


def _largest(i: Int[ndarray, " n"], j: Int[ndarray, " n"], of_i: ndarray, of_j: ndarray, n_latents: int) -> ndarray:
    """Of each latent the largest value over its pairs; 0 without one."""
    best = np.zeros(n_latents)
    np.maximum.at(best, i, of_i)
    np.maximum.at(best, j, of_j)
    return best


def shifted(on: csr_array, seed: int = 0) -> csr_array:
    """The null: every latent's firings moved along the tokens by an offset of its own, ends joined.

    Rates and runs of firing stay, coincidences are chance.
    """
    rng = np.random.default_rng(seed)
    offsets = rng.integers(0, on.shape[0], on.shape[1])
    entries = coo_array(on)
    rows = (entries.row + offsets[entries.col]) % on.shape[0]
    return csr_array(coo_array((entries.data, (rows, entries.col)), shape=on.shape))
