"""The Hub, with its refusals as one line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tcsae.shared.base.errors import ConfigError, RemoteError, TcsaeError

HTTP = ("httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3")
"""Libraries that the Hub's client has spoken through."""


def hub_api() -> Any:
    """A client of HF_ENDPOINT's Hub, with the user's token."""
    from huggingface_hub import HfApi

    return HfApi(library_name="tcsae")


def check_repo_name(option: str, name: str) -> None:
    """Raises ConfigError for what is no OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{option} {name!r}: give OWNER/NAME, in letters, digits, - _ and dots.") from error
    if "/" not in name:
        raise ConfigError(f"{option} {name!r} has no owner. Give OWNER/NAME.")


@contextmanager
def hub_errors(name: str, kind: str) -> Iterator[None]:
    """What the Hub refuses within, as RemoteError; `kind`: "model" or "dataset"."""
    try:
        yield
    except TcsaeError:
        raise
    except Exception as error:  # of the Hub's client and the HTTP library below it, which changes with its versions
        if (line := refusal(error, name, kind)) is None:
            raise
        raise RemoteError(line) from error


def refusal(error: Exception, name: str, kind: str) -> str | None:
    """What an error of the Hub's client means and what to do, in one line; None for another error."""
    from huggingface_hub import errors

    log_in = "log in: hf auth login"
    known = {
        errors.OfflineModeIsEnabled: f"{name}: the Hub is switched off (HF_HUB_OFFLINE). Unset it, and start again.",
        errors.GatedRepoError: f"{name} asks for its terms to be accepted on the Hub; then {log_in}.",
        errors.RevisionNotFoundError: f"{name} has no such revision on the Hub. Give another --revision.",
        errors.RepositoryNotFoundError: f"The {kind} {name} is not on the Hub, or not yours to see. Look at the name, "
        f"or {log_in}.",
        errors.LocalEntryNotFoundError: f"{name} is not in the Hub's local cache, and the Hub cannot be reached (no "
        "network, or HF_HUB_OFFLINE).",
        errors.EntryNotFoundError: f"{name}: the Hub has no such file ({_first_line(error)}).",
    }
    for one, line in known.items():
        if isinstance(error, one):
            return line
    if isinstance(error, errors.HfHubHTTPError):
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return f"The Hub does not let you write to {name}. With a token that may, {log_in}."
        return f"{name}: the Hub answers {_first_line(error)}. Start again later: what is there stays."
    if type(error).__module__.partition(".")[0] in HTTP or isinstance(error, ConnectionError | TimeoutError):
        return f"{name}: the Hub cannot be reached ({_first_line(error)}). Start again later: what is there stays."
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
