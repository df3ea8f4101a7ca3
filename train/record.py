"""A run's folder: what says that it is there already, who may write to it, and the SAE that it ends as."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tcsae import __version__
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.settings import differences, from_dict, to_dict
from tcsae.shared.base.trackers import TRACKED
from tcsae.shared.sae.folder import METRICS, RECORD, load_record, save_sae
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import Store
from tcsae.train.checkpoint import checkpoints, read_about
from tcsae.train.config import TrainConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.plan import Run
from tcsae.train.trainer import Trainer

RETIRED = {"optimizer.gradients": "written"}
"""Settings of older versions that are gone, and the value at which nothing changed."""
MOVED = {"temporal.temperature": "temporal.contrast.temperature"}
"""Settings of older versions by the names that they have now."""
LOCK = "train.lock"


def is_trained(store: Store, path: Path, run: Run, world: int) -> bool:
    """Whether the run is there already. Reads only.

    Raises RunError, naming the differences, if what is there, finished or not, is another run.
    """
    finished, unfinished = (path / RECORD).exists(), checkpoints(path)
    if not finished and not unfinished:
        return False
    record = load_record(path) if finished else read_about(unfinished[-1])
    recorded = {
        "train": _with_defaults(record.get("train", {})),
        "store": record.get("store", {}).get("content"),
        "from": record.get("from"),
    }
    asked = {"train": to_dict(run.config), "store": store.content, "from": run.init_from}
    if not finished and (before := record.get("ranks", 1)) != world:
        raise RunError(
            f"{path} was begun by {before} process(es), this start has {world}, whose sums round otherwise. Go on with "
            f"{before}, or use --fresh to train it again."
        )
    if differing := differences(recorded, asked):
        raise RunError(
            f"{path} was trained otherwise ({'; '.join(differing)}). Use --fresh to train it again, or another --runs."
        )
    return finished


@contextmanager
def writable_folder(path: Path) -> Iterator[None]:
    """The run's folder, made if need be, for this process alone; what a killed one left under temporary names goes.

    Raises RunError if another process trains the run, DiskError if the folder cannot be written.
    """
    folder = LocalObjects(str(path))
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = folder.lock(LOCK)
    if lock is None:
        raise RunError(f"{path}: another process trains this run{folder.holder(LOCK)}. Wait for it, or end it.")
    try:
        folder.sweep()
        yield
    finally:
        with contextlib.suppress(OSError):  # a lock file that stays holds nobody up: what counts is who has it open
            (path / LOCK).unlink(missing_ok=True)
        lock.release()


def clear_run(path: Path) -> None:
    """Remove what an earlier training left, the record first: without it there is no finished SAE."""
    with disk_errors(path):
        for file in (path / RECORD, *checkpoints(path), path / METRICS, path / TRACKED):
            file.unlink(missing_ok=True)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as recorded; what did not exist yet in the version that wrote them was as the default is, a retired
    setting at its only value that is left is as good as absent, and one that was moved stands where it does now.
    """
    settings = {
        key: {k: v for k, v in value.items() if RETIRED.get(f"{key}.{k}") != v} if isinstance(value, dict) else value
        for key, value in settings.items()
    }
    for old, new in MOVED.items():
        (*_, parent, key), (*parents, name) = old.split("."), new.split(".")
        if isinstance(settings.get(parent), dict) and key in settings[parent]:
            inner = settings
            for one in parents:
                inner = inner.setdefault(one, {})
            inner.setdefault(name, settings[parent].pop(key))
    try:
        return to_dict(from_dict(TrainConfig, settings))
    except ConfigError:  # a setting that is gone, or none at all: it differs
        return settings


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
            **{f"{name}_per_epoch": n for name, n in loader.left_out().items()},
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
    with disk_errors(path):
        save_sae(trainer.finished_sae(), path, record, metadata)
