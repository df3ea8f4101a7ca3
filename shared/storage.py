"""A store's objects for Zarr: its own store classes, writing through ours."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.abc.codec import ArrayArrayCodec
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from tcsae.shared.objects import LocalObjects, T

if TYPE_CHECKING:
    from tcsae.shared.remote import RemoteObjects


class DurableStore(LocalStore):
    """Zarr's store on a local folder, with fsync before and after the rename."""

    def __init__(self, objects: LocalObjects, *, read_only: bool = False) -> None:
        super().__init__(objects.root, read_only=read_only)
        self._objects = objects

    def with_read_only(self, read_only: bool = False) -> "DurableStore":
        return type(self)(self._objects, read_only=read_only)

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        self._check_writable()
        if exclusive and self._objects.has(key):
            raise FileExistsError(key)
        await asyncio.to_thread(self._objects.put, key, value.as_numpy_array().tobytes())


class RemoteStore(ObjectStore):
    """Zarr's store on obstore's; each object is one PUT, and errors are one line."""

    def __init__(self, objects: "RemoteObjects", *, read_only: bool = False) -> None:
        super().__init__(objects.store, read_only=read_only)
        self._objects = objects

    async def _waited(self, ask: Callable[..., T], *given: Any) -> T:
        """`ask` in a thread: as many as requests are worth, where asyncio itself has as many as there are cores."""
        return await asyncio.get_running_loop().run_in_executor(_threads(self._objects.n_readers), ask, *given)

    def with_read_only(self, read_only: bool = False) -> "RemoteStore":
        return type(self)(self._objects, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is not None:  # our arrays have none, their chunks being read whole
            with self._objects.explained(key):
                return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes(await self._waited(self._objects.get, key))
        except FileNotFoundError:
            return None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await self._waited(self._objects.put, key, value.as_numpy_array().tobytes())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self._waited(self._objects.has, key):  # a store has one writer of each object
            await self.set(key, value)


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """Those that wait for answers to what Zarr asks."""
    return ThreadPoolExecutor(n, thread_name_prefix="zarr")


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
