"""Which latent stands for which planted feature, from directions alone."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

SPLIT_COSINE, ANTIPODAL_COSINE = 0.7, -0.9
SIGNED = 1e-6
"""Weight of a cosine's sign in the matching: of a feature's two sides, a latent gets the one it points along."""


@dataclass(frozen=True, eq=False)
class Matching:
    """n_features true directions and n_latents decoder rows."""

    latent_of: Int[ndarray, " n_features"]
    """The latent that the optimal one-to-one assignment (Hungarian) gives each feature; -1: none is left."""
    feature_of: Int[ndarray, " n_latents"]
    """The same the other way round; -1: no feature is left."""
    cosine: Float[ndarray, " n_features"]
    """Absolute, between a feature and its latent; 0 without one."""
    nearest: Int[ndarray, " n_latents"]
    """The feature that each latent points along most."""
    along: Float[ndarray, " n_features"]
    """Product of a feature's direction with its latent's decoder row, whatever the row's norm."""
    splits: Int[ndarray, " n_features"]
    """Latents beyond the first within SPLIT_COSINE of a feature."""
    n_antipodal: int
    """Pairs of decoder rows below ANTIPODAL_COSINE."""

    @property
    def has_latent(self) -> Bool[ndarray, " n_features"]:
        return self.latent_of >= 0


def match(directions: Float[ndarray, "n_features d"], rows: Float[ndarray, "n_latents d"]) -> Matching:
    """The matching of largest total absolute cosine, as SynthSAEBench's MCC. A row of zeros has cosine 0 with all."""
    from scipy.optimize import linear_sum_assignment

    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = directions @ units.T
    features, latents = linear_sum_assignment(np.abs(cosines) + SIGNED * cosines, maximize=True)
    latent_of, feature_of = np.full(len(directions), -1), np.full(len(rows), -1)
    latent_of[features], feature_of[latents] = latents, features
    cosine, along = np.zeros(len(directions)), np.zeros(len(directions))
    cosine[features] = np.abs(cosines[features, latents])
    along[features] = (directions[features] * rows[latents]).sum(1)
    splits = np.maximum((cosines > SPLIT_COSINE).sum(1) - 1, 0)
    nearest = cosines.argmax(0)
    return Matching(latent_of, feature_of, cosine, nearest, along, splits, antipodal_pairs(units))


def antipodal_pairs(units: Float[ndarray, "n d"], block: int = 1024) -> int:
    """Pairs of rows of norm 1 that point against each other: a cosine below ANTIPODAL_COSINE."""
    starts = range(0, len(units), block)
    return sum(int((units[start : start + block] @ units.T < ANTIPODAL_COSINE).sum()) for start in starts) // 2


def capture(directions: Float[ndarray, "n d"], rows: Float[ndarray, "m d"]) -> float:
    """Share of the subspace of some directions that lies in the span of some rows: 1 for all, 0 for nothing."""
    of_rows, of_truth = (_basis(one) for one in (rows, directions))
    return float(np.square(of_truth @ of_rows.T).sum() / max(1, len(of_truth)))


def _basis(rows: Float[ndarray, "m d"]) -> Float[ndarray, "rank d"]:
    _, sizes, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return basis[sizes > 1e-6 * max(1e-12, sizes.max(initial=0))]
