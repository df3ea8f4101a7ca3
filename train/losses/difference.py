"""Eq. 3 of the paper, and its scale-free and gated kin: how much a code changes between positions of one window.

Nothing is unfolded: a mean over windows is a weighted sum over pairs (i, i + lag), each weighted by the number of
windows that hold it (tcsae.shared.base.windows.pair_weights), which is 0 where a pair would leave its segment.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import sum_dtype, to_device
from tcsae.shared.base.windows import n_windows, pair_weights
from tcsae.shared.sae.ops import Code, pair_differences, square_norms
from tcsae.train.batch import Batch
from tcsae.train.settings.temporal_settings import TemporalConfig


class Pairs(NamedTuple):
    """The pairs (i, i + lag) of a batch."""

    lag: int
    weights: Float[Tensor, " n"]
    """Share of pair (i, i + lag) in the mean over windows and their pairs: over all lags they sum to 1, or to 0."""


def pairs_of(batch: Batch, window: int, lags: range = range(1, 2)) -> list[Pairs]:
    """The batch's pairs at these lags, weighted for a mean over the whole batch's windows and the pairs within one."""
    per_window = sum(window - lag for lag in lags)
    total = max(1, int(n_windows(batch.all.lengths, window).sum()) * per_window)
    device, pairs = batch.x.device, []
    for lag in lags:
        weights = torch.from_numpy(pair_weights(batch.lengths, window, lag) / total)
        pairs.append(Pairs(lag, to_device(weights.to(sum_dtype(device)), device)))
    return pairs


def mean_difference(code: Code, pairs: list[Pairs]) -> Float[Tensor, ""]:
    """sum over pairs of weight * ||f_{i+lag} - f_i||^2, this process's share."""
    parts = []
    for lag, weights in pairs:
        differences = pair_differences(code, lag)
        parts.append(torch.dot(weights[: len(differences)].to(differences), differences))
    return torch.stack(parts).sum()


def difference(config: TemporalConfig, code: Code, batch: Batch, _seed: int = 0) -> Float[Tensor, ""]:
    """Eq. 3: mean over windows and their pairs of ||f_j - f_i||^2."""
    return mean_difference(code, pairs_of(batch, config.window, _lags(config)))


def gated(config: TemporalConfig, code: Code, batch: Batch, _seed: int = 0) -> Float[Tensor, ""]:
    """Eq. 3 with each pair weighted by relu(cos(x_i, x_j))."""
    pairs = pairs_of(batch, config.window, _lags(config))
    for lag, weights in pairs:
        if len(weights) > lag:
            gate = F.cosine_similarity(batch.x[:-lag], batch.x[lag:]).clamp_(min=0)
            weights[:-lag] *= gate.to(weights)
    return mean_difference(code, pairs)


def relative(config: TemporalConfig, code: Code, batch: Batch, _seed: int = 0) -> Float[Tensor, ""]:
    """Eq. 3 over the pairs' squared norms: in 0..1 for non-negative codes, whatever their scale."""
    pairs = pairs_of(batch, config.window, _lags(config))
    squares = square_norms(code)
    energy = torch.dot(_energy_weights(pairs).to(squares), squares)
    change, energy = batch.group.sum(mean_difference(code, pairs)), batch.group.sum(energy)
    return batch.group.share(change / energy.clamp_min(1e-30))


def _lags(config: TemporalConfig) -> range:
    return range(1, config.window) if config.pairs == "all" else range(1, 2)


def _energy_weights(pairs: list[Pairs]) -> Float[Tensor, " n"]:
    """Weight of each token's ||f_i||^2 in the mean over windows and their pairs of ||f_i||^2 + ||f_j||^2."""
    total = torch.zeros_like(pairs[0].weights)
    for lag, weights in pairs:
        total += weights
        total[lag:] += weights[: len(total) - lag]
    return total
