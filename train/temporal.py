"""The temporal term of a run: eq. 3 of the paper and its scale-free, gated and contrastive kin, and a position penalty.

Each returns its value at weight 1 and its gradient with respect to the code's entries; the trainer sets the weight.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.codes import SparseCode
from tcsae.shared.windows import n_windows, pair_weights, positions
from tcsae.train.buffers import Workspace
from tcsae.train.config import TemporalConfig
from tcsae.train.loader import Batch
from tcsae.train.losses import Pairs, difference_dense, difference_sparse, energy_share

MEANS_DECAY = 0.99
"""Of the running mean code at each position."""


def pairs_of(config: TemporalConfig, batch: Batch) -> list[Pairs]:
    """The batch's pairs with their weights: a mean over its windows, and over the pairs within one."""
    window = config.window
    lags = range(1, window) if config.pairs == "all" else (1,)
    per_window = sum(window - lag for lag in lags)
    total: float = max(1, int(n_windows(batch.lengths, window).sum()) * per_window)
    if batch.whole is not None:  # a part of a batch, whose every loss is weighted by its share of the tokens
        n_all = max(1, int(n_windows(batch.whole, window).sum()) * per_window)
        total = n_all * len(batch.x) / batch.n_whole
    pairs = []
    for lag in lags:
        weights = torch.from_numpy(pair_weights(batch.lengths, window, lag) / total).to(batch.x)
        if config.kind == "gated" and len(weights) > lag:
            weights[:-lag] *= F.cosine_similarity(batch.x[:-lag], batch.x[lag:]).clamp_(min=0)
        pairs.append(Pairs(lag, weights))
    return pairs


def sparse_term(
    config: TemporalConfig, code: SparseCode, batch: Batch, workspace: Workspace, seed: int
) -> tuple[float, Float[Tensor, " n_entries"]]:
    """Value and gradient, at weight 1, for a sparse code of non-negative entries."""
    if config.kind == "contrastive":
        return contrastive(config, code, batch, seed)
    pairs = pairs_of(config, batch)
    grad = torch.zeros_like(code.values)
    value = difference_sparse(code, pairs, grad, workspace.zeros(code.n_tokens, code.d_sae))
    if config.kind == "relative":
        share = energy_share(pairs)[code.rows]
        energy = (share * code.values.double().square()).sum()
        return relative(value, energy, grad, share * code.values)
    return float(value), grad


def dense_term(
    config: TemporalConfig, activations: Float[Tensor, "n d"], batch: Batch, workspace: Workspace, seed: int
) -> tuple[float, Float[Tensor, "n d"]]:
    """Value and gradient, at weight 1, for a dense code; the gradient lies in the workspace."""
    if config.kind == "contrastive":
        return contrastive_dense(config, activations, batch, seed)
    pairs = pairs_of(config, batch)
    grad = workspace.get("temporal", *activations.shape).zero_()
    value = difference_dense(activations, pairs, grad)
    if config.kind == "relative":
        share = energy_share(pairs)
        energy = (share.double() * activations.square().sum(1)).sum()
        return relative(value, energy, grad, share[:, None] * activations)
    return float(value), grad


def relative(difference: Tensor, energy: Tensor, grad: Tensor, half_energy_grad: Tensor) -> tuple[float, Tensor]:
    """R = difference / energy, in 0..1 for non-negative codes of any scale; `grad` is difference's, in place."""
    if not energy > 0:
        return 0.0, grad.zero_()
    ratio = float(difference / energy)
    return ratio, grad.sub_(half_energy_grad, alpha=2 * ratio).div_(float(energy))


def partners(batch: Batch, seed: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Bool[Tensor, "p p"]]:
    """One adjacent pair from each segment that has one, drawn by `seed`, and which pairs are of other documents."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(batch.lengths) - batch.lengths
    has = np.flatnonzero(batch.lengths >= 2)
    first = starts[has] + rng.integers(0, np.maximum(batch.lengths[has] - 1, 1))
    documents = batch.documents[has]
    others = documents[:, None] != documents[None, :]
    return torch.from_numpy(first), torch.from_numpy(first + 1), torch.from_numpy(others)


def info_nce(
    a: Float[Tensor, "p d"], b: Float[Tensor, "p d"], others: Bool[Tensor, "p p"], temperature: float
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of cosines: each row's partner against the partners of other documents' rows."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    scores = scores.masked_fill(~(others | torch.eye(len(a), dtype=torch.bool)), -torch.inf)
    target = torch.arange(len(a))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def contrastive_dense(
    config: TemporalConfig, activations: Float[Tensor, "n d"], batch: Batch, seed: int
) -> tuple[float, Float[Tensor, "n d"]]:
    """InfoNCE between adjacent tokens (van den Oord et al. 2018, arXiv:1807.03748), of a dense code."""
    first, second, others = partners(batch, seed)
    rows = torch.cat([first, second])
    value, grad = _contrast(activations[rows], others, config.temperature)
    return value, torch.zeros_like(activations).index_copy_(0, rows, grad)


def contrastive(
    config: TemporalConfig, code: SparseCode, batch: Batch, seed: int
) -> tuple[float, Float[Tensor, " n_entries"]]:
    """As `contrastive_dense`, at a sparse code's entries."""
    first, second, others = partners(batch, seed)
    rows = torch.cat([first, second])
    place_of = torch.full((code.n_tokens,), -1, dtype=torch.int64)
    place_of[rows] = torch.arange(len(rows))
    place = place_of[code.rows]
    at = (place >= 0).nonzero().squeeze(1)
    where = (place[at], code.latents[at])
    dense = code.values.new_zeros(len(rows), code.d_sae).index_put_(where, code.values[at])
    value, dense_grad = _contrast(dense, others, config.temperature)
    grad = torch.zeros_like(code.values)
    grad[at] = dense_grad[where]
    return value, grad


def _contrast(rows: Float[Tensor, "two_p d"], others: Bool[Tensor, "p p"], temperature: float) -> tuple[float, Tensor]:
    """Value and gradient, by autograd on a leaf of the few rows that take part."""
    if len(others) < 2:
        return 0.0, torch.zeros_like(rows)
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        value = info_nce(leaf[: len(others)], leaf[len(others) :], others, temperature)
        (grad,) = torch.autograd.grad(value, leaf)
    return value.item(), grad


class PositionPenalty:
    """The code's variance between positions, by running means: sum_j sum_p n_p (m_jp - m_j)^2 / n.

    The means follow the batches and are held constant in the gradient, 2 (m_jp - m_j) / n for every token at p.
    """

    def __init__(self, n_positions: int, d: int) -> None:
        self.sums = torch.zeros(n_positions, d)
        self.counts = torch.zeros(n_positions)

    def sparse(self, code: SparseCode, batch: Batch) -> tuple[float, Float[Tensor, " n_entries"]]:
        """Value and gradient at weight 1."""
        position = torch.from_numpy(positions(batch.lengths) + np.repeat(batch.starts, batch.lengths))
        entry = position[code.rows]
        self._decay(position)
        flat = entry * self.sums.shape[1] + code.latents
        self.sums.view(-1).index_add_(0, flat, code.values.to(self.sums.dtype))
        off, value = self._deviations()
        return value, (2 / code.n_tokens) * off.view(-1)[flat].to(code.values.dtype)

    def dense(self, activations: Float[Tensor, "n d"], batch: Batch) -> tuple[float, Float[Tensor, "n d"]]:
        """As `sparse`, for a dense code."""
        position = torch.from_numpy(positions(batch.lengths) + np.repeat(batch.starts, batch.lengths))
        self._decay(position)
        self.sums.index_add_(0, position, activations.to(self.sums.dtype))
        off, value = self._deviations()
        return value, (2 / len(activations)) * off[position].to(activations.dtype)

    def _decay(self, position: Int[Tensor, " n"]) -> None:
        self.sums.mul_(MEANS_DECAY)
        self.counts.mul_(MEANS_DECAY).add_(torch.bincount(position, minlength=len(self.counts)))

    def _deviations(self) -> tuple[Float[Tensor, "n_positions d"], float]:
        means = self.sums / self.counts.clamp(min=1)[:, None]
        overall = self.sums.sum(0) / self.counts.sum().clamp(min=1)
        off = torch.where(self.counts[:, None] > 0, means - overall, 0.0)
        shares = self.counts / self.counts.sum().clamp(min=1)
        return off, float((shares[:, None] * off.square()).sum())
