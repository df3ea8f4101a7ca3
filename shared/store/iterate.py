"""Batches of segments for anybody's trainer, as a torch dataset that knows where it is.

An epoch visits the chunks in random order. Consecutive chunks form a block of about `buffer_sequences` sequences, whose
segments are shuffled; blocks laid end to end are cut into batches. All of it is a function of the seed and the epoch,
so the number of batches handed out is the whole state. Workers of a DataLoader read all blocks and make every n-th
batch: the batches are the same ones, in the same order, whatever their number.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.base.settings import differences, to_dict
from tcsae.shared.base.windows import positions, segments


class SegmentBatch(NamedTuple):
    """n segments; what is not valid is 0."""

    x: Float[Tensor, "n segment_length d_model"]
    valid: Bool[Tensor, "n segment_length"]
    """Left-aligned; all but at a sequence's end."""
    tokens: Int[Tensor, "n segment_length"]
    sequences: Int[Tensor, " n"]
    """Number of each segment's sequence within the split."""
    starts: Int[Tensor, " n"]
    """Position of each segment's first token in its sequence."""
    documents: Int[Tensor, " n"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IterateConfig:
    """Which batches, in which order."""

    split: str = "train"
    hook: str | None = None
    segment_length: int = 16
    batch_tokens: int = 4096
    epochs: int | None = 1
    skip_first: int = 1
    shuffle: bool = True
    seed: int = 0
    buffer_sequences: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("segment_length", 1), ("buffer_sequences", 1), ("skip_first", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}.")
        if self.batch_tokens < self.segment_length:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} holds no segment of segment_length={self.segment_length}. Raise the "
                "first or lower the second."
            )
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs={self.epochs}: must be at least 1, or None for no end.")


class _Block(NamedTuple):
    values: ndarray
    """[n_rows, d_stored], as stored."""
    table: Int[ndarray, "n_segments 4"]
    """Each segment's first row in `values`, length, sequence, and position in it; in the order of use."""


class SegmentDataset(IterableDataset):
    """See `Store.iterate`. Raises StoreError if no position is left."""

    def __init__(self, store: Any, config: IterateConfig, device: torch.device | str = "cpu") -> None:
        self.store, self.config, self.device = store, config, torch.device(device)
        self.split = store.split(config.split)
        self.hook = store.hook(config.hook)
        per_chunk, n = store.sequences_per_chunk, self.split.n_sequences
        self._ranges = [(first, min(first + per_chunk, n)) for first in range(0, n, per_chunk)]
        lengths = np.maximum(self.split.lengths.astype(np.int64) - config.skip_first, 0)
        counts = -(-lengths // config.segment_length)
        self._segments_of_chunk = np.array([counts[first:stop].sum() for first, stop in self._ranges], dtype=np.int64)
        self.n_segments = int(counts.sum())
        """Segments in an epoch."""
        if not self.n_segments:
            raise StoreError(
                f"{store.location}: no sequence of split {config.split!r} has more than skip_first={config.skip_first} "
                "positions. Lower it."
            )
        self.per_batch = config.batch_tokens // config.segment_length
        """Segments in a batch; the last of an epoch has what is left."""
        self.n_batches = math.ceil(self.n_segments / self.per_batch)
        """Batches in an epoch."""
        self._chunks_per_block = max(1, config.buffer_sequences // per_chunk)
        self._done = 0
        self._resume: int | None = None

    def __len__(self) -> int:
        if self.config.epochs is None:
            raise TypeError("epochs=None has no length: it never ends")
        return self.config.epochs * self.n_batches

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and of what."""
        return {"n_batches": self._done if self._resume is None else self._resume, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there. Raises ConfigError for the state of other batches."""
        if differing := differences(state["of"], self._identity()):
            raise ConfigError(f"The state is of other batches ({'; '.join(differing)}). Iterate as it was then.")
        self._resume = int(state["n_batches"])

    def _identity(self) -> dict[str, Any]:
        values = to_dict(self.config) | {"hook": self.hook, "content": self.store.content}
        return {key: value for key, value in values.items() if key != "epochs"}

    def __iter__(self) -> Iterator[SegmentBatch]:
        self._done, self._resume = self._resume or 0, None
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 1)
        epochs = self.config.epochs
        while epochs is None or self._done < epochs * self.n_batches:
            epoch, first = divmod(self._done, self.n_batches)
            for number, (block, rows) in zip(
                range(epoch * self.n_batches + first, (epoch + 1) * self.n_batches),
                self._epoch(epoch, first),
                strict=True,
            ):
                self._done = number + 1
                if number % n_workers == worker:
                    yield self._batch(block, rows)

    def _epoch(self, epoch: int, first: int) -> Iterator[tuple[list[_Block], list[ndarray]]]:
        """Parts of blocks that make each batch of an epoch, from batch `first` on."""
        blocks = self._blocks(epoch, first * self.per_batch)
        block, at = next(blocks)
        for number in range(first, self.n_batches):
            left = min(self.per_batch, self.n_segments - number * self.per_batch)
            parts: tuple[list[_Block], list[ndarray]] = ([], [])
            while left:
                if at == len(block.table):
                    block, at = next(blocks)
                taken = block.table[at : at + left]
                parts[0].append(block)
                parts[1].append(taken)
                at, left = at + len(taken), left - len(taken)
            yield parts

    def _blocks(self, epoch: int, skip: int) -> Iterator[tuple[_Block, int]]:
        """An epoch's blocks from its segment number `skip` on, each with the first segment to use."""
        order = np.arange(len(self._ranges))
        if self.config.shuffle:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(order)
        for number, start in enumerate(range(0, len(order), self._chunks_per_block)):
            chunks = order[start : start + self._chunks_per_block]
            n = int(self._segments_of_chunk[chunks].sum())
            if skip >= n:
                skip -= n
                continue
            yield self._read([self._ranges[int(chunk)] for chunk in chunks], (epoch, number)), skip
            skip = 0

    def _read(self, ranges: list[tuple[int, int]], draw: tuple[int, int]) -> _Block:
        length, tables, values, n = self.store.sequence_length, [], [], 0
        for first, stop in ranges:
            sequence, start, count = segments(
                self.split.lengths[first:stop], self.config.segment_length, self.config.skip_first
            )
            tables.append(np.stack([(sequence + n) * length + start, count, sequence + first, start], axis=1))
            values.append(self.split.read_stored(self.hook, first, stop))
            n += stop - first
        table = np.concatenate(tables)
        if self.config.shuffle:
            table = table[np.random.default_rng([self.config.seed, *draw]).permutation(len(table))]
        stored = np.concatenate(values) if len(values) > 1 else values[0]
        if stored.dtype.kind != "f":
            stored = stored.view(f"i{stored.dtype.itemsize}")  # the same bits: torch has few unsigned types
        return _Block(stored.reshape(n * length, -1), table)

    def _batch(self, blocks: list[_Block], tables: list[ndarray]) -> SegmentBatch:
        device, decode = self.device, self.split.decoder(self.hook, self.device)
        table = np.concatenate(tables)
        counts = table[:, 1]
        rows = []
        for block, part in zip(blocks, tables, strict=True):
            at = np.repeat(part[:, 0], part[:, 1]) + positions(part[:, 1])
            rows.append(decode(torch.from_numpy(block.values[at]).to(device)))
        valid = np.arange(self.config.segment_length) < counts[:, None]
        x = torch.zeros(*valid.shape, rows[0].shape[1], device=device)
        mask = torch.from_numpy(valid).to(device)
        x[mask] = torch.cat(rows)
        tokens = np.zeros(valid.shape, np.int64)
        sequence, place = np.repeat(table[:, 2], counts), np.repeat(table[:, 3], counts) + positions(counts)
        tokens[valid] = self.split.tokens[sequence, place]
        about = (tokens, table[:, 2], table[:, 3], self.split.documents[table[:, 2]].astype(np.int64))
        return SegmentBatch(x, mask, *(torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in about))
