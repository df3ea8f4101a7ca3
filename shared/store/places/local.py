"""A store in a local folder: whole files, fsynced and renamed, and a lock of the operating system."""

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import disk_errors, files_below, is_at, remove_folder, sweep_partials, write_atomic
from tcsae.shared.store.places.base import BLOCK_BYTES, Lock, Objects

NOT_AN_OBJECT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


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
        with disk_errors_but_missing(self._root / key):
            return (self._root / key).read_bytes()

    def read_into(self, key: str, *views: memoryview) -> int:
        return read_file_into(self._root / key, 0, views)

    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        with disk_errors_but_missing(self._root / key), (self._root / key).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def size(self, key: str) -> int | None:
        path = self._root / key
        with disk_errors(path, StoreError):
            return path.stat().st_size if path.is_file() else None

    def listed(self, prefix: str = "") -> dict[str, int]:
        sizes = {}
        with disk_errors(self._root / prefix, StoreError):
            for path in files_below(self._root / prefix):
                with contextlib.suppress(FileNotFoundError):  # another process took it away in between
                    sizes[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return dict(sorted(sizes.items()))

    def zarr_store(self) -> Any:
        return DurableStore(self)

    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:
        path = self._root / name
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            return FileLock.take(path, shared)  # the kernel frees a dead process's
        except OSError as error:
            if not path.exists() or error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise self._cannot_write(error) from error
            if not force:
                raise StoreError(
                    f"{path}: the lock cannot be read ({error.strerror}). If nobody writes there: --force deletes it."
                ) from error
        with disk_errors(path, StoreError):
            remove_folder(path) if path.is_dir() else path.unlink()
            return FileLock.take(path, shared)

    def holder(self, name: str) -> str:
        try:
            record = json.loads((self._root / name).read_bytes())
            return f" (process {int(record['pid'])} on {str(record['host'])[:80]})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""  # just taken, or by a version that did not say

    def is_empty(self, is_leftover: Callable[[str], bool]) -> bool:
        with disk_errors(self._root, StoreError):
            if not self._root.exists():
                return True
            return self._root.is_dir() and all(is_leftover(path.name) for path in self._root.iterdir())

    def is_new(self) -> bool:
        with disk_errors(self._root, StoreError):
            return not self._root.exists() or (self._root.is_dir() and not any(self._root.iterdir()))

    def sweep(self) -> int:
        with disk_errors(self._root, StoreError):
            return sweep_partials(self._root)

    def delete_below(self, prefix: str) -> None:
        super().delete_below(prefix)
        with disk_errors(self._root / prefix, StoreError):
            remove_folder(self._root / prefix)

    def _put(self, key: str, data: bytes) -> None:
        with disk_errors(self._root / key, StoreError):
            write_atomic(self._root / key, data)

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with disk_errors(self._root / key, StoreError), contextlib.suppress(NotADirectoryError):
                (self._root / key).unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> StoreError:
        return StoreError(f"{self.location} cannot be written ({error.strerror}). Give another --store.")


@contextlib.contextmanager
def disk_errors_but_missing(path: Path) -> Iterator[None]:
    """OSErrors of reading `path` as StoreError; FileNotFoundError where there is no file (but a folder, say)."""
    try:
        with disk_errors(path, StoreError):
            yield
    except StoreError as error:
        if isinstance(error.__cause__, NOT_AN_OBJECT):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error.__cause__
        raise


def read_file_into(path: Path, at: int, views: Sequence[memoryview]) -> int:
    """Fill `views`, one after the other, from a file's bytes from `at` on; returns how many there were.

    Read in as many calls as it takes: Linux gives at most 2 GiB in one.
    """
    n_read = 0
    with path.open("rb", buffering=0) as file:
        if at:
            file.seek(at)
        for view in views:
            filled = 0
            while filled < len(view) and (n := file.readinto(view[filled:])):
                filled += n
            n_read += filled
    return n_read


class FileLock(Lock):
    """A lock on a file that the kernel releases when the process ends, however that is: flock, with a shared mode.

    Where there is no `fcntl` (Windows) it is filelock's, which is exclusive only. filelock everywhere would lose the
    shared mode, by which several processes write shards while a second harvest, which would sweep away their temporary
    files, is refused; its own read-write lock lies in SQLite, which does not hold over network file systems.
    """

    def __init__(self, path: Path, descriptor: int | None, whole: Any = None) -> None:
        self._path, self._descriptor, self._whole = path, descriptor, whole

    @classmethod
    def take(cls, path: Path, shared: bool) -> Optional["FileLock"]:
        """The lock on `path`, or None if somebody else holds it. Raises OSError if the file cannot be opened."""
        try:
            import fcntl
        except ImportError:
            return cls._take_exclusive(path, shared)
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if not is_at(descriptor, path):
                    os.close(descriptor)  # its holder has deleted it in between: the lock is another file by now
                    continue
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            if not shared:
                _write_holder(descriptor)
            return cls(path, descriptor)

    @classmethod
    def _take_exclusive(cls, path: Path, shared: bool) -> Optional["FileLock"]:
        import filelock

        if shared:
            raise _no_shared_mode(path)
        whole = filelock.FileLock(path)
        try:
            whole.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return cls(path, None, whole)

    def check(self) -> None:
        """Nobody can break it."""

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._whole is not None:
            self._whole.release()
            self._whole = None

    def share(self) -> None:
        if self._descriptor is None:
            raise _no_shared_mode(self._path)
        import fcntl

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError("Another process took the store's lock just now. Start again when it is done.") from error


def _write_holder(descriptor: int) -> None:
    """Say in the lock's file who holds it. On a full disk it stays empty: the lock itself holds all the same."""
    record = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, record, 0)


def _no_shared_mode(path: Path) -> StoreError:
    return StoreError(
        f"{path}: several processes can write one store only where the system has flock (Linux, macOS). Start one."
    )


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
