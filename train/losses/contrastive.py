"""InfoNCE between adjacent tokens (van den Oord et al. 2018, arXiv:1807.03748), against other documents' pairs."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.ops import Code, dense_rows
from tcsae.train.batch import Batch
from tcsae.train.config import TemporalConfig


def contrastive(config: TemporalConfig, code: Code, batch: Batch, seed: int) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of one adjacent pair from every segment, with cosine scores over temperature."""
    first, second, others = partners(batch, seed)
    if len(others) < 2:
        return torch.zeros((), device=batch.x.device, dtype=batch.x.dtype)
    tokens = torch.cat([first, second]) - batch.offset
    at = ((tokens >= 0) & (tokens < len(batch.x))).nonzero().squeeze(1)
    rows = batch.group.rows(dense_rows(code, tokens[at]), at, len(tokens))
    pairs = len(others)
    return batch.group.share(info_nce(rows[:pairs], rows[pairs:], others, config.temperature))


def partners(batch: Batch, seed: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Bool[Tensor, "p p"]]:
    """(first, second, others): one adjacent pair from each of the whole batch's segments that has one, drawn by `seed`,
    as tokens of the whole batch, and which pairs are of other documents.
    """
    rng = np.random.default_rng(seed)
    lengths = batch.all.lengths
    starts = np.cumsum(lengths) - lengths
    paired = np.flatnonzero(lengths >= 2)
    first = starts[paired] + rng.integers(0, np.maximum(lengths[paired] - 1, 1))
    documents = batch.all.documents[paired]
    others = torch.from_numpy(documents[:, None] != documents[None, :]).to(batch.x.device)
    tokens = torch.from_numpy(first).to(batch.x.device)
    return tokens, tokens + 1, others


def info_nce(
    a: Float[Tensor, "p d"], b: Float[Tensor, "p d"], others: Bool[Tensor, "p p"], temperature: float
) -> Float[Tensor, ""]:
    """Mean over both directions: each row's partner against the partners of other documents' rows."""
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    scores = scores.masked_fill(~(others | own), -torch.inf)
    return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
