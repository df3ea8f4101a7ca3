"""A writer's progress: one record per commit, each written only after the bytes that it speaks of are on disk."""

import base64
import json
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import json_digest
from tcsae.shared.store.format import SPLITS
from tcsae.shared.store.places.base import Lock, Objects

LOCK = "harvest.lock"
FOLDER = "journal"
SEQUENCES = "sequences"
"""The record of phase 1."""
PLAN = "plan"
"""The record that phase 1 is done, with its counts."""
CODEC = "codec"
"""The record that the codec's parameters are computed."""
OPEN = "open"
"""The record that shards can be written, by several processes if need be."""
RETAINED = "kept"
"""The record of an extension: the shards of the sealed store that stay as they are."""


class LockedError(StoreError):
    """Another process writes the store."""


class Journal:
    """The records below journal/, and the lock that keeps other writers out (or with `shared`, those who do not share).

    Raises LockedError if another process holds the lock, StoreError if nothing can be written there; `force` breaks a
    lock whose holder may be dead, or that cannot be read.
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
        """A record, or None if it was not written. Raises StoreError, naming it, if it is damaged."""
        return read_record(self._objects, name)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write or replace a record, durably."""
        self._lock.check()
        record = _without_digest(record)
        self._objects.put(record_key(name), json.dumps(record | {DIGEST: json_digest(record)}).encode())

    def has(self, name: str) -> bool:
        return self._objects.has(record_key(name))

    def names(self) -> set[str]:
        """Of all records, by one listing."""
        return recorded(self._objects)

    def share(self) -> None:
        """Let in others who share."""
        self._lock.share()

    def release(self) -> None:
        """Let other writers in. A second call does nothing."""
        self._lock.release()


def remove_traces(objects: Objects) -> None:
    """Delete journal and locks of a store that needs them no longer. Only under the lock."""
    objects.delete_below(FOLDER)
    objects.delete([LOCK])
    objects.delete_below(f"{LOCK}s")


def recorded(objects: Objects) -> set[str]:
    """Names of all records of a journal."""
    return {key.removeprefix(f"{FOLDER}/").removesuffix(".json") for key in objects.listed(FOLDER)}


def record_key(name: str) -> str:
    """The object of a record."""
    return f"{FOLDER}/{name}.json"


def read_record(objects: Objects, name: str) -> dict[str, Any] | None:
    """A record of a journal, or None if it was not written.

    Raises StoreError, naming the file, if it is not what a writer writes.
    """
    try:
        data = objects.get(record_key(name))
    except FileNotFoundError:
        return None
    try:
        record = json.loads(data)
        if record.get(DIGEST) not in (None, json_digest(_without_digest(record))):  # older versions wrote none
            raise ValueError("its digest does not fit")
        record = _without_digest(record)
        missing = [field for field in FIELDS.get(name, SHARD_FIELDS) if not isinstance(record[field], dict)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(objects, name, f"{type(error).__name__}: {error}") from error
    if missing:
        raise _damaged(objects, name, f"{missing[0]} is no object")
    return record


def _without_digest(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != DIGEST}


DIGEST = "digest"
"""Of a record without it: a flipped digit in a count is JSON all the same."""
FIELDS: dict[str, tuple[str, ...]] = {
    SEQUENCES: ("n_sequences",),
    PLAN: ("counts",),
    CODEC: ("eval", "objects"),
    OPEN: (),
    RETAINED: ("shards", "sums"),
}
SHARD_FIELDS = ("objects", "partials")


def _damaged(objects: Objects, name: str, why: str) -> StoreError:
    cure = "Delete it: that shard is then made anew" if name not in FIELDS else "Start anew: --fresh"
    return StoreError(f"{objects.name(record_key(name))} is damaged ({why}). {cure}.")


class Retained:
    """What an extended store retains of the time before: nothing, if it is a new one."""

    def __init__(self, journal: Journal) -> None:
        record = journal.read(RETAINED)
        self.shards: dict[str, dict[str, str]] = record["shards"] if record else {}
        """Name of each retained shard -> its objects' keys and digests."""
        self.trailers: dict[str, int] = record.get("trailers", {}) if record else {}
        """Their chunks' crc32c, as far as the store had them."""
        self._sums: dict[str, str] = record["sums"] if record else {}

    def sums(self, hook: str, n: int) -> Float[ndarray, " n"]:
        """float64 sums over the retained train shards, added in order; see `partial_sums`."""
        encoded = self._sums.get(hook)
        return np.frombuffer(base64.b64decode(encoded)).copy() if encoded else np.zeros(n)


def clear_for_extension(journal: Journal, objects: Objects) -> None:
    """Delete the shards that an extension does not retain, before the first new one: they may be of another dtype."""
    record, names = journal.read(RETAINED), journal.names()
    begun = CODEC in names or any(name.startswith(tuple(f"{split}-" for split in SPLITS)) for name in names)
    if record and not record["shards"] and not begun:
        for folder in (*(f"{split}/activations" for split in SPLITS), "codec"):
            objects.delete_below(folder)
