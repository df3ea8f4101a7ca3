"""One pass over a split by several processes: each goes through whole documents, rank 0 adds up what they find.

The split is cut into the same batches as by one process, so that every code is the same, bit for bit; sums then differ
by the order of addition alone.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from tcsae.evaluate.batches import batch_ranges, document_numbers
from tcsae.shared.base.distributed import ALONE, Ranks
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split

Range = tuple[int, int]


class Part(NamedTuple):
    """What of a split this process goes through: ranges of sequences, each a batch."""

    own: list[Range]
    before: list[Range]
    """Those before that hold the document before: tokens of neighbouring documents are compared."""
    ours: Ranks = ALONE

    def n_tokens(self, split: Split) -> int:
        return sum(int(split.lengths[start:stop].sum()) for start, stop in self.own)

    @property
    def has_all(self) -> bool:
        """Whether the sums of all parts come to this process."""
        return self.ours.rank == 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Leave the sum over all parts in rank 0's tensors; those of the others are of no use then."""
        if not self.ours.parallel:
            return
        for tensor in tensors:
            wide = tensor.double() if tensor.is_floating_point() else tensor
            dist.reduce(wide, 0)
            if wide is not tensor:
                tensor.copy_(wide)

    def gather(self, part: Any) -> list[Any]:
        """What all processes found, in order, in rank 0; nothing in the others."""
        if not self.ours.parallel:
            return [part]
        gathered = [None] * self.ours.world if self.has_all else None
        dist.gather_object(part, gathered)
        return gathered or []

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, in order, in all."""
        if not self.ours.parallel:
            return [value]
        values = [None] * self.ours.world
        dist.all_gather_object(values, value)
        return values


def part_of(split: Split, rules: CountingRules, ours: Ranks) -> Part:
    """This process's part: about as many tokens as any other's, of documents that nobody else has."""
    ranges = batch_ranges(split)
    if not ours.parallel:
        return Part(ranges, [])
    document = document_numbers(split)[0]
    starts = np.array([start for start, _ in ranges])
    begins = (starts == 0) | (document[starts] != document[starts - 1])  # some document, which no batch before holds
    done = np.concatenate([[0], split.lengths.cumsum()])
    able = np.flatnonzero(begins)
    shares = np.arange(ours.world + 1) * done[-1] / ours.world
    edges = np.append(able, len(ranges))[np.searchsorted(done[starts[able]], shares)]
    edges[-1] = len(ranges)
    first, stop = (int(edge) for edge in edges[ours.rank : ours.rank + 2])
    return Part(ranges[first:stop], _before(split, rules, ranges, first), ours)


def _before(split: Split, rules: CountingRules, ranges: list[Range], first: int) -> list[Range]:
    """The batches up to number `first` that hold the last document with a counted token before it."""
    if not 0 < first < len(ranges):
        return []
    sequences = np.flatnonzero(counted(split, rules, 0, ranges[first][0]).any(1))
    if not len(sequences):
        return []
    document = document_numbers(split)[0]
    sequence = sequences[np.searchsorted(document[sequences], document[sequences[-1]])]
    return [one for one in ranges[:first] if one[1] > sequence]
