"""A finished run becomes an SAE folder that says everything about itself."""

import importlib.metadata
from pathlib import Path

import torch

from tcsae import __version__
from tcsae.shared.config import to_dict
from tcsae.shared.sae import save_sae
from tcsae.shared.store import Store
from tcsae.train.loader import SegmentLoader
from tcsae.train.plan import Run
from tcsae.train.trainer import Trainer


def save_run(store: Store, loader: SegmentLoader, path: Path, run: Run, trainer: Trainer, seconds: float) -> None:
    """Write the SAE, in the units of the data, with its record."""
    recipe, progress = store.manifest.recipe, trainer.progress
    record = {
        "name": run.name,
        "preset": run.preset,
        "train": to_dict(run.config),
        "from": run.init_from,
        "hook": loader.hook,
        "store": {"location": store.location, "content": store.content},
        "steps": progress.n_steps,
        "tokens": progress.n_tokens,
        "left_out": {
            "skip_first_per_epoch": loader.n_skipped,
            "short_per_epoch": loader.n_short,
            "max_norm": progress.n_left_out,
        },
        "epochs": progress.n_tokens / loader.n_tokens,
        "input_scale": trainer.scale,
        "dead_fraction": float(trainer.dead().float().mean()),
        "restored": progress.n_restored,
        "ended": progress.ended,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": trainer.sample.device.type,
        "finished": True,
        "libraries": {"tcsae": __version__, "torch": importlib.metadata.version("torch")},
    }
    metadata = {
        "model_name": recipe.model.name,
        "hook_name": loader.hook,
        "dataset_path": recipe.corpus.name,
        "context_size": recipe.sequences.length,
        "prepend_bos": recipe.sequences.prepend_bos,
    }
    save_sae(trainer.finished_sae(), path, record, metadata)
