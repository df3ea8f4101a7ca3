"""The split in order, in batches of whole documents, every chunk read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a split is gone through."""

    hook: str
    rules: CountingRules
    """Which positions are counted."""
    splice_all: bool
    """Whether xhat also stands at the skipped positions when it is given to the tail."""
    mean: Float64[Tensor, " d_model"]
    """Of x over the train split."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where systems and tail are."""
    ce_tokens: int | None = None
    """The tail reads the first documents that hold so many tokens; None: all."""


BATCH_TOKENS = 4096
"""Positions in a batch, at most (or one piece of a document)."""
PIECE_SEQUENCES = 64
"""A document of more sequences counts as several pieces: what is worked out "within a document" has bounded size."""


class EvalBatch(NamedTuple):
    """Whole sequences, and whole pieces of documents."""

    start: int
    """Number of the first sequence within the split."""
    x: Float[Tensor, "batch position d_model"]
    tokens: Int[Tensor, "batch position"]
    lengths: Int[Tensor, " batch"]
    document: Int[Tensor, " batch"]
    """0 to the split's number of documents - 1, in order."""
    piece: Int[Tensor, " batch"]
    """The same for pieces."""
    counted: Bool[Tensor, "batch position"]
    """Valid positions that no rule leaves out."""
    skipped: Bool[Tensor, "batch position"]
    """The other valid positions."""

    @property
    def runs(self) -> Int[Tensor, " n"]:
        """Of each counted position: its run of consecutive ones within a sequence, numbered in order."""
        return run_numbers(self.counted)

    @property
    def has_next(self) -> Bool[Tensor, "batch position"]:
        """Where the next token lies in the same sequence."""
        return torch.from_numpy(self.has_next_on_host)

    @property
    def has_next_on_host(self) -> Bool[ndarray, "batch position"]:
        """The same as an array."""
        return np.arange(self.tokens.shape[1]) < self.lengths.numpy()[:, None] - 1


def number_runs(values: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    """0, 1, 2 ... for each run of equal values."""
    return np.concatenate([[0], (values[1:] != values[:-1]).cumsum()]) if len(values) else values


def run_numbers(counted: Bool[Tensor, "batch position"]) -> Int[Tensor, " n"]:
    """Of each counted position the number of its run: a new one begins with a sequence, and after what is left out."""
    chosen = counted.numpy()
    before = np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
    return torch.from_numpy((chosen & ~before).ravel().cumsum()[chosen.ravel()] - 1)


def document_numbers(split: Split) -> tuple[Int[ndarray, " n_sequences"], Int[ndarray, " n_sequences"]]:
    """Document and piece of each sequence, both counted from 0 in the split's order."""
    document = number_runs(split.documents)
    first = np.searchsorted(document, document)
    within = np.arange(len(document)) - first
    return document, number_runs(document * (split.n_sequences + 1) + within // PIECE_SEQUENCES)


def batches(
    split: Split,
    hook: str,
    rules: CountingRules,
    max_tokens: int | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> Iterator[EvalBatch]:
    """The split as float32 batches; of a part of it, the first pieces of documents that hold `max_tokens` in all, or
    consecutive `ranges` of `batch_ranges`.
    """
    document, piece = (torch.from_numpy(one) for one in document_numbers(split))
    position = torch.arange(split.store.sequence_length)
    ranges = batch_ranges(split, max_tokens) if ranges is None else ranges
    rows = _Rows(split, hook, ranges[0][0] if ranges else 0)
    for start, stop in ranges:
        part = slice(start, stop)
        x = torch.from_numpy(rows.read(start, stop)).float()
        lengths = torch.from_numpy(split.lengths[part])
        valid = position < lengths[:, None]
        chosen = torch.from_numpy(counted(split, rules, start, stop))
        tokens = torch.from_numpy(split.tokens[part])
        yield EvalBatch(start, x, tokens, lengths, document[part], piece[part], chosen, valid & ~chosen)


def batch_ranges(split: Split, max_tokens: int | None = None) -> list[tuple[int, int]]:
    """First sequence and end of every batch."""
    piece = document_numbers(split)[1][: n_sequences(split, max_tokens)]
    return list(_ranges(piece, max(1, BATCH_TOKENS // split.store.sequence_length)))


def check_counted(split: Split, rules: CountingRules, n_sequences: int | None = None) -> None:
    """Raises StoreError if no position is counted, of the first `n_sequences` or of all: no figure would be one."""
    if not counted(split, rules, 0, n_sequences).any():
        raise StoreError(
            f"{split.store.location}: its {split.name} split has no position {rules} in "
            f"{len(split.lengths[:n_sequences])} sequences. Harvest more tokens, or a larger share for it "
            "(--eval-every)."
        )


def n_sequences(split: Split, max_tokens: int | None) -> int:
    """Sequences of the pieces of documents, from the split's first on, that `max_tokens` reach into; None: all."""
    if max_tokens is None or max_tokens >= split.n_tokens:
        return split.n_sequences
    piece = document_numbers(split)[1]
    last = int(np.searchsorted(split.lengths.cumsum(), max_tokens))
    return int(np.searchsorted(piece, piece[last], side="right"))


def _ranges(piece: Int[ndarray, " n_sequences"], per_batch: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences that cut no piece, of at most `per_batch` sequences unless one piece has more."""
    ends = np.append(np.flatnonzero(piece[1:] != piece[:-1]) + 1, len(piece))
    start = 0
    while start < len(piece):
        fitting = np.searchsorted(ends, start + per_batch, side="right") - 1
        stop = int(ends[fitting]) if fitting >= 0 else start
        if stop <= start:
            stop = int(ends[np.searchsorted(ends, start, side="right")])
        yield start, stop
        start = stop


class _Rows:
    """Rows of a split's activations in ascending order, read chunk by chunk."""

    def __init__(self, split: Split, hook: str, start: int) -> None:
        self.split, self.hook = split, hook
        self.start = self.stop = start - start % split.store.sequences_per_chunk
        self.held: list[ndarray] = []

    def read(self, start: int, stop: int) -> Float[ndarray, "n position d_model"]:
        while self.stop < stop:
            end = min(self.stop + self.split.store.sequences_per_chunk, self.split.n_sequences)
            self.held.append(self.split.read(self.hook, self.stop, end))
            self.stop = end
        block = self.held[0] if len(self.held) == 1 else np.concatenate(self.held)
        wanted = block[start - self.start : stop - self.start]
        self.held, self.start = [block[stop - self.start :]], stop
        return wanted
