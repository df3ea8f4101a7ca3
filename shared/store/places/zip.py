"""A store in one zip file, to be handed on: written once by `tcsae copy`, read as it is, never changed."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import whole_file
from tcsae.shared.store.places.base import BLOCK_BYTES, Lock, Objects

SUFFIX = ".zip"
LOCAL_HEADER_BYTES = 30
"""Then the name and the extra field, whose lengths are its last two numbers of 16 bits."""


class ZipObjects(Objects):
    """The members of a zip file, which are stored uncompressed. Read at their places, by any number of threads."""

    writable = False

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.path = Path(location.removeprefix("file://"))

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """Raises FileNotFoundError if there is no file, StoreError if it is none of ours."""
        if not self.path.exists():
            raise FileNotFoundError(self.location)
        try:
            with zipfile.ZipFile(self.path) as opened:
                members = {one.filename: one for one in opened.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise StoreError(f"{self.location} is no zip file ({error}). Give another --store.") from error
        if packed := [name for name, one in members.items() if one.compress_type != zipfile.ZIP_STORED]:
            raise StoreError(
                f"{self.location}: {packed[0]} is compressed; members have to be stored plainly, as tcsae copy does."
            )
        return members

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if "_descriptor" in self.__dict__:
            os.close(self._descriptor)

    def name(self, key: str) -> str:
        return f"{self.location}/{key}"

    def get(self, key: str) -> bytes:
        at, n_bytes = self._place(key)
        return os.pread(self._descriptor, n_bytes, at)

    def read_into(self, key: str, *views: memoryview) -> int:
        at, n_bytes = self._place(key)
        left = n_bytes
        for view in views:
            want = min(len(view), left)
            if want:
                n = os.preadv(self._descriptor, [view[:want]], at)
                at, left = at + n, left - n
        return n_bytes - left

    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        at, n_bytes = self._place(key)
        for start in range(at, at + n_bytes, BLOCK_BYTES):
            yield os.pread(self._descriptor, min(BLOCK_BYTES, at + n_bytes - start), start)

    def size(self, key: str) -> int | None:
        member = self._members.get(key)
        return None if member is None else member.file_size

    def listed(self, prefix: str = "") -> dict[str, int]:
        below = f"{prefix}/" if prefix else ""
        return {key: one.file_size for key, one in sorted(self._members.items()) if key.startswith(below)}

    def zarr_store(self, *, read_only: bool = False) -> Any:  # noqa: ARG002
        from zarr.storage import ZipStore

        return ZipStore(self.path, mode="r", read_only=True)

    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:  # noqa: ARG002
        raise self._read_only()

    def _place(self, key: str) -> tuple[int, int]:
        """Where a member's bytes begin, and how many there are."""
        if key not in self._members:
            raise FileNotFoundError(self.name(key))
        member = self._members[key]
        header = os.pread(self._descriptor, LOCAL_HEADER_BYTES, member.header_offset)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member.header_offset + LOCAL_HEADER_BYTES + lengths, member.file_size

    def _put(self, key: str, data: bytes) -> None:  # noqa: ARG002
        raise self._read_only()

    def _delete(self, keys: Sequence[str]) -> None:  # noqa: ARG002
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return StoreError(f"{self.location} can be read only. Give another --store, then tcsae copy.")


def write_zip(path: Path, objects: Iterator[tuple[str, bytes]]) -> None:
    """Write a zip file of objects in their order."""
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as made:
        for key, data in objects:
            made.writestr(zipfile.ZipInfo(key), data)  # of 1980: the same store is the same file
