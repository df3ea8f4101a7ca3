"""Who stands where: what the temporal measures need to know of each batch, worked out once for all systems.

All of it follows from the store's sequences alone, never from how they are cut into batches: the groups of documents,
the permutation within a document, the partners in other documents.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch, document_numbers
from tcsae.shared.base.device import to_device
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split

N_GROUPS = 8
"""Documents are dealt into this many groups, in turn; leaving one out at a time gives the intervals."""
FAR = 8
"""A lag that is a measure of its own, with an interval."""
LAGS = (1, FAR)
"""Of the measures without the mean by position."""
N_LABELS = 128
"""Position bins, and token ids (the most frequent) whose share of variance is measured."""


class TokenPairs(NamedTuple):
    """TokenPairs of tokens, numbered as [kept of earlier batches | this batch's counted tokens]."""

    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    group: Int[Tensor, " m"]


class View(NamedTuple):
    """The counted tokens of one batch, in order."""

    n: int
    sequence: Int[Tensor, " n"]
    """Its run of counted positions: a sequence, or what lies between two positions that are left out."""
    piece: Int[Tensor, " n"]
    """Numbered from 0 within the batch."""
    n_pieces: int
    group: Int[Tensor, " n"]
    from_start: Int[Tensor, " n"]
    """Counted positions before it in its run."""
    to_end: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    """Bin of its absolute position."""
    token: Int[Tensor, " n"]
    """Rank of its token id among the most frequent, or N_LABELS."""
    standing_in: Int[Tensor, " n"]
    """The token of the same piece that stands here when positions are permuted."""
    kept: Int[Tensor, " n_kept"]
    """What to keep for the next batch, numbered as in TokenPairs."""
    n_kept_before: int
    partners: TokenPairs
    """Tokens at the same counted position of the first sequences of consecutive documents."""
    joins: TokenPairs
    """The last token of a document and the first of the next."""
    restarts: TokenPairs
    """The last token of a sequence and the first of the next one of the same document."""

    def to(self, device: torch.device) -> "View":
        """The same view on a device."""

        def moved(value: Any) -> Any:
            return to_device(value, device) if isinstance(value, Tensor) else value

        pairs = {name: TokenPairs(*map(moved, getattr(self, name))) for name in ("partners", "joins", "restarts")}
        return self._replace(**{name: moved(value) for name, value in self._asdict().items()} | pairs)

    @property
    def adjacent(self) -> Bool[Tensor, " n_minus_1"]:
        """Whether token i and i + 1 are neighbours in one sequence."""
        return self.sequence[1:] == self.sequence[:-1]


class _Document(NamedTuple):
    """Where a document's tokens are, numbered as in TokenPairs."""

    number: int
    first: range
    """Of its first sequence."""
    last: int


class Layout:
    """Makes the views of one pass, batch after batch."""

    def __init__(self, split: Split, rules: CountingRules) -> None:
        length = split.store.sequence_length
        self.n_positions = min(length, N_LABELS)
        self.bins = torch.arange(length) * self.n_positions // length
        ids, counts = np.unique(split.tokens[counted(split, rules)], return_counts=True)
        frequent = ids[np.argsort(-counts, kind="stable")[:N_LABELS]]
        self.rank = torch.full((int(ids.max(initial=0)) + 1,), N_LABELS)
        self.rank[torch.from_numpy(frequent).long()] = torch.arange(len(frequent))
        self.n_pieces = int(document_numbers(split)[1].max(initial=-1)) + 1
        self.carried: _Document | None = None

    def view(self, batch: EvalBatch) -> View:
        """The view of the next batch."""
        sequence, position = batch.counted.nonzero().T
        document, piece = batch.document[sequence], batch.piece[sequence]
        run = batch.runs
        per_run = torch.bincount(run)
        starts = per_run.cumsum(0) - per_run
        from_start = torch.arange(len(run)) - starts[run]
        n_before = len(self.carried.first) + 1 if self.carried else 0
        restarts = self._restarts(document, sequence, n_before)
        documents = self._documents(document.numpy(), run.numpy(), n_before)
        partners, joins = _pairs(documents)
        # Numbered anew, as documents without a counted token are of no piece.
        local = torch.unique_consecutive(piece, return_inverse=True)[1]
        carried_tokens = torch.tensor([*documents[-1].first, documents[-1].last]) if documents else torch.arange(0)
        if documents:
            n_first = len(documents[-1].first)
            self.carried = _Document(documents[-1].number, range(n_first), n_first)
        return View(
            n=len(sequence),
            sequence=run,
            piece=local,
            n_pieces=int(local[-1]) + 1 if len(local) else 0,
            group=document % N_GROUPS,
            from_start=from_start,
            to_end=per_run[run] - 1 - from_start,
            position=self.bins[position],
            token=self.rank[batch.tokens[sequence, position].long()],
            standing_in=torch.from_numpy(_permutation(piece.numpy())),
            kept=carried_tokens,
            n_kept_before=n_before,
            partners=partners,
            joins=joins,
            restarts=restarts,
        )

    def _restarts(self, document: Int[Tensor, " n"], sequence: Int[Tensor, " n"], n_before: int) -> TokenPairs:
        """Where the context begins anew inside a document, that of the last batch included."""
        new = (sequence[1:] != sequence[:-1]) & (document[1:] == document[:-1])
        second = torch.from_numpy(np.flatnonzero(new.numpy()) + 1)
        first, second = second - 1 + n_before, second + n_before
        if self.carried and len(document) and self.carried.number == int(document[0]):
            first, second = (
                torch.cat((torch.tensor([one]), rest)) for one, rest in ((n_before - 1, first), (n_before, second))
            )
        return TokenPairs(first, second, document[second - n_before] % N_GROUPS)

    def _documents(self, document: ndarray, sequence: ndarray, n_before: int) -> list[_Document]:
        """The carried document, then this batch's; one that goes on from the last batch keeps its first sequence."""
        documents = [self.carried] if self.carried else []
        edges = np.flatnonzero(np.diff(document, prepend=-1, append=-1)) if len(document) else np.arange(0)
        for start, stop in itertools.pairwise(edges):
            number, last = int(document[start]), n_before + int(stop) - 1
            if documents and documents[-1].number == number:
                documents[-1] = documents[-1]._replace(last=last)
                continue
            n_first = int((sequence[start:stop] == sequence[start]).sum())
            documents.append(_Document(number, range(n_before + int(start), n_before + int(start) + n_first), last))
        return documents


def _pairs(documents: list[_Document]) -> tuple[TokenPairs, TokenPairs]:
    first: list[int] = []
    second: list[int] = []
    groups: list[int] = []
    joins: list[tuple[int, int, int]] = []
    for one, other in itertools.pairwise(documents):
        m = min(len(one.first), len(other.first))
        first += one.first[:m]
        second += other.first[:m]
        groups += [one.number % N_GROUPS] * m
        joins.append((one.last, other.first[0], one.number % N_GROUPS))
    at = torch.tensor(joins, dtype=torch.int64).view(-1, 3)
    partners = TokenPairs(*(torch.tensor(part, dtype=torch.int64) for part in (first, second, groups)))
    return partners, TokenPairs(at[:, 0], at[:, 1], at[:, 2])


def _permutation(piece: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Every token's stand-in: a permutation within each piece that depends on the piece's number alone."""
    if not len(piece):
        return piece
    within = np.arange(len(piece)) - np.searchsorted(piece, piece)
    mixed = (piece.astype(np.uint64) << np.uint64(32)) + within.astype(np.uint64)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):  # splitmix64
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(multiplier)
    return np.lexsort((mixed ^ (mixed >> np.uint64(31)), piece))
