"""Batches of whole segments from a store, in an order that is a function of the seed alone.

An epoch visits the chunks in random order. Consecutive chunks form a block of about `buffer_sequences` sequences; the
segments of a block are shuffled, and the blocks' segments laid end to end make one endless stream. Batch i is segments
i * n_segments .. (i + 1) * n_segments of it, so the number of batches handed out is all the state there is. While one
block is used up, a thread reads the next: two blocks are in memory, and of the whole split one count a chunk.

For another device than the CPU the thread also copies the block there, as it is stored, with the rows of all its tokens
in their shuffled order: to a GPU from pinned memory, on a stream of its own, so that a batch is one gather and one
decoding there. Two blocks are on the device then.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.device import Readout, to_device
from tcsae.shared.base.distributed import ALONE, Ranks
from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.base.settings import from_dict
from tcsae.shared.base.windows import kept_runs, masked_segments, positions, segments
from tcsae.shared.store.codecs import SIGNED
from tcsae.shared.store.counted import counted, left_out, norm_median
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch, Text, Whole
from tcsae.train.collectives import Collectives
from tcsae.train.config import DataConfig, TrainConfig
from tcsae.train.settings.temporal_settings import TemporalConfig

FIRST_READS = 8
SINGLE_VECTORS = (
    "holds single vectors without the order of a text: no windows, no first positions. Train without a temporal term: "
    "--preset topk --set data.skip_first=0."
)


class Block(NamedTuple):
    """What is in memory at a time: the sequences of some chunks, and their segments in shuffled order."""

    values: Tensor
    """[n_sequences * sequence_length, d_stored], as stored; a batch is decoded once, for all who use it."""
    segments: Int[ndarray, "n_segments 4"]
    """Each segment's first row in `values`, length, position in its sequence, and document."""
    text: Text | None = None
    """Of every row, where it was asked for."""
    rows: Int[Tensor, " n_tokens"] | None = None
    """Row of every token, in the order of the segments; None on a CPU, where each batch works out its own."""
    edges: Int[ndarray, " n_segments_plus_1"] | None = None
    """Where each segment begins in `rows`, and where the last ends."""
    copied: Any = None
    """The event after the copy to a GPU."""

    def token_rows(self, first: int, stop: int) -> Int[Tensor, " n"]:
        """Rows of the tokens of segments first..stop-1."""
        if self.rows is None or self.edges is None:
            return _token_rows(self.segments[first:stop])
        return self.rows[int(self.edges[first]) : int(self.edges[stop])]

    def there(self, device: torch.device, stream: Any) -> "Block":
        """The block on a device; to a GPU on that stream, `copied` being the end of it."""
        rows, edges = _token_rows(self.segments), np.append(0, np.cumsum(self.segments[:, 1]))
        values = self.values.view(SIGNED.get(self.values.dtype, self.values.dtype))
        if stream is None:
            return Block(to_device(values, device), self.segments, self.text, to_device(rows, device), edges)
        with torch.cuda.stream(stream):
            values = values.to(device, non_blocking=True)  # pinned already, see _block_memory
            rows = to_device(rows, device)
            copied = torch.cuda.Event()
            copied.record(stream)
        return Block(values, self.segments, self.text, rows, edges, copied)

    def await_copy(self) -> None:
        """Have the current stream wait for the copy, and keep the memory until that stream is done with it."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            for tensor in (self.values, self.rows):
                assert tensor is not None
                tensor.record_stream(stream)


class Reads:
    """How many chunks of a block are read at the same time: one from a disk; from afar, twice as many each time that
    training had to wait for a block, up to what the store is good for.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.n = min(most, FIRST_READS)

    def wanted(self, waited: bool) -> None:
        """A block is wanted now; `waited` if it was not there yet."""
        if waited:
            self.n = min(self.most, 2 * self.n)


class SegmentLoader:
    """Endless batches of the train split's segments, on `device` (see the module's docstring).

    Raises StoreError if the store has no such hook, or no position beyond `skip_first`.
    """

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        n_batches_done: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
        text: bool = False,
    ) -> None:
        self.store = store
        self.config = config
        self.hook = store.hook(config.hook)
        self.n_batches_done = n_batches_done
        """The loader's state."""
        n = config.n_segments
        self._with_text = text
        self._group = Collectives(ranks)
        self._part = slice(ranks.rank * n // ranks.world, (ranks.rank + 1) * n // ranks.world)
        """Segments of a batch that are handed out here; the rest are those of other processes."""
        split, per_chunk = store.train, store.sequences_per_chunk
        starts = range(0, split.n_sequences, per_chunk)
        counts = np.zeros((len(starts), 3), dtype=np.int64)  # the segments themselves would be 24 bytes each
        for i, first in enumerate(starts):
            _, _, length = self._segments(first, min(first + per_chunk, split.n_sequences))
            counts[i] = len(length), length.sum(), length.max(initial=0)
        self._segments_of_chunk = counts[:, 0].copy()
        self.n_segments = int(self._segments_of_chunk.sum())
        """Segments in an epoch."""
        self.n_tokens = int(counts[:, 1].sum())
        """Tokens in an epoch: every valid position that no rule but `max_norm` leaves out, once."""
        self.longest = int(counts[:, 2].max(initial=0))
        """Tokens of the longest segment."""
        if not self.n_segments:
            raise self._nothing_left()
        self._n_chunks = len(starts)
        self._chunks_per_block = max(1, config.buffer_sequences // per_chunk)
        self._n_blocks = -(-self._n_chunks // self._chunks_per_block)
        self._norm_limit = config.max_norm and config.max_norm * norm_median(store, self.hook)
        self._device = torch.device(device)
        rows = config.n_segments * config.segment_length
        self._buffer = torch.empty(rows, store.d_model(self.hook), device=self._device)
        self._stored_dtype = store.array(f"train/activations/{self.hook}").dtype
        self._decode = split.decoder(self.hook, self._device)
        self._reads = Reads(store.objects.n_readers)

    def _segments(self, first: int, stop: int) -> tuple[ndarray, ndarray, ndarray]:
        """(sequence, start, length) of the segments of sequences first..stop-1; sequences count from `first`."""
        lengths, config = self.store.train.lengths[first:stop], self.config
        long_enough = lengths >= config.min_sequence_length
        if not config.rules.has_holes:
            return segments(np.where(long_enough, lengths, 0), config.segment_length, config.skip_first)
        usable = counted(self.store.train, config.rules.without_norm(), first, stop)
        return masked_segments(usable & long_enough[:, None], config.segment_length)

    def _nothing_left(self) -> StoreError:
        config, lengths = self.config, self.store.train.lengths
        if self.store.sequence_length == 1:
            return StoreError(f"{self.store.location} {SINGLE_VECTORS}")
        if config.rules.has_holes:
            return StoreError(
                f"{self.store.location}: no train token counts, {config.rules.without_norm()}. Leave out fewer "
                "(data.exclude_tokens, data.positions, data.skip_first, data.min_sequence_length)."
            )
        return StoreError(
            f"{self.store.location}: no train sequence has {config.min_sequence_length} tokens "
            f"(data.min_sequence_length) and more than data.skip_first={config.skip_first}; the longest has "
            f"{lengths.max(initial=0)}. Lower them."
        )

    def left_out(self) -> dict[str, int]:
        """Tokens that no epoch has, by the rule that leaves them out (`max_norm` is told batch by batch)."""
        rules = self.config.rules.without_norm()
        if not rules.has_holes:  # by arithmetic: a corpus has billions of positions
            return {"skip_first": self.n_skipped}
        return left_out(self.store.train, rules, self.config.min_sequence_length)

    @property
    def n_skipped(self) -> int:
        """Valid tokens that no epoch has: the sequences' positions before `skip_first`."""
        lengths = self.store.train.lengths
        return int(np.minimum(lengths[lengths >= self.config.min_sequence_length], self.config.skip_first).sum())

    @property
    def n_short(self) -> int:
        """Tokens of the sequences below `min_sequence_length`, which no epoch has either."""
        lengths = self.store.train.lengths
        return int(lengths[lengths < self.config.min_sequence_length].sum())

    def check_windows(self, config: TrainConfig) -> None:
        """Raises ConfigError for windows that no segment holds: of a crosscoder, or of a temporal term, which would be
        0 on every batch.
        """
        if self.longest < config.sae.window:
            raise ConfigError(
                f"sae.window={config.sae.window} positions a code; the longest segment of {self.store.location} has "
                f"{self.longest} (data.segment_length={self.config.segment_length}, data.skip_first="
                f"{self.config.skip_first}). Lower sae.window or raise data.segment_length."
            )
        temporal = config.temporal
        if not temporal.active:
            return
        if self.store.sequence_length == 1:
            raise ConfigError(f"{self.store.location} {SINGLE_VECTORS}")
        needed = temporal.n_positions
        if self.longest // config.sae.window < needed:
            raise ConfigError(
                f"temporal.kind={temporal.kind!r} takes {needed} consecutive positions; the longest segment of "
                f"{self.store.location} has {self.longest} (data.skip_first={self.config.skip_first}). Lower "
                "data.skip_first, temporal.window or temporal.contrast.gap, or set temporal.weight=0."
            )
        documents = self.store.train.documents
        self._check_topic(temporal)
        if temporal.contrasts_documents and (documents == documents[0]).all():
            raise ConfigError(
                f"temporal.kind={temporal.kind!r} contrasts documents; {self.store.location} has one alone. Use "
                "another kind, or set temporal.weight=0."
            )

    def _check_topic(self, temporal: TemporalConfig) -> None:
        """Raises ConfigError where no batch has two tokens of a document that are far enough apart, but by chance."""
        if not temporal.reads_text:
            return
        distance, split, where = temporal.contrast.distance, self.store.train, self.store.location
        if temporal.order != "document" and (split.tokens[:1000] == split.tokens[0, 0]).all():
            raise ConfigError(
                f"temporal.kind={temporal.kind!r} tells tokens by their ids; {where} has the same everywhere. Use "
                "another kind, or set temporal.weight=0."
            )
        needed = distance * (2 if temporal.order == "document" else 1)
        if self.longest > needed:
            return
        term = f"order={temporal.order!r}" if temporal.order == "document" else f"kind={temporal.kind!r}"
        what = f"temporal.{term} pairs tokens of a document temporal.contrast.distance={distance} apart"
        if self.config.document_segments == 1:
            raise ConfigError(
                f"{what}; the longest segment has {self.longest}, and few documents have two in a batch. Set "
                f"data.document_segments=4, or data.segment_length above {needed}."
            )
        longest = int(np.bincount(np.unique(split.documents, return_inverse=True)[1], split.lengths).max())
        if longest <= distance:
            raise ConfigError(
                f"{what}; the longest document of {where} has {longest} tokens. Lower temporal.contrast.distance."
            )

    def block_bytes(self) -> int:
        """Of one block in memory."""
        return self._block_memory().nbytes

    def __iter__(self) -> Iterator[Batch]:
        want = self.config.n_segments
        stream = self._blocks(self.n_batches_done * want)
        block, at = next(stream)
        while True:
            taken, texts = [], []
            n_rows = n_taken = 0
            while n_taken < want:
                if at == len(block.segments):
                    block, at = next(stream)
                taken.append(block.segments[at : at + want - n_taken])
                if block.text is not None:
                    index = _token_rows(taken[-1]).numpy()
                    texts.append(Text(block.text.tokens[index], block.text.places[index]))
                ours = (edge - n_taken for edge in (self._part.start, self._part.stop))
                first, stop = (at + min(max(0, edge), len(taken[-1])) for edge in ours)
                n_rows += self._gather(block, block.token_rows(first, stop), n_rows)
                n_taken, at = n_taken + len(taken[-1]), at + len(taken[-1])
            self.n_batches_done += 1
            text = Text(*(np.concatenate(parts) for parts in zip(*texts, strict=True))) if texts else None
            yield self._batch(np.concatenate(taken), self._buffer[:n_rows], text)

    def sample(self, n_tokens: int, window: int = 1) -> Float[Tensor, "n d_in"]:
        """About `n_tokens` tokens from the beginning of the first epoch, less those above `max_norm`: the same ones,
        however far the loader is.

        With a window, their windows side by side, [n, window * d_model].
        """
        for batch in self._samples(n_tokens):
            x = batch.x if window == 1 else batch.windows(window, 0).x
            if len(x):
                return x
        what = "train token counts" if window == 1 else f"{window} train tokens in a row count"
        raise StoreError(f"{self.store.location}: no {what}, {self.config.rules}. Raise data.max_norm.")

    def _samples(self, n_tokens: int) -> Iterator[Batch]:
        """The first epoch's segments, about `n_tokens` at a time, none across two blocks: some have no token left."""
        memory = self._block_memory()
        for number in range(self._n_blocks):
            if not self._n_segments_of(0, number):
                continue
            block = self._read_block(0, number, memory)
            ends = np.cumsum(block.segments[:, 1])
            cuts = np.searchsorted(ends, np.arange(n_tokens, ends[-1], n_tokens)) + 1
            for part in np.split(block.segments, cuts):
                x = self._decode(to_device(block.values[_token_rows(part)], self._device))
                _, lengths, starts, documents = part.T
                if self._norm_limit is not None:
                    within = self._within_norm(x)
                    segment, offset, lengths = kept_runs(lengths, within)
                    x, starts, documents = self._kept(x, within), starts[segment] + offset, documents[segment]
                yield Batch(x, lengths, starts, documents)

    def _gather(self, block: Block, index: Int[Tensor, " n"], start: int) -> int:
        """Copy rows into the batch buffer from row `start` on; returns how many."""
        self._decode(torch.index_select(block.values, 0, index), self._buffer[start : start + len(index)])
        return len(index)

    def _kept(self, x: Float[Tensor, "n d_model"], keep: Bool[ndarray, " n"]) -> Float[Tensor, "n_kept d_model"]:
        """Some of the tokens; indices are made on the host, so that a GPU is not waited for."""
        return x.index_select(0, to_device(np.flatnonzero(keep), self._device))

    def _batch(self, table: Int[ndarray, "n_segments 4"], x: Float[Tensor, "n d_model"], text: Text | None) -> Batch:
        """The batch of these segments, cut where a norm is above the limit; `x` is of our part of them."""
        ours, n_left_out = self._part, 0
        _, lengths, starts, documents = table.T
        if self._norm_limit is not None:
            keep = np.zeros(int(lengths.sum()), bool)
            before = int(lengths[: ours.start].sum())
            within = self._within_norm(x)
            keep[before : before + len(x)] = within
            keep = self._group.any(torch.from_numpy(keep)).numpy()  # each process has seen the norms of its own
            segment, offset, lengths = kept_runs(lengths, keep)
            starts, documents = starts[segment] + offset, documents[segment]
            ours, n_left_out = slice(*np.searchsorted(segment, [ours.start, ours.stop]).tolist()), int((~keep).sum())
            x = self._kept(x, within)
            text = text and Text(*(part[keep] for part in text))
        batch = Batch(x, lengths[ours], starts[ours], documents[ours], n_left_out, text=text)
        if self._part == slice(0, len(table)):
            return batch
        return batch._replace(
            whole=Whole(lengths, documents, int(lengths[: ours.start].sum()), starts), group=self._group
        )

    def _within_norm(self, x: Float[Tensor, "n d_model"]) -> Bool[ndarray, " n"]:
        """Which tokens have no norm above the limit."""
        return ~Readout(x.norm(dim=1) > self._norm_limit, "max_norm").values().numpy()

    def _blocks(self, skip: int) -> Iterator[tuple[Block, int]]:
        """The stream's blocks from its segment number `skip` on, each with the first segment to use."""
        epoch, skip = divmod(skip, self.n_segments)
        number = 0
        while skip >= (n := self._n_segments_of(epoch, number)):
            number, skip = number + 1, skip - n
        memory = itertools.cycle([self._block_memory(), self._block_memory()])
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            pending: Future[Block] = reader.submit(self._next_block, epoch, number, next(memory), stream, None)
            while True:
                self._reads.wanted(not pending.done())
                block = pending.result()
                block.await_copy()
                epoch, number = (epoch, number + 1) if number + 1 < self._n_blocks else (epoch + 1, 0)
                # Into the memory of the block before, which is used up, or whose copy is ahead of this one's.
                pending = reader.submit(self._next_block, epoch, number, next(memory), stream, block.copied)
                yield block, skip
                skip = 0

    def _next_block(self, epoch: int, number: int, memory: ndarray, stream: Any, before: Any) -> Block:
        """A block where batches are gathered; `before`: the copy of the block before, on the same stream."""
        if before is not None:
            before.synchronize()
        block = self._read_block(epoch, number, memory)
        return block if self._device.type == "cpu" else block.there(self._device, stream)

    def _block_memory(self) -> ndarray:
        n = min(self._chunks_per_block * self.store.sequences_per_chunk, self.store.train.n_sequences)
        array = self.store.array(f"train/activations/{self.hook}")
        # Most blocks of uint32 (compact) fit half the bytes; one that does not is widened when it is read.
        memory = np.empty((n, *array.shape[1:]), np.uint16 if array.dtype == np.uint32 else array.dtype)
        if self._device.type == "cuda":
            memory = torch.empty(memory.nbytes, dtype=torch.uint8, pin_memory=True).numpy().view(memory.dtype)
            memory = memory.reshape(n, *array.shape[1:])
        return memory

    def _chunks(self, epoch: int, number: int) -> Int[ndarray, " n_chunks"]:
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self._n_chunks)
        return order[number * self._chunks_per_block : (number + 1) * self._chunks_per_block]

    def _n_segments_of(self, epoch: int, number: int) -> int:
        return int(self._segments_of_chunk[self._chunks(epoch, number)].sum())

    def _read_block(self, epoch: int, number: int, memory: ndarray) -> Block:
        per_chunk, length = self.store.sequences_per_chunk, self.store.sequence_length
        segments, n = [], 0
        ranges = [
            (int(c) * per_chunk, min(int(c) * per_chunk + per_chunk, self.store.train.n_sequences))
            for c in self._chunks(epoch, number)
        ]
        memory = self._read_chunks(ranges, memory)
        for first, stop in ranges:
            sequence, start, n_positions = self._segments(first, stop)
            rows = (sequence + n) * length + start
            segments.append(np.stack([rows, n_positions, start, self.store.train.documents[first + sequence]], axis=1))
            n += stop - first
        table = np.concatenate(segments)
        rng = np.random.default_rng([self.config.seed, epoch, number])
        order = document_order(table[:, 3], self.config.document_segments, rng)
        return Block(torch.from_numpy(memory[:n]).view(n * length, -1), table[order], self._text(ranges))

    def _text(self, ranges: list[tuple[int, int]]) -> Text | None:
        """Token ids and places of a block's rows."""
        if not self._with_text:
            return None
        split = self.store.train
        tokens, starts = (np.concatenate([one[a:b] for a, b in ranges]) for one in (split.tokens, split.starts))
        places = starts[:, None] + np.arange(self.store.sequence_length)
        return Text(tokens.ravel(), places.ravel())

    def _read_chunks(self, ranges: list[tuple[int, int]], memory: ndarray) -> ndarray:
        """Read chunks' rows into `memory`, one after the other; returns the memory, a wider one if they do not fit."""
        split, in_place = self.store.train, memory.dtype == self._stored_dtype
        starts = np.cumsum([0, *(stop - first for first, stop in ranges)])

        def read(i: int) -> ndarray:
            out = memory[starts[i] : starts[i + 1]] if in_place else None
            return split.read_stored(self.hook, *ranges[i], out)

        for i, rows in enumerate(self.store.objects.each(read, range(len(ranges)), self._reads.n)):
            if not in_place:
                if rows.max(initial=0) > np.iinfo(memory.dtype).max:
                    memory = memory.astype(rows.dtype)
                memory[starts[i] : starts[i + 1]] = rows
        return memory


def document_order(documents: Int[ndarray, " n"], per_cluster: int, rng: np.random.Generator) -> Int[ndarray, " n"]:
    """A random order of segments in which up to `per_cluster` of a document, from all over it, follow each other."""
    if per_cluster == 1:
        return rng.permutation(len(documents))
    within = np.lexsort((rng.random(len(documents)), documents))
    counts = np.unique(documents, return_counts=True)[1]
    rank, document = positions(counts), np.repeat(np.arange(len(counts)), counts)
    clusters = np.unique(np.stack([document, rank // per_cluster], 1), axis=0, return_inverse=True)[1].ravel()
    return within[np.argsort(rng.permutation(clusters.max(initial=0) + 1)[clusters], kind="stable")]


def _token_rows(chosen: Int[ndarray, "n_segments 4"]) -> Int[Tensor, " n"]:
    first, lengths = chosen[:, 0], chosen[:, 1]
    return torch.from_numpy(np.repeat(first, lengths) + positions(lengths))


def iterate_segments(
    store: Store, *, n_segments: int = 256, segment_length: int = 16, **options: float | str | None
) -> Iterator[tuple[Float[Tensor, "n segment_length d_model"], Bool[Tensor, "n segment_length"]]]:
    """Endless shuffled batches for anybody's own trainer: (x, valid).

    x float32 [n, segment_length, d_model], consecutive positions of one sequence each, zero where not valid; valid bool
    [n, segment_length], left-aligned. n is `n_segments`, another where `max_norm` cuts segments. `options`: hook,
    skip_first (1), min_sequence_length (1), exclude_tokens, positions, max_norm (None), buffer_sequences (2048) and
    seed (0), as in `tcsae.train.config.DataConfig`.
    """
    config = from_dict(DataConfig, {"n_segments": n_segments, "segment_length": segment_length, **options})
    for batch in SegmentLoader(store, config):
        valid = torch.from_numpy(np.arange(segment_length) < batch.lengths[:, None])
        x = torch.zeros(len(batch.lengths), segment_length, batch.x.shape[1])
        x[valid] = batch.x
        yield x, valid


def iterate_tokens(
    store: Store, *, batch_tokens: int = 4096, **options: float | str | None
) -> Iterator[Float[Tensor, "n d_model"]]:
    """Endless shuffled batches of single tokens, float32 [n, d_model]; options as above.

    n is `batch_tokens`, less where `max_norm` leaves tokens out.
    """
    config = from_dict(DataConfig, {"n_segments": batch_tokens, "segment_length": 1, **options})
    for batch in SegmentLoader(store, config):
        yield batch.x.clone()
