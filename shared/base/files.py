"""Files that are whole or absent: written under a temporary name, fsynced, renamed, and the folder fsynced."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when it is complete and on the disk; after an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` never holds a part of it, not even after a crash."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then rename it to `path`, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_folder(path.parent)


def sweep_partials(folder: Path) -> int:
    """Remove what a killed writer left under its temporary name; returns how many. Only its one writer may call it."""
    n = 0
    for place, folders, files in os.walk(folder):
        for name in [name for name in folders if name.endswith(PARTIAL)]:
            remove_folder(Path(place, name))
            folders.remove(name)
            n += 1
        for name in files:
            if name.endswith(PARTIAL):
                Path(place, name).unlink(missing_ok=True)
                n += 1
    return n


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there. Others may do so, too; what they write there meanwhile stays."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(place, name).unlink(missing_ok=True)
        try:
            Path(place).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, if it is there, at whatever depth; while others write there, too."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for place, _, names in os.walk(folder, onerror=failed):
        yield from (Path(place, name) for name in names)


def cache_path() -> Path:
    """Where things lie that can be made again: TCSAE_CACHE, or the user's cache directory."""
    chosen = os.environ.get("TCSAE_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("tcsae")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of `value` as canonical JSON (sorted keys, no spaces), hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
