"""Writing an activation store, in two phases, so that it can be killed at any moment and goes on where it stopped.

Phase 1 appends sequences to both splits and commits after every few thousand documents; phase 2 writes shards, each a
fixed range of whole sequences, in any order. Sealing adds statistics, tails, tokenizer and checksums, then the
manifest; until then the store cannot be opened for reading. Progress lies in `journal/`: one record per commit, each
written only after the bytes that it speaks of are on disk.
"""

import base64
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from jaxtyping import Float, Int
from numpy import ndarray
from zarr.codecs import ZstdCodec

from tcsae.shared.codecs import encode, stored_dtype
from tcsae.shared.config import differences
from tcsae.shared.errors import DataError, StoreError
from tcsae.shared.files import sweep_partials, write_atomic
from tcsae.shared.journal import Journal, remove_traces
from tcsae.shared.manifest import SEALED, SPLITS, Layout, Manifest, Recipe, content_digest
from tcsae.shared.statistics import N_NORM_BINS, partial_sums, split_sums
from tcsae.shared.storage import DurableStore, local_root, open_or_create
from tcsae.shared.store import check_manifest, read_attributes

CHUNK_BYTES = 4 << 20


class Shard(NamedTuple):
    """The unit of phase 2: sequences start..stop-1 of a split, one object of every hook's array."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:08d}"


@dataclass
class Rows:
    """Sequences to append: shapes and dtypes as in `Split`."""

    tokens: Int[ndarray, "n sequence_length"]
    lengths: Int[ndarray, " n"]
    documents: Int[ndarray, " n"]
    starts: Int[ndarray, " n"]


def layout_for(recipe: Recipe) -> Layout:
    """Chunks of about 4 MiB in the widest hook's array: one read, contiguous, a second or so of work."""
    width = max(hook.d_model for hook in recipe.hooks)
    per_sequence = recipe.sequences.length * width * stored_dtype(recipe.codec).itemsize
    return Layout(sequences_per_chunk=max(1, CHUNK_BYTES // per_sequence))


class StoreWriter:
    """The one writer of a store: use `open_writer`, and `with`, which releases its lock at the end."""

    def __init__(self, location: str, root: Path, manifest: Manifest) -> None:
        self.location = location
        self.root = root
        self.manifest = manifest
        self._store = DurableStore(root)
        self._journal = Journal(root, location)
        self._arrays: dict[str, zarr.Array] = {}
        self._lengths: dict[str, ndarray] = {}
        sweep_partials(root)
        if not (root / "zarr.json").exists():
            self._write_root(manifest)
        self._load_plan()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Phase 1: sequences

    @property
    def progress(self) -> dict[str, Any]:
        """What the last `commit` recorded; empty before the first."""
        return self._journal.read("sequences") or {}

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
                array = self._token_array(f"{split}/{name}", values.dtype, values.shape[1:])
                array.resize((stop, *array.shape[1:]))
                if stop > start:
                    array[start:stop] = values
        self._journal.write("sequences", {**progress, "n_sequences": after})

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
        length = self.manifest.recipe.sequences.length
        tokens = self._token_array(f"{shard.split}/tokens", np.dtype("int32"), (length,))
        return np.asarray(tokens[shard.start : shard.stop])

    def lengths(self, shard: Shard) -> Int[ndarray, " n"]:
        """Lengths of a shard's sequences."""
        assert self.planned, "lengths are read once, so phase 1 must be done"
        if shard.split not in self._lengths:
            array = self._token_array(f"{shard.split}/lengths", np.dtype("int32"), ())
            self._lengths[shard.split] = np.asarray(array[:])
        return self._lengths[shard.split][shard.start : shard.stop]

    # Phase 2: shards

    def shards(self) -> list[Shard]:
        """All shards, train first, in order."""
        n = self.manifest.layout.sequences_per_chunk
        return [
            Shard(split, number, start, min(start + n, self.manifest.counts[split]["sequences"]))
            for split in SPLITS
            for number, start in enumerate(range(0, self.manifest.counts[split]["sequences"], n))
        ]

    def missing_shards(self) -> list[Shard]:
        """The shards that are not yet recorded."""
        return [shard for shard in self.shards() if not self._journal.has(shard.name)]

    def write_shard(self, shard: Shard, activations: Mapping[str, Float[ndarray, "n sequence_length d_model"]]) -> None:
        """Write a shard's activations of every hook (float32; what lies beyond a length is stored as zero).

        Raises DataError, naming sequence and hook, for NaN, infinity, or a value that the codec cannot hold.
        """
        valid = np.arange(self.manifest.recipe.sequences.length) < self.lengths(shard)[:, None]
        objects, partials = {}, {}
        for hook in self.manifest.recipe.hooks:
            values = activations[hook.requested]
            _check_finite(values, valid, shard, hook.requested)
            block = encode(np.where(valid[..., None], values, np.float32(0)), self.manifest.recipe.codec)
            path = f"{shard.split}/activations/{hook.requested}"
            self._activation_array(path, hook.d_model)[shard.start : shard.stop] = block
            key = f"{path}/c/{shard.number}/0/0"
            objects[key] = self._store.digest(key)
            if shard.split == "train":
                sums = partial_sums(values[valid])
                partials[hook.requested] = base64.b64encode(sums.tobytes()).decode()
        self._journal.write(shard.name, {"objects": objects, "partials": partials})

    # The seal

    def add_file(self, key: str, data: bytes) -> None:
        """Write an object that belongs to no array (tail, tokenizer); name it in `seal`."""
        self._store.put(key, data)

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
        for split, hook in itertools.product(SPLITS, self.manifest.recipe.hooks):
            self._activation_array(f"{split}/activations/{hook.requested}", hook.d_model)  # also of an empty split
        self._write_statistics()
        manifest = replace(self.manifest, tails=tails, files=tuple(sorted(files)), times=times, state=SEALED)
        recorded = {key: digest for shard in self.shards() for key, digest in self._objects_of(shard).items()}
        digests = [recorded.get(key) or self._store.digest(key) for key in manifest.objects()]
        checksums = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        self._create("checksums", checksums.shape, checksums.shape, np.dtype("uint8"), 0)[:] = checksums
        self.manifest = replace(manifest, content=content_digest(checksums.tobytes()))
        self._write_root(self.manifest)
        self.close()
        return self.manifest

    def close(self) -> None:
        """Release the lock; after the seal, also remove journal and lock file."""
        if self.manifest.state == SEALED:
            remove_traces(self.root)
        self._journal.release()

    # Within

    def _write_statistics(self) -> None:
        """mean, variance (of the valid train tokens) and norm histogram from the shards' sums, added in shard order."""
        for hook in self.manifest.recipe.hooks:
            total = np.zeros(1 + 2 * hook.d_model + N_NORM_BINS)
            for shard in self.shards():
                if shard.split == "train":
                    record = self._journal.read(shard.name)
                    assert record is not None
                    total += np.frombuffer(base64.b64decode(record["partials"][hook.requested]))
            count, first, second, histogram = split_sums(total, hook.d_model)
            mean = first / max(count, 1.0)
            arrays = {"mean": mean, "variance": np.maximum(second / max(count, 1.0) - mean**2, 0.0)}
            for name, values in (arrays | {"norm_histogram": histogram.astype(np.int64)}).items():
                path = f"statistics/{hook.requested}/{name}"
                self._create(path, values.shape, values.shape, values.dtype, 0)[:] = values

    def _objects_of(self, shard: Shard) -> dict[str, str]:
        record = self._journal.read(shard.name)
        assert record is not None, shard
        return record["objects"]

    def _load_plan(self) -> None:
        if plan := self._journal.read("plan"):
            self.manifest = replace(self.manifest, counts=plan["counts"])

    def _write_root(self, manifest: Manifest) -> None:
        root = {"zarr_format": 3, "node_type": "group", "attributes": {"tcsae": manifest.to_json()}}
        write_atomic(self.root / "zarr.json", (json.dumps(root, indent=2) + "\n").encode())

    def _token_array(self, path: str, dtype: np.dtype, rest: tuple[int, ...]) -> zarr.Array:
        rows = self.manifest.layout.sequences_per_token_chunk
        return self._create(path, (0, *rest), (rows, *rest), dtype, np.iinfo(dtype).max, ZstdCodec(level=1))

    def _activation_array(self, path: str, d_model: int) -> zarr.Array:
        split, length = path.split("/")[0], self.manifest.recipe.sequences.length
        shape = (self.manifest.counts[split]["sequences"], length, d_model)
        chunks = (self.manifest.layout.sequences_per_chunk, length, d_model)
        return self._create(path, shape, chunks, stored_dtype(self.manifest.recipe.codec), np.nan)

    def _create(
        self, path: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype, fill: object, *codecs: Any
    ) -> zarr.Array:
        """The array at `path`, created if it is not there yet."""
        if path not in self._arrays:
            self._arrays[path] = open_or_create(self._store, path, shape, chunks, dtype, fill, codecs)
        return self._arrays[path]


def open_writer(location: str, recipe: Recipe, layout: Layout | None = None) -> StoreWriter | None:
    """A writer for a new store, or for an unfinished one of the same recipe; None if it is sealed already.

    `layout` is for a new store (default: chunks of about 4 MiB); an unfinished one keeps its own.

    Raises StoreError, naming each difference, if a store of another recipe is there; or if another process writes it.
    """
    root = local_root(location)
    values = read_attributes(root)
    if values is None:
        manifest = Manifest(state="harvesting", recipe=recipe, layout=layout or layout_for(recipe))
        return StoreWriter(location, root, manifest)
    manifest = check_manifest(location, values)
    if differing := differences(manifest.recipe, recipe):
        found = "; ".join(differing)
        raise StoreError(
            f"{location} was harvested otherwise ({found}). Use --fresh to start anew, or another --store."
        )
    if manifest.state == SEALED:
        remove_traces(root)  # of a writer that was killed right after the seal
        return None
    return StoreWriter(location, root, manifest)


def _check_finite(values: ndarray, valid: ndarray, shard: Shard, hook: str) -> None:
    bad = ~np.isfinite(values).all(axis=-1) & valid
    if bad.any():
        row, position = np.argwhere(bad)[0]
        where = f"{shard.split} sequence {shard.start + row}, position {position}"
        raise DataError(f"{hook} is NaN or infinite at {where}. Nothing of this shard was stored; look at the model.")
