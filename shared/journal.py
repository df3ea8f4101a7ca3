"""A writer's progress: one record per commit, each written only after the bytes that it speaks of are on disk."""

import json
from typing import Any

from tcsae.shared.errors import StoreError
from tcsae.shared.locks import Lock
from tcsae.shared.objects import Objects

LOCK = "harvest.lock"
FOLDER = "journal"
SEQUENCES = "sequences"
"""The record of phase 1."""
OPEN = "open"
"""The record that shards can be written, by several processes if need be."""


class LockedError(StoreError):
    """Another process writes the store."""


class Journal:
    """The records below journal/, and the lock that keeps other writers out (or with `shared`, those who do not share).

    Raises LockedError if another process holds the lock, StoreError if nothing can be written there; `force` breaks a
    lock whose owner may be dead.
    """

    def __init__(self, objects: Objects, *, shared: bool = False, force: bool = False) -> None:
        self._objects = objects
        lock = objects.lock(LOCK, shared=shared, force=force)
        if lock is None:
            raise LockedError(
                f"Another process harvests into {objects.location}{objects.holder(LOCK)}. Wait for it, or give another "
                "--store."
            )
        self._lock: Lock = lock

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None if it was not written."""
        try:
            return json.loads(self._objects.get(record_key(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write or replace a record, durably."""
        self._lock.check()
        self._objects.put(record_key(name), json.dumps(record).encode())

    def has(self, name: str) -> bool:
        return self._objects.has(record_key(name))

    def names(self) -> set[str]:
        """Of all records, found at once."""
        return recorded(self._objects)

    def share(self) -> None:
        """Let in others who share."""
        self._lock.share()

    def release(self) -> None:
        """Let other writers in. Once is enough, twice does no harm."""
        self._lock.release()


def remove_traces(objects: Objects) -> None:
    """Delete journal and locks of a store that needs them no longer."""
    objects.delete_below(FOLDER)
    objects.delete([LOCK])
    objects.delete_below(f"{LOCK}s")


def recorded(objects: Objects) -> set[str]:
    """Names of all records of a journal."""
    return {key.removeprefix(f"{FOLDER}/").removesuffix(".json") for key in objects.listed(FOLDER)}


def record_key(name: str) -> str:
    """The object of a record."""
    return f"{FOLDER}/{name}.json"
