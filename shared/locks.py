"""Locks that keep other writers out: flock on a local disk, an object with a lease in an object store."""

import fcntl
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Optional

from tcsae.shared.errors import StoreError


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
