"""A run's folder: what says that it is there already, who may write to it, and the SAE that it ends as."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tcsae import __version__
from tcsae.shared.base.device import precision
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.settings import differences, from_dict, to_dict
from tcsae.shared.base.trackers import TRACKED
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.folder import METRICS, RECORD, load_record, save_sae
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import Store
from tcsae.train.checkpoint import checkpoints, read_about
from tcsae.train.config import MAX_STEPS, TrainConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.plan import Run
from tcsae.train.trainer import Progress, Trainer

RETIRED = {"optimizer.gradients": "written"}
"""Settings of older versions that are gone, and the value at which nothing changed."""
MOVED = {"temporal.temperature": "temporal.contrast.temperature"}
"""Settings of older versions by the names that they have now."""
LOCK = "train.lock"
MOST_COMPARED = 1_000_000
"""First steps whose learning rates are compared one by one."""


def is_trained(store: Store, path: Path, run: Run, world: int) -> bool:
    """Whether the run is finished. Reads only. A finished run that goes on to more steps is not.

    Raises RunError, naming the differences, if what is in the folder, finished or not, is another run.
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
    differing = differences(recorded, asked)
    if not differing:
        return finished
    reason = ""
    if finished and [one.partition(":")[0] for one in differing] == ["train.steps"]:
        reason = _why_not_longer(run, record, read_about(unfinished[-1]) if unfinished else None, world)
        if not reason:
            return False
    raise RunError(
        f"{path} was trained otherwise ({'; '.join(differing)}). Use --fresh to train it again, or another --runs."
        + reason
    )


def _why_not_longer(run: Run, record: dict[str, Any], checkpoint: dict[str, Any] | None, world: int) -> str:
    """Why a finished run cannot go on to the steps that are asked for; empty if it can."""
    before, after = record["steps"], run.config.steps
    if after <= before or record.get("ended"):
        return f" It has {before:,} steps{' and ended early' if record.get('ended') else ''}: nothing can go on."
    lost = steps_dependence(run.config, before, after, record["tokens"])
    if lost:
        return (
            f" It cannot go on to {after:,} steps: its {before:,} are not the first of those, as {'; '.join(lost)}. "
            f"Its weights alone: --init-from {run.name}."
        )
    if checkpoint is None:
        return f" It cannot go on: its last checkpoint is gone. Its weights alone: --init-from {run.name}."
    if (n := checkpoint.get("ranks", 1)) != world:
        return f" It cannot go on in {world} process(es): it was trained in {n}, whose sums round otherwise."
    return ""


def steps_dependence(config: TrainConfig, before: int, after: int, n_tokens: int) -> list[str]:
    """What would have been otherwise in the first `before` steps (`n_tokens` tokens) of a run of `after` steps: empty
    if both train alike, so that one is the beginning of the other, bit for bit.
    """
    lost = []
    rate = config.optimizer.learning_rate
    compared = (
        *range(min(before, MOST_COMPARED)),
        before - 1,
    )  # a rate that begins to fall later still falls at the end
    if (first := next((step for step in compared if rate(step, before) != rate(step, after)), None)) is not None:
        lost.append(
            f"the learning rate differs from step {first:,} on (optimizer.decay={config.optimizer.decay!r}, "
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}; none and at most "
            f"{max(1, int(config.optimizer.warmup_share * before))} do not)"
        )
    if config.temporal.active and config.temporal.warmup:
        lost.append(f"temporal.warmup={config.temporal.warmup} is a share of the steps")
    # A limit of a tenth of the run's tokens grows with the run; one of at most half of that share is never the share.
    by_share = config.dead.after_share < 1 and config.dead.after_tokens > config.dead.after_share * n_tokens / 2
    if by_share and config.dead.aux_weight and KINDS[config.sae.activation].mostly_zero:
        lost.append(f"dead.after_share={config.dead.after_share} is a share of the tokens (1 is not)")
    return lost


def goes_on(run: Run, progress: Progress) -> bool:
    """Whether more steps can follow the last one, so that its checkpoint stays."""
    config = run.config
    if not config.steps or not config.guard.checkpoint_steps or progress.ended:
        return False
    return not steps_dependence(config, config.steps, MAX_STEPS, progress.n_tokens)


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
        "precision": precision(),
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
