"""Where a store's objects live: one root, objects by key. Zarr writes through it, and so do we; all of it is durable.

Every object written gets its sha256 remembered, so that a digest describes the bytes that were handed to the disk, not
what a later read of it says.
"""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import ArrayArrayCodec
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from tcsae.shared.errors import StoreError
from tcsae.shared.files import write_atomic


class DurableStore(LocalStore):
    """Zarr's store on a local folder, with fsync before and after the rename, and the digest of each object written."""

    digests: dict[str, str]

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.digests = {}

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        self._check_writable()
        if exclusive and (self.root / key).exists():
            raise FileExistsError(key)
        await asyncio.to_thread(self.put, key, value.as_numpy_array().tobytes())

    def put(self, key: str, data: bytes) -> None:
        """Write one object, durably."""
        write_atomic(self.root / key, data)
        self.digests[key] = hashlib.sha256(data).hexdigest()

    def digest(self, key: str) -> str:
        """sha256 of an object as it is stored now, from memory if this process wrote it."""
        if key not in self.digests:
            self.digests[key] = hashlib.sha256((self.root / key).read_bytes()).hexdigest()
        return self.digests[key]


def local_root(location: str) -> Path:
    """The folder that a store's location names.

    Raises StoreError for a URL: stores lie on local disks so far.
    """
    if "://" in location and not location.startswith("file://"):
        raise StoreError(
            f"{location!r} is a URL; a store lies in a local folder. Give a path, for example data/a.zarr."
        )
    return Path(location.removeprefix("file://"))


def open_or_create(
    store: DurableStore,
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
    group = zarr.open_group(store, mode="r+")
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
