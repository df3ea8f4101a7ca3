"""Direction of time: the token that comes next, told from the one before and from far ones of the same segment.

A cosine cannot tell the two apart; a bilinear score, learned beside the SAE, can.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.ops import Code, decode_code, take
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch
from tcsae.train.config import TemporalConfig
from tcsae.train.losses.contrastive import unit
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.losses.state import NO_STATE, TermState


def direction(
    config: TemporalConfig, code: Code, batch: Batch, seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """InfoNCE of (t, t + 1) against (t, t - 1) and (t, u + 1) with u at the gap; score h_t U V^T h_u, unit h."""
    head = state.head
    assert head is not None, "the bilinear score has weights"
    first, _, far = choose_pairs(config, batch, seed, before=1)
    if not len(first):
        return 0 * (head.U.sum() + head.V.sum())
    n = len(first)
    tokens = torch.cat([first, first + 1, first - 1]) - batch.offset
    at = ((tokens >= 0) & (tokens < len(batch.x))).nonzero().squeeze(1)
    rows = take(code, tokens[at])
    rows = unit(rows) if isinstance(rows, SparseCode) else F.normalize(rows, dim=1)
    U, V = (weights.to(batch.x.dtype) for weights in (head.U, head.V))
    from_t = batch.group.rows(decode_code(rows, U, None), at, 3 * n)[:n]
    of_next, of_last = batch.group.rows(decode_code(rows, V, None), at, 3 * n)[n:].split(n)
    scores = from_t @ of_next.T / config.contrast.temperature
    backward = (from_t * of_last).sum(1) / config.contrast.temperature
    kept = (far.sum(1) + 1 >= config.contrast.min_negatives).to(scores.dtype)
    positive = scores.diagonal()
    own = torch.eye(n, dtype=torch.bool, device=scores.device)
    scores = torch.cat([scores.masked_fill(~(far | own), -torch.inf), backward[:, None]], 1)
    return batch.group.share(kept @ (scores.logsumexp(1) - positive) / kept.sum().clamp(min=1))
