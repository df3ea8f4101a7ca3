"""Topic: tokens of one document, far apart and in different words, told from tokens of documents of similar words.

A positive pair has `contrast.distance` positions between its two tokens and no word in common within `contrast.around`
tokens of each; so has a pair with a negative, else a shared word would mark the positive. Negatives are of the half of
the batch's documents whose words are most like the anchor's (tf-idf).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.device import to_device
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.ops import Code
from tcsae.train.batch import Batch
from tcsae.train.losses.contrastive import contrastive, cosines, info_nce
from tcsae.train.losses.state import NO_STATE, TermState
from tcsae.train.settings.temporal_settings import ContrastConfig, TemporalConfig

DRAWS = 8
"""Candidates for each anchor's partner; where none of them fits, the anchor is left out."""
MATCHED = 0.5
"""Share of the other documents that count as similar."""


class TopicPairs(NamedTuple):
    """Tokens of the whole batch."""

    anchor: Int[ndarray, " p"]
    partner: Int[ndarray, " p"]
    negatives: Bool[ndarray, "p p"]
    """[i, j]: whether anchor i is told from partner j."""


def topic(
    config: TemporalConfig, code: Code, batch: Batch, seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of topic pairs, with cosine scores over temperature."""
    contrast, device = config.contrast, batch.x.device
    anchor, partner, negatives = topic_pairs(contrast, batch, seed)
    if len(anchor) < 2:
        return torch.zeros((), device=device, dtype=batch.x.dtype)
    scores = cosines(code, anchor, partner, batch, state if contrast.centred else NO_STATE) / contrast.temperature
    return batch.group.share(info_nce(scores, to_device(negatives, device), contrast.min_negatives))


def local_topic(
    config: TemporalConfig, code: Code, batch: Batch, seed: int, state: TermState = NO_STATE
) -> Float[Tensor, ""]:
    """Mean of the local contrast and the topic term."""
    return (contrastive(config, code, batch, seed, state) + topic(config, code, batch, seed, state)) / 2


def topic_pairs(contrast: ContrastConfig, batch: Batch, seed: int) -> TopicPairs:
    """Up to `contrast.per_segment` (1) anchors of each segment of the whole batch, with partners and negatives."""
    whole, text = batch.all, batch.text
    assert text is not None, "the loader was not asked for token ids"
    rng = np.random.default_rng(seed)
    n, limit = int(whole.lengths.sum()), contrast.per_segment or 1
    segment = np.repeat(np.arange(len(whole.lengths)), whole.lengths)
    order = np.lexsort((rng.random(n), segment))
    anchor = np.sort(order[positions(whole.lengths) < limit])
    document = np.unique(whole.documents, return_inverse=True)[1][segment]
    of_document, counts = np.argsort(document, kind="stable"), np.bincount(document)
    first = (np.cumsum(counts) - counts)[document[anchor]]
    drawn = first[:, None] + (rng.random((len(anchor), DRAWS)) * counts[document[anchor], None]).astype(np.int64)
    candidates = of_document[drawn]
    near = _neighbours(text.tokens, segment, contrast.around)
    fits = np.abs(text.places[candidates] - text.places[anchor, None]) >= contrast.distance
    fits &= ~_share(near[anchor][:, None], near[candidates])
    chosen, has_partner = fits.argmax(1), fits.any(1)
    anchor, partner = anchor[has_partner], candidates[has_partner, chosen[has_partner]]
    similar = _similar_documents(text.tokens, document)
    negatives = similar[document[anchor][:, None], document[partner]]
    negatives &= ~_share(near[anchor][:, None], near[partner][None])
    return TopicPairs(anchor, partner, negatives)


def _neighbours(tokens: Int[ndarray, " n"], segment: Int[ndarray, " n"], around: int) -> Int[ndarray, "n m"]:
    """Token ids around each token in its segment; -1 beyond its ends."""
    at = np.arange(len(tokens))[:, None] + np.arange(-around, around + 1)
    inside = (at >= 0) & (at < len(tokens))
    at = np.where(inside, at, 0)
    return np.where(inside & (segment[at] == segment[:, None]), tokens[at], -1)


def _share(a: Int[ndarray, "*#shape m"], b: Int[ndarray, "*#shape m"]) -> Bool[ndarray, "..."]:
    """Whether the two have a token in common; shapes broadcast."""
    in_common = np.zeros(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), bool)
    for i in range(a.shape[-1]):
        in_common |= ((a[..., i, None] == b) & (b >= 0)).any(-1)
    return in_common


def _similar_documents(tokens: Int[ndarray, " n"], document: Int[ndarray, " n"]) -> Bool[ndarray, "d d"]:
    """[i, j]: whether j is among the nearest of i's others by tf-idf, or i among j's."""
    words = np.unique(tokens, return_inverse=True)[1]
    n_documents = int(document.max()) + 1
    counts = np.zeros((n_documents, int(words.max()) + 1), np.float32)
    np.add.at(counts, (document, words), 1.0)
    weighted = counts * np.log(n_documents / (counts > 0).sum(0))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    likeness = weighted @ weighted.T
    np.fill_diagonal(likeness, -np.inf)
    n_near = int(np.ceil(MATCHED * (n_documents - 1)))
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :n_near]
    similar = np.zeros((n_documents, n_documents), bool)
    similar[np.arange(n_documents)[:, None], nearest] = True
    return similar | similar.T
