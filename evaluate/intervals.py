"""How sure a figure is: 95% intervals by resampling whole documents, and paired differences between two SAEs.

Tokens of one document are alike, so documents are drawn, never tokens. Resamplings depend on the number of documents
alone: two SAEs on one store share theirs, so their differences are paired. Fewer than MIN_DOCUMENTS documents have no
interval: their resamplings are too alike to say anything (those of one document are all the same).

scipy.stats.bootstrap was weighed: it calls a statistic on resampled observations, and ours are ratios of sums over
documents, for which a product of weights and sums is enough; it has no way to share resamplings between two SAEs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int, UInt8
from numpy import ndarray
from torch import Tensor

T_975_NORMAL = 1.96
T_975 = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t at 97.5%, by the number of groups of a jackknife."""
MIN_DOCUMENTS = 5
N_RESAMPLINGS = 1000
LEVEL = 0.95
STRATUM = 1 << 16
"""Documents that are drawn together: 66 MB of counts."""
FOLD = 1 << 12
"""Documents whose counts are held as float64 at a time: 32 MB."""


def n_rows(n_documents: int) -> int:
    """Rows of a figure: the split itself, then its resamplings, of which too few documents have none."""
    return 1 + (N_RESAMPLINGS if n_documents >= MIN_DOCUMENTS else 0)


class Resamplings:
    """How often each document is drawn, in memory that does not grow with their number.

    The first row is the split itself (all ones). Up to STRATUM documents are one multinomial draw a row; more are drawn
    stratum by stratum, each with its share of a multinomial draw over strata: the same distribution.
    """

    def __init__(self, n_documents: int, n_counted: int | None = None) -> None:
        """`n_counted`: documents with a counted token; by default all."""
        self.n_documents = n_documents
        self.n_rows = n_rows(n_documents if n_counted is None else n_counted)
        sizes = np.diff([*range(0, n_documents, STRATUM), n_documents])
        shares = np.random.default_rng(1).multinomial(n_documents, sizes / max(n_documents, 1), self.n_rows - 1)
        self._per_stratum = shares if len(sizes) > 1 else np.full((self.n_rows - 1, 1), n_documents)
        self._stratum = -1
        self._counts = np.zeros((0, 0), np.uint8)

    def weights(self, start: int, stop: int) -> Float64[Tensor, "n_rows n_documents"]:
        """The columns of documents start..stop-1, which are of one stratum."""
        stratum, first = divmod(start, STRATUM)
        if stratum != self._stratum:
            size = min(STRATUM, self.n_documents - stratum * STRATUM)
            seed = 0 if self.n_documents <= STRATUM else [2, stratum]
            self._counts = _draw(np.random.default_rng(seed), self._per_stratum[:, stratum], size)
            self._stratum = stratum
        weights = torch.ones(self.n_rows, stop - start, dtype=torch.float64)
        weights[1:] = torch.from_numpy(self._counts[:, first : first + stop - start])
        return weights

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of documents that `weights` takes, in order, of at most FOLD."""
        stop = self.n_documents if stop is None else stop
        while start < stop:
            end = min(stop, start - start % FOLD + FOLD)
            yield start, end
            start = end

    def sums(self, values: Float64[Tensor, "n_documents columns"]) -> Float64[Tensor, "n_rows columns"]:
        """Sums over documents, a row for each resampling."""
        total = torch.zeros(self.n_rows, values.shape[1], dtype=torch.float64)
        for start, stop in self.blocks():
            total.addmm_(self.weights(start, stop), values[start:stop])
        return total


def _draw(
    rng: np.random.Generator, per_row: Int[ndarray, " n_rows"], n_documents: int
) -> UInt8[ndarray, "n_rows n_documents"]:
    """A few rows at a time: NumPy makes them of 8 bytes a count."""
    counts = np.empty((len(per_row), n_documents), np.uint8)
    equal = np.full(n_documents, 1 / n_documents) if n_documents else np.zeros(0)
    step = max(1, (1 << 20) // max(1, n_documents))
    for row in range(0, len(per_row), step):
        drawn = rng.multinomial(per_row[row : row + step], equal)
        assert drawn.max(initial=0) < 256, "a document is drawn once on average"
        counts[row : row + step] = drawn
    return counts


def resamplings(n_documents: int) -> Float64[Tensor, "n_rows n_documents"]:
    """All weights at once, for few documents; see `Resamplings`."""
    return Resamplings(n_documents).weights(0, n_documents)


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
    """`value` plus and minus t standard errors, from its values with one group of documents left out at a time.

    None with fewer than MIN_DOCUMENTS groups, as each holds a document at least.
    """
    g = len(left)
    if g < MIN_DOCUMENTS or not np.isfinite([value, *left]).all():
        return None
    error = float(np.sqrt((g - 1) / g * np.square(np.array(left) - np.mean(left)).sum()))
    return [value - T_975[g] * error, value + T_975[g] * error]


def jackknife_draws(value: float, left: list[float]) -> Float64[Tensor, " n_rows"]:
    """`value`, then draws whose spread is that of `jackknife`: each group's deviation weighted at random, with the same
    weights for all figures of as many groups. `value` alone with too few groups, or where some figure is undefined.
    """
    g = len(left)
    if g < MIN_DOCUMENTS or not np.isfinite([value, *left]).all():
        return torch.tensor([value], dtype=torch.float64)
    weights = np.random.default_rng(g).normal(size=(N_RESAMPLINGS, g)) * T_975[g] / T_975_NORMAL
    deviations = (np.array(left) - np.mean(left)) * np.sqrt((g - 1) / g)
    return torch.from_numpy(np.concatenate([[value], value + weights @ deviations]))


def over_seeds(draws: Float64[Tensor, "n_seeds n_rows"]) -> Float64[Tensor, " n_rows"]:
    """Mean over seeds, on resamplings of the documents and of the seeds; the first row of all seeds on all documents.

    Seeds deviate from their mean on a resampling sqrt(n / (n - 1)) times as far as they are: drawn as they are, n seeds
    would vary by so much too little, a fifth for three.
    """
    n_seeds, n_rows = draws.shape
    mean = draws.mean(0)
    picked = torch.from_numpy(np.random.default_rng(n_seeds).integers(0, n_seeds, (n_seeds, n_rows)))
    resampled = mean + (draws.gather(0, picked).mean(0) - mean) * (n_seeds / max(1, n_seeds - 1)) ** 0.5
    resampled[0] = mean[0]
    return resampled


def p_value(values: Float64[Tensor, " n_rows"]) -> float | None:
    """Two-sided, of no difference: twice the share of the draws on the rarer side of 0, never below 2 / (draws + 1).

    None where `interval` is.
    """
    draws = values[1:]
    if not len(draws) or not bool(draws.isfinite().all()):
        return None
    rarer = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the chance that some true null ends at or below a is at most a."""
    n, largest = len(p_values), 0.0
    adjusted = [0.0] * n
    for rank, i in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
