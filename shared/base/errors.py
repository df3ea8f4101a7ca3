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


class NoTailError(StoreError):
    """A store that was sealed without the tail that is asked for, and why it was."""


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


class InstallError(TcsaeError):
    """A library that is installed and cannot be imported."""


def broken_library(what: str, error: ImportError) -> InstallError:
    """The error for `what` that a library could not load as an import of its failed.

    transformers says "Could not import module X", and the reason in the exception before that one.
    """
    root: BaseException = error
    while (before := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        root = before
    reason = " ".join(str(root).split())[:300]
    return InstallError(
        f"{what} cannot be loaded, as an import fails ({type(root).__name__}: {reason}). Install or "
        "repair that library, then start the same command again."
    )


def unknown(kind: str, asked: str, known: Iterable[str]) -> str:
    """One line that says what was asked, what exists, and the nearest name."""
    names = list(known)
    near = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {asked!r}.{hint} There is: {', '.join(names) or 'none'}."
