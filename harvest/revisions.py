"""Revisions: what names a model or a corpus exactly, a digest of local files or a commit of the Hugging Face Hub."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from tcsae.shared.base.console import say
from tcsae.shared.base.errors import unknown
from tcsae.shared.base.files import file_digest

LOCAL = "sha256:"
"""Beginning of a local revision; what else there is are commits."""

TIMEOUT_S = 10.0


class HubError(Exception):
    """Why the Hub gave no commit, to stand in a message: "is not on the Hugging Face Hub"."""


class UnreachableError(HubError):
    """The Hub did not answer: no network, offline mode, or a fault of its server."""


def pinned_commit(kind: str, name: str, revision: str | None, stored: str | None) -> str:
    """The commit that `revision` (None: the main branch) of a "model" or "dataset" names.

    `stored` is the one that a store of this name was begun with. It stands where no other revision is asked for: the
    Hub is asked once a store, a harvest goes on whatever is uploaded meanwhile, and a sealed store opens offline.
    Raises HubError.
    """
    if stored is not None and revision in (None, stored):
        if revision is None:
            say(f"{name}: the store's revision is used, {stored}.")
        return stored
    try:
        return hub_commit(kind, name, revision)
    except UnreachableError as error:
        if stored is None:
            raise
        say(f"{name} {error}. The store's commit of it is used: {stored}.")
        return stored


def not_found(kind: str, asked: str, name: str, known: Iterable[str], error: HubError) -> str:
    """One line on a model or dataset that is nowhere: what was asked, and why the Hub has no `name` for us.

    A name that can only be the Hub's is not called unknown, nor compared with others.
    """
    if asked != name or "/" in asked:
        called = asked if asked == name else f"{asked} ({name})"
        return f"The {kind} {called} is no file or folder here, and {name} {error}. There is also: {', '.join(known)}."
    return f"{unknown(kind, asked, known)} No file or folder has this name here, and {name} {error}."


def digest_files(files: Iterable[Path], root: Path) -> str:
    """ "sha256:..." over the files' names (relative to `root`) and bytes."""
    whole = hashlib.sha256()
    for file in sorted(files):
        name = os.fsencode(file.relative_to(root).as_posix())
        whole.update(name + f"\0{file_digest(file)}\n".encode())
    return f"{LOCAL}{whole.hexdigest()}"


def hub_commit(kind: str, name: str, revision: str | None) -> str:
    """The commit that `revision` (None: the main branch) of a "model" or "dataset" names now.

    Asks the Hub once, without retries; a model that is in the local cache needs no answer. Raises HubError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        return str(ask(name, revision=revision, timeout=TIMEOUT_S).sha)
    except HFValidationError as error:
        raise HubError("can be no name on the Hugging Face Hub") from error
    except GatedRepoError as error:
        raise HubError(
            "asks for its licence to be accepted on the Hugging Face Hub; then log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"has no revision {revision!r} on the Hugging Face Hub") from error
    except RepositoryNotFoundError as error:
        raise HubError("is not on the Hugging Face Hub (if it is private, log in: hf auth login)") from error
    except (
        Exception
    ) as error:  # no route, offline mode, server faults: the HTTP library's errors change with its versions
        if kind == "model" and (commit := _cached_commit(name, revision)):
            return commit
        raise UnreachableError(f"could not be looked up on the Hugging Face Hub ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to stand in a message of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cached_commit(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None
