"""Redundancy of one decoder, and agreement of two: from weights alone, no store and no code."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from tcsae.evaluate.planted.matching import ANTIPODAL_COSINE

SAME, NEAR = 0.7, 0.9
BLOCK = 1024

REDUNDANCY = {
    "latents": "decoder rows that are not zero",
    "antipodal_pairs": f"pairs of rows with a cosine below {ANTIPODAL_COSINE}: two sides of one signed direction",
    "near_duplicates": f"pairs with a cosine above {NEAR}",
    "has_neighbour": f"share of rows with another within a cosine of {SAME}",
    "nearest_cosine": "median over rows of the largest cosine with another",
    "effective_rank": "exp of the entropy of the rows' normalised squared singular values",
}
AGREEMENT = {
    "mean_cosine": "mean cosine over the one-to-one assignment of largest total (Hungarian)",
    "median_cosine": "its median",
    "share_same": f"share of the pairs with a cosine above {SAME}",
    "null_cosine": "mean cosine of such an assignment with random directions in the place of one decoder",
}


class Pairing(NamedTuple):
    """A one-to-one assignment of two decoders' latents, the most alike first."""

    first: Int[ndarray, " n"]
    second: Int[ndarray, " n"]
    cosine: Float[ndarray, " n"]

    def figures(self) -> dict[str, float]:
        return {
            "mean_cosine": float(self.cosine.mean()),
            "median_cosine": float(np.median(self.cosine)),
            "share_same": float((self.cosine > SAME).mean()),
        }


def unit_rows(rows: Float[ndarray, "n d"]) -> Float[ndarray, "m d"]:
    """Rows of norm 1, without those of zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(norms, 1e-12))[norms[:, 0] > 1e-12]


def redundancy(rows: Float[ndarray, "n d"]) -> dict[str, float]:
    """The figures of REDUNDANCY."""
    units = unit_rows(rows)
    nearest, opposite, near = np.full(len(units), -1.0), 0, 0
    for start in range(0, len(units), BLOCK):
        cosines = units[start : start + BLOCK] @ units.T
        at = np.arange(len(cosines))
        cosines[at, start + at] = np.nan
        opposite += int((cosines < ANTIPODAL_COSINE).sum())
        near += int((cosines > NEAR).sum())
        if len(units) > 1:
            nearest[start : start + BLOCK] = np.nanmax(cosines, axis=1)
    sizes = np.linalg.svd(units.astype(np.float64), compute_uv=False) ** 2
    shares = sizes[sizes > 0] / max(sizes.sum(), 1e-300)
    return {
        "latents": len(units),
        "antipodal_pairs": opposite // 2,
        "near_duplicates": near // 2,
        "has_neighbour": float((nearest > SAME).mean()) if len(units) else 0.0,
        "nearest_cosine": float(np.median(nearest)) if len(units) else 0.0,
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def pair(first: Float[ndarray, "n d"], second: Float[ndarray, "m d"]) -> Pairing:
    """The assignment of largest total cosine, of min(n, m) pairs. A row of zeros has cosine 0 with all."""
    from scipy.optimize import linear_sum_assignment

    ours, theirs = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (first, second))
    cosines = ours @ theirs.T
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    order = np.argsort(-cosines[rows, columns], kind="stable")
    return Pairing(rows[order], columns[order], cosines[rows, columns][order].astype(np.float64))


def null_cosine(first: Float[ndarray, "n d"], n_latents: int, seed: int = 0) -> float:
    """Mean cosine of the assignment to random directions: what two decoders without anything in common have."""
    random = np.random.default_rng(seed).standard_normal((n_latents, first.shape[1]), np.float32)
    return float(pair(first, random).cosine.mean())
