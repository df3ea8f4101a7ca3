"""Writer of an activation store, in two phases, so that it can be killed at any moment and goes on where it stopped.

Phase 1 appends sequences to both splits and commits after every few thousand documents; phase 2 writes shards, each a
fixed range of whole sequences, in any order. Sealing adds statistics, tails, tokenizer and checksums, then the
manifest; until then the store cannot be opened for reading. Progress lies in `journal/`: one record per commit, each
written only after the bytes that it speaks of are on disk.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from tcsae.shared.base.errors import DataError, StoreError
from tcsae.shared.base.settings import differences
from tcsae.shared.store.arrays import CodecRecord, StoreArrays
from tcsae.shared.store.codecs import FIT_TOKENS
from tcsae.shared.store.format import (
    HARVESTING,
    PER_TOKEN,
    SEALED,
    SPLITS,
    TOKEN_DTYPES,
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
from tcsae.shared.store.integrity import CHECKSUMS_METADATA, ROOT, TRAILERS, encoded_trailers
from tcsae.shared.store.journal import (
    FOLDER,
    LOCK,
    OPEN,
    PLAN,
    SEQUENCES,
    Journal,
    Retained,
    clear_for_extension,
    record_key,
    remove_traces,
)
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import HEX, Objects
from tcsae.shared.store.reader import check_manifest, is_leftover, read_attributes


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
    roles: UInt8[ndarray, "n sequence_length"] | None = None
    """Of a store whose recipe names roles."""

    def arrays(self) -> dict[str, ndarray]:
        """Name -> rows of every array that is given."""
        return {name: values for name, values in vars(self).items() if values is not None}

    def part(self, which: slice) -> "Rows":
        """Some of the sequences."""
        return Rows(**{name: values[which] for name, values in self.arrays().items()})

    @staticmethod
    def joined(parts: "Sequence[Rows]") -> "Rows":
        """The sequences of all parts, which give the same arrays."""
        return Rows(**{name: np.concatenate([one.arrays()[name] for one in parts]) for name in parts[0].arrays()})

    @staticmethod
    def none(recipe: Recipe) -> "Rows":
        """No sequence at all."""
        length = recipe.sequences.length
        shapes = {name: (0, length) if name in PER_TOKEN else (0,) for name in recipe.token_arrays}
        return Rows(**{name: np.zeros(shape, TOKEN_DTYPES.get(name, "int32")) for name, shape in shapes.items()})


class StoreWriter:
    """The one writer of a store, or with `shared` one of several that write shards.

    Use `open_writer`, which holds the lock before it reads what is there; and `with`, which releases it at the end.
    """

    def __init__(
        self, objects: Objects, manifest: Manifest, journal: Journal | None = None, *, shared: bool = False
    ) -> None:
        self.location = objects.location
        self.objects = objects
        self.manifest = manifest
        self._journal = journal or Journal(objects, shared=shared)
        self._arrays = StoreArrays(objects.zarr_store(), manifest.layout, manifest.recipe.sequences.length)
        self._lengths: dict[tuple[str, int], ndarray] = {}
        """By split and number of the chunk: a shard reads what it needs, not the whole split's."""
        self.codec = CodecRecord(manifest.recipe, objects, self._arrays, self._journal)
        try:
            if not shared:
                self._begin()
            self._retained = Retained(self._journal)
            self._load_plan()
        except BaseException:
            self._journal.release()
            raise

    def _begin(self) -> None:
        self.objects.sweep()
        if not self.objects.has(ROOT):
            self.objects.put(ROOT, self.manifest.root_metadata())
        clear_for_extension(self._journal, self.objects)

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
            assert tuple(rows[split].arrays()) == self.manifest.recipe.token_arrays, "roles as the recipe says"
            for name, values in rows[split].arrays().items():
                array = self._arrays.tokens(split, name)
                array.resize((stop, *array.shape[1:]))
                if stop > start:
                    array[start:stop] = values
        self._journal.write(SEQUENCES, {**progress, "n_sequences": after})
        per_chunk = self.manifest.layout.sequences_per_token_chunk
        for key in [key for key in self._lengths if key[1] >= before[key[0]] // per_chunk]:
            del self._lengths[key]  # of a chunk that has grown

    def finish_sequences(self, counts: dict[str, Any]) -> None:
        """End phase 1: `counts` has, per split, n sequences, tokens and documents, and whatever was left out."""
        if self.progress.get("n_sequences") is None:
            self.commit(dict.fromkeys(SPLITS, Rows.none(self.manifest.recipe)), {})
        for split in SPLITS:
            assert self.progress["n_sequences"][split] == counts[split]["sequences"], "counts in = counts out"
        self._journal.write(PLAN, {"counts": counts})
        self._load_plan()

    def tokens(self, shard: Shard) -> Int[ndarray, "n sequence_length"]:
        """Tokens of a shard's sequences. Raises StoreError if a chunk is missing or damaged."""
        return self._stored(shard.split, "tokens", shard.start, shard.stop)

    def lengths(self, shard: Shard) -> Int[ndarray, " n"]:
        """Lengths of a shard's sequences. Raises StoreError if a chunk is missing or damaged."""
        assert self.planned, "lengths are remembered, so phase 1 must be done"
        per_chunk = self.manifest.layout.sequences_per_token_chunk
        n = self.manifest.counts[shard.split]["sequences"]
        first = shard.start // per_chunk
        parts = []
        for number in range(first, -(-shard.stop // per_chunk)):
            key = shard.split, number
            if key not in self._lengths:
                start = number * per_chunk
                self._lengths[key] = self._stored(shard.split, "lengths", start, min(start + per_chunk, n))
            parts.append(self._lengths[key])
        lengths = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return lengths[shard.start - first * per_chunk : shard.stop - first * per_chunk]

    def _stored(self, split: str, name: str, start: int, stop: int) -> ndarray:
        """Rows of phase 1. A missing chunk reads as the fill value, which is never stored."""
        array, where = self._arrays.tokens(split, name), f"{self.location}: {split}/{name}, sequences {start}.."
        try:
            values = np.asarray(array[start:stop])
        except StoreError:
            raise
        except Exception as error:  # each codec has its own kinds
            raise StoreError(f"{where}{stop - 1}: damaged ({error}). Start anew: --fresh.") from error
        if (values == array.fill_value).any():
            raise StoreError(f"{where}{stop - 1}: a chunk is missing. Start anew: --fresh.")
        return values

    # Phase 2: shards

    def shards(self) -> list[Shard]:
        """All shards, train first, in order."""
        return shards_of(self.manifest)

    def missing_shards(self) -> list[Shard]:
        """The shards that are not yet recorded."""
        done = self._retained.shards.keys() | self._journal.names()
        return [shard for shard in self.shards() if shard.name not in done]

    def is_written(self, shard: Shard) -> bool:
        """Whether a shard is recorded by now."""
        return shard.name in self._retained.shards or self._journal.has(shard.name)

    def fit_codec(self, run: Callable[[Shard], Mapping[str, Float[ndarray, "n sequence_length d_model"]]]) -> None:
        """Record the codec's parameters, unless that is done; no shard is written before. `run` gives a shard's
        activations of every hook, float32; it is asked for the first train shards, up to FIT_TOKENS positions.

        Raises DataError for NaN or infinity.
        """
        if self.codec.fitted:
            return
        n = -(-FIT_TOKENS // self.manifest.recipe.sequences.length)
        samples = {hook.requested: [np.zeros((0, hook.d_model), np.float32)] for hook in self.manifest.recipe.hooks}
        for shard in self.shards():
            if shard.split == "train" and shard.start < n:
                activations, valid = run(shard), self._valid(shard)
                for hook, parts in samples.items():
                    check_finite(activations[hook], valid, "train", shard.start, hook)
                    parts.append(activations[hook][: n - shard.start][valid[: n - shard.start]])
        self.codec.fit({hook: np.concatenate(parts) for hook, parts in samples.items()})

    def write_shard(self, shard: Shard, activations: Mapping[str, Float[ndarray, "n sequence_length d_model"]]) -> None:
        """Write a shard's activations of every hook (float32; what lies beyond a length is stored as zero).

        Raises DataError, naming sequence and hook, for NaN, infinity, or a value that the codec cannot hold.
        """
        valid = self._valid(shard)
        digests, trailers, partials = {}, {}, {}
        for hook in self.manifest.recipe.hooks:
            array, sums = self._activations(shard.split, hook), np.zeros(n_sums(hook.d_model))
            write = partial(self._write_chunk, shard, hook.requested, array, activations[hook.requested], valid)
            for key, its_sums in self.objects.each(write, chunks_of(shard, self.manifest.layout)):
                digests[key], trailers[key] = self.objects.stamp(key)
                sums += its_sums
            if shard.split == "train":
                partials[hook.requested] = base64.b64encode(sums.tobytes()).decode()
        self._journal.write(shard.name, {"objects": digests, "partials": partials, "trailers": trailers})

    def share(self) -> None:
        """Let other processes write shards, too: every array that these go into exists. They share the lock."""
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
        digests, trailers = self._digests_and_trailers(manifest)
        checksums = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        self.objects.delete_below("checksums")  # of the time before an extension
        self._arrays.whole("checksums", checksums, attributes={TRAILERS: encoded_trailers(trailers)})
        metadata = self.objects.stamp(CHECKSUMS_METADATA).digest
        self.manifest = replace(manifest, content=content_digest(checksums.tobytes()), checksums_metadata=metadata)
        self.objects.put(ROOT, self.manifest.root_metadata())
        self.close()
        return self.manifest

    def close(self) -> None:
        """Release the lock; after the seal, also remove journal and lock file."""
        try:
            if self.manifest.state == SEALED:
                remove_traces(self.objects)
        finally:
            self._journal.release()

    # Within

    def _digests_and_trailers(self, manifest: Manifest) -> tuple[list[str], list[int]]:
        """Of every object in the manifest's order: as recorded when it was written, else as it lies there.

        Raises StoreError, naming it, if an object is not what was recorded.
        """
        digests = self.codec.objects()
        trailers: dict[str, int] = {}
        for shard, record in self._records():
            digests |= record["objects"] if record else self._retained.shards[shard.name]
            trailers |= (record or {}).get("trailers", {})  # not in a journal of version 0.1.0
        trailers |= self._retained.trailers
        others, rows = set(manifest.files), []
        for key in manifest.objects():
            is_chunk = key not in others and not key.endswith("/zarr.json")
            if key not in digests or (is_chunk and key not in trailers):
                stamp = self.objects.stamp(key)
                if digests.setdefault(key, stamp.digest) != stamp.digest:
                    raise StoreError(f"{self.objects.name(key)} is damaged. Start anew: --fresh.")
                trailers[key] = stamp.trailer
            rows.append((digests[key], trailers[key] if is_chunk else 0))
        return [digest for digest, _ in rows], [trailer for _, trailer in rows]

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
            total = self._retained.sums(hook.requested, n_sums(hook.d_model))
            sums = total.copy()  # over full shards only: what an extension goes on from
            for shard, record in self._records():
                if shard.split == "train" and record:
                    total += np.frombuffer(base64.b64decode(record["partials"][hook.requested]))
                    if shard.stop - shard.start == self.manifest.layout.sequences_per_shard:
                        sums = total.copy()
            for name, values in (finished(total, hook.d_model) | {"sums": sums}).items():
                self._arrays.whole(f"statistics/{hook.requested}/{name}", values)

    def _records(self) -> Iterator[tuple[Shard, dict[str, Any] | None]]:
        """Every shard in order with its record; none of a retained one. Raises StoreError for a damaged record."""
        shards, n = self.shards(), self.objects.n_readers
        for i in range(0, len(shards), n):
            part = shards[i : i + n]
            for shard, record in zip(
                part, self.objects.each(lambda shard: self._journal.read(shard.name), part), strict=True
            ):
                if record and not all(
                    isinstance(one, str) and HEX.fullmatch(one) for one in record["objects"].values()
                ):
                    name = self.objects.name(record_key(shard.name))
                    raise StoreError(f"{name} is damaged. Delete it: that shard is then made anew.")
                yield shard, record

    def _load_plan(self) -> None:
        if plan := self._journal.read(PLAN):
            self.manifest = replace(self.manifest, counts=plan["counts"])

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
    `force` breaks a lock whose holder may be dead, or that cannot be read.

    Raises StoreError, naming each difference, if a store of another recipe is there; or if another process writes it.
    """
    objects = objects_at(location)
    if not objects.writable:
        raise StoreError(f"{location} can be read only. Give another --store, then tcsae copy.")
    if _begun(objects, recipe, layout) is None and not _has_traces(objects):
        return None  # on a disk that may be read-only
    journal = Journal(objects, force=force)
    try:
        manifest = _begun(objects, recipe, layout)  # again, as another process may have sealed it before the lock
        if manifest is not None:
            return StoreWriter(objects, manifest, journal)
        remove_traces(objects)  # of a writer that was killed right after the seal
    except BaseException:
        journal.release()
        raise
    journal.release()
    return None


def _begun(objects: Objects, recipe: Recipe, layout: Layout | None) -> Manifest | None:
    """The manifest to go on with, of a new store or the unfinished one of `recipe` that is there; None if it is sealed.

    Raises StoreError if anything else is there.
    """
    location, values = objects.location, read_attributes(objects)
    if values is None:
        if stray := [key for key in objects.listed() if not is_leftover(key)]:
            raise StoreError(f"{location} is not an activation store: {stray[0]} lies there. Give another --store.")
        return Manifest(state=HARVESTING, recipe=recipe, layout=layout or layout_for(recipe))
    manifest = check_manifest(location, values)
    differing = differences(manifest.recipe, recipe)
    usable = manifest.state == SEALED and all(one.startswith("libraries.") for one in differing)
    if differing and not usable:  # other versions than it was written with can read it
        raise StoreError(_otherwise(location, manifest.recipe, recipe, differing))
    return None if manifest.state == SEALED else manifest


def _otherwise(location: str, stored: Recipe, asked: Recipe, differing: list[str]) -> str:
    """Why a store cannot become that of another recipe, and the cures, the one that deletes nothing first."""
    theirs, ours = ([hook.requested for hook in recipe.hooks] for recipe in (stored, asked))
    if all(one.startswith(("hooks.", "libraries.")) for one in differing):
        both = " ".join(f"--hook {name}" for name in dict.fromkeys(theirs + ours))
        return (
            f"{location} holds {', '.join(theirs)}, not {', '.join(ours)}. A store is extended by --tokens, not by "
            f"hooks. Give another --store for these, or harvest all in one pass with --fresh {both}."
        )
    return (
        f"{location} was harvested otherwise ({'; '.join(differing)}). Give another --store, or delete this one with "
        "--fresh."
    )


def _has_traces(objects: Objects) -> bool:
    """Whether a sealed store has a lock or a journal: of a writer at work, or of one that was killed after the seal."""
    return objects.has(LOCK) or bool(objects.listed(FOLDER)) or bool(objects.listed(f"{LOCK}s"))
