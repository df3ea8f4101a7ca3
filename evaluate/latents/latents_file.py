"""latents.json of a run's folder: read only if it is of the weights and the store that are there now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest, write_json
from tcsae.shared.sae.folder import WEIGHTS, evaluation_digest, read_object, writing

LATENTS = "latents.json"
LATENTS_VERSION = 1
"""Raised whenever a figure is added or defined anew."""
AGAIN = "What was finished stays: start the same command again once it can."


def load_latents(run_path: Path, content: str) -> dict[str, Any] | None:
    """A run's latents.json if it holds and is of these weights, this store and these definitions; else None."""
    try:
        held = read_object(run_path / LATENTS, "")
        is_current = (
            held["version"] == LATENTS_VERSION
            and held["store"]["content"] == content
            and held["weights"] == file_digest(run_path / WEIGHTS)
            and held["digest"] == evaluation_digest(held)
            and all(isinstance(one["rows"], dict) for one in held["parts"].values())
        )
        return held if is_current else None
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_latents(run_path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write it, with its digest; returns what was written. Raises RunError if the disk refuses it."""
    held = {name: value for name, value in values.items() if name != "digest"}
    held["digest"] = evaluation_digest(held)
    with writing(run_path, AGAIN):
        write_json(run_path / LATENTS, held)
    return held
