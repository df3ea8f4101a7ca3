"""Files and folders that are whole or absent, and one line for whatever the disk refuses.

A file is written under a temporary name, fsynced and renamed, and its folder fsynced; so a kill or a power loss leaves
the old file, or the new one.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from tcsae.shared.base.errors import DiskError, TcsaeError

PARTIAL = ".partial"
STALE_S = 24 * 3600.0
"""A temporary name this old is of a writer that was killed: no file takes a day to write."""

CURES = {
    errno.ENOSPC: "The disk is full: make room, then start the same command again.",
    errno.EDQUOT: "The quota is used up: make room, then start the same command again.",
    errno.EROFS: "The disk is read-only: give another place.",
    errno.EACCES: "Ask for the permission, or give another place.",
    errno.EPERM: "Ask for the permission, or give another place.",
    errno.ENAMETOOLONG: "The name is too long: give a shorter one.",
    errno.ENOENT: "It is gone, or was never written: look at the path, and whether its disk is mounted.",
    errno.ENOTDIR: "A file is where a folder has to be: give another place, or move it away.",
    errno.EISDIR: "A folder is where a file has to be: give another place, or move it away.",
    errno.EEXIST: "Something is there already: give another place, or move it away.",
    errno.ENOTEMPTY: "Something is there already: give another place, or move it away.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.ENFILE: "Too many files are open on this machine.",
    errno.ENOMEM: "Too little memory is free.",
}
"""What to do about an errno."""
DISK_CURE = "Look at the disk and whether it is mounted, then start the same command again."


def disk_line(error: BaseException, path: Path | str | None = None) -> str | None:
    """One line (path, reason, cure) for an OSError, or for a library's error that quotes one; None for any other.

    `path` is used where the error names no file, as that of a full disk does not.
    """
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    quoted = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))  # Rust's forms: safetensors, tokenizers
    if number is None and quoted:
        number = int(quoted[1] or quoted[2])
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save's, whatever the reason was
        number = errno.ENOSPC
    if number is None and not isinstance(error, OSError):
        return None
    written = getattr(error, "filename2", None) if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else None
    name = written or getattr(error, "filename", None) or path
    reason = os.strerror(number) if number is not None else " ".join(str(error).split()) or type(error).__name__
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes | os.PathLike) else ""
    cure = CURES.get(number, DISK_CURE) if number is not None else DISK_CURE
    return f"{where}{reason}. {cure}"


@contextmanager
def disk_errors(path: Path | str, kind: type[TcsaeError] = DiskError) -> Iterator[None]:
    """What the disk refuses within, raised as `kind` in one line that names the path and the cure."""
    try:
        yield
    except TcsaeError:
        raise
    except Exception as error:
        line = disk_line(error, path)
        if line is None:
            raise
        raise kind(line) from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when it is complete and on the disk; after an error nothing is left.

    An OSError from within names `path` if it names no file.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` never holds a part of it, not even after a crash."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then put it at `path` in place of what is there.

    A folder that is there is exchanged for the new one in one step, so that at any moment one of the two is whole at
    `path` (on Linux and macOS; elsewhere the old one is moved aside first). Not for folders that others read meanwhile:
    the old one is deleted afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path)
    temporary = temporary_path(path)
    try:
        temporary.mkdir()
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        _put_in_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and str(temporary) in str(error.filename):
            name = str(error.filename).replace(str(temporary), str(path))
            raise OSError(error.errno, error.strerror, name) from error
        raise
    _fsync_folder(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # what was there before


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a folder to `path`; what is there takes the new folder's old name."""
    while True:
        try:
            new.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
        try:
            if not _exchange(new, path):
                aside = temporary_path(path)
                path.rename(aside)
                new.rename(path)
                aside.rename(new)
        except FileNotFoundError:
            if not new.exists():
                raise
            continue  # what was there has gone in between
        return


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; whether the system and its file system can."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform, "")
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    paths, swap = (os.fsencode(one), os.fsencode(other)), 2  # RENAME_EXCHANGE, RENAME_SWAP
    at_cwd = -100
    done = call(at_cwd, paths[0], at_cwd, paths[1], swap) if name == "renameat2" else call(*paths, swap)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def temporary_path(path: Path) -> Path:
    """A new name beside `path` that says it is not finished, cut where it would be too long for a file system."""
    return path.with_name(f"{path.name[:180]}.{uuid.uuid4().hex}{PARTIAL}")


def remove_stale_partials(path: Path) -> None:
    """Delete what writers of `path` left under temporary names a day ago or more. Any process may call it."""
    for stale in path.parent.glob(f"{_escaped(path.name[:180])}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_S:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def _escaped(name: str) -> str:
    """`name` for glob, taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def sweep_partials(folder: Path) -> int:
    """Remove what killed writers left under temporary names; returns how many. Only the one writer of `folder` may."""
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
    """Delete a folder, if it is there. Others may do so, too; what they write into it meanwhile stays."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(place, name).unlink(missing_ok=True)
        try:
            Path(place).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder at any depth, none if it is not there. Others may write there meanwhile."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for place, _, names in os.walk(folder, onerror=failed):
        yield from (Path(place, name) for name in names)


def cache_path() -> Path:
    """The folder of what can be made again: TCSAE_CACHE, or the user's cache directory."""
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
    if os.name == "nt":
        return  # which has no such thing
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
