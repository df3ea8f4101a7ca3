"""Splitting and absorption, with labels that token ids alone give: first letter, leading space, digit.

As SAEBench measures them on first letters (arXiv:2409.14507), on the store's own text: the latents that a label takes
are chosen on half of the documents, everything else is counted on the other half.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csc_array

from tcsae.evaluate.latents.material import Coded
from tcsae.evaluate.probing.scores import discriminant, logistic

MIN_EACH, MIN_IDS = 100, 4
"""Tokens with a label in each half, and different ids with it."""
MAX_FIT = 2048
MAX_LATENTS = 6
GAIN = 0.03
"""F1 that another latent must add to count as part of a split: SAEBench's."""
ABSORBED = 0.4
"""Share of what is reconstructed along the label's direction that one other latent must carry: SAEBench's."""
MIN_F1, ABOVE_ALWAYS = 0.5, 0.1
"""F1 from which on a label counts as one that latents stand for, and how far above that of always saying it."""

DEFINITIONS = {
    "labels": "labels of token ids (first letter, leading space, digit) that are frequent enough",
    "x_f1": "F1 of a linear probe on x for the label, mean over labels: what there is to be had",
    "label_f1": "F1 of the one latent that says most of the label, mean over labels",
    "split_f1": f"the same of as many latents as each add {GAIN} of F1",
    "splits": "latents that a label is split into: as many as each add that much; mean over labels",
    "absorption": "share of a label's tokens, of those that the probe on x gets right, on which all of these latents "
    f"are off while one other carries {ABSORBED:.0%} or more of what is reconstructed along the probe; mean over "
    f"labels with a split_f1 of {MIN_F1} or more, {ABOVE_ALWAYS} above that of always saying the label",
}


class TokenLabel(NamedTuple):
    name: str
    values: Int[ndarray, " n"]
    """0 or 1 for each token; -1: it says nothing of it."""


def id_labels(texts: Mapping[int, str]) -> dict[str, dict[int, int]]:
    """{label: {id: 0 or 1}}; of first letters, only for tokens that begin with one, spaces aside."""
    labels: dict[str, dict[int, int]] = {}
    firsts = {token: text.lstrip()[:1].lower() for token, text in texts.items()}
    lettered = {token: one for token, one in firsts.items() if one.isascii() and one.isalpha()}
    for letter in sorted(set(lettered.values())):
        labels[f"first_letter_{letter}"] = {token: int(one == letter) for token, one in lettered.items()}
    labels["leading_space"] = {token: int(text[:1] == " ") for token, text in texts.items()}
    labels["digit"] = {token: int(any(one.isdigit() for one in text)) for token, text in texts.items()}
    return labels


def permuted_ids(labels: Mapping[str, Mapping[int, int]], seed: int = 0) -> dict[str, dict[int, int]]:
    """The null: which ids have a label is permuted among those that it says something of."""
    rng = np.random.default_rng(seed)
    return {
        name: dict(zip(of_id, rng.permutation(list(of_id.values())).tolist(), strict=True))
        for name, of_id in labels.items()
    }


def token_labels(
    ids: Int[ndarray, " n"], labels: Mapping[str, Mapping[int, int]], train: Bool[ndarray, " n"]
) -> list[TokenLabel]:
    """Labels of tokens, those that are frequent enough in both halves and have MIN_IDS ids with and without."""
    frequent = []
    for name, of_id in labels.items():
        table = np.full(int(max(ids.max(initial=0), *of_id)) + 1, -1, np.int8)
        table[list(of_id)] = list(of_id.values())
        values = table[ids]
        counts = [int((values[half] == one).sum()) for half in (train, ~train) for one in (0, 1)]
        n_ids = [len(np.unique(ids[values == one])) for one in (0, 1)]
        if min(counts) >= MIN_EACH and min(n_ids) >= MIN_IDS:
            frequent.append(TokenLabel(name, values))
    return frequent


class ProbedLabel(NamedTuple):
    """A label with what stands for it in x and in the code."""

    values: Int[ndarray, " n"]
    direction: Float[ndarray, " d_model"]
    """Fisher's discriminant, of the training half."""
    scores: Float[ndarray, " n"]
    """x along it."""
    ranked: Int[ndarray, " k"]
    """The latents that say most of it, of the training half."""
    features: Float[ndarray, "n k"]
    """Their values, in units of their means where they are on."""


def splitting(coded: Coded, labels: list[TokenLabel], train: Bool[ndarray, " n"]) -> dict[str, Any]:
    """{"figures": of DEFINITIONS, "labels": {label: its own}}."""
    if not labels:
        return {"figures": dict.fromkeys(DEFINITIONS) | {"labels": 0}, "labels": {}}
    probed = zip(labels, _probed(coded, labels, train), strict=True)
    of_label = {label.name: _of_label(coded, one, train) for label, one in probed}
    figures: dict[str, float | None] = {"labels": len(labels)}
    for name in DEFINITIONS.keys() - {"labels"}:
        known = [one[name] for one in of_label.values() if one[name] is not None]
        figures[name] = float(np.mean(known)) if known else None
    return {"figures": {name: figures[name] for name in DEFINITIONS}, "labels": of_label}


def _probed(coded: Coded, labels: list[TokenLabel], train: Bool[ndarray, " n"]) -> Iterator[ProbedLabel]:
    """All labels at once where that is a product of matrices."""
    contrasts = np.zeros((len(train), len(labels)))
    for i, label in enumerate(labels):
        for value, sign in ((1, 1.0), (0, -1.0)):
            which = train & (label.values == value)
            contrasts[which, i] = sign / which.sum()
    x, columns = coded.sequences.x.double().numpy(), csc_array(coded.code)
    centred = x[train] - x[train].mean(0)
    directions = discriminant(x.T @ contrasts, centred.T @ centred / len(centred))
    scores = x @ directions
    n_on = np.maximum(np.diff(columns.indptr), 1)
    scale = np.maximum(np.asarray(columns.sum(0)).ravel() / n_on, 1e-12)
    differences = (columns.T @ contrasts) / scale[:, None]
    for i, label in enumerate(labels):
        ranked = np.argsort(-differences[:, i], kind="stable")[:MAX_LATENTS]
        features = columns[:, ranked].toarray() / scale[ranked]
        yield ProbedLabel(label.values, directions[:, i], scores[:, i], ranked, features)


def _of_label(coded: Coded, label: ProbedLabel, train: Bool[ndarray, " n"]) -> dict[str, Any]:
    values, direction, scores, ranked, features = label
    fit, test = train & (values >= 0), ~train & (values >= 0)
    tested = values[test] == 1
    threshold = best_threshold(scores[fit], values[fit] == 1)
    right = (scores[test] > threshold) & tested
    f1s = [_sparse_f1(features[:, :1], values == 1, fit, test)]
    for k in range(2, len(ranked) + 1):
        more = _sparse_f1(features[:, :k], values == 1, fit, test)
        if more - f1s[-1] < GAIN:
            break
        f1s.append(more)
    n_split = len(f1s)
    absorbed, always = None, f1(np.ones_like(tested), tested)
    if f1s[-1] >= max(MIN_F1, always + ABOVE_ALWAYS) and right.any():
        carried = _carried_by_one(coded, np.flatnonzero(test)[right], direction, ranked[:n_split])
        absorbed = float((carried >= ABSORBED).mean())
    return {
        "x_f1": f1(scores[test] > threshold, tested),
        "label_f1": f1s[0],
        "split_f1": f1s[-1],
        "splits": n_split,
        "absorption": absorbed,
        "latents": ranked[:n_split].tolist(),
    }


def _sparse_f1(
    features: Float[ndarray, "n k"], truth: Bool[ndarray, " n"], fit: Bool[ndarray, " n"], test: Bool[ndarray, " n"]
) -> float:
    """Of a logistic regression on k latents, at the threshold that was best where it was fitted."""
    weights = np.ones(1)
    if features.shape[1] > 1:
        parts = [np.flatnonzero(fit & (truth == value)) for value in (False, True)]
        at = np.concatenate([one[:: -(-len(one) // MAX_FIT)] for one in parts])
        weights = logistic(features[at], truth[at])
    scores = features @ weights
    return f1(scores[test] > best_threshold(scores[fit], truth[fit]), truth[test])


def f1(said: Bool[ndarray, " n"], truth: Bool[ndarray, " n"]) -> float:
    both = int((said & truth).sum())
    return 2 * both / max(1, int(said.sum()) + int(truth.sum()))


def best_threshold(scores: Float[ndarray, " n"], truth: Bool[ndarray, " n"]) -> float:
    """The value above which scores have the largest F1."""
    order = np.argsort(-scores, kind="stable")
    hits = truth[order].cumsum()
    values = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    ends = np.append(np.diff(scores[order]) != 0, True)  # ties are said together
    best = int(np.argmax(np.where(ends, values, -1)))
    below = scores[order[best + 1]] if best + 1 < len(order) else scores[order[best]] - 1
    return float((scores[order[best]] + below) / 2)


def _carried_by_one(
    coded: Coded, tokens: Int[ndarray, " m"], direction: Float[ndarray, " d_model"], main: Int[ndarray, " k"]
) -> Float[ndarray, " m"]:
    """Of each token the largest share of one latent in what is reconstructed along a direction; 0 if a main one is on.

    Only contributions along it count, not those against it.
    """
    entries = coded.added[tokens]
    token = np.repeat(np.arange(len(tokens)), np.diff(entries.indptr))
    along = np.maximum(entries.data * (coded.rows @ direction)[entries.indices], 0)
    total = np.bincount(token, along, len(tokens))
    most = np.zeros(len(tokens))
    np.maximum.at(most, token, along)
    is_on = np.bincount(token, np.isin(entries.indices, main), len(tokens)) > 0
    return np.where(is_on | (total <= 0), 0, most / np.maximum(total, 1e-300))
