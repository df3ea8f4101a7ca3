"""Writing an activation store, in two phases, so that it can be killed at any moment and goes on where it stopped.

Phase 1 appends sequences to both splits and commits after every few thousand documents; phase 2 writes shards, each a
fixed range of whole sequences, in any order. Sealing adds statistics, tails, tokenizer and checksums, then the
manifest; until then the store cannot be opened for reading. Progress lies in `journal/`: one record per commit, each
written only after the bytes that it speaks of are on disk.
"""

import base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from zarr.abc.codec import ArrayArrayCodec
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from tcsae.shared.base.errors import DataError, StoreError
from tcsae.shared.base.settings import differences
from tcsae.shared.store.codecs import EXACT, FIT_TOKENS, encode, eval_codec, fit, representation, stored_width
from tcsae.shared.store.format import (
    HARVESTING,
    SEALED,
    SPLITS,
    Chunk,
    HookRecipe,
    Layout,
    Manifest,
    Recipe,
    Shard,
    chunk_key,
    chunks_of,
    content_digest,
    finished,
    layout_for,
    n_sums,
    partial_sums,
    shards_of,
)
from tcsae.shared.store.journal import CODEC, OPEN, SEQUENCES, Journal, Kept, clear_for_extension, remove_traces
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.reader import ROOT, check_manifest, is_leftover, read_attributes

# The arrays of a store that is being written, by path: made on first use, grown when their split grows.

COMPACT_BLOCK_BYTES = 1 << 17


class StoreArrays:
    """Arrays for `layout`, of sequences of `length` positions. The root group has to be there when one is asked for."""

    def __init__(self, store: ZarrStore, layout: Layout, length: int) -> None:
        self._store = store
        self._layout = layout
        self._length = length
        self._arrays: dict[str, zarr.Array] = {}

    def tokens(self, split: str, name: str) -> zarr.Array:
        """`tokens`, `lengths`, `documents` or `starts` of a split; new with no rows."""
        dtype = np.dtype("int64" if name == "documents" else "int32")
        rows, rest = self._layout.sequences_per_token_chunk, (self._length,) if name == "tokens" else ()
        fill = np.iinfo(dtype).max
        return self._array(f"{split}/{name}", (0, *rest), (rows, *rest), dtype, fill, ZstdCodec(level=1))

    def activations(self, split: str, hook: HookRecipe, codec: str, n_sequences: int) -> zarr.Array:
        """A split's activations of a hook, stored as `codec`, with `n_sequences` rows."""
        width, stored = stored_width(codec, hook.d_model), representation(codec)
        shape = (n_sequences, self._length, width)
        chunks = (self._layout.sequences_per_chunk, self._length, width)
        codecs = compact_codecs() if codec == "compact" else ()
        array = self._array(f"{split}/activations/{hook.requested}", shape, chunks, stored.dtype, stored.fill, *codecs)
        if array.shape != shape:
            array.resize(shape)
        return array

    def whole(self, path: str, values: np.ndarray, fill: object = 0) -> None:
        """Write an array that is one object."""
        self._array(path, values.shape, values.shape, values.dtype, fill)[:] = values

    def _array(
        self, path: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype, fill: object, *codecs: Any
    ) -> zarr.Array:
        if path not in self._arrays:
            self._arrays[path] = open_or_create(self._store, path, shape, chunks, dtype, fill, codecs)
        return self._arrays[path]


def compact_codecs() -> tuple[Any, ...]:
    """One dimension's coefficients side by side, bytes of equal weight side by side; zstd 1 then comes within 3% of
    the entropy, and higher levels do worse: the data are near random.
    """
    blosc = BloscCodec(typesize=4, cname="zstd", clevel=1, shuffle="shuffle", blocksize=COMPACT_BLOCK_BYTES)
    return TransposeCodec(order=(2, 0, 1)), blosc


# What the splits of a store that is being written are stored as: the codec's parameters, once they are computed.


class CodecRecord:
    """The journal's record of the codec, and the arrays below codec/; any writer that finds them goes on with them."""

    def __init__(self, recipe: Recipe, objects: Objects, arrays: StoreArrays, journal: Journal) -> None:
        self._recipe, self._objects, self._arrays, self._journal = recipe, objects, arrays, journal
        self._parameters: dict[str, dict[str, ndarray]] = {}

    @property
    def fitted(self) -> bool:
        """Whether the parameters are recorded, or the codec has none: shards can be written."""
        return self._recipe.codec in EXACT or self._journal.has(CODEC)

    def fit(self, samples: Mapping[str, Float[ndarray, "n d_model"]]) -> None:
        """Compute and record the parameters from every hook's tokens."""
        objects = {}
        for hook, x in samples.items():
            for name, values in fit(self._recipe.codec, x, self._recipe.codec_error).items():
                path = f"codec/{hook}/{name}"
                self._arrays.whole(path, values, np.nan)
                key = f"{path}/c/{'/'.join('0' * values.ndim)}"
                objects[key] = self._objects.digest(key)
        evals = {hook: eval_codec(self._recipe.codec, x) for hook, x in samples.items()}
        self._journal.write(CODEC, {"eval": evals, "objects": objects})

    def name(self, split: str, hook: str) -> str:
        """What a hook of a split is stored as."""
        if split == "train" or self._recipe.codec in EXACT:
            return self._recipe.codec
        record = self._journal.read(CODEC)
        assert record is not None, "fit comes before the first shard"
        return record["eval"][hook]

    def encode(self, split: str, hook: str, x: Float[ndarray, "n d_model"]) -> Shaped[ndarray, "n d_stored"]:
        """Stored rows. Raises DataError where a value does not fit."""
        codec = self.name(split, hook)
        names = representation(codec).parameters
        if names and hook not in self._parameters:
            assert self.fitted, "fit comes before the first shard"
            group = zarr.open_group(
                self._objects.zarr_store(read_only=True), path=f"codec/{hook}", mode="r", zarr_format=3
            )
            self._parameters[hook] = {name: np.asarray(group[name][:]) for name in names}  # type: ignore[index]
        return encode(x, codec, self._parameters.get(hook))

    def objects(self) -> dict[str, str]:
        """Keys of the parameters' chunks, and their digests as they were written."""
        return dict((self._journal.read(CODEC) or {}).get("objects", {}))


def check_finite(
    values: Float[ndarray, "n sequence_length d_model"],
    valid: Bool[ndarray, "n sequence_length"],
    split: str,
    first: int,
    hook: str,
) -> None:
    """Raises DataError, naming the place, if a valid position of sequences `first`, ... holds NaN or infinity."""
    bad = ~np.isfinite(values).all(axis=-1) & valid
    if bad.any():
        row, position = np.argwhere(bad)[0]
        where = f"{split} sequence {first + row}, position {position}"
        raise DataError(f"{hook} is NaN or infinite at {where}. Nothing of this shard was stored; look at the model.")


@dataclass
class Rows:
    """Sequences to append: shapes and dtypes as in `Split`."""

    tokens: Int[ndarray, "n sequence_length"]
    lengths: Int[ndarray, " n"]
    documents: Int[ndarray, " n"]
    starts: Int[ndarray, " n"]


class StoreWriter:
    """The one writer of a store: use `open_writer`, and `with`, which releases its lock at the end."""

    def __init__(self, objects: Objects, manifest: Manifest, *, shared: bool = False, force: bool = False) -> None:
        self.location = objects.location
        self.objects = objects
        self.manifest = manifest
        self._journal = Journal(objects, shared=shared, force=force)
        self._arrays = StoreArrays(objects.zarr_store(), manifest.layout, manifest.recipe.sequences.length)
        self._lengths: dict[str, ndarray] = {}
        self.codec = CodecRecord(manifest.recipe, objects, self._arrays, self._journal)
        if not shared:
            objects.sweep()
            if not objects.has(ROOT):
                objects.put(ROOT, manifest.root_metadata())
            clear_for_extension(self._journal, objects)
        self._kept = Kept(self._journal)
        self._load_plan()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Phase 1: sequences

    @property
    def progress(self) -> dict[str, Any]:
        """What the last `commit` recorded; empty before the first."""
        return self._journal.read(SEQUENCES) or {}

    @property
    def planned(self) -> bool:
        """Whether phase 1 is done."""
        return bool(self.manifest.counts)

    def commit(self, rows: Mapping[str, Rows], progress: dict[str, Any]) -> None:
        """Append rows to the splits, durably, then record `progress`; a restart goes on from that record."""
        before = self.progress.get("n_sequences", dict.fromkeys(SPLITS, 0))
        after = {}
        for split in SPLITS:
            start = before[split]
            after[split] = stop = start + len(rows[split].lengths)
            for name, values in vars(rows[split]).items():
                array = self._arrays.tokens(split, name)
                array.resize((stop, *array.shape[1:]))
                if stop > start:
                    array[start:stop] = values
        self._journal.write(SEQUENCES, {**progress, "n_sequences": after})

    def finish_sequences(self, counts: dict[str, Any]) -> None:
        """End phase 1: `counts` has, per split, n sequences, tokens and documents, and whatever was left out."""
        if self.progress.get("n_sequences") is None:
            empty = np.zeros((0, self.manifest.recipe.sequences.length), np.int32)
            rows = Rows(empty, np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))
            self.commit(dict.fromkeys(SPLITS, rows), {})
        for split in SPLITS:
            assert self.progress["n_sequences"][split] == counts[split]["sequences"], "counts in = counts out"
        self._journal.write("plan", {"counts": counts})
        self._load_plan()

    def tokens(self, shard: Shard) -> Int[ndarray, "n sequence_length"]:
        """Tokens of a shard's sequences."""
        return np.asarray(self._arrays.tokens(shard.split, "tokens")[shard.start : shard.stop])

    def lengths(self, shard: Shard) -> Int[ndarray, " n"]:
        """Lengths of a shard's sequences."""
        assert self.planned, "lengths are read once, so phase 1 must be done"
        if shard.split not in self._lengths:
            self._lengths[shard.split] = np.asarray(self._arrays.tokens(shard.split, "lengths")[:])
        return self._lengths[shard.split][shard.start : shard.stop]

    # Phase 2: shards

    def shards(self) -> list[Shard]:
        """All shards, train first, in order."""
        return shards_of(self.manifest)

    def missing_shards(self) -> list[Shard]:
        """The shards that are not yet recorded."""
        done = self._kept.shards.keys() | self._journal.names()
        return [shard for shard in self.shards() if shard.name not in done]

    def is_written(self, shard: Shard) -> bool:
        """Whether a shard is recorded by now."""
        return shard.name in self._kept.shards or self._journal.has(shard.name)

    def fit_codec(self, run: Callable[[Shard], Mapping[str, Float[ndarray, "n sequence_length d_model"]]]) -> None:
        """Record the codec's parameters, unless that is done; no shard is written before. `run` gives a shard's
        activations of every hook, float32; it is asked for the first train shards, up to FIT_TOKENS positions.

        Raises DataError for NaN or infinity.
        """
        if self.codec.fitted:
            return
        n = -(-FIT_TOKENS // self.manifest.recipe.sequences.length)
        found = {hook.requested: [np.zeros((0, hook.d_model), np.float32)] for hook in self.manifest.recipe.hooks}
        for shard in self.shards():
            if shard.split == "train" and shard.start < n:
                activations, valid = run(shard), self._valid(shard)
                for hook, parts in found.items():
                    check_finite(activations[hook], valid, "train", shard.start, hook)
                    parts.append(activations[hook][: n - shard.start][valid[: n - shard.start]])
        self.codec.fit({hook: np.concatenate(parts) for hook, parts in found.items()})

    def write_shard(self, shard: Shard, activations: Mapping[str, Float[ndarray, "n sequence_length d_model"]]) -> None:
        """Write a shard's activations of every hook (float32; what lies beyond a length is stored as zero).

        Raises DataError, naming sequence and hook, for NaN, infinity, or a value that the codec cannot hold.
        """
        valid = self._valid(shard)
        objects, partials = {}, {}
        for hook in self.manifest.recipe.hooks:
            array, sums = self._activations(shard.split, hook), np.zeros(n_sums(hook.d_model))
            write = partial(self._write_chunk, shard, hook.requested, array, activations[hook.requested], valid)
            for key, its_sums in self.objects.each(write, chunks_of(shard, self.manifest.layout)):
                objects[key] = self.objects.digest(key)
                sums += its_sums
            if shard.split == "train":
                partials[hook.requested] = base64.b64encode(sums.tobytes()).decode()
        self._journal.write(shard.name, {"objects": objects, "partials": partials})

    def share(self) -> None:
        """Go on together with other processes (who share its lock): all is there that shards are written into."""
        self._make_activations()
        self._journal.write(OPEN, {})
        self._journal.share()

    # The seal

    def add_file(self, key: str, data: bytes) -> None:
        """Write an object that belongs to no array (tail, tokenizer); name it in `seal`."""
        self.objects.put(key, data)

    def add_folder(self, key: str, folder: Path) -> list[str]:
        """Write every file of a folder below `key`; returns the keys, sorted."""
        keys = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            keys.append(f"{key}/{file.relative_to(folder).as_posix()}")
            self.add_file(keys[-1], file.read_bytes())
        return keys

    def seal(self, tails: dict[str, Any], files: list[str], times: dict[str, Any]) -> Manifest:
        """Write statistics, checksums and the final manifest, then remove journal and lock.

        Raises StoreError, naming it, if a shard is missing.
        """
        if missing := self.missing_shards():
            raise StoreError(f"{self.location} lacks {len(missing)} shards, first {missing[0].name}. Harvest again.")
        self.fit_codec(lambda shard: {})  # noqa: ARG005  a store without a single shard
        self._make_activations()
        self._write_statistics()
        manifest = replace(self.manifest, tails=tails, files=tuple(sorted(files)), times=times, state=SEALED)
        recorded = self.codec.objects()
        for shard, record in self._records():
            recorded |= record["objects"] if record else self._kept.shards[shard.name]
        digests = [recorded.get(key) or self.objects.digest(key) for key in manifest.objects()]
        checksums = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        self.objects.delete_below("checksums")  # of the time before an extension
        self._arrays.whole("checksums", checksums)
        metadata = self.objects.digest("checksums/zarr.json")
        self.manifest = replace(manifest, content=content_digest(checksums.tobytes()), checksums_metadata=metadata)
        self.objects.put(ROOT, self.manifest.root_metadata())
        self.close()
        return self.manifest

    def close(self) -> None:
        """Release the lock; after the seal, also remove journal and lock file."""
        if self.manifest.state == SEALED:
            remove_traces(self.objects)
        self._journal.release()

    # Within

    def _write_chunk(
        self, shard: Shard, hook: str, array: zarr.Array, values: Float[ndarray, "n t d"], valid: ndarray, chunk: Chunk
    ) -> tuple[str, Float[ndarray, " n_sums"]]:
        """Write one chunk of a shard; returns its key, and the sums over its tokens."""
        here, first = valid[chunk.rows], shard.start + chunk.rows.start
        check_finite(values[chunk.rows], here, shard.split, first, hook)
        x = values[chunk.rows][here]
        block = np.zeros((len(here), *array.shape[1:]), array.dtype)
        block[here] = self.codec.encode(shard.split, hook, x)
        array[first : first + len(here)] = block
        return chunk_key(shard.split, hook, chunk.number), partial_sums(x)

    def _write_statistics(self) -> None:
        """mean, variance (of the valid train tokens) and norm histogram from the shards' sums, added in shard order."""
        for hook in self.manifest.recipe.hooks:
            total = self._kept.sums(hook.requested, n_sums(hook.d_model))
            sums = total.copy()  # over full shards only: what an extension goes on from
            for shard, record in self._records():
                if shard.split == "train" and record:
                    total += np.frombuffer(base64.b64decode(record["partials"][hook.requested]))
                    if shard.stop - shard.start == self.manifest.layout.sequences_per_shard:
                        sums = total.copy()
            for name, values in (finished(total, hook.d_model) | {"sums": sums}).items():
                self._arrays.whole(f"statistics/{hook.requested}/{name}", values)

    def _records(self) -> Iterator[tuple[Shard, dict[str, Any] | None]]:
        """Every shard in order with its record; none of a kept one."""
        shards, n = self.shards(), self.objects.n_readers
        for i in range(0, len(shards), n):
            part = shards[i : i + n]
            yield from zip(part, self.objects.each(lambda shard: self._journal.read(shard.name), part), strict=True)

    def _load_plan(self) -> None:
        if plan := self._journal.read("plan"):
            self.manifest = replace(self.manifest, counts=plan["counts"])
            self._lengths.clear()

    def _valid(self, shard: Shard) -> Bool[ndarray, "n sequence_length"]:
        return np.arange(self.manifest.recipe.sequences.length) < self.lengths(shard)[:, None]

    def _make_activations(self) -> None:
        for split in SPLITS:
            for hook in self.manifest.recipe.hooks:
                self._activations(split, hook)  # also of an empty split

    def _activations(self, split: str, hook: HookRecipe) -> zarr.Array:
        n = self.manifest.counts[split]["sequences"]
        return self._arrays.activations(split, hook, self.codec.name(split, hook.requested), n)


def open_writer(
    location: str, recipe: Recipe, layout: Layout | None = None, *, force: bool = False
) -> StoreWriter | None:
    """A writer for a new store, or for an unfinished one of the same recipe; None if it is sealed already.

    `layout` is for a new store (default: `layout_for`); an unfinished one keeps its own.
    `force` breaks a lock in an object store whose owner may be dead.

    Raises StoreError, naming each difference, if a store of another recipe is there; or if another process writes it.
    """
    objects = objects_at(location)
    if not objects.writable:
        raise StoreError(f"{location} can be read only. Give another --store, then tcsae copy.")
    values = read_attributes(objects)
    if values is None:
        if stray := [key for key in objects.listed() if not is_leftover(key)]:
            raise StoreError(f"{location} is not an activation store: {stray[0]} lies there. Give another --store.")
        manifest = Manifest(state=HARVESTING, recipe=recipe, layout=layout or layout_for(recipe))
        return StoreWriter(objects, manifest, force=force)
    manifest = check_manifest(location, values)
    differing = differences(manifest.recipe, recipe)
    read_only = manifest.state == SEALED and all(one.startswith("libraries.") for one in differing)
    if differing and not read_only:  # other versions than it was written with can read it
        found = "; ".join(differing)
        raise StoreError(
            f"{location} was harvested otherwise ({found}). Use --fresh to start anew, or another --store."
        )
    if manifest.state == SEALED:
        remove_traces(objects)  # of a writer that was killed right after the seal
        return None
    return StoreWriter(objects, manifest, force=force)


def open_or_create(
    store: ZarrStore,
    path: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype,
    fill: object,
    codecs: tuple[Any, ...] = (),
) -> zarr.Array:
    """The array at `path`; if not there yet, made with its parent groups.

    Its codecs: those of `codecs` that rearrange an array, little-endian, the other `codecs`, crc32c.
    """
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    if parent := path.rpartition("/")[0]:
        group.require_group(parent)
    if path in group:
        found = group[path]
        assert isinstance(found, zarr.Array)
        return found
    return group.create_array(
        path,
        shape=shape,
        chunks=tuple(max(1, n) for n in chunks),
        dtype=dtype,
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(endian=None),
        filters=tuple(codec for codec in codecs if isinstance(codec, ArrayArrayCodec)),
        compressors=(*(codec for codec in codecs if not isinstance(codec, ArrayArrayCodec)), Crc32cCodec()),
        fill_value=fill,
        # A missing chunk is damage, not a run of fill values.
        config={"write_empty_chunks": True},
    )
