"""What goes wrong with a disk, as one line that names the path and the cure; nothing that was finished is lost."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tcsae.shared.base.errors import Stopped, StoreError, TcsaeError

FULL = (errno.ENOSPC, errno.EDQUOT)
CURES = {
    errno.EROFS: "Its disk can only be read: mount it to be written, or give another --store.",
    errno.EACCES: "Get the permission, or give another --store.",
    errno.EPERM: "Get the permission, or give another --store.",
    errno.ENAMETOOLONG: "Give a shorter --store.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the limit of open files (ulimit -n).",
}
OTHER_CURE = "See whether its disk is still there, or give another --store."


class NoRoomError(StoreError):
    """The disk is full, or would be."""


@contextmanager
def disk_errors(location: str) -> Iterator[None]:
    """Raises StoreError, or NoRoomError, in place of what a disk raises, whichever library met it."""
    try:
        yield
    except (TcsaeError, Stopped):
        raise
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        path = getattr(error, "filename", None)
        place = location if path is None or str(path).startswith(location) else str(path)
        if number in FULL:
            raise NoRoomError(
                f"The disk of {place} is full. Make room and start the same harvest again: it goes on from what is "
                "there."
            ) from error
        raise StoreError(
            f"{place} cannot be used ({os.strerror(number)}). {CURES.get(number, OTHER_CURE)} The same harvest goes on "
            "from what is there."
        ) from error


def _errno(error: Exception) -> int | None:
    """The number of an operating system's error, also where a library (safetensors) has only its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if "No space left on device" in str(error):
        return errno.ENOSPC
    match = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))
    return int(match[1] or match[2]) if match else None
