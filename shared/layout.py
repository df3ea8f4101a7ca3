"""How a store is cut: chunks, which are the objects of its arrays, and shards, the pieces that it is made in.

The model runs over a shard at a time, so a shard holds whole batches whatever the width of the activations: a chunk of
4 MiB is 128 sequences of 128 positions at width 128, and four at width 4096. And several batches, because sequences are
put into batches by length within their shard only.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tcsae.shared.codecs import representation
from tcsae.shared.manifest import SPLITS, Layout, Manifest, Recipe

CHUNK_BYTES = 4 << 20
SHARD_BATCHES = 8
"""Forward passes in a shard, about: some seconds of work, which is what a kill may cost."""
SHARD_BYTES = 128 << 20
"""Float32 activations of all hooks in a shard, at most, or else one batch: two shards are in memory."""


class Shard(NamedTuple):
    """The unit of phase 2: sequences start..stop-1 of a split, in one or several chunks of every hook's array."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:08d}"


class Chunk(NamedTuple):
    """A chunk of a shard: its number in the array, and which of the shard's sequences it holds."""

    number: int
    rows: slice


def layout_for(recipe: Recipe) -> Layout:
    """Chunks of about 4 MiB in the widest hook's array: one read, contiguous. Shards of about SHARD_BATCHES batches."""
    widths = [hook.d_model for hook in recipe.hooks]
    length, batch = recipe.sequences.length, recipe.model.batch_size
    per_chunk = max(1, CHUNK_BYTES // (length * max(widths) * representation(recipe.codec).bytes_per_number))
    n_batches = max(1, min(SHARD_BATCHES, SHARD_BYTES // max(1, batch * length * sum(widths) * 4)))
    return Layout(sequences_per_chunk=per_chunk, chunks_per_shard=max(1, n_batches * batch // per_chunk))


def shards_of(manifest: Manifest) -> list[Shard]:
    """All shards, train first, in order. Phase 1 must be done."""
    n = manifest.layout.sequences_per_shard
    return [
        Shard(split, number, start, min(start + n, manifest.counts[split]["sequences"]))
        for split in SPLITS
        for number, start in enumerate(range(0, manifest.counts[split]["sequences"], n))
    ]


def chunks_of(shard: Shard, layout: Layout) -> Iterator[Chunk]:
    """The chunks that a shard consists of; the last one of a split may not be full."""
    n = layout.sequences_per_chunk
    for start in range(shard.start, shard.stop, n):
        yield Chunk(start // n, slice(start - shard.start, min(start + n, shard.stop) - shard.start))


def chunk_key(split: str, hook: str, number: int) -> str:
    """Key of the object that holds a chunk of a hook's activations."""
    return f"{split}/activations/{hook}/c/{number}/0/0"
