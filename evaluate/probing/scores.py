"""What a probe scores: AUROC over all tokens and within equal tokens, and a logistic regression on a few latents."""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

STEPS, RIDGE = 12, 1e-3
"""Newton steps; penalty on standardised weights, per token."""


def auroc(scores: Float[ndarray, " n"], truth: Bool[ndarray, " n"]) -> float:
    """Chance that a positive's score is above a negative's, ties half; NaN without one of each."""
    return grouped_auroc(scores, truth, np.zeros(len(scores), np.int64))


def grouped_auroc(scores: Float[ndarray, " n"], truth: Bool[ndarray, " n"], group: Int[ndarray, " n"]) -> float:
    """The same over pairs of one group alone, each pair counting once; NaN if there is none."""
    order = np.lexsort((scores, group))
    group, scores, truth = group[order], scores[order], truth[order]
    begins = np.flatnonzero(np.diff(group, prepend=group[:1] - 1) != 0)
    number = np.zeros(len(group), np.int64)
    number[begins[1:]] = 1
    number = number.cumsum()
    new = np.append(True, (np.diff(scores) != 0) | (np.diff(group) != 0))[: len(scores)]
    tie = new.cumsum() - 1
    places = np.arange(len(scores)) - begins[number] if len(scores) else np.zeros(0)
    ranks = np.bincount(tie, places) / np.maximum(np.bincount(tie), 1) + 1  # ties share their mean rank
    n_positive = np.bincount(number, truth)
    n_negative = np.bincount(number) - n_positive
    above = np.bincount(number, ranks[tie] * truth) - n_positive * (n_positive + 1) / 2
    pairs = (n_positive * n_negative).sum()
    return float(above[n_negative > 0].sum() / pairs) if pairs else float("nan")


def logistic(features: Float[ndarray, "n k"], truth: Bool[ndarray, " n"], ridge: float = RIDGE) -> Float[ndarray, " k"]:
    """Weights of a logistic regression with an intercept, which is left out: AUROC knows none.

    Minimises the mean loss + ridge / 2 |w|^2 by Newton's method with halved steps.
    """
    wide = np.concatenate([features, np.ones((len(features), 1))], 1)
    penalty = np.append(np.full(features.shape[1], ridge), 1e-9)
    weights, sign = np.zeros(wide.shape[1]), np.where(truth, 1.0, -1.0)

    def loss(one: ndarray) -> float:
        return float(np.logaddexp(0, -sign * (wide @ one)).mean() + (penalty * one**2).sum() / 2)

    now = loss(weights)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(wide @ weights, -30, 30)))
        slope = wide.T @ (chance - truth) / len(wide) + penalty * weights
        curve = (wide * (chance * (1 - chance))[:, None]).T @ wide / len(wide) + np.diag(penalty)
        step, size = np.linalg.solve(curve, slope), 1.0
        while size > 1e-3 and (after := loss(weights - size * step)) > now:
            size /= 2
        if size <= 1e-3 or now - after < 1e-9:
            break
        weights, now = weights - size * step, after
    return weights[:-1]


def discriminant(
    differences: Float[ndarray, "d n_labels"], covariance: Float[ndarray, "d d"]
) -> Float[ndarray, "d n_labels"]:
    """Directions of Fisher's linear discriminant for labels that share one covariance, slightly ridged."""
    scale = np.trace(covariance) / len(covariance)
    return np.linalg.solve(covariance + 1e-3 * max(scale, 1e-12) * np.eye(len(covariance)), differences)
