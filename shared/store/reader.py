"""Reading an activation store: the manifest, the sequences, their activations. See data/README.md for the format."""

import contextlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from tcsae.shared.base.errors import DeniedError, RemoteError, StoreError, unknown
from tcsae.shared.base.files import cache_path, write_folder
from tcsae.shared.store.codecs import representation
from tcsae.shared.store.format import FORMAT, SEALED, SPLITS, VERSION, Manifest, is_intact, manifest_from_json
from tcsae.shared.store.journal import LOCK
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects, is_temporary
from tcsae.shared.store.places.local import LocalObjects

if TYPE_CHECKING:
    import torch

    from tcsae.shared.store.codecs import Decoder


# Plain chunks straight from their files: the bytes into the caller's buffer, then their crc32c. Zarr is the general
# path; this one reads several times as fast and makes no copy.

CRC_BYTES = 4


def is_plain(array: zarr.Array) -> bool:
    """Whether a chunk's file is its numbers, little-endian, then their crc32c, as it is without a compressor."""
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]  # type: ignore[index, call-overload, union-attr]
    return codecs == ["bytes", "crc32c"] and array.dtype.byteorder in "<=|"


def read_chunk(objects: Objects, key: str, out: ndarray, chunk_bytes: int) -> None:
    """Fill `out` (contiguous) with the first bytes of the plain chunk `key`, which holds `chunk_bytes` of numbers.

    Raises StoreError, naming the object, if it is missing, of another size, or its checksum does not fit.
    """
    whole = out.reshape(-1).view(np.uint8)
    if len(whole) < chunk_bytes:  # the last chunk of an array is stored whole, too
        whole = np.empty(chunk_bytes, np.uint8)
    trailer = bytearray(CRC_BYTES + 1)
    try:
        n_read = objects.read_into(key, whole.data, memoryview(trailer))
    except OSError as error:
        why = error.strerror or "it is not there"
        raise StoreError(
            f"{objects.name(key)} cannot be read ({why}): the store is damaged. Harvest it again."
        ) from error
    if n_read != chunk_bytes + CRC_BYTES:
        raise StoreError(
            f"{objects.name(key)} is damaged: it is not {chunk_bytes + CRC_BYTES} bytes long. Harvest the store again."
        )
    if google_crc32c.value(whole) != int.from_bytes(trailer[:CRC_BYTES], "little"):
        raise StoreError(f"{objects.name(key)} is damaged: its checksum does not fit. Harvest the store again.")
    if len(whole) > out.nbytes:
        out.reshape(-1).view(np.uint8)[:] = whole[: out.nbytes]


# Folders that a library wants to read from a disk: parts of a local store as they are, of others by way of a cache.


def local_folder(objects: Objects, prefix: str, manifest: Manifest) -> Path:
    """The folder of a sealed store's files below `prefix` ("tail/<hook>", "tokenizer"), named by its manifest.

    A store that is no local one is fetched from once; its content names the copy. Raises StoreError if a file is
    missing.
    """
    if isinstance(objects, LocalObjects):
        return objects.root / prefix
    path = cache_path() / "stores" / manifest.content[:16] / prefix
    keys = [key for key in manifest.files if key.startswith(f"{prefix}/")]

    def fill(folder: Path) -> None:
        for key in keys:
            file = folder / key.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as out:
                for block in objects.blocks(key):
                    out.write(block)

    if not path.is_dir():
        write_folder(path, fill)
    return path


ROOT, CHECKSUMS, CHECKSUMS_METADATA = "zarr.json", "checksums/c/0/0", "checksums/zarr.json"


class Split:
    """The sequences of one split, in corpus order.

    tokens     int32 [n_sequences, sequence_length]; beyond a sequence's length: the pad id
    lengths    int32 [n_sequences]; valid tokens, left-aligned
    documents  int64 [n_sequences]; number of the document in the corpus
    starts     int32 [n_sequences]; first token of the sequence within its document
    """

    def __init__(self, store: "Store", name: str) -> None:
        self.store = store
        self.name = name
        self.n_sequences: int = store.manifest.counts[name]["sequences"]
        self.n_tokens: int = store.manifest.counts[name]["tokens"]
        self.n_documents: int = store.manifest.counts[name]["documents"]

    @cached_property
    def tokens(self) -> Int[ndarray, "n_sequences sequence_length"]:
        return np.asarray(self.store.array(f"{self.name}/tokens")[:])

    @cached_property
    def lengths(self) -> Int[ndarray, " n_sequences"]:
        return np.asarray(self.store.array(f"{self.name}/lengths")[:])

    @cached_property
    def documents(self) -> Int[ndarray, " n_sequences"]:
        return np.asarray(self.store.array(f"{self.name}/documents")[:])

    @cached_property
    def starts(self) -> Int[ndarray, " n_sequences"]:
        return np.asarray(self.store.array(f"{self.name}/starts")[:])

    def read(self, hook: str, start: int, stop: int) -> Float[ndarray, "n sequence_length d_model"]:
        """Activations of sequences start..stop-1, float32 whatever they are stored as; zero beyond a length.

        Cheapest along chunks: multiples of `store.sequences_per_chunk`.
        Raises StoreError, naming the place, if stored bytes are missing or damaged.
        """
        stored = self.read_stored(hook, start, stop)
        if stored.dtype.kind == "f":
            return stored.astype(np.float32)
        import torch

        # A signed view of the same bits: torch has few unsigned types.
        rows = stored.reshape(-1, stored.shape[-1]).view(f"i{stored.dtype.itemsize}")
        values = self.decoder(hook)(torch.from_numpy(rows)).numpy().reshape(*stored.shape[:2], -1)
        values[np.arange(stored.shape[1]) >= self.lengths[start:stop, None]] = 0
        return values

    def read_stored(
        self, hook: str, start: int, stop: int, out: ndarray | None = None
    ) -> Shaped[ndarray, "n sequence_length d_stored"]:
        """The same as stored rows, which `decoder` makes activations of; all zero beyond a sequence's length.

        `out`, of the stored dtype and contiguous, takes the result without a copy in between.
        """
        path = f"{self.name}/activations/{hook}"
        array, per_chunk = self.store.array(path), self.store.sequences_per_chunk
        if out is None:
            out = np.empty((stop - start, *array.shape[1:]), array.dtype)
        if start % per_chunk or (stop % per_chunk and stop != self.n_sequences) or not is_plain(array):
            out[:] = self._read_through_zarr(path, array, start, stop)
            return out
        chunk_bytes = per_chunk * out[:1].nbytes if len(out) else 0

        def read(first: int) -> None:
            rows = out[first - start : min(first + per_chunk, stop) - start]
            read_chunk(self.store.objects, f"{path}/c/{first // per_chunk}/0/0", rows, chunk_bytes)

        for _ in self.store.objects.each(read, range(start, stop, per_chunk)):
            pass
        return out

    def codec(self, hook: str) -> str:
        """What a hook of this split is stored as: the recipe's codec, or float16 or float32 (the eval split)."""
        dtype = self.store.array(f"{self.name}/activations/{hook}").dtype
        return dtype.name if dtype.kind == "f" else self.store.manifest.recipe.codec

    def decoder(self, hook: str, device: "torch.device | str" = "cpu") -> "Decoder":
        """Makes float32 activations of stored rows, on `device`."""
        from tcsae.shared.store.codecs import Decoder

        codec = self.codec(hook)
        names = representation(codec).parameters
        parameters = {name: np.asarray(self.store.array(f"codec/{hook}/{name}")[:]) for name in names}
        return Decoder(codec, parameters, device)

    def _read_through_zarr(self, path: str, array: zarr.Array, start: int, stop: int) -> ndarray:
        where = f"{self.store.location}: {path}, sequences {start}..{stop - 1}"
        try:
            block = np.asarray(array[start:stop])
        except RemoteError:
            raise
        except Exception as error:
            raise StoreError(f"{where}: damaged ({error}). Harvest the store again.") from error
        # A missing chunk reads as the fill value, which is never stored.
        first = block[..., 0]
        if (np.isnan(first) if first.dtype.kind == "f" else first == array.fill_value).any():
            raise StoreError(f"{where}: a chunk is missing. Harvest the store again.")
        return block


class Store:
    """A sealed activation store, read-only."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self.location = objects.location
        self.objects = objects
        self.manifest = manifest
        self.train = Split(self, "train")
        self.eval = Split(self, "eval")
        self._group = zarr.open_group(objects.zarr_store(read_only=True), mode="r", zarr_format=3)
        self._arrays: dict[str, zarr.Array] = {}

    @property
    def root(self) -> Path:
        """The folder of a store on a local disk. Raises StoreError for another."""
        return self.objects.root

    @property
    def content(self) -> str:
        """sha256 of what is in the store; runs and evaluations cite it."""
        return self.manifest.content

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the stored hooks, as they were asked for."""
        return tuple(hook.requested for hook in self.manifest.recipe.hooks)

    @property
    def sequence_length(self) -> int:
        return self.manifest.recipe.sequences.length

    @property
    def sequences_per_chunk(self) -> int:
        return self.manifest.layout.sequences_per_chunk

    def hook(self, name: str | None = None) -> str:
        """`name` if it is stored, or the only (else the first) hook. Raises StoreError for another name."""
        if name is None:
            return self.hooks[0]
        if name not in self.hooks:
            raise StoreError(f"{self.location}: " + unknown("hook", name, self.hooks))
        return name

    def d_model(self, hook: str) -> int:
        """Width of a hook's activations."""
        return next(one.d_model for one in self.manifest.recipe.hooks if one.requested == self.hook(hook))

    def split(self, name: str) -> Split:
        if name not in SPLITS:
            raise StoreError(unknown("split", name, SPLITS))
        return self.train if name == "train" else self.eval

    def array(self, path: str) -> zarr.Array:
        """A Zarr array of the store by its path. Raises StoreError if it is missing."""
        if path not in self._arrays:
            try:
                array = self._group[path]
            except KeyError as error:
                raise StoreError(f"{self.location} has no {path}: it is damaged. Harvest it again.") from error
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        return self._arrays[path]

    def tail_path(self, hook: str) -> Path:
        """Folder of the tail after `hook`, fetched if the store is no local one.

        Raises StoreError, saying why, if the store has none.
        """
        tail = self.manifest.tails.get(hook, {"none": "none was saved"})
        if "none" in tail:
            raise StoreError(f"{self.location} has no tail for {hook}: {tail['none']}")
        return local_folder(self.objects, f"tail/{hook}", self.manifest)

    @property
    def tokenizer_path(self) -> Path | None:
        """Folder of the tokenizer, if one was saved; fetched if the store is no local one."""
        if not any(key.startswith("tokenizer/") for key in self.manifest.files):
            return None
        return local_folder(self.objects, "tokenizer", self.manifest)

    def n_bytes(self) -> dict[str, int]:
        """Bytes on disk by part: each hook's activations, the tokens, the tails, the rest."""
        parts: dict[str, int] = {}
        for key, n_bytes in object_sizes(self.objects, self.manifest).items():
            pieces = key.split("/")
            hook = len(pieces) > 3 and pieces[1] == "activations"
            part = f"activations {pieces[2]}" if hook else pieces[0] if len(pieces) > 1 else "metadata"
            parts[part] = parts.get(part, 0) + n_bytes
        return parts


def open_store(location: str | Path) -> Store:
    """Open a sealed activation store, read-only. Only its manifest is read.

    Raises StoreError if there is none, an unfinished one, something else, or one that a newer version wrote.
    """
    location = str(location)
    objects = objects_at(location)
    values = read_attributes(objects)
    if values is None:
        raise StoreError(f"No activation store at {location}. Make one: tcsae --store {location} harvest")
    manifest = check_manifest(location, values)
    if manifest.state != SEALED:
        raise StoreError(f"{location} is unfinished. Start the same harvest again: it goes on where it stopped.")
    return Store(objects, manifest)


def read_manifest(location: str) -> Manifest | None:
    """The manifest of the store at `location`, sealed or not; None if there is none.

    Raises StoreError if something else is there, or a store that a newer version wrote.
    """
    values = read_attributes(objects_at(location))
    return None if values is None else check_manifest(location, values)


def read_attributes(objects: Objects) -> Mapping[str, Any] | None:
    """attributes["tcsae"] of the group at a location ({} if it is another Zarr group), or None if nothing is there.

    In an object store, nothing is where there is no zarr.json: readers do not list.
    Raises StoreError if something else is there.
    """
    try:
        return json.loads(objects.get(ROOT))["attributes"].get("tcsae", {})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, FileNotFoundError) and objects.is_empty(is_leftover):
            return None
        raise StoreError(
            f"{objects.location} is not an activation store. Give another --store, or move it away."
        ) from error


def is_leftover(key: str) -> bool:
    """Whether a writer that was killed before its first object left this."""
    return key.startswith(LOCK) or is_temporary(key)


def object_sizes(objects: Objects, manifest: Manifest) -> dict[str, int]:
    """Keys and sizes of all that lies at a sealed store's location; where it cannot be listed, of what should be."""
    if objects.listable:
        with contextlib.suppress(DeniedError):  # a bucket may let everybody read and nobody list
            return objects.listed()
    keys = [ROOT, CHECKSUMS, CHECKSUMS_METADATA, *manifest.objects()]
    return {key: size for key, size in zip(keys, objects.each(objects.size, keys), strict=True) if size is not None}


def check_manifest(location: str, values: Mapping[str, Any]) -> Manifest:
    """The manifest, if this version can read it. Raises StoreError otherwise."""
    found, version = values.get("format"), values.get("version", 0)
    if found != FORMAT:
        raise StoreError(f"{location} has format {found!r}; this program reads {FORMAT!r}. Give another --store.")
    if version > VERSION:
        raise StoreError(f"{location} has version {version}; this program reads up to {VERSION}. Update tcsae.")
    if not is_intact(values):
        raise StoreError(f"{location}: the manifest in zarr.json is damaged: its digest does not fit. Harvest again.")
    return manifest_from_json(values)
