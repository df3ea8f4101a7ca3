"""Where a store's objects live: named bytes at one location, on a disk or in an object store (see `remote`).
All that the house reads and writes of a store goes through here.

An object is whole or absent: a disk's file is written under a temporary name, fsynced and renamed; an object store's is
one PUT. Every object written gets its sha256 remembered, so that a digest describes the bytes that were handed over,
not what a later read of them says.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import PARTIAL


class Lock(ABC):
    """A lock that is held."""

    @abstractmethod
    def check(self) -> None:
        """Raises StoreError if it is held no more: somebody has broken it."""

    @abstractmethod
    def release(self) -> None:
        """Let others in. Once is enough, twice does no harm."""

    @abstractmethod
    def share(self) -> None:
        """Go on holding it together with others who share it."""


BLOCK_BYTES = 1 << 22

T = TypeVar("T")
R = TypeVar("R")


class Objects(ABC):
    """The objects at one location, by key ("train/tokens/c/0/0")."""

    writable = True
    listable = True
    n_readers = 1
    """Reads that are worth having under way at the same time; 1 where a read does not wait."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.digests: dict[str, str] = {}

    @property
    def root(self) -> Path:
        """The folder of a local store. Raises StoreError for any other."""
        raise StoreError(f"{self.location} is no local folder; this works on one only. Make one: tcsae copy.")

    @abstractmethod
    def name(self, key: str) -> str:
        """What people call an object."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """A whole object. Raises FileNotFoundError."""

    @abstractmethod
    def read_into(self, key: str, *views: memoryview) -> int:
        """Fill `views`, one after the other, from an object's first bytes; returns how many there were.

        Raises OSError if it cannot be read.
        """

    @abstractmethod
    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        """An object's bytes a few MiB at a time. Raises FileNotFoundError."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it is not there."""

    @abstractmethod
    def listed(self, prefix: str = "") -> dict[str, int]:
        """Keys below a prefix (a folder: no part of a name) and their sizes. What only reads a store never lists."""

    @abstractmethod
    def zarr_store(self, *, read_only: bool = False) -> Any:
        """The same place as a Zarr store; what is written through it is written by `put`."""

    @abstractmethod
    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:
        """Take a lock, or None if somebody holds it. Several may share one. `force` breaks what looks dead."""

    def holder(self, name: str) -> str:  # noqa: ARG002
        """Who holds a lock, for an error message; empty where that is not known."""
        return ""

    @abstractmethod
    def _put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def _delete(self, keys: Sequence[str]) -> None: ...

    def sweep(self) -> int:
        """Remove what a killed writer left under temporary names; returns how many. Only the one writer may."""
        return 0

    def is_empty(self, is_leftover: Callable[[str], bool]) -> bool:  # noqa: ARG002
        """Whether nothing is here but leftovers. An object store without a root object counts as empty, unlisted."""
        return True

    def is_new(self) -> bool:
        """Whether nothing at all is here. Only who will write asks: this lists."""
        return not self.listed()

    def has(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        """Write one object, durably."""
        self._put(key, data)
        self.digests[key] = hashlib.sha256(data).hexdigest()

    def digest(self, key: str) -> str:
        """sha256 of an object as it is stored now, from memory if this process wrote it."""
        if key not in self.digests:
            self.digests[key] = self.read_digest(key)[0]
        return self.digests[key]

    def read_digest(self, key: str) -> tuple[str, int]:
        """sha256 of an object's bytes as they are read now, and how many there are. Raises FileNotFoundError."""
        found, n = hashlib.sha256(), 0
        for block in self.blocks(key):
            found.update(block)
            n += len(block)
        return found.hexdigest(), n

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is no fault."""
        for key in keys:
            self.digests.pop(key, None)
        self._delete(keys)

    def delete_below(self, prefix: str) -> None:
        """Delete all objects below a prefix."""
        self.delete(list(self.listed(prefix)))

    def each(self, do: Callable[[T], R], items: Iterable[T], n: int | None = None) -> Iterator[R]:
        """`do` of every item, in order; as many at a time as reads are worth (or `n`)."""
        items, n = list(items), self.n_readers if n is None else n
        if min(n, len(items)) < 2:
            yield from map(do, items)
            return
        with ThreadPoolExecutor(min(n, len(items)), thread_name_prefix="objects") as pool:
            yield from pool.map(do, items)


def is_remote(location: str) -> bool:
    """Whether a location is a URL of an object store."""
    return "://" in location and not location.startswith("file://")


def is_temporary(key: str) -> bool:
    """Whether a key is one of a write that was killed."""
    return any(part.endswith(PARTIAL) for part in key.split("/"))
