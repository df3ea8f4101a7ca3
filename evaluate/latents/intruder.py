"""The intruder test without a judge: of five contexts, is the one in which the latent is off the odd one out?

Contexts are compared by their words: the cosine of tf-idf vectors of the ids in the last tokens, the token itself and
the one before it also by their place.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csr_array

from tcsae.evaluate.latents.material import Sequences
from tcsae.evaluate.latents.predictability import ids_before

WINDOW = 8
SHOWN = 5
"""Contexts of a trial, the intruder among them."""
TRIALS = 16
CHANCE = 1 / SHOWN
PLACED = 2
"""Last tokens that also count by their place."""


def context_vectors(sequences: Sequences) -> csr_array:
    """One row of norm 1 for each counted token."""
    columns = [ids_before(sequences, back) for back in range(WINDOW)]
    vocabulary = int(max(one.max(initial=0) for one in columns)) + 1
    words = [one[:, None] for one in columns]
    words += [
        np.where(columns[back] >= 0, columns[back] + (1 + back) * vocabulary, -1)[:, None] for back in range(PLACED)
    ]
    ids = np.concatenate(words, 1)
    n, width = ids.shape
    row, word = np.repeat(np.arange(n), width), ids.ravel()
    known = word >= 0
    counts = csr_array((np.ones(known.sum()), (row[known], word[known])), shape=(n, (1 + PLACED) * vocabulary))
    weight = np.log((1 + n) / (1 + np.bincount(counts.indices, minlength=counts.shape[1])))
    counts.data = counts.data * weight[counts.indices]
    norms = np.sqrt(np.asarray(counts.power(2).sum(1)).ravel())
    counts.data = counts.data / np.maximum(norms, 1e-12)[np.repeat(np.arange(n), np.diff(counts.indptr))]
    return counts


def intruder(vectors: csr_array, on: csr_array, documents: Int[ndarray, " n"], seed: int = 0) -> Float[ndarray, " m"]:
    """Of each latent (a column of `on`) the share of trials in which the intruder is the least like the others.

    Contexts of a trial are from different documents; the intruder is one at which another latent is on. NaN for a
    latent that is on in fewer than SHOWN documents.
    """
    dense: Bool[ndarray, "n m"] = on.toarray() != 0
    anywhere = np.flatnonzero(dense.any(1))
    rng = np.random.default_rng(seed)
    shares = np.full(dense.shape[1], np.nan)
    for i, fires in enumerate(dense.T):
        at = np.flatnonzero(fires)
        off = anywhere[~fires[anywhere]]
        if len(np.unique(documents[at])) >= SHOWN and len(off):
            shares[i] = np.mean([_trial(vectors, at, off, documents, rng) for _ in range(TRIALS)])
    return shares


def _trial(
    vectors: csr_array,
    at: Int[ndarray, " n_on"],
    off: Int[ndarray, " n_off"],
    documents: Int[ndarray, " n"],
    rng: np.random.Generator,
) -> float:
    """1 if the intruder is picked, 0 if not, shares where others are as unlike."""
    shuffled = rng.permutation(at)
    first = np.unique(documents[shuffled], return_index=True)[1]
    contexts = shuffled[rng.permutation(first)[: SHOWN - 1]]
    rows = vectors[np.append(contexts, rng.choice(off))]
    alike = (rows @ rows.T).toarray()
    np.fill_diagonal(alike, 0)
    likeness = alike.sum(1).round(9)
    least = likeness == likeness.min()
    return float(least[-1] / least.sum())
