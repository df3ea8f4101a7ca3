"""A writer's progress: one record per commit, each written only after the bytes that it speaks of are on disk."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tcsae.shared.errors import StoreError
from tcsae.shared.files import write_atomic

LOCK = "harvest.lock"
FOLDER = "journal"
SEQUENCES = "sequences"
"""The record of phase 1."""


class Journal:
    """The records below `root`/journal, and the lock that keeps other writers out.

    Raises StoreError if another process holds the lock, or if nothing can be written there.
    """

    def __init__(self, root: Path, location: str) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = os.open(root / LOCK, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # a full disk, which is said elsewhere
            raise StoreError(f"{location} cannot be written ({error.strerror}). Give another --store.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise StoreError(
                f"Another process harvests into {location}. Wait for it, or give another --store."
            ) from error

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None if it was not written."""
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write or replace a record, durably."""
        write_atomic(self._path(name), json.dumps(record).encode())

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def release(self) -> None:
        """Let other writers in. Once is enough, twice does no harm."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _path(self, name: str) -> Path:
        return self.root / FOLDER / f"{name}.json"


def remove_traces(root: Path) -> None:
    """Delete journal and lock file of a store that needs them no longer."""
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    (root / LOCK).unlink(missing_ok=True)
