"""The losses that no SAE changes, kept below the folder of runs: worked out once per store and settings."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch

from tcsae.evaluate.metrics import DEFINITION_VERSION
from tcsae.evaluate.one_pass import Settings
from tcsae.evaluate.tail_metrics import Losses, Reference
from tcsae.shared.files import json_digest, write_atomic
from tcsae.shared.store import Store

FOLDER = ".reference"
LOSSES = ("clean", "ablation", "zero", "mean")


def _identity(store: Store, split: str, settings: Settings) -> dict[str, str]:
    return {
        "definition_version": str(DEFINITION_VERSION),
        "content": store.content,
        "split": split,
        "hook": settings.hook,
        "skip_first": str(settings.skip_first),
        "splice_all": str(settings.splice_all),
    }


def reference_path(runs_path: Path, store: Store, split: str, settings: Settings) -> Path:
    """Where the losses of this store and these settings are kept."""
    identity = _identity(store, split, settings)
    return runs_path / FOLDER / f"{store.content[:12]}-{json_digest(identity)[:12]}.safetensors"


def load_reference(runs_path: Path, store: Store, split: str, settings: Settings) -> Reference | None:
    """What an earlier evaluation kept, or None: absent, damaged, or of something else."""
    path = reference_path(runs_path, store, split, settings)
    try:
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() != _identity(store, split, settings):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        losses = [Losses(*tensors[name]) for name in LOSSES]
        return Reference(tensors["n_predictions"], tensors["n_positions"], *losses)
    except (OSError, KeyError, safetensors.SafetensorError):  # worked out again, then replaced
        return None


def save_reference(runs_path: Path, store: Store, split: str, settings: Settings, reference: Reference) -> None:
    """Keep the losses, per document."""
    tensors = {name: torch.stack(tuple(getattr(reference, name))) for name in LOSSES}
    tensors |= {name: getattr(reference, name).contiguous() for name in ("n_predictions", "n_positions")}
    data = safetensors.torch.save(tensors, _identity(store, split, settings))
    write_atomic(reference_path(runs_path, store, split, settings), data)
