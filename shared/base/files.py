"""Files and folders that are whole or absent, and one line for whatever the disk refuses.

A file or folder is written under a temporary name, fsynced and renamed, and its folder fsynced; so a kill or a power
loss leaves the old one, or the new one. Its writer holds the system's lock on the temporary one, which ends with the
process: what nobody holds was left by a killed writer. `write_folder` and the start of each command delete it.
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
MAX_NAME = 180
"""Characters of a name that its temporary name begins with."""
STALE_S = 24 * 3600.0
"""Where locks cannot tell (Windows, some network file systems): a temporary name this old is a killed writer's."""

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
    errno.ELOOP: "A link leads to itself: give another place, or delete the link.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.ENFILE: "Too many files are open on this machine.",
    errno.ENOMEM: "Too little memory is free.",
}
"""What to do about an errno."""
DISK_CURE = "Look at the disk and whether it is mounted, then start the same command again."


def disk_line(error: BaseException, path: Path | str | None = None, cure: str | None = None) -> str | None:
    """One line (path, reason, cure) for an OSError, or for a library's error that quotes one; None for any other.

    `path` is used where the error names no file, as that of a full disk does not. With a `cure` of the caller's the
    line says that `path` cannot be written, and that cure.
    """
    if isinstance(error, RuntimeError) and (loop := re.match(r"Symlink loop from '(.+)'", str(error))):  # pathlib's
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), loop[1])
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
    if cure is not None:
        return f"{path} cannot be written ({reason}). {cure}"
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes | os.PathLike) else ""
    usual = CURES.get(number, DISK_CURE) if number is not None else DISK_CURE
    return f"{where}{reason}. {usual}"


@contextmanager
def disk_errors(path: Path | str, kind: type[TcsaeError] = DiskError, cure: str | None = None) -> Iterator[None]:
    """What the disk refuses within, raised as `kind` in one line that names the path and the cure (`disk_line`)."""
    try:
        yield
    except TcsaeError:
        raise
    except Exception as error:
        line = disk_line(error, path, cure)
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
        with _opened(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file
                file.close()
            temporary.replace(path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _opened(temporary: Path) -> BinaryIO:
    """A new file that is locked as long as it is open."""
    while True:
        file = temporary.open("wb")
        if _is_held(file.fileno(), temporary):
            return file
        file.close()  # another process took it for a dead one's before it was locked


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` never holds a part of it, not even after a crash."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a path of bytes that are no UTF-8
        data = json.dumps(value, indent=2).encode()
    write_atomic(path, data + b"\n")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then put it at `path` in place of what is there.

    A folder that is there is exchanged for the new one in one step, so that at any moment one of the two is whole at
    `path` (on Linux and macOS; elsewhere the old one is moved aside first). Not for folders that others read meanwhile:
    the old one is deleted afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_partials(path)
    temporary = temporary_path(path)
    with _locked_folder(temporary):
        _fill_and_swap(path, temporary, fill)
    _fsync_folder(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # what was there before


def _fill_and_swap(path: Path, temporary: Path, fill: Callable[[Path], None]) -> None:
    try:
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


@contextmanager
def _locked_folder(temporary: Path) -> Iterator[None]:
    """A new folder, locked where the system locks folders."""
    descriptor = None
    try:
        while True:
            temporary.mkdir(exist_ok=True)
            if os.name == "nt":
                break
            descriptor = os.open(temporary, os.O_RDONLY)
            if _is_held(descriptor, temporary):
                break
            os.close(descriptor)  # another process took it for a dead one's before it was locked
            descriptor = None
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


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
    return path.with_name(f"{path.name[:MAX_NAME]}.{uuid.uuid4().hex}{PARTIAL}")


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take the system's lock on an open file or folder until it is closed; whether nobody else holds it.

    None where it cannot be locked: by the system (Windows), or the file system (folders of NFS, say).
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_held(descriptor: int, temporary: Path) -> bool:
    """Whether a new file or folder is locked and in its place, or can only be told by its age."""
    locked = try_lock(descriptor)
    return locked is None or (locked and is_at(descriptor, temporary))


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_dead_partials(path: Path) -> None:
    """Delete what killed writers of `path` left under temporary names, never a living one's. Any process may call it.

    Its temporary names are `temporary_path`'s: 32 hexadecimal digits, so that no file of a user is taken for one.
    """
    name = path.name[:MAX_NAME]
    _remove_dead(path.parent, lambda one: one.startswith(name) and bool(_TEMPORARY.fullmatch(one[len(name) :])))


def remove_dead_partials_in(folder: Path) -> None:
    """The same of every name right in a folder."""
    _remove_dead(folder, lambda one: bool(_TEMPORARY.search(one)))


def _remove_dead(folder: Path, is_temporary: Callable[[str], bool]) -> None:
    with contextlib.suppress(OSError):  # what cannot be listed is left to the writer, who says so
        for temporary in [path for path in folder.iterdir() if is_temporary(path.name)]:
            _remove_if_dead(temporary)


_TEMPORARY = re.compile(r"\.[0-9a-f]{32}" + re.escape(PARTIAL) + r"\Z")


def _remove_if_dead(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        is_folder = temporary.is_dir()
        descriptor = os.open(temporary, os.O_RDONLY if is_folder else os.O_RDWR) if os.name != "nt" else None
        try:
            is_dead = None if descriptor is None else try_lock(descriptor)
            if is_dead is None:
                is_dead = time.time() - temporary.stat().st_mtime > STALE_S
            if is_dead:
                shutil.rmtree(temporary) if is_folder else temporary.unlink()
        finally:
            if descriptor is not None:
                os.close(descriptor)


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


def is_utf8(name: str) -> bool:
    """Whether the bytes of a name are UTF-8: Python has half surrogate pairs for those that are not."""
    return not any("\ud800" <= one <= "\udfff" for one in name)


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
