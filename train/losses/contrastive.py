"""InfoNCE between adjacent tokens (van den Oord et al. 2018, arXiv:1807.03748), against other documents' pairs."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import to_device
from tcsae.shared.sae.ops import Code, dense_rows
from tcsae.train.batch import Batch
from tcsae.train.config import TemporalConfig


def contrastive(config: TemporalConfig, code: Code, batch: Batch, seed: int) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of one adjacent pair from every segment, with cosine scores over temperature."""
    first, others = _drawn(batch, seed)
    pairs, device = len(first), batch.x.device
    if pairs < 2:
        return torch.zeros((), device=device, dtype=batch.x.dtype)
    tokens = np.concatenate([first, first + 1]) - batch.offset
    at = np.flatnonzero((tokens >= 0) & (tokens < len(batch.x)))  # on the host, so that a GPU is not waited for
    rows = dense_rows(code, to_device(tokens[at], device))
    rows = batch.group.rows(rows, to_device(at, device), len(tokens))
    others = to_device(others, device)
    return batch.group.share(info_nce(rows[:pairs], rows[pairs:], others, config.temperature))


def partners(batch: Batch, seed: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Bool[Tensor, "p p"]]:
    """(first, second, others): one adjacent pair from each of the whole batch's segments that has one, drawn by `seed`,
    as tokens of the whole batch, and which pairs are of other documents.
    """
    first, others = _drawn(batch, seed)
    tokens = to_device(first, batch.x.device)
    return tokens, tokens + 1, to_device(others, batch.x.device)


def _drawn(batch: Batch, seed: int) -> tuple[Int[ndarray, " p"], Bool[ndarray, "p p"]]:
    """First tokens and `others` of `partners`, on the host."""
    rng = np.random.default_rng(seed)
    lengths = batch.all.lengths
    starts = np.cumsum(lengths) - lengths
    paired = np.flatnonzero(lengths >= 2)
    first = starts[paired] + rng.integers(0, np.maximum(lengths[paired] - 1, 1))
    documents = batch.all.documents[paired]
    return first, documents[:, None] != documents[None, :]


def info_nce(
    a: Float[Tensor, "p d"], b: Float[Tensor, "p d"], others: Bool[Tensor, "p p"], temperature: float
) -> Float[Tensor, ""]:
    """Mean over both directions: each row's partner against the partners of other documents' rows."""
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    scores = scores.masked_fill(~(others | own), -torch.inf)
    return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
