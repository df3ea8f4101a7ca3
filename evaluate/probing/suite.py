"""The probing suite: every label against x, x smoothed, each SAE's code and that code smoothed.

For a code, the k latents with the largest difference of class means, in units of a latent's mean where it is on, are
chosen on half of the documents, and a logistic regression on them is fitted there; the other half scores it. x has no
latents: its k = 1 is the direction between the class means, and "all" is Fisher's discriminant on all dimensions.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from tcsae.evaluate.measures.smoothing import EMA, Smoothing, filtered_rows, smoothing_kernel
from tcsae.evaluate.probing.given_labels import (
    DOCUMENT,
    GIVEN,
    corpus_fields,
    field_labels,
    held_out_groups,
)
from tcsae.evaluate.probing.scores import auroc, discriminant, grouped_auroc, logistic
from tcsae.evaluate.probing.text_labels import text_labels
from tcsae.evaluate.systems import sae_code
from tcsae.shared.base.errors import StoreError
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.store.reader import Split, Store

LATENTS, QUICK_LATENTS = (1, 2, 5, 16), (1, 5)
QUICK_TOKENS = 25_000
MIN_EACH = 50
"""Positives, and negatives, that each half must have for a label to be scored."""
MIN_FIRINGS = 10
MAX_FIT = 4096
"""Positives, and negatives, that a regression is fitted on, evenly spaced."""
MEMORY = 0.8
"""Of the exponential smoothing along a sequence."""
ALL = "all"


class Label(NamedTuple):
    name: str
    kind: str
    values: Int[ndarray, " n"]
    """0 or 1 for each counted token; -1: not known."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The counted tokens of some sequences: whole documents from the split's first on."""

    split: Split
    hook: str
    skip_first: int
    n_sequences: int

    @cached_property
    def lengths(self) -> Int[ndarray, " n_sequences"]:
        """Counted tokens of each sequence."""
        return np.maximum(self.split.lengths[: self.n_sequences] - self.skip_first, 0).astype(np.int64)

    @cached_property
    def counted(self) -> Bool[ndarray, " n_valid"]:
        """Of the valid tokens, which are counted."""
        n = self.split.lengths[: self.n_sequences]
        position = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
        return position >= self.skip_first

    @cached_property
    def ids(self) -> Int[ndarray, " n"]:
        return self._valid(self.split.tokens)[self.counted]

    @cached_property
    def documents(self) -> Int[ndarray, " n"]:
        """Number in the corpus of each token's document."""
        return np.repeat(self.split.documents[: self.n_sequences], self.lengths)

    @cached_property
    def kernel(self) -> Float[Tensor, "longest longest"]:
        return smoothing_kernel(Smoothing(EMA, MEMORY), int(self.lengths.max(initial=0)))

    def x(self) -> Float[Tensor, "n d_model"]:
        chunk = max(1, self.split.store.sequences_per_chunk)
        parts = []
        for start in range(0, self.n_sequences, chunk):
            stop = min(start + chunk, self.n_sequences)
            position = np.arange(self.split.store.sequence_length)
            lengths = self.split.lengths[start:stop, None]
            mask = (position < lengths) & (position >= self.skip_first)
            parts.append(self.split.read(self.hook, start, stop)[mask])
        return torch.from_numpy(np.concatenate(parts)).float()

    def smooth(self, rows: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        return filtered_rows(rows, self.lengths.tolist(), self.kernel)

    def smooth_back(self, rows: Float[ndarray, "n m"]) -> Float[ndarray, "n m"]:
        """The adjoint: a sum over smoothed values is one over the values themselves, with weights smoothed back."""
        kernel = self.kernel.double().numpy()
        parts = np.split(rows, self.lengths.cumsum()[:-1])
        return np.concatenate([kernel[: len(one), : len(one)].T @ one for one in parts])

    def _valid(self, values: Int[ndarray, "n_all sequence_length"]) -> Int[ndarray, " n_valid"]:
        lengths = self.split.lengths[: self.n_sequences, None]
        return values[: self.n_sequences][np.arange(values.shape[1]) < lengths]

    def pieces(self) -> Iterator[Int[ndarray, " n"]]:
        """Ids of all valid tokens of each document."""
        ids = self._valid(self.split.tokens)
        documents = np.repeat(self.split.documents[: self.n_sequences], self.split.lengths[: self.n_sequences])
        yield from np.split(ids, np.flatnonzero(np.diff(documents)) + 1)


def choose_tokens(store: Store, hook: str, skip_first: int, most: int | None) -> Tokens:
    """All of the eval split, or the documents from the first on that hold `most` tokens.

    Raises StoreError if that is not a token.
    """
    split = store.eval
    n = split.n_sequences
    if most is not None and split.n_tokens > most:
        n = int(np.searchsorted(split.lengths.cumsum(), most)) + 1
        n = int(np.searchsorted(split.documents, split.documents[n - 1], side="right"))
    tokens = Tokens(split, hook, skip_first, n)
    if not tokens.lengths.sum():
        raise StoreError(f"{store.location}: its eval split has no position from {skip_first} on. Harvest more tokens.")
    return tokens


def free_labels(store: Store, tokens: Tokens) -> tuple[list[Label], list[str], bool]:
    """Labels of text and corpus; the held-out group of each token; and whether the corpus is at hand."""
    labels = []
    if store.tokenizer_path is not None:
        texts = TokenTexts(store).table(np.unique(tokens.ids).tolist() + [int(one) for one in _first_ids(tokens)])
        plain = {token: text.replace("⏎", "\n").replace("⇥", "\t") for token, text in texts.items()}
        documents = [[plain[int(token)] for token in piece] for piece in tokens.pieces()]
        for name, (kind, values) in text_labels(documents).items():
            labels.append(Label(name, kind, values[tokens.counted]))
    numbers, place = np.unique(tokens.documents, return_inverse=True)
    records = corpus_fields(store, numbers.tolist())
    for name, values in field_labels(records or []).items():
        labels.append(Label(name, DOCUMENT, values[place]))
    groups = np.array(held_out_groups(records, numbers.tolist()))[place]
    return labels, groups.tolist(), records is not None


def _first_ids(tokens: Tokens) -> Int[ndarray, " n"]:
    """Ids that only skipped positions have: their text is part of a document, too."""
    return np.unique(np.concatenate(list(tokens.pieces())))


def given(values: Mapping[str, Int[ndarray, " n_valid"]], tokens: Tokens) -> list[Label]:
    return [Label(name, GIVEN, one[: len(tokens.counted)][tokens.counted]) for name, one in values.items()]


def halves(groups: Sequence[str]) -> Bool[ndarray, " n"]:
    """Which tokens latents are chosen and regressions fitted on: half of the groups, by a hash of their names."""
    side = {group: hashlib.sha256(group.encode()).digest()[0] % 2 == 0 for group in set(groups)}
    return np.array([side[group] for group in groups], bool)


Figures = dict[str, dict[str, dict[str, float | None]]]
"""{label: {k: {"auroc", "within"}}}; k as text, or ALL."""


class Probe:
    """Labels, halves and what is worked out once for all representations."""

    def __init__(self, tokens: Tokens, labels: Sequence[Label], train: Bool[ndarray, " n"], ks: Sequence[int]) -> None:
        self.tokens, self.train, self.ks = tokens, train, tuple(ks)
        enough = [
            min(int((one.values[half] == value).sum()) for half in (train, ~train) for value in (0, 1)) >= MIN_EACH
            for one in labels
        ]
        self.labels = [one for one, has in zip(labels, enough, strict=True) if has]
        self.left_out = [one.name for one, has in zip(labels, enough, strict=True) if not has]
        self._contrasts = np.zeros((len(train), len(self.labels)))
        for i, label in enumerate(self.labels):
            for value, sign in ((1, 1.0), (0, -1.0)):
                which = train & (label.values == value)
                self._contrasts[which, i] = sign / which.sum()

    @cached_property
    def _contrasts_back(self) -> Float[ndarray, "n n_labels"]:
        return self.tokens.smooth_back(self._contrasts)

    def of_x(self, x: Float[Tensor, "n d_model"]) -> Figures:
        """{label: {"1": {"auroc", "within"}, "all": ...}} of activations."""
        wide = x.double().numpy()
        differences = wide.T @ self._contrasts
        ours = wide[self.train] - wide[self.train].mean(0)
        best = discriminant(differences, ours.T @ ours / len(ours))
        figures = {}
        for i, label in enumerate(self.labels):
            directions = {"1": differences[:, i], ALL: best[:, i]}
            figures[label.name] = {k: self._score(label, wide @ one) for k, one in directions.items()}
        return figures

    def of_code(self, code: csr_array, smooth: bool) -> Figures:
        """{label: {k: {"auroc", "within"}}} of a code, or of that code smoothed."""
        here = code[np.flatnonzero(self.train)]
        n_on = np.bincount(here.indices, minlength=code.shape[1])
        size = np.bincount(here.indices, here.data, minlength=code.shape[1]) / np.maximum(n_on, 1)
        scale = np.where((n_on >= MIN_FIRINGS) & (size > 0), size, np.inf)
        differences = (code.T @ (self._contrasts_back if smooth else self._contrasts)) / scale[:, None]
        columns = csc_array(code)
        figures: Figures = {}
        for i, label in enumerate(self.labels):
            order = np.argsort(-abs(differences[:, i]), kind="stable")[: max(self.ks)]
            values = torch.from_numpy(columns[:, order].toarray()).float()
            features = (self.tokens.smooth(values) if smooth else values).double().numpy() / scale[order]
            figures[label.name] = {}
            for k in self.ks:
                weights = self._fit(label, features[:, :k]) if k > 1 else np.sign(differences[order[:1], i])
                figures[label.name][str(k)] = self._score(label, features[:, :k] @ weights)
        return figures

    def _fit(self, label: Label, features: Float[ndarray, "n k"]) -> Float[ndarray, " k"]:
        parts = [np.flatnonzero(self.train & (label.values == value)) for value in (0, 1)]
        at = np.concatenate([one[:: -(-len(one) // MAX_FIT)] for one in parts])
        return logistic(features[at], label.values[at] == 1)

    def _score(self, label: Label, scores: Float[ndarray, " n"]) -> dict[str, float | None]:
        tested = ~self.train & (label.values >= 0)
        truth, scores = label.values[tested] == 1, scores[tested]
        within = grouped_auroc(scores, truth, self.tokens.ids[tested].astype(np.int64))
        return {"auroc": auroc(scores, truth), "within": None if np.isnan(within) else within}


def sparse_code(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], tokens: Tokens) -> csr_array:
    """The whole code, [n, d_sae], whatever the SAE reads of a token's sequence."""
    sequence = torch.from_numpy(np.repeat(np.arange(tokens.n_sequences), tokens.lengths))
    with torch.inference_mode():
        code = sae_code(sae, x, sequence)
    assert isinstance(code, SparseCode), "dense codes are refused before"
    return csr_array((code.values.numpy(), code.latents.numpy(), code.offsets.numpy()), shape=(len(x), code.d_sae))


def means(figures: Figures, kinds: Mapping[str, str], k: str, key: str) -> dict[str, float | None]:
    """Mean over the labels of each kind of a figure; None where no label has it. `kinds`: of each label."""
    made: dict[str, float | None] = {}
    for kind in dict.fromkeys(kinds.values()):
        values = [figures[name].get(k, {}).get(key) for name, its_kind in kinds.items() if its_kind == kind]
        known = [one for one in values if one is not None]
        made[kind] = float(np.mean(known)) if known else None
    return made
