"""Locks in an object store: an object that only one process can create, renewed while that process lives.

The exclusive lock NAME is one object; who shares it has an object of its own below NAMEs/ ("harvest.locks/..."). Each
tries first and looks second, so of two who want what cannot go together at most one gets it. An owner that dies stops
renewing, and after LEASE_S anybody may take its place. That is judged by the object's time and one's own clock: clocks
should agree within some seconds.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import NamedTuple, Optional, Protocol, runtime_checkable

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.places.base import Lock


@runtime_checkable
class LeaseObjects(Protocol):
    """What a lease needs of an object store."""

    location: str

    def listed(self, prefix: str = "") -> dict[str, int]: ...
    def delete(self, keys: list[str]) -> None: ...
    def get_with_tag(self, key: str) -> tuple[bytes, dict[str, str], datetime]: ...
    def put_if(self, key: str, data: bytes, tag: dict[str, str] | None) -> dict[str, str] | None: ...


LEASE_S = 60.0
RENEWALS = 4
"""Within a lease."""


class Holder(NamedTuple):
    """Who holds a lock."""

    key: str
    host: str
    pid: int
    token: str
    tag: dict[str, str]
    left_s: float
    """Until it is taken for dead; renewed, it starts again."""
    readable: bool = True
    """Whether the lock says who holds it: a damaged one does not."""


def alive(objects: LeaseObjects, name: str) -> list[Holder]:
    """Those whose lease on a lock has not run out, the exclusive one first."""
    keys = [name, *objects.listed(f"{name}s")]
    return [one for key in keys if (one := _holder(objects, key)) is not None and one.left_s > 0]


def describe(holders: list[Holder]) -> str:
    """Who they are, for an error message."""
    names = [f"{_who(one)}, {one.left_s:.0f} s of its lease left" for one in holders]
    return f" ({'; '.join(names)}; if it is dead: --force)" if names else ""


def _who(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host}" if holder.readable else f"{holder.key} is unreadable"


class Lease(Lock):
    """A lock that is held, and renewed by a thread."""

    def __init__(self, objects: LeaseObjects, name: str, shared: bool) -> None:
        self._objects, self._name = objects, name
        self._token = uuid.uuid4().hex
        self._key = self._shared_key() if shared else name
        self._tag: dict[str, str] | None = None
        self._renewed = time.monotonic()
        self._lost = False
        self._guard = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(cls, objects: LeaseObjects, name: str, shared: bool, force: bool) -> Optional["Lease"]:
        """The lock, or None if somebody alive holds one that does not go with it."""
        lease = cls(objects, name, shared)
        if not lease._create(force):
            return None
        try:
            others = [one for one in alive(objects, name) if one.token != lease._token]
            against = [one for one in others if not shared or one.key == name]
            if against and not force:
                objects.delete([lease._key])
                return None
            if not shared:  # of the dead, and of those that --force declares dead
                objects.delete(list(objects.listed(f"{name}s")))
            elif against:
                objects.delete([name])
        except BaseException:
            with contextlib.suppress(StoreError):  # else it runs out
                objects.delete([lease._key])
            raise
        lease._thread.start()
        return lease

    def check(self) -> None:
        if self._lost or time.monotonic() - self._renewed > LEASE_S:
            raise StoreError(
                f"{self._objects.location}: the lock was lost ({self._key} is another's, or could not be renewed). "
                "What is written is whole; start again when the other process is done."
            )

    def release(self) -> None:
        if self._end.is_set():
            return
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_ours_still():
            self._objects.delete([self._key])

    def _is_ours_still(self) -> bool:
        """Whether the lock can be deleted: no process has taken it over, nor will until the deletion is done.

        An object store has no deletion on a condition; but a lease that was renewed just now is nobody else's for
        LEASE_S. A process that was asleep for longer leaves the lock to whoever has it, or to run out.
        """
        if self._lost:
            return False
        start = time.monotonic()
        return self._written(self._tag) is not None and time.monotonic() - start < LEASE_S / 2

    def share(self) -> None:
        with self._guard:
            old, self._key = self._key, self._shared_key()
            self._tag = self._written(None)
            self._lost = self._tag is None
            self._objects.delete([old])

    def _shared_key(self) -> str:
        return f"{self._name}s/{self._token}"

    def _record(self) -> bytes:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}).encode()

    def _create(self, force: bool) -> bool:
        self._tag = self._written(None)
        if self._tag is None:
            holder = _holder(self._objects, self._key)
            if holder is None:  # released in between
                self._tag = self._written(None)
            elif force or holder.left_s <= 0:
                self._tag = self._written(holder.tag)
        return self._tag is not None

    def _written(self, tag: dict[str, str] | None) -> dict[str, str] | None:
        """The tag of our record, written unless another's is there; None if it is."""
        new_tag = self._objects.put_if(self._key, self._record(), tag)
        if new_tag is None and (holder := _holder(self._objects, self._key)) and holder.token == self._token:
            return holder.tag  # done at the first try, whose answer was lost
        return new_tag

    def _renew(self) -> None:
        while not self._end.wait(LEASE_S / RENEWALS):
            with self._guard:
                try:
                    tag = self._written(self._tag)
                except StoreError:
                    continue  # not reached: tried again until the lease is over
                if tag is None:
                    self._lost = True
                    return
                self._tag, self._renewed = tag, time.monotonic()


def _holder(objects: LeaseObjects, key: str) -> Holder | None:
    try:
        data, tag, modified = objects.get_with_tag(key)
    except FileNotFoundError:
        return None
    left_s = LEASE_S - (datetime.now(UTC) - modified).total_seconds()
    try:
        record = json.loads(data)
        return Holder(key, str(record["host"]), int(record["pid"]), str(record["token"]), tag, left_s)
    except (ValueError, KeyError, TypeError):
        return Holder(key, "", 0, "", tag, left_s, readable=False)
