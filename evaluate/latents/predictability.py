"""Held-out predictability: how well a latent's firing follows from the text, without anybody to explain it.

A latent that a reader could name is one whose firing something about the text tells. Predictors are the token's id and
the ids before it (rates of firing, shrunk to those of the shorter context), and labels of the text; they are fitted on
half of the documents, and the other half scores them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csr_array

from tcsae.evaluate.latents.material import Sequences
from tcsae.evaluate.probing.scores import auroc, logistic

N_GRAMS = 3
PRIOR = 2.0
"""Tokens that the shorter context's rate counts as."""
MIN_EACH = 10
"""Firings, and tokens without one, that each half must have for a latent to be scored."""
MAX_FIT = 2048
NAMED = 0.9

DEFINITIONS = {
    "auc_token": "AUROC, on held-out documents, with which a latent's firing follows from the token's id alone; median "
    "over latents",
    "auc_ngram": f"the same from the last {N_GRAMS} ids",
    "auc_text": "the same from these and from labels of the text (see `tcsae probe`)",
    "readable": f"share of latents with an auc_text above {NAMED}",
    "intruder": "share of trials in which, of five contexts, the one with the latent off is least like the others "
    "(words of the last 8 tokens); chance is .2",
}


class Predicted(NamedTuple):
    """AUROC of each latent on the held-out half; NaN for one that fires too seldom."""

    token: Float[ndarray, " m"]
    ngram: Float[ndarray, " m"]
    text: Float[ndarray, " m"]


class Contexts:
    """Of each counted token, numbers of its n-grams, and the labels of the text."""

    def __init__(self, sequences: Sequences, labels: Sequence[Int[ndarray, " n"]], train: Bool[ndarray, " n"]) -> None:
        self.train = train
        self.grams: list[Int[ndarray, " n"]] = []
        """Number of the gram of 1, 2, ... ids that ends at each token."""
        number = np.zeros(len(train), np.int64)
        for back in range(N_GRAMS):
            ids = ids_before(sequences, back)
            number = np.unique(number * (int(ids.max(initial=0)) + 2) + ids + 1, return_inverse=True)[1]
            self.grams.append(number)
        self.before = np.unique(ids_before(sequences, 1), return_inverse=True)[1]
        self.labels = np.zeros((len(train), 0), np.float32)
        if labels:
            self.labels = np.stack([np.maximum(one, 0) for one in labels], 1).astype(np.float32)


def ids_before(sequences: Sequences, back: int) -> Int[ndarray, " n"]:
    """The id so many tokens before each counted one; -1 before a sequence's first."""
    at = sequences.position - back
    return np.where(at >= 0, sequences.ids[sequences.sequence, np.maximum(at, 0)], -1).astype(np.int64)


def predicted(contexts: Contexts, on: csr_array) -> Predicted:
    """Of each column of a matrix [n, m] whose entries are firings."""
    dense = on.toarray() != 0
    figures = np.full((3, dense.shape[1]), np.nan)
    train = contexts.train
    for i, fires in enumerate(dense.T):
        counts = [int((fires[half] == one).sum()) for half in (train, ~train) for one in (False, True)]
        if min(counts) >= MIN_EACH:
            figures[:, i] = _of_latent(contexts, fires)
    return Predicted(*figures)


def _of_latent(contexts: Contexts, fires: Bool[ndarray, " n"]) -> tuple[float, float, float]:
    train, base = contexts.train, float(fires[contexts.train].mean())
    prior = np.full(len(fires), base)
    rates = [prior := gram_rates(gram, fires, train, prior) for gram in contexts.grams]
    before = gram_rates(contexts.before, fires, train, np.full(len(fires), base))
    logits = np.stack([np.log(one / (1 - one)) for one in (*rates, before)], 1)
    parts = [np.flatnonzero(train & (fires == value)) for value in (False, True)]
    at = np.concatenate([one[:: -(-len(one) // MAX_FIT)] for one in parts])
    features = np.concatenate([logits[at], contexts.labels[at]], 1)
    spread = np.maximum(features.std(0), 1e-6)
    weights = logistic((features - features.mean(0)) / spread, fires[at]) / spread
    n, tested = logits.shape[1], ~train
    scores = logits[tested] @ weights[:n] + contexts.labels[tested] @ weights[n:]
    truth = fires[tested]
    return auroc(rates[0][tested], truth), auroc(rates[-1][tested], truth), auroc(scores, truth)


def gram_rates(
    gram: Int[ndarray, " n"], fires: Bool[ndarray, " n"], train: Bool[ndarray, " n"], prior: Float[ndarray, " n"]
) -> Float[ndarray, " n"]:
    """Rate of firing after the same gram in the training half, a token itself left out of its own, shrunk to `prior`.

    Within (0, 1).
    """
    size = int(gram.max(initial=0)) + 1
    n, n_on = (np.bincount(gram[train], weights, size)[gram] for weights in (None, fires[train]))
    n, n_on = n - train, n_on - (train & fires)
    return ((n_on + PRIOR * prior) / (n + PRIOR)).clip(1e-6, 1 - 1e-6)


def summary(aucs: Predicted) -> dict[str, float | None]:
    """The figures of DEFINITIONS but `intruder`."""
    scored = ~np.isnan(aucs.text)
    if not scored.any():
        return dict.fromkeys(("auc_token", "auc_ngram", "auc_text", "readable"))
    figures: dict[str, float | None] = {"readable": float((aucs.text[scored] > NAMED).mean())}
    return figures | {f"auc_{name}": float(np.median(values[scored])) for name, values in aucs._asdict().items()}
