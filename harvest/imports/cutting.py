"""A stream of tokens, as other programs saved them, to the sequences of a store."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from tcsae.data.model import is_eval


class Tokens(NamedTuple):
    """Consecutive tokens of a source."""

    x: dict[str, Float[ndarray, "n _d_model"]]
    """Per hook."""
    run: Int[ndarray, " n"]
    """Never falls; tokens of one number stood next to each other in one sequence."""
    document: Int[ndarray, " n"]
    """Never falls."""
    ids: Int[ndarray, " n"] | None = None
    """Token ids, where the source has them."""

    def part(self, which: Shaped[ndarray, " m"] | slice) -> "Tokens":
        x = {hook: values[which] for hook, values in self.x.items()}
        return Tokens(x, self.run[which], self.document[which], None if self.ids is None else self.ids[which])

    def then(self, other: "Tokens") -> "Tokens":
        x = {hook: np.concatenate([values, other.x[hook]]) for hook, values in self.x.items()}
        ids = None if self.ids is None or other.ids is None else np.concatenate([self.ids, other.ids])
        return Tokens(x, np.concatenate([self.run, other.run]), np.concatenate([self.document, other.document]), ids)


class Sequences(NamedTuple):
    """What `StoreCreation.append` takes, of one split."""

    x: dict[str, Float[ndarray, "n sequence_length _d_model"]]
    lengths: Int[ndarray, " n"]
    documents: Int[ndarray, " n"]
    ids: Int[ndarray, "n sequence_length"]


@dataclass
class Cutter:
    """Cuts runs into sequences of at most `length` tokens, and deals documents out to the splits."""

    length: int
    min_length: int
    eval_every: int
    start_token: int | None = None
    """A run also begins at each token of this id (a BOS that stands between packed documents)."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("tokens_read", "tokens_dropped_short", "train", "eval"), 0)
    )
    """Tokens read, left out in pieces shorter than `min_length`, and in each split."""
    _held: Tokens | None = None
    _n_starts: int = 0
    _last: tuple[int, str] = (-1, "train")
    """The last document, and its split."""

    def add(self, tokens: Tokens) -> Iterator[tuple[str, Sequences]]:
        """The sequences that are whole once these tokens are known."""
        self.counts["tokens_read"] += len(tokens.run)
        whole = self._begun(tokens)
        whole = whole if self._held is None else self._held.then(whole)
        at = int(np.searchsorted(whole.run, whole.run[-1])) if len(whole.run) else 0
        at += (len(whole.run) - at) // self.length * self.length  # the last run may go on
        self._held = whole.part(slice(at, None))
        yield from self._cut(whole.part(slice(at)))

    def rest(self) -> Iterator[tuple[str, Sequences]]:
        """The last sequence."""
        if self._held is not None:
            yield from self._cut(self._held)
        self._held = None

    def _begun(self, tokens: Tokens) -> Tokens:
        """With a new run and document from each start token on."""
        if self.start_token is None:
            return tokens
        assert tokens.ids is not None, "looked at before the first tokens"
        starts = self._n_starts + np.cumsum(tokens.ids == self.start_token)
        self._n_starts = int(starts[-1]) if len(starts) else self._n_starts
        return tokens._replace(run=tokens.run + starts, document=tokens.document + starts)

    def _cut(self, tokens: Tokens) -> Iterator[tuple[str, Sequences]]:
        if not len(tokens.run):
            return
        begins = np.flatnonzero(np.diff(tokens.run, prepend=tokens.run[0] - 1))
        lengths = np.diff(begins, append=len(tokens.run))
        per_run = -(-lengths // self.length)
        which = np.repeat(np.arange(len(begins)), per_run)
        offset = (np.arange(len(which)) - np.repeat(np.cumsum(per_run) - per_run, per_run)) * self.length
        first, n = begins[which] + offset, np.minimum(lengths[which] - offset, self.length)
        long_enough = n >= self.min_length
        self.counts["tokens_dropped_short"] += int(n[~long_enough].sum())
        first, n = first[long_enough], n[long_enough]
        splits = [self._split(tokens, int(one), int(m)) for one, m in zip(first, n, strict=True)]
        for split in ("train", "eval"):
            ours = np.array([one == split for one in splits], bool)
            if ours.any():
                self.counts[split] += int(n[ours].sum())
                yield split, self._padded(tokens, first[ours], n[ours])

    def _split(self, tokens: Tokens, first: int, n: int) -> str:
        """By the ids of a document's first sequence, so that a document that is there twice is in one split; without
        ids by its number."""
        document = int(tokens.document[first])
        if document != self._last[0]:
            ids = tokens.ids
            text = str(document) if ids is None else " ".join(map(str, ids[first : first + n].tolist()))
            self._last = document, "eval" if is_eval(text, self.eval_every) else "train"
        return self._last[1]

    def _padded(self, tokens: Tokens, first: Int[ndarray, " n"], lengths: Int[ndarray, " n"]) -> Sequences:
        position = np.arange(self.length)
        valid = position < lengths[:, None]
        at = np.where(valid, first[:, None] + position, 0)
        x: Mapping[str, ndarray] = {hook: values[at] for hook, values in tokens.x.items()}
        ids = np.zeros(at.shape, np.int64) if tokens.ids is None else np.where(valid, tokens.ids[at], 0)
        return Sequences(dict(x), lengths, tokens.document[first], ids)
