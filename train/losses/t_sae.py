"""T-SAE (arXiv 2511.05541) as its published code trains it, but for this: a pair's tokens never lie in two documents;
AuxK looks at 1024 tokens of a batch; decoder rows start normal, not uniform; the threshold's average starts at half the
run where that has fewer than 2000 steps; each text draws its own past partners.

Tokens come in pairs: a current one, which is reconstructed, and a partner earlier in the same segment, of which only
the code is used. Both are encoded, and their BatchTopK taken, apart. On the first group's codes F (current) and P:

    (CE(S, diagonal) + CE(S^T, diagonal)) / 2,   S = F P^T

Inner products, without norm or temperature, so the strength goes with the square of the activations' scale; against
all other pairs of the batch, those of the same document included.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.device import static_shapes, to_device
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch, Whole, shuffled
from tcsae.train.losses.contrastive import info_nce, sparse_products
from tcsae.train.losses.state import NO_STATE, TermState
from tcsae.train.settings.temporal_settings import TemporalConfig

THRESHOLD_DECAY = 0.999
THRESHOLD_START = 1000
"""Step after which the threshold follows the smallest activation kept."""


def t_sae(
    _config: TemporalConfig, code: Code, batch: Batch, _seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """The contrastive term, of the codes of current tokens and, in `state.partner`, of their partners."""
    partner = state.partner
    assert partner is not None, "its pairs are encoded by the trainer"
    if batch.n_whole < 2:
        return torch.zeros((), device=batch.x.device, dtype=batch.x.dtype)
    if isinstance(code, SparseCode) and isinstance(partner, SparseCode):
        if batch.group.alone and not static_shapes(code.values):
            return info_nce(sparse_products(code, partner), None)
        code, partner = code.dense(), partner.dense()
    assert isinstance(code, Tensor) and isinstance(partner, Tensor)
    mine = torch.arange(len(batch.x), device=batch.x.device) + batch.offset
    a, b = (batch.group.rows(one, mine, batch.n_whole) for one in (code, partner))
    return batch.group.share(info_nce(a @ b.T, None))


class Paired(NamedTuple):
    """A batch as this loss sees it."""

    current: Batch
    """Of the current tokens, each a segment to itself."""
    partners: Float[Tensor, "n d_model"]


def paired(config: TemporalConfig, batch: Batch, seed: int) -> Paired:
    """Pairs drawn from every segment of two tokens or more: `contrast.per_segment` current ones, or all that can be.

    In another order of the tokens where a control asks for it.
    """
    whole, contrast = batch.all, config.contrast
    rng = np.random.default_rng(seed)
    segment, current = _currents(whole.lengths, contrast.per_segment or 1, rng)
    partner = current - 1 if contrast.partner == "previous" else rng.integers(0, np.maximum(current, 1))
    first = (np.cumsum(whole.lengths) - whole.lengths)[segment]
    ours = (first >= batch.offset) & (first < batch.offset + len(batch.x))
    index = to_device(np.stack([first + current, first + partner])[:, ours] - batch.offset, batch.x.device)
    if config.order != "text":
        _, batch = shuffled(config.order, batch, seed)
    start, documents = whole.starts[segment] + current, whole.documents[segment]
    ones = np.ones_like(segment)
    seen = Batch(batch.x[index[0]], ones[ours], start[ours], documents[ours], group=batch.group)
    if batch.whole is not None:
        n_before = int((first < batch.offset).sum())
        seen = seen._replace(whole=Whole(ones, documents, n_before, start))
    return Paired(seen, batch.x[index[1]])


def _currents(
    lengths: Int[ndarray, " n_segments"], limit: int, rng: np.random.Generator
) -> tuple[Int[ndarray, " p"], Int[ndarray, " p"]]:
    """(segment, offset) of up to `limit` distinct tokens of each segment, never its first."""
    room = np.maximum(lengths - 1, 0)
    segment, offset = np.repeat(np.arange(len(room)), room), positions(room)
    order = np.lexsort((rng.random(len(segment)), segment))
    keep = np.sort(order[positions(room) < limit])
    return segment[keep], offset[keep] + 1


def next_threshold(
    threshold: Float[Tensor, ""], values: Float[Tensor, " n"], batch: Batch, step: int, steps: int
) -> Float[Tensor, ""]:
    """The threshold after 0-based `step`: from a start on, the running mean of the smallest activation kept."""
    start = min(THRESHOLD_START, steps // 2)
    if step <= start:
        return threshold
    smallest = batch.group.smallest(torch.where(values > 0, values, torch.inf))
    smallest = torch.where(smallest.isinf(), 0.0, smallest)
    return smallest if step == start + 1 else THRESHOLD_DECAY * threshold + (1 - THRESHOLD_DECAY) * smallest


def residual_variance(residual: Float[Tensor, "n d_model"], batch: Batch) -> Float[Tensor, ""]:
    """Variance of the whole batch's residuals, summed over dimensions: T-SAE's AuxK is divided by it."""
    mean = batch.group.mean(residual, max(1, batch.n_whole))
    return (batch.group.sum_((residual - mean).square().sum()) / max(1, batch.n_whole)).clamp_min(1e-30)
