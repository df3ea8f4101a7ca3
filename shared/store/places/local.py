"""A store in a local folder: whole files, fsynced and renamed, and a file lock."""

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import files_below, remove_folder, sweep_partials, write_atomic
from tcsae.shared.store.places.base import BLOCK_BYTES, Lock, Objects


class LocalObjects(Objects):
    """Files of a folder."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._root = Path(location.removeprefix("file://"))

    @property
    def root(self) -> Path:
        return self._root

    def name(self, key: str) -> str:
        return str(self._root / key)

    def get(self, key: str) -> bytes:
        try:
            return (self._root / key).read_bytes()
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(key) from error

    def read_into(self, key: str, *views: memoryview) -> int:
        n_read = 0
        with (self._root / key).open("rb", buffering=0) as file:
            for view in views:
                at = 0
                while at < len(view) and (n := file.readinto(view[at:])):
                    at += n
                n_read += at
        return n_read

    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        with (self._root / key).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def size(self, key: str) -> int | None:
        path = self._root / key
        return path.stat().st_size if path.is_file() else None

    def listed(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for path in files_below(self._root / prefix):
            with contextlib.suppress(FileNotFoundError):  # another process took it away in between
                found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def zarr_store(self, *, read_only: bool = False) -> Any:

        return DurableStore(self, read_only=read_only)

    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:  # noqa: ARG002
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            return FileLock.take(self._root / name, shared)  # the kernel frees a dead process's
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # a full disk, which is said elsewhere
            raise StoreError(f"{self.location} cannot be written ({error.strerror}). Give another --store.") from error

    def is_empty(self, is_leftover: Callable[[str], bool]) -> bool:
        if not self._root.exists():
            return True
        return self._root.is_dir() and all(is_leftover(path.name) for path in self._root.iterdir())

    def is_new(self) -> bool:
        return not self._root.exists() or (self._root.is_dir() and not any(self._root.iterdir()))

    def sweep(self) -> int:
        return sweep_partials(self._root)

    def delete_below(self, prefix: str) -> None:
        super().delete_below(prefix)
        remove_folder(self._root / prefix)

    def _put(self, key: str, data: bytes) -> None:
        write_atomic(self._root / key, data)

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)


class FileLock(Lock):
    """flock on a file. The kernel releases it when the process ends, however that is."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, shared: bool) -> Optional["FileLock"]:
        """The lock on `path`, or None if somebody else holds it."""
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def check(self) -> None:
        """Nobody can break it."""

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def share(self) -> None:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError("Another process took the store's lock just now. Start again when it is done.") from error


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
