"""Reading a sealed activation store: its manifest, its sequences, their activations.

Whatever is read is checked against the recorded digests on its first use (`integrity`). Chunks of codecs without a
compressor go straight from their files into the caller's buffer, several times as fast as through Zarr and without a
copy; Zarr is the general path. data/README.md states the format.
"""

import contextlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from jaxtyping import Float, Int, Shaped, UInt8
from numpy import ndarray

from tcsae.shared.base.errors import ConfigError, DeniedError, NoTailError, StoreError, unknown
from tcsae.shared.store.codecs import representation
from tcsae.shared.store.dataset import SplitItems, StoreData
from tcsae.shared.store.format import (
    FORMAT,
    SEALED,
    SPLITS,
    VERSION,
    Manifest,
    allowed_dtypes,
    impossible,
    is_intact,
    is_tail,
    manifest_from_json,
)
from tcsae.shared.store.integrity import (
    CHECKSUMS,
    CHECKSUMS_METADATA,
    DIGEST_BYTES,
    ROOT,
    CheckedStore,
    DamagedError,
    Digests,
    check_count,
    check_layers,
    checked_folder,
    checksum_rows,
    read_chunk,
)
from tcsae.shared.store.journal import LOCK
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import CRC_BYTES, Objects, check_digest, check_key, is_temporary

if TYPE_CHECKING:
    import torch

    from tcsae.shared.store.codecs import Decoder

LARGE_BYTES = 256 << 20
"""A chunk that claims more is held to its file's size before memory is taken for it."""


class Split(SplitItems):
    """The sequences of one split, in corpus order.

    tokens     int32 [n_sequences, sequence_length]; beyond a sequence's length: the pad id
    lengths    int32 [n_sequences]; valid tokens, left-aligned
    documents  int64 [n_sequences]; number of the document in the corpus
    starts     int32 [n_sequences]; first token of the sequence within its document
    roles      uint8 [n_sequences, sequence_length]; whose token it is, by number in the recipe's roles, 0: nobody's
    """

    def __init__(self, store: "Store", name: str) -> None:
        self.store = store
        self.name = name
        self.n_sequences: int = store.manifest.counts[name]["sequences"]
        self.n_tokens: int = store.manifest.counts[name]["tokens"]
        self.n_documents: int = store.manifest.counts[name]["documents"]

    @cached_property
    def tokens(self) -> Int[ndarray, "n_sequences sequence_length"]:
        return self.store.values(f"{self.name}/tokens")

    @cached_property
    def lengths(self) -> Int[ndarray, " n_sequences"]:
        return self.store.values(f"{self.name}/lengths")

    @cached_property
    def documents(self) -> Int[ndarray, " n_sequences"]:
        return self.store.values(f"{self.name}/documents")

    @cached_property
    def starts(self) -> Int[ndarray, " n_sequences"]:
        return self.store.values(f"{self.name}/starts")

    @cached_property
    def roles(self) -> UInt8[ndarray, "n_sequences sequence_length"]:
        """Raises StoreError for a store that has none."""
        if not self.store.manifest.recipe.roles:
            how = "Harvest conversations with --chat-template and --roles."
            raise StoreError(f"{self.store.location} does not say whose tokens are whose. {how}")
        return self.store.values(f"{self.name}/roles")

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
        digests = self.store.digests

        def read(first: int) -> None:
            rows = out[first - start : min(first + per_chunk, stop) - start]
            read_chunk(self.store.objects, f"{path}/c/{first // per_chunk}/0/0", rows, chunk_bytes, digests)

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
        parameters = {name: self.store.values(f"codec/{hook}/{name}") for name in names}
        return Decoder(codec, parameters, device)

    def _read_through_zarr(self, path: str, array: zarr.Array, start: int, stop: int) -> ndarray:
        where = f"{self.store.location}: {path}, sequences {start}..{stop - 1}"
        try:
            return np.asarray(array[start:stop])
        except DamagedError as error:
            what = "a chunk is missing" if error.missing else "damaged"
            raise StoreError(f"{where}: {what} ({error})") from error
        except StoreError:
            raise
        except Exception as error:  # each codec has its own kinds
            raise StoreError(f"{where}: damaged ({error}). Harvest the store again.") from error


class Store(StoreData):
    """A sealed activation store, read-only."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self.location = objects.location
        self.objects = objects
        self.manifest = manifest
        self.train = Split(self, "train")
        self.eval = Split(self, "eval")
        self._arrays: dict[str, zarr.Array] = {}
        self._folders: dict[str, Path] = {}

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

    @cached_property
    def digests(self) -> Digests:
        """What every object is checked against. Raises StoreError if the checksums themselves are damaged."""
        return Digests(self.objects, self.manifest)

    def array(self, path: str) -> zarr.Array:
        """A Zarr array of the store by its path, every chunk of which is checked as it is read.

        Raises StoreError if it is missing, damaged, or not of the shape and dtype that the manifest gives it.
        """
        if path not in self._arrays:
            checked = self._checked
            try:
                array = zarr.open_array(checked, path=path, mode="r", zarr_format=3)
            except DamagedError as error:
                if not error.missing:
                    raise
                raise StoreError(f"{self.location} has no {path}: it is damaged. Harvest it again.") from error
            except StoreError:
                raise
            except FileNotFoundError as error:  # Zarr's, for a path that is none of the store's
                raise StoreError(f"{self.location} has no {path}.") from error
            except Exception as error:  # whole bytes that Zarr cannot make an array of
                name = self.objects.name(f"{path}/zarr.json")
                raise StoreError(f"{name} describes no array ({error}). Harvest the store again.") from error
            self._check_array(path, array)
            self._arrays[path] = array
        return self._arrays[path]

    def values(self, path: str) -> ndarray:
        """A whole small array. Raises StoreError, naming the object, if it is missing or damaged."""
        array = self.array(path)
        try:
            return np.asarray(array[:])
        except StoreError:
            raise
        except Exception as error:  # each codec has its own kinds
            raise StoreError(f"{self.objects.name(path)}: damaged ({error}). Harvest the store again.") from error

    def _check_array(self, path: str, array: zarr.Array) -> None:
        n_objects = self.manifest.n_objects()
        shape, rows = self.manifest.arrays().get(path, ((n_objects, DIGEST_BYTES), n_objects))
        name, chunks = self.objects.name(f"{path}/zarr.json"), tuple(max(1, n) for n in (rows, *shape[1:]))
        if array.shape != shape or array.chunks != chunks or array.shards is not None:
            raise StoreError(
                f"{name}: its shape is {list(array.shape)} in chunks of {list(array.chunks)}, not {list(shape)} in "
                f"chunks of {list(chunks)} as the manifest says. Harvest the store again."
            )
        allowed = allowed_dtypes(path, self.manifest.recipe.codec)
        if array.dtype.name not in allowed:
            raise StoreError(
                f"{name}: its dtype is {array.dtype}, not {' or '.join(allowed)}. Harvest the store again."
            )
        n_bytes = int(np.prod(chunks, dtype=object)) * array.dtype.itemsize
        if n_bytes > LARGE_BYTES and is_plain(array) and shape[0]:
            key = f"{path}/c/{'/'.join('0' * len(shape))}"
            if self.objects.size(key) not in (None, n_bytes + CRC_BYTES):
                raise self.digests.damaged(key, f"is damaged: it is not {n_bytes + CRC_BYTES} bytes long")

    @cached_property
    def _checked(self) -> CheckedStore:
        return CheckedStore(self.objects, self.digests)

    def tail_path(self, hook: str) -> Path:
        """Folder of the tail after `hook`, its files checked; fetched if the store is no local one.

        Raises NoTailError, saying why, if the store was sealed without; StoreError if it is damaged.
        """
        tail = self.manifest.tails.get(hook, {"none": "none was saved"})
        if "none" in tail:
            raise NoTailError(f"{self.location} has no tail for {hook}: {tail['none']}")
        folder = self._folder(f"tail/{self.hook(hook)}")
        check_layers(folder)
        return folder

    @property
    def tokenizer_path(self) -> Path | None:
        """Folder of the tokenizer, its files checked, if one was saved; fetched if the store is no local one."""
        if not any(key.startswith("tokenizer/") for key in self.manifest.files):
            return None
        return self._folder("tokenizer")

    def _folder(self, prefix: str) -> Path:
        if prefix not in self._folders:
            self._folders[prefix] = checked_folder(self.objects, self.digests, prefix, self.manifest)
        return self._folders[prefix]

    def n_bytes(self) -> dict[str, int]:
        """Bytes on disk by part: each hook's activations, the tokens, the tails, the rest.

        Raises StoreError, naming it, if an object is missing, or a chunk of a codec without a compressor is not as
        long as its array says.
        """
        parts: dict[str, int] = {}
        sizes = object_sizes(self.objects, self.manifest)
        self._check_sizes(sizes)
        for key, n_bytes in sizes.items():
            pieces = key.split("/")
            hook = len(pieces) > 3 and pieces[1] == "activations"
            part = f"activations {pieces[2]}" if hook else pieces[0] if len(pieces) > 1 else "metadata"
            parts[part] = parts.get(part, 0) + n_bytes
        return parts

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        expected: dict[str, int] = {}
        for path in self.manifest.arrays():
            if is_plain(array := self.array(path)):
                expected[path] = int(np.prod(array.chunks, dtype=object)) * array.dtype.itemsize + CRC_BYTES
        for key in self.manifest.objects():
            if key not in sizes:
                raise self.digests.damaged(key, "is missing: the store is damaged", missing=True)
            path, is_chunk, _ = key.partition("/c/")
            if is_chunk and sizes[key] != expected.get(path, sizes[key]):
                raise self.digests.damaged(key, f"is damaged: it is not {expected[path]} bytes long")


def open_store(location: str | Path) -> Store:
    """Open a sealed activation store, read-only. Only its manifest is read, and held to the number of checksums.

    Raises StoreError if there is none, an unfinished one, something else, one that a newer version wrote, or one whose
    manifest cannot be.
    """
    location = str(location)
    objects = objects_at(location)
    values = read_attributes(objects)
    if values is None:
        raise StoreError(f"No activation store at {location}. Make one: tcsae --store {location} harvest")
    manifest = check_manifest(location, values)
    if manifest.state != SEALED:
        raise StoreError(unfinished(location, manifest))
    check_count(objects, manifest)
    return Store(objects, manifest)


Store.reopen = staticmethod(open_store)


def unfinished(location: str, manifest: Manifest) -> str:
    """Why a store that is not sealed cannot be read, and what to do."""
    before = manifest.history[-1] if manifest.history else {}
    if "n_tokens" in before:
        return (
            f"{location} is being extended from {before['n_tokens']} to {manifest.recipe.n_tokens} tokens and "
            "is unfinished. Start the same harvest again if no process is at it: it goes on where it stopped."
        )
    return f"{location} is unfinished. Start the same harvest again: it goes on where it stopped."


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
    root = _root_metadata(objects)
    if root is None:
        return None
    try:
        values = json.loads(root)["attributes"].get("tcsae", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _foreign(objects, f": its {ROOT} is no JSON of a Zarr group with attributes") from error
    if not isinstance(values, Mapping):
        raise _foreign(objects, f": its {ROOT} has no manifest")
    return values


def _root_metadata(objects: Objects) -> bytes | None:
    """The bytes of zarr.json, or None if nothing is there. Raises StoreError if something else is there."""
    with contextlib.suppress(FileNotFoundError):
        return objects.get(ROOT)
    if objects.is_empty(is_leftover):
        return None
    try:
        return objects.get(ROOT)  # the first object of a store: another process may have begun it in between
    except FileNotFoundError as error:
        raise _foreign(objects, "") from error


def _foreign(objects: Objects, why: str) -> StoreError:
    return StoreError(f"{objects.location} is not an activation store{why}. Give another --store, or move it away.")


def is_leftover(key: str) -> bool:
    """Whether a writer that was killed before its first object left this."""
    return is_lock(key) or is_temporary(key)


def is_lock(key: str) -> bool:
    """Whether a key is that of a lock, held or left behind."""
    return key.startswith(LOCK)


def object_sizes(objects: Objects, manifest: Manifest) -> dict[str, int]:
    """Keys and sizes of all that lies at a sealed store's location; where it cannot be listed, of what should be."""
    if objects.listable:
        with contextlib.suppress(DeniedError):  # a bucket may let everybody read and nobody list
            return objects.listed()
    checksum_rows(objects, manifest)  # the manifest may claim more objects than there is memory for
    keys = [ROOT, CHECKSUMS, CHECKSUMS_METADATA, *manifest.objects()]
    return {key: size for key, size in zip(keys, objects.each(objects.size, keys), strict=True) if size is not None}


def check_manifest(location: str, values: Mapping[str, Any]) -> Manifest:
    """The manifest, if this version can read it and it can be. Raises StoreError otherwise.

    Nothing of it is used before: its keys become paths, its `content` a name in the cache, its counts sizes in memory.
    """
    kind, version = values.get("format"), values.get("version", 0)
    if kind != FORMAT:
        raise StoreError(f"{location} has format {kind!r}; this program reads {FORMAT!r}. Give another --store.")
    if type(version) is not int or version < 1:
        raise _damaged_manifest(location, f"version {version!r}")
    if version > VERSION:
        raise StoreError(f"{location} has version {version}; this program reads up to {VERSION}. Update tcsae.")
    if not is_intact(values):
        raise _damaged_manifest(location, "its digest does not fit")
    try:
        manifest = manifest_from_json(values)
    except (ConfigError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged_manifest(location, str(error).rstrip(".")) from error
    _check_names(location, manifest)
    for hook, tail in manifest.tails.items():
        if not is_tail(tail):
            raise _damaged_manifest(location, f"tails.{hook}={tail!r:.100} is neither layers nor why there is none")
    if wrong := impossible(manifest):
        raise _damaged_manifest(location, f"it claims {wrong}")
    return manifest


def _damaged_manifest(location: str, why: str) -> StoreError:
    return StoreError(f"{location}: the manifest in {ROOT} is damaged: {why}. Harvest again.")


def _check_names(location: str, manifest: Manifest) -> None:
    """Raises StoreError for a name that would lead out of the store, or a digest that is none."""
    for hook in manifest.recipe.hooks:
        check_key(hook.requested, location)
        if "/" in hook.requested:
            raise _damaged_manifest(location, f"a hook {hook.requested!r}")
    for key in manifest.files:
        check_key(key, location)
        if key.count("/") < 1 or key.split("/")[0] not in ("tail", "tokenizer"):
            raise _damaged_manifest(location, f"a file {key!r} that is neither of a tail nor of the tokenizer")
    if manifest.state == SEALED:
        check_digest(manifest.content, "content", location)
        if manifest.version > 1:
            check_digest(manifest.checksums_metadata, "checksums_metadata", location)


def is_plain(array: zarr.Array) -> bool:
    """Whether a chunk's file is its numbers, little-endian, then their crc32c, as it is without a compressor."""
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]  # type: ignore[index, call-overload, union-attr]
    return codecs == ["bytes", "crc32c"] and array.dtype.byteorder in "<=|"
