"""Direction of time: the token that comes next, told from the one before and from far ones of the same segment.

A cosine cannot tell the two apart; a bilinear score, learned beside the SAE, can.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import static_shapes, to_device
from tcsae.shared.sae.ops import Code, decode_code, dense_rows
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch
from tcsae.train.losses.contrastive import unit
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.losses.state import NO_STATE, TermState
from tcsae.train.settings.temporal_settings import TemporalConfig


def direction(
    config: TemporalConfig, code: Code, batch: Batch, seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """InfoNCE of (t, t + 1) against (t, t - 1) and (t, u + 1) with u at the gap; score h_t U V^T h_u, unit h."""
    head = state.head
    assert head is not None, "the bilinear score has weights"
    first, _, negatives = choose_pairs(config, batch, seed, before=1)
    if not len(first):
        return 0 * (head.U.sum() + head.V.sum())
    n, device = len(first), batch.x.device
    far = to_device(negatives, device)
    tokens, place = np.unique(np.concatenate([first, first + 1, first - 1]), return_inverse=True)
    t, after, before = to_device(place.reshape(3, n), device)
    ours = tokens - batch.offset
    at = np.flatnonzero((ours >= 0) & (ours < len(batch.x)))
    rows = _unit_rows(code, to_device(ours[at], device))
    U, V = (weights.to(batch.x.dtype) for weights in (head.U, head.V))
    from_all, of_all = (
        batch.group.rows(decode_code(rows, one, None), to_device(at, device), len(tokens)) for one in (U, V)
    )
    from_t, of_next, of_last = from_all[t], of_all[after], of_all[before]
    scores = from_t @ of_next.T / config.contrast.temperature
    backward = (from_t * of_last).sum(1) / config.contrast.temperature
    counts = (far.sum(1) + 1 >= config.contrast.min_negatives).to(scores.dtype)
    positive = scores.diagonal()
    own = torch.eye(n, dtype=torch.bool, device=scores.device)
    scores = torch.cat([scores.masked_fill(~(far | own), -torch.inf), backward[:, None]], 1)
    return batch.group.share(counts @ (scores.logsumexp(1) - positive) / counts.sum().clamp(min=1))


def _unit_rows(code: Code, tokens: Int[Tensor, " m"]) -> Code:
    """The code of distinct tokens, each at norm 1."""
    if isinstance(code, SparseCode) and not static_shapes(code.values):
        return unit(code.take(tokens)[0])
    return F.normalize(dense_rows(code, tokens), dim=1)
