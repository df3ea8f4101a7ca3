"""A store in one zip file, to be handed on: written once by `tcsae copy`, read as it is, never changed."""

import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import disk_errors, remove_dead_partials, whole_file
from tcsae.shared.store.places.base import BLOCK_BYTES, Lock, Objects
from tcsae.shared.store.places.local import disk_errors_but_missing, read_file_into

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
        try:
            with disk_errors_but_missing(self.path), zipfile.ZipFile(self.path) as opened:
                members = {one.filename: one for one in opened.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise StoreError(f"{self.location} is no zip file ({error}). Give another --store.") from error
        if packed := [name for name, one in members.items() if one.compress_type != zipfile.ZIP_STORED]:
            raise StoreError(
                f"{self.location}: {packed[0]} is compressed; members have to be stored plainly, as tcsae copy does."
            )
        n_file = self.path.stat().st_size
        if beyond := [name for name, one in members.items() if one.header_offset + one.file_size > n_file]:
            raise StoreError(f"{self.location}: {beyond[0]} reaches beyond the end of the file. Get it anew.")
        return members

    def name(self, key: str) -> str:
        return f"{self.location}/{key}"

    def get(self, key: str) -> bytes:
        data = bytearray(self._member(key).file_size)
        with disk_errors(self.path, StoreError):
            n_read = self.read_into(key, memoryview(data))
        return bytes(data[:n_read])

    def read_into(self, key: str, *views: memoryview) -> int:
        left, parts = self._member(key).file_size, []
        for view in views:
            parts.append(view[: min(len(view), left)])
            left -= len(parts[-1])
        return read_file_into(self.path, self._start(key), parts)

    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        left, at = self._member(key).file_size, self._start(key)
        while left > 0:
            block = bytearray(min(BLOCK_BYTES, left))
            with disk_errors(self.path, StoreError):
                n_read = read_file_into(self.path, at, [memoryview(block)])
            if not n_read:
                return
            yield bytes(block[:n_read])
            at, left = at + n_read, left - n_read

    def size(self, key: str) -> int | None:
        member = self._members.get(key)
        return None if member is None else member.file_size

    def listed(self, prefix: str = "") -> dict[str, int]:
        below = f"{prefix}/" if prefix else ""
        return {key: one.file_size for key, one in sorted(self._members.items()) if key.startswith(below)}

    def zarr_store(self) -> Any:
        raise self._read_only()

    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:  # noqa: ARG002
        raise self._read_only()

    def _member(self, key: str) -> zipfile.ZipInfo:
        if key not in self._members:
            raise FileNotFoundError(self.name(key))
        return self._members[key]

    def _start(self, key: str) -> int:
        """Where a member's bytes begin in the file."""
        member, header = self._member(key), bytearray(LOCAL_HEADER_BYTES)
        with disk_errors(self.path, StoreError):
            read_file_into(self.path, member.header_offset, [memoryview(header)])
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member.header_offset + LOCAL_HEADER_BYTES + lengths

    def _put(self, key: str, data: bytes) -> None:  # noqa: ARG002
        raise self._read_only()

    def _delete(self, keys: Sequence[str]) -> None:  # noqa: ARG002
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return StoreError(f"{self.location} can be read only. Give another --store, then tcsae copy.")


def write_zip(path: Path, objects: Iterator[tuple[str, bytes]]) -> None:
    """Write a zip file of objects in their order. Raises StoreError for what the disk refuses."""
    remove_dead_partials(path)
    with disk_errors(path, StoreError), whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key, data in objects:
            archive.writestr(zipfile.ZipInfo(key), data)  # of 1980: the same store is the same file
