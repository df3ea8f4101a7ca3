"""The temporal term of a run: eq. 3 of the paper and its scale-free, gated and contrastive kin, and a position penalty.

Each returns its value at weight 1 and its gradient with respect to the code's entries; the trainer sets the weight.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import sum_dtype
from tcsae.shared.base.windows import n_windows, pair_weights, positions
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.adder import ALONE, Adder
from tcsae.train.batch import Batch
from tcsae.train.buffers import Workspace
from tcsae.train.config import TemporalConfig
from tcsae.train.losses.difference import Pairs, difference_dense, difference_sparse, energy_share

MEANS_DECAY = 0.99
"""Of the running mean code at each position."""


def pairs_of(config: TemporalConfig, batch: Batch) -> list[Pairs]:
    """The batch's pairs with their weights: a mean over the whole batch's windows, and over the pairs within one."""
    window = config.window
    lags = range(1, window) if config.pairs == "all" else (1,)
    per_window = sum(window - lag for lag in lags)
    total = max(1, int(n_windows(batch.all.lengths, window).sum()) * per_window)
    pairs = []
    for lag in lags:
        weights = torch.from_numpy(pair_weights(batch.lengths, window, lag) / total).to(batch.x)
        if config.kind == "gated" and len(weights) > lag:
            weights[:-lag] *= F.cosine_similarity(batch.x[:-lag], batch.x[lag:]).clamp_(min=0)
        pairs.append(Pairs(lag, weights))
    return pairs


def shuffled(order: Literal["segment", "batch"], batch: Batch, seed: int) -> Int[Tensor, " n"]:
    """The batch's tokens in random order, drawn by `seed`: within each segment, or over the batch."""
    rng = np.random.default_rng(seed)
    draws = rng.random(batch.n_whole)[batch.offset : batch.offset + len(batch.x)]
    if order == "segment":
        draws += np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    return torch.from_numpy(np.argsort(draws)).to(batch.x.device)


def sparse_term(
    config: TemporalConfig, code: SparseCode, batch: Batch, workspace: Workspace, seed: int, adder: Adder = ALONE
) -> tuple[float, Float[Tensor, " n_entries"]]:
    """Value of the whole batch and gradient, at weight 1, for a sparse code of non-negative entries."""
    if config.order != "text":
        moved = shuffled(config.order, batch, seed)
        part, at = code.take(moved)
        batch = batch._replace(x=batch.x[moved])
        found, unit = sparse_term(replace(config, order="text"), part, batch, workspace, seed, adder)
        return found, torch.empty_like(unit).index_copy_(0, at, unit)
    if config.kind == "contrastive":
        return contrastive(config, code, batch, seed, adder)
    pairs = pairs_of(config, batch)
    grad = torch.zeros_like(code.values)
    value = adder.tensor(difference_sparse(code, pairs, grad, workspace.zeros(code.n_tokens, code.d_sae)))
    if config.kind == "relative":
        share = energy_share(pairs)[code.rows]
        energy = (share * code.values.to(sum_dtype(share.device)).square()).sum()
        return relative(value, adder.tensor(energy), grad, share * code.values)
    return float(value), grad


def dense_term(
    config: TemporalConfig,
    activations: Float[Tensor, "n d"],
    batch: Batch,
    workspace: Workspace,
    seed: int,
    adder: Adder = ALONE,
) -> tuple[float, Float[Tensor, "n d"]]:
    """As `sparse_term`, for a dense code; the gradient may lie in the workspace."""
    if config.order != "text":
        moved = shuffled(config.order, batch, seed)
        batch = batch._replace(x=batch.x[moved])
        found, unit = dense_term(replace(config, order="text"), activations[moved], batch, workspace, seed, adder)
        return found, torch.empty_like(unit).index_copy_(0, moved, unit)
    if config.kind == "contrastive":
        return contrastive_dense(config, activations, batch, seed, adder)
    pairs = pairs_of(config, batch)
    grad = workspace.get("temporal", *activations.shape).zero_()
    value = adder.tensor(difference_dense(activations, pairs, grad))
    if config.kind == "relative":
        share = energy_share(pairs)
        energy = (share.to(sum_dtype(share.device)) * activations.square().sum(1)).sum()
        return relative(value, adder.tensor(energy), grad, share[:, None] * activations)
    return float(value), grad


def relative(difference: Tensor, energy: Tensor, grad: Tensor, half_energy_grad: Tensor) -> tuple[float, Tensor]:
    """R = difference / energy, in 0..1 for non-negative codes of any scale; `grad` is difference's, in place."""
    if not energy > 0:
        return 0.0, grad.zero_()
    ratio = float(difference / energy)
    return ratio, grad.sub_(half_energy_grad, alpha=2 * ratio).div_(float(energy))


def partners(batch: Batch, seed: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Bool[Tensor, "p p"]]:
    """One adjacent pair from each of the whole batch's segments that has one, drawn by `seed`, and which pairs are of
    other documents.
    """
    rng = np.random.default_rng(seed)
    lengths = batch.all.lengths
    starts = np.cumsum(lengths) - lengths
    has = np.flatnonzero(lengths >= 2)
    first = starts[has] + rng.integers(0, np.maximum(lengths[has] - 1, 1))
    documents = batch.all.documents[has]
    others = documents[:, None] != documents[None, :]
    device = batch.x.device
    at, apart = torch.from_numpy(first).to(device), torch.from_numpy(others).to(device)
    return at, at + 1, apart


def _paired(batch: Batch, seed: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Bool[Tensor, "p p"]]:
    """Of the 2 p tokens of the whole batch's pairs (each pair's first, then each one's second): which are here, and
    where; and which pairs are of other documents.
    """
    first, second, others = partners(batch, seed)
    rows = torch.cat([first, second]) - batch.offset
    at = ((rows >= 0) & (rows < len(batch.x))).nonzero().squeeze(1)
    return at, rows[at], others


def info_nce(
    a: Float[Tensor, "p d"], b: Float[Tensor, "p d"], others: Bool[Tensor, "p p"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "p d"], Float[Tensor, "p d"]]:
    """Symmetric InfoNCE of cosines, each row's partner against the partners of other documents' rows; d / da, d / db.

    With S = cos(a_i, b_j) / temperature and p pairs, d / dS = (softmax over rows + softmax over columns - 2 I) / (2 p).
    """
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    (unit_a, norm_a), (unit_b, norm_b) = _unit(a), _unit(b)
    scores = (unit_a @ unit_b.T / temperature).masked_fill_(~(others | own), -torch.inf)
    by_row, by_column = scores.log_softmax(1), scores.log_softmax(0)
    value = -(by_row.diagonal() + by_column.diagonal()).mean() / 2
    slope = (by_row.exp() + by_column.exp() - 2 * own) / (2 * len(a) * temperature)
    return value, _along_sphere(slope @ unit_b, unit_a, norm_a), _along_sphere(slope.T @ unit_a, unit_b, norm_b)


def _unit(x: Float[Tensor, "p d"]) -> tuple[Float[Tensor, "p d"], Float[Tensor, "p 1"]]:
    norm = x.norm(dim=1, keepdim=True).clamp_(min=1e-12)
    return x / norm, norm


def _along_sphere(
    grad: Float[Tensor, "p d"], unit: Float[Tensor, "p d"], norm: Float[Tensor, "p 1"]
) -> Float[Tensor, "p d"]:
    """From the gradient at a normed row to that at the row itself."""
    return (grad - unit * (grad * unit).sum(1, keepdim=True)) / norm


def contrastive_dense(
    config: TemporalConfig, activations: Float[Tensor, "n d"], batch: Batch, seed: int, adder: Adder = ALONE
) -> tuple[float, Float[Tensor, "n d"]]:
    """InfoNCE between adjacent tokens (van den Oord et al. 2018, arXiv:1807.03748), of a dense code."""
    at, rows, others = _paired(batch, seed)
    value, grad = _contrast(adder.rows(activations[rows], at, 2 * len(others)), others, config.temperature)
    return value, torch.zeros_like(activations).index_copy_(0, rows, adder.own(grad, at))


def contrastive(
    config: TemporalConfig, code: SparseCode, batch: Batch, seed: int, adder: Adder = ALONE
) -> tuple[float, Float[Tensor, " n_entries"]]:
    """As `contrastive_dense`, at a sparse code's entries."""
    chosen, rows, others = _paired(batch, seed)
    place_of = torch.full_like(code.offsets[1:], -1)
    place_of[rows] = torch.arange(len(rows), device=rows.device)
    place = place_of[code.rows]
    at = (place >= 0).nonzero().squeeze(1)
    where = (place[at], code.latents[at])
    dense = code.values.new_zeros(len(rows), code.d_sae).index_put_(where, code.values[at])
    value, dense_grad = _contrast(adder.rows(dense, chosen, 2 * len(others)), others, config.temperature)
    grad = torch.zeros_like(code.values)
    grad[at] = adder.own(dense_grad, chosen)[where]
    return value, grad


def _contrast(rows: Float[Tensor, "two_p d"], others: Bool[Tensor, "p p"], temperature: float) -> tuple[float, Tensor]:
    """Value and gradient at the few rows that take part: first each pair's first, then each pair's second."""
    if len(others) < 2:
        return 0.0, torch.zeros_like(rows)
    value, *grads = info_nce(rows[: len(others)], rows[len(others) :], others, temperature)
    return float(value), torch.cat(grads)


def positions_of(batch: Batch) -> Int[Tensor, " n"]:
    """Each token's position in its sequence."""
    found = positions(batch.lengths) + np.repeat(batch.starts, batch.lengths)
    return torch.from_numpy(found).to(batch.x.device)


class PositionPenalty:
    """The code's variance between positions, by running means: sum_j sum_p n_p (m_jp - m_j)^2 / n.

    The means follow the batches and are held constant in the gradient, 2 (m_jp - m_j) / n for every token at p.
    """

    def __init__(self, n_positions: int, d: int, device: torch.device, adder: Adder = ALONE) -> None:
        self.adder = adder
        self.sums = torch.zeros(n_positions, d, device=device)
        self.counts = torch.zeros(n_positions, device=device)

    def sparse(self, code: SparseCode, batch: Batch) -> tuple[float, Float[Tensor, " n_entries"]]:
        """Value and gradient at weight 1."""
        position = positions_of(batch)
        entry = position[code.rows]
        self._decay(position)
        flat = entry * self.sums.shape[1] + code.latents
        self.sums.view(-1).index_add_(0, flat, code.values.to(self.sums.dtype))
        off, value = self._deviations()
        return value, (2 / batch.n_whole) * off.view(-1)[flat].to(code.values.dtype)

    def dense(self, activations: Float[Tensor, "n d"], batch: Batch) -> tuple[float, Float[Tensor, "n d"]]:
        """As `sparse`, for a dense code."""
        position = positions_of(batch)
        self._decay(position)
        self.sums.index_add_(0, position, activations.to(self.sums.dtype))
        off, value = self._deviations()
        return value, (2 / batch.n_whole) * off[position].to(activations.dtype)

    def _decay(self, position: Int[Tensor, " n"]) -> None:
        decay = MEANS_DECAY * self.adder.keeps
        self.sums.mul_(decay)
        self.counts.mul_(decay).add_(torch.bincount(position, minlength=len(self.counts)))

    def _deviations(self) -> tuple[Float[Tensor, "n_positions d"], float]:
        self.adder.tensor(self.sums)
        self.adder.tensor(self.counts)
        means = self.sums / self.counts.clamp(min=1)[:, None]
        overall = self.sums.sum(0) / self.counts.sum().clamp(min=1)
        off = torch.where(self.counts[:, None] > 0, means - overall, 0.0)
        shares = self.counts / self.counts.sum().clamp(min=1)
        return off, float((shares[:, None] * off.square()).sum())
