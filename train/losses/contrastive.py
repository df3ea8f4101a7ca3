"""InfoNCE between adjacent tokens (van den Oord et al. 2018, arXiv:1807.03748).

Against other documents' pairs, a code has to say what is common to a document; against far pairs of the same
segment ("local"), only what is common to neighbours, as topic and running means are shared by positives and negatives.
With a symmetric score that measures locality, not direction: text read backwards scores the same.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import static_shapes, to_device
from tcsae.shared.sae.ops import Code, decode_code, dense_rows, square_norms
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.losses.state import NO_STATE, TermState
from tcsae.train.settings.temporal_settings import TemporalConfig


def contrastive(
    config: TemporalConfig, code: Code, batch: Batch, seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of adjacent pairs, with cosine scores over temperature."""
    first, _, others = choose_pairs(config, batch, seed)
    if len(first) < 2:
        return torch.zeros((), device=batch.x.device, dtype=batch.x.dtype)
    contrast = config.contrast
    scores = cosines(code, first, first + 1, batch, state if contrast.centred else NO_STATE)
    negatives = to_device(others, batch.x.device)
    return batch.group.share(info_nce(scores / contrast.temperature, negatives, contrast.min_negatives))


def cosines(
    code: Code, first: Int[ndarray, " p"], second: Int[ndarray, " p"], batch: Batch, state: TermState = NO_STATE
) -> Float[Tensor, "p p"]:
    """Cosine of each token of `first` (of the whole batch) with each of `second`.

    Less the running means at their positions, if `state` has them.
    """
    device = batch.x.device
    if isinstance(code, SparseCode) and batch.group.alone and not static_shapes(code.values):
        at_a, at_b = torch.from_numpy(first), torch.from_numpy(second)
        a, b = code.take(at_a)[0], code.take(at_b)[0]
        if state.means is None:
            return sparse_products(unit(a), unit(b))
        assert state.position is not None
        return _centred_cosines(a, b, state.means, state.position[at_a], state.position[at_b])
    tokens, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    rows = whole_rows(code, tokens, batch)
    if state.means is not None:
        assert state.position is not None
        position = whole_rows(state.position[:, None].to(rows), tokens, batch)[:, 0].long()
        rows = rows - state.means[position].to(rows)
    rows = F.normalize(rows, dim=1)[to_device(place.reshape(2, -1), device)]
    return rows[0] @ rows[1].T


def whole_rows(code: Code, tokens: Int[ndarray, " m"], batch: Batch) -> Float[Tensor, "m d"]:
    """The code of distinct tokens of the whole batch, which several processes may have a part of each."""
    device, ours = batch.x.device, tokens - batch.offset
    at = np.flatnonzero((ours >= 0) & (ours < len(batch.x)))  # on the host, so that a GPU is not waited for
    return batch.group.rows(dense_rows(code, to_device(ours[at], device)), to_device(at, device), len(tokens))


def _centred_cosines(
    a: SparseCode,
    b: SparseCode,
    means: Float[Tensor, "n_positions d"],
    at_a: Int[Tensor, " p"],
    at_b: Int[Tensor, " p"],
) -> Float[Tensor, "p p"]:
    """Cosines of a - m and b - m' without a row that is dense: (a - m)(b - m') = ab - am' - mb + mm'."""
    means = means.to(a.values.dtype)
    columns, of_means = means.T.contiguous(), means @ means.T
    a_means, b_means = decode_code(a, columns, None), decode_code(b, columns, None)
    products = sparse_products(a, b) - a_means[:, at_b] - b_means[:, at_a].T + of_means[at_a[:, None], at_b]

    def norm(code: SparseCode, with_means: Tensor, at: Tensor) -> Float[Tensor, " p"]:
        own = with_means.gather(1, at[:, None]).squeeze(1)
        squares = square_norms(code)
        squares = squares - 2 * own.to(squares) + of_means.diagonal()[at].to(squares)
        return squares.clamp_min(1e-24).sqrt().to(means.dtype)

    return products / (norm(a, a_means, at_a)[:, None] * norm(b, b_means, at_b))


def unit(code: SparseCode) -> SparseCode:
    """Each token's code at norm 1; one without an active latent stays 0."""
    norms = square_norms(code).clamp_min(1e-24).sqrt()
    return code.with_values(code.values / norms.to(code.values.dtype).index_select(0, code.rows))


def sparse_products(a: SparseCode, b: SparseCode) -> Float[Tensor, "n_a n_b"]:
    """Inner product of each token of `a` with each of `b`.

    256 tokens by 256 of 32 latents each out of 4096 take 2 million products, as matrices 268 million.
    """
    columns = b.values.new_zeros(b.d_sae, b.n_tokens).index_put((b.latents, b.rows), b.values)
    return decode_code(a, columns, None)


def info_nce(
    scores: Float[Tensor, "p p"], negatives: Bool[Tensor, "p p"] | None, min_negatives: int = 1
) -> Float[Tensor, ""]:
    """Mean over both directions of -log softmax of each pair's score among its negatives' (None: all others').

    Pairs with fewer than `min_negatives` in either direction are left out; 0 if all are.
    """
    counts = torch.ones_like(scores[0])
    positive = scores.diagonal()
    if negatives is not None:
        fewest = torch.minimum(negatives.sum(1), negatives.sum(0))
        counts = (fewest >= min_negatives).to(scores.dtype)
        own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~(negatives | own), -torch.inf)
    losses = (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - positive
    return counts @ losses / counts.sum().clamp(min=1)
