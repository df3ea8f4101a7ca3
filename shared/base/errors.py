"""What the user can cure. The command line prints these as one line and exits with 1; a traceback is a bug of ours.

Every message has three parts: the value found, what is allowed, what to do.
"""

import difflib
from collections.abc import Iterable


class TcsaeError(Exception):
    """Base of all errors that the user can cure."""


class Stopped(Exception):  # noqa: N818
    """A signal ended a stage, with all that was done on disk. The message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(TcsaeError):
    """A setting that cannot be: unknown, out of range, or at odds with another."""


class StoreError(TcsaeError):
    """An activation store that is missing, unfinished, foreign, newer or damaged."""


class RemoteError(StoreError):
    """An object store that cannot be reached, or refuses."""


class DeniedError(RemoteError):
    """An object store that does not allow a request."""


class DiskError(TcsaeError):
    """A file or folder that the disk refuses to read or write: full, read-only, not allowed, gone."""


class RunError(TcsaeError):
    """A run folder (a trained SAE) that is missing, unfinished, or does not fit the store."""


class DataError(TcsaeError):
    """Text or activations that cannot be used: an unknown corpus, not enough text, NaN."""


class ModelError(TcsaeError):
    """A language model or hook that cannot be had."""


def unknown(kind: str, asked: str, known: Iterable[str]) -> str:
    """One line that says what was asked, what exists, and the nearest name."""
    names = list(known)
    near = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {asked!r}.{hint} There is: {', '.join(names) or 'none'}."
