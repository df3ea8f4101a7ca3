"""Bytes of a sealed store against what was written: nothing of it is used before it is checked.

The checksum array has the sha256 of every object, and the manifest has the digest of that array, so an object is bound
to its key: two chunks that were swapped are damage, and so is one that is missing. For chunks of arrays the attributes
of the checksum array also have the crc32c that each chunk ends with. A reader computes that crc anyway, so to compare
it costs nothing (a sha256 of every chunk would cost the loader a third of its speed on one core); of a store that was
sealed without them, the sha256 is computed when a chunk is first read in a process.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import UInt32
from numpy import ndarray
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import (
    PARTIAL,
    cache_path,
    disk_errors,
    file_digest,
    files_below,
    remove_dead_partials,
    whole_file,
)
from tcsae.shared.store.format import SEALED, Manifest, content_digest
from tcsae.shared.store.places.base import CRC_BYTES, Objects, in_thread
from tcsae.shared.store.places.local import LocalObjects

ROOT, CHECKSUMS, CHECKSUMS_METADATA = "zarr.json", "checksums/c/0/0", "checksums/zarr.json"
TRAILERS = "crc32c"
"""Attribute of the checksum array: base64 of a little-endian uint32 per row, 0 for an object that is no chunk."""
DIGEST_BYTES = 32


class DamagedError(StoreError):
    """An object whose bytes are missing, or not those that were written."""

    def __init__(self, name: str, key: str, reason: str, missing: bool = False) -> None:
        super().__init__(f"{name} {reason}. Harvest the store again.")
        self.key, self.reason, self.missing = key, reason, missing


class Digests:
    """The recorded sha256 of every object of a sealed store, and the recorded crc32c of every chunk.

    Raises StoreError, naming the file, if the checksums themselves are missing or damaged.
    """

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self._objects, self.manifest = objects, manifest
        self.rows = checksum_rows(objects, manifest)
        """The checksum array's bytes, 32 an object."""
        self.trailers = self._recorded_trailers()
        """Per object, 0 where none is recorded; filled in as chunks are checked."""
        self._chunks: dict[str, tuple[int, int, str]] = {}
        """Array -> the row of its first chunk, how many chunks there are, and how each one's key ends."""
        self._others: dict[str, int] = {}
        row = 0
        for group in manifest.groups():
            self._others[f"{group}/zarr.json"] = row
            row += 1
        for path, (shape, per_chunk) in manifest.arrays().items():
            n_chunks = -(-shape[0] // per_chunk)
            self._others[f"{path}/zarr.json"] = row
            self._chunks[path] = row + 1, n_chunks, "/0" * (len(shape) - 1)
            row += 1 + n_chunks
        self._others |= {key: row + i for i, key in enumerate(manifest.files)}

    def row(self, key: str) -> int | None:
        """The row of an object; None for a key that is none of the store's."""
        if key in self._others:
            return self._others[key]
        path, _, rest = key.rpartition("/c/")
        if path not in self._chunks:
            return None
        first, n_chunks, end = self._chunks[path]
        number = rest.removesuffix(end) if end else rest
        if not number.isdecimal() or int(number) >= n_chunks or f"{int(number)}{end}" != rest:
            return None
        return first + int(number)

    def digest(self, key: str) -> str:
        """sha256 of an object as it was written, hexadecimal."""
        row = self.row(key)
        assert row is not None, "only keys of the store are asked for"
        return self.rows[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES].hex()

    def trailer(self, key: str) -> int:
        """The crc32c that a chunk ends with, 0 if none is recorded."""
        row = self.row(key)
        assert row is not None, "only keys of the store are asked for"
        return int(self.trailers[row])

    def check(self, key: str, data: bytes) -> None:
        """Raises DamagedError unless `data` are the bytes of an object as it was written."""
        row = self.row(key)
        assert row is not None, "only keys of the store are asked for"
        trailer = int.from_bytes(data[-CRC_BYTES:], "little")
        if self.trailers[row] and google_crc32c.value(data[:-CRC_BYTES]) != trailer:
            raise self.damaged(key, "is damaged: its checksum does not fit")
        self._check(key, row, trailer, [data])

    def check_chunk(self, key: str, body: ndarray, trailer: bytes) -> None:
        """The same of a chunk whose `trailer` is known to be the crc32c of its `body`."""
        row = self.row(key)
        assert row is not None, "only keys of the store are asked for"
        self._check(key, row, int.from_bytes(trailer, "little"), [body.data, trailer])

    def _check(self, key: str, row: int, trailer: int, parts: Iterable[bytes | memoryview]) -> None:
        recorded = int(self.trailers[row])
        if recorded and recorded == trailer:
            return
        if not recorded:
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            if digest.digest() == self.rows[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]:
                if key not in self._others:
                    self.trailers[row] = trailer
                return
        raise self.damaged(key, "is damaged: it is not what was written under this name")

    def damaged(self, key: str, reason: str, missing: bool = False) -> StoreError:
        """The error for an object at fault; another one if that is because the store was opened before a change."""
        if changed := change_since(self._objects, self.manifest):
            return StoreError(f"{self._objects.location} {changed}")
        return DamagedError(self._objects.name(key), key, reason, missing)

    def _recorded_trailers(self) -> UInt32[ndarray, " n_objects"]:
        manifest, n = self.manifest, len(self.rows) // DIGEST_BYTES
        none = np.zeros(n, np.uint32)
        if not manifest.checksums_metadata:  # version 1
            return none
        name = self._objects.name(CHECKSUMS_METADATA)
        try:
            data = self._objects.get(CHECKSUMS_METADATA)
        except FileNotFoundError as error:
            raise self.damaged(CHECKSUMS_METADATA, "is missing", missing=True) from error
        if hashlib.sha256(data).hexdigest() != manifest.checksums_metadata:
            raise self.damaged(CHECKSUMS_METADATA, "is damaged: its checksum does not fit")
        try:
            recorded = json.loads(data)["attributes"].get(TRAILERS)
            trailers = none if recorded is None else np.frombuffer(base64.b64decode(recorded, validate=True), "<u4")
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise StoreError(f"{name} cannot be read ({error}). Harvest the store again.") from error
        if len(trailers) != n:
            raise StoreError(f"{name} has {len(trailers)} crc32c, not {n}. Harvest the store again.")
        return trailers.astype(np.uint32)


def check_count(objects: Objects, manifest: Manifest) -> None:
    """Raises DamagedError unless there are as many checksums as the manifest claims objects.

    By arithmetic, before anything is allocated or read: a manifest may claim 10^12 sequences.
    """
    name, size = objects.name(CHECKSUMS), objects.size(CHECKSUMS)
    if size is None:
        raise DamagedError(name, CHECKSUMS, "is missing", missing=True)
    if size != (n_bytes := manifest.n_objects() * DIGEST_BYTES + CRC_BYTES):
        reason = f"has {size:,} bytes; the {manifest.n_objects():,} objects that the manifest claims take {n_bytes:,}"
        raise DamagedError(name, CHECKSUMS, reason)


def checksum_rows(objects: Objects, manifest: Manifest) -> bytes:
    """The checksum array's bytes, held to the manifest's `content`. Raises DamagedError."""
    check_count(objects, manifest)
    name, n_bytes = objects.name(CHECKSUMS), manifest.n_objects() * DIGEST_BYTES
    try:
        data = objects.get(CHECKSUMS)
    except FileNotFoundError as error:
        raise DamagedError(name, CHECKSUMS, "is missing", missing=True) from error
    rows, crc = data[:n_bytes], data[n_bytes:]
    if crc != google_crc32c.value(rows).to_bytes(CRC_BYTES, "little"):
        raise DamagedError(name, CHECKSUMS, "is damaged: its checksum does not fit")
    if content_digest(rows) != manifest.content:
        raise DamagedError(name, CHECKSUMS, "does not fit the manifest's content digest")
    return rows


def change_since(objects: Objects, manifest: Manifest) -> str:
    """What has become of a store since its manifest was read; empty if nothing has."""
    try:
        values = json.loads(objects.get(ROOT))["attributes"]["tcsae"]
        state, content = values["state"], values["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # damaged or gone, which is what the caller says
    if state != SEALED:
        return "is being extended or made anew since it was opened. Start again when that harvest is done."
    return "" if content == manifest.content else "was replaced since it was opened. Start again."


def encoded_trailers(trailers: Iterable[int]) -> str:
    """The checksum array's attribute."""
    return base64.b64encode(np.fromiter(trailers, "<u4").tobytes()).decode()


class CheckedStore(ZarrStore):
    """A sealed store for Zarr to read: every object checked, and a missing one damage in place of fill values."""

    def __init__(self, objects: Objects, digests: Digests) -> None:
        super().__init__(read_only=True)
        self._objects, self._digests = objects, digests

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckedStore) and other._objects is self._objects

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        assert byte_range is None, "the arrays' chunks are read whole"
        if key not in (CHECKSUMS, CHECKSUMS_METADATA) and self._digests.row(key) is None:
            return None
        return prototype.buffer.from_bytes(await in_thread(self._objects.n_readers, self._read, key))

    def _read(self, key: str) -> bytes:
        try:
            data = self._objects.get(key)
        except FileNotFoundError as error:
            raise self._digests.damaged(key, "is missing: the store is damaged", missing=True) from error
        if key not in (CHECKSUMS, CHECKSUMS_METADATA):  # these were checked by `Digests`
            self._digests.check(key, data)
        return data

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return self._digests.row(key) is not None

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return False

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        self._check_writable()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        for key in self._digests.manifest.objects():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in {key.removeprefix(below).split("/")[0]: None async for key in self.list_prefix(below)}:
            yield name


def checked_folder(objects: Objects, digests: Digests, prefix: str, manifest: Manifest) -> Path:
    """The folder of a store's files below `prefix` ("tail/<hook>", "tokenizer"), every one held to its digest.

    A local store's is its own. Of any other, files are fetched into the cache, each under a temporary name and then
    renamed: several processes may do so at once, and a folder that others read is never deleted.
    Raises StoreError if a file is missing, damaged, or none of the store's.
    """
    keys = [key for key in manifest.files if key.startswith(f"{prefix}/")]
    is_local = isinstance(objects, LocalObjects)
    folder = objects.root / prefix if is_local else cache_path() / "stores" / manifest.content[:16] / prefix
    with disk_errors(folder, StoreError):
        for key in keys:
            file = folder / key.removeprefix(f"{prefix}/")
            if is_local:
                _check_file(file, key, digests)
            elif not file.is_file() or file_digest(file) != digests.digest(key):
                _fetch(objects, key, file, digests)
        names = {key.removeprefix(f"{prefix}/") for key in keys}
        for file in files_below(folder):
            name = file.relative_to(folder).as_posix()
            if name not in names and not name.endswith(PARTIAL) and not file.name.startswith("."):
                raise StoreError(f"{file} does not belong to the store. Move it away.")
    return folder


def _check_file(file: Path, key: str, digests: Digests) -> None:
    if not file.is_file():
        raise digests.damaged(key, "is missing: the store is damaged", missing=True)
    if file_digest(file) != digests.digest(key):
        raise digests.damaged(key, "is damaged: it is not what was written under this name")


def _fetch(objects: Objects, key: str, file: Path, digests: Digests) -> None:
    digest = hashlib.sha256()
    remove_dead_partials(file)
    with whole_file(file) as out:
        try:
            for block in objects.blocks(key):
                digest.update(block)
                out.write(block)
        except FileNotFoundError as error:
            raise digests.damaged(key, "is missing: the store is damaged", missing=True) from error
        if digest.hexdigest() != digests.digest(key):
            raise digests.damaged(key, "is damaged: it is not what was written under this name")


LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Names that a model's config has for how many layers there are."""


def check_layers(tail: Path) -> None:
    """Raises StoreError if a tail's config claims more layers than there are tensors: they would all be allocated."""
    from safetensors import SafetensorError, safe_open

    config, weights = tail / "config.json", tail / "model.safetensors"
    if not config.is_file() or not weights.is_file():
        return  # which is what loading it says
    try:
        values = json.loads(config.read_bytes())
        with safe_open(weights, "np") as tensors:
            n_tensors = len(tensors.keys())
    except (ValueError, RecursionError, SafetensorError) as error:
        raise StoreError(f"{tail} cannot be loaded as a tail ({error}). Harvest the store again.") from error
    parts = [values, *values.values()] if isinstance(values, dict) else []
    claims = [part.get(name) for part in parts if isinstance(part, dict) for name in LAYER_COUNTS]
    if most := max((n for n in claims if isinstance(n, int) and n > n_tensors), default=0):
        raise StoreError(f"{config} claims {most:,} layers; its weights are {n_tensors:,} tensors. Harvest again.")


def read_chunk(objects: Objects, key: str, out: ndarray, chunk_bytes: int, digests: Digests) -> None:
    """Fill `out` (contiguous) with the first bytes of the plain chunk `key`, which holds `chunk_bytes` of numbers.

    Raises StoreError, naming the object, if it is missing, of another size, its checksum does not fit, or it is not the
    chunk that was written under this key.
    """
    whole = out.reshape(-1).view(np.uint8)
    if len(whole) < chunk_bytes:  # the last chunk of an array is stored whole, too
        whole = np.empty(chunk_bytes, np.uint8)
    trailer = bytearray(CRC_BYTES + 1)
    try:
        n_read = objects.read_into(key, whole.data, memoryview(trailer))
    except OSError as error:
        why = error.strerror or "it is not there"
        missing = isinstance(error, FileNotFoundError)
        raise digests.damaged(key, f"cannot be read ({why}): the store is damaged", missing) from error
    if n_read != chunk_bytes + CRC_BYTES:
        raise digests.damaged(key, f"is damaged: it is not {chunk_bytes + CRC_BYTES} bytes long")
    if google_crc32c.value(whole) != int.from_bytes(trailer[:CRC_BYTES], "little"):
        raise digests.damaged(key, "is damaged: its checksum does not fit")
    digests.check_chunk(key, whole, bytes(trailer[:CRC_BYTES]))
    if len(whole) > out.nbytes:
        out.reshape(-1).view(np.uint8)[:] = whole[: out.nbytes]
