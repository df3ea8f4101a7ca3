"""How sure a figure is: 95% intervals by resampling whole documents, and paired differences between two SAEs.

Tokens of one document are alike, so documents are drawn, never tokens. Resamplings depend on the number of documents
alone: two SAEs on one store share theirs, so their differences are paired.
"""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t at 97.5%, by the number of groups of a jackknife."""
N_RESAMPLINGS = 1000
LEVEL = 0.95


def resamplings(n_documents: int) -> Float64[Tensor, "n_rows n_documents"]:
    """How often each document is drawn: the first row is the split itself (all ones), the rest are draws."""
    draws = np.random.default_rng(0).multinomial(n_documents, np.full(n_documents, 1 / n_documents), N_RESAMPLINGS)
    return torch.from_numpy(np.concatenate([np.ones((1, n_documents)), draws]))


def point(values: Float64[Tensor, " n_rows"]) -> float | None:
    """The figure itself, from the first row; None where it is not defined."""
    value = float(values[0])
    return value if np.isfinite(value) else None


def interval(values: Float64[Tensor, " n_rows"]) -> list[float] | None:
    """The percentile interval of the draws; None where some draw leaves the figure undefined or there are none."""
    draws = values[1:]
    if not len(draws) or not bool(draws.isfinite().all()):
        return None
    tail = (1 - LEVEL) / 2
    return torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def jackknife(value: float, left: list[float]) -> list[float] | None:
    """`value` plus and minus t standard errors, from its values with one group of documents left out at a time."""
    g = len(left)
    if g < 2 or not np.isfinite([value, *left]).all():
        return None
    error = float(np.sqrt((g - 1) / g * np.square(np.array(left) - np.mean(left)).sum()))
    return [value - T_975[g] * error, value + T_975[g] * error]
