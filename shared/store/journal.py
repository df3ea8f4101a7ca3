"""A writer's progress: one record per commit, each written only after the bytes that it speaks of are on disk."""

import base64
import json
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.format import SPLITS
from tcsae.shared.store.places.base import Lock, Objects

CODEC = "codec"

KEPT = "kept"
AMOUNTS = ("n_tokens", "n_sequences")


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


class Kept:
    """What an extended store keeps of the time before: nothing, if it is a new one."""

    def __init__(self, journal: Journal) -> None:
        record = journal.read(KEPT)
        self.shards: dict[str, dict[str, str]] = record["shards"] if record else {}
        """Name of each kept shard -> its objects' keys and digests."""
        self._sums: dict[str, str] = record["sums"] if record else {}

    def sums(self, hook: str, n: int) -> Float[ndarray, " n"]:
        """float64 sums over the kept train shards, added in order; see `statistics`."""
        found = self._sums.get(hook)
        return np.frombuffer(base64.b64decode(found)).copy() if found else np.zeros(n)


def clear_for_extension(journal: Journal, objects: Objects) -> None:
    """Delete the shards that an extension does not keep, before the first new one: they may be of another dtype."""
    record, names = journal.read(KEPT), journal.names()
    begun = CODEC in names or any(name.startswith(tuple(f"{split}-" for split in SPLITS)) for name in names)
    if record and not record["shards"] and not begun:
        for folder in (*(f"{split}/activations" for split in SPLITS), "codec"):
            objects.delete_below(folder)
