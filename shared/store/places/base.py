"""The objects of a store, named bytes at one location, whatever kind of place that is.

An object is whole or absent: a disk's file is written under a temporary name, fsynced and renamed; an object store's is
one PUT. Of every object written the sha256 is remembered, so that a digest describes the bytes that were handed over
and not what a later read of them says.
"""

import asyncio
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import PARTIAL

BLOCK_BYTES = 1 << 22
CRC_BYTES = 4
"""At the end of every array's object: the crc32c of what is before it, little-endian."""
HEX = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")
R = TypeVar("R")


class Stamp(NamedTuple):
    """What an object's bytes are recognised by."""

    digest: str
    """sha256, hexadecimal."""
    trailer: int
    """The last four bytes as a little-endian number: of an array's chunk, its crc32c."""


class Lock(ABC):
    """A lock that is held."""

    @abstractmethod
    def check(self) -> None:
        """Raises StoreError if it is held no more: somebody has broken it."""

    @abstractmethod
    def release(self) -> None:
        """Let others in. A second call does nothing."""

    @abstractmethod
    def share(self) -> None:
        """Turn an exclusive lock into one that others can share."""


class Objects(ABC):
    """The objects at one location, by key ("train/tokens/c/0/0")."""

    writable = True
    listable = True
    n_readers = 1
    """Reads that are worth having under way at the same time; 1 where a read does not wait."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._stamps: dict[str, Stamp] = {}

    @property
    def root(self) -> Path:
        """The folder of a local store. Raises StoreError for any other."""
        raise StoreError(f"{self.location} is no local folder; this works on one only. Make one: tcsae copy.")

    @abstractmethod
    def name(self, key: str) -> str:
        """What people call an object."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """A whole object. Raises FileNotFoundError; StoreError if it cannot be read."""

    @abstractmethod
    def read_into(self, key: str, *views: memoryview) -> int:
        """Fill `views`, one after the other, from an object's first bytes; returns how many there were.

        Raises OSError if it cannot be read.
        """

    @abstractmethod
    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        """An object's bytes a few MiB at a time. Raises FileNotFoundError; StoreError if it cannot be read."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it is not there."""

    @abstractmethod
    def listed(self, prefix: str = "") -> dict[str, int]:
        """Keys below a prefix (a folder: no part of a name) and their sizes. What only reads a store never lists."""

    @abstractmethod
    def zarr_store(self) -> Any:
        """The same place as a Zarr store to write into; what goes through it is written by `put`."""

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
        """Remove what killed writers left under temporary names; returns how many. Only the one writer may."""
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
        """Write one object, durably. Raises StoreError for a key that leads out of the store, or a full disk."""
        check_key(key, self.location)
        self._put(key, data)
        self._stamps[key] = stamp_of(data)

    def stamp(self, key: str) -> Stamp:
        """The digest and trailer of an object: as this process wrote it, else as it is read now."""
        if key not in self._stamps:
            self._stamps[key] = stamp_of(self.get(key))
        return self._stamps[key]

    def read_digest(self, key: str) -> tuple[str, int]:
        """sha256 of an object's bytes as they are read now, and how many there are. Raises FileNotFoundError."""
        digest, n = hashlib.sha256(), 0
        for block in self.blocks(key):
            digest.update(block)
            n += len(block)
        return digest.hexdigest(), n

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is no fault."""
        for key in keys:
            self._stamps.pop(key, None)
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


async def in_thread(n_readers: int, do: Callable[..., T], *arguments: Any) -> T:
    """`do` in a thread, for Zarr: as many as requests are worth; of a disk asyncio's own, which a fork starts anew."""
    threads = _threads(n_readers) if n_readers > 1 else None
    return await asyncio.get_running_loop().run_in_executor(threads, do, *arguments)


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="zarr")


def stamp_of(data: bytes) -> Stamp:
    """The digest and trailer of an object's bytes."""
    return Stamp(hashlib.sha256(data).hexdigest(), int.from_bytes(data[-CRC_BYTES:], "little"))


def check_key(key: str, location: str) -> None:
    """Raises StoreError unless `key` names an object below `location`: parts of printable characters with / between.

    For every key that a file gives: joined to a folder, an absolute one or one with ".." would name any file.
    """
    parts = key.split("/") if isinstance(key, str) else [""]
    bad = any(part in ("", ".", "..") or not part.isprintable() for part in parts)
    if bad or "\\" in key or re.match(r"[A-Za-z]:", key):
        raise StoreError(
            f"{location}: {key!r} cannot be the key of an object; names of letters, digits and signs with / between "
            "them can. The store is damaged or forged: harvest it again, or get it anew from where it came."
        )


def check_digest(digest: str, what: str, location: str) -> None:
    """Raises StoreError unless `digest` is a sha256: 64 digits 0-9a-f. It may name a folder of the cache."""
    if not isinstance(digest, str) or not HEX.fullmatch(digest):
        raise StoreError(
            f"{location}: {what} {str(digest)[:80]!r} is no sha256 (64 digits 0-9a-f). The store is damaged or forged: "
            "harvest it again, or get it anew from where it came."
        )


def is_remote(location: str) -> bool:
    """Whether a location is a URL of an object store."""
    return "://" in location and not location.startswith("file://")


def is_temporary(key: str) -> bool:
    """Whether a key is one of a write that was killed."""
    return any(part.endswith(PARTIAL) for part in key.split("/"))
