"""Train many runs from one pass over a store, and leave each as an SAE folder."""

import importlib.metadata
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcsae import __version__
from tcsae.shared.config import differences, to_dict
from tcsae.shared.console import progress, say
from tcsae.shared.errors import RunError
from tcsae.shared.sae import RECORD, load_record, save_sae
from tcsae.shared.store import Store
from tcsae.train.config import DataConfig, TrainConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.trainer import StepResult, Trainer, Workspace

METRICS = "metrics.jsonl"
SAMPLE_TOKENS = 32_768
"""Tokens that the input scale and the first decoder bias are taken from."""


class Run(NamedTuple):
    """One SAE to train, and the folder name it gets."""

    name: str
    preset: str
    config: TrainConfig


def train_runs(store: Store, runs_path: Path, runs: Sequence[Run], fresh: bool = False) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; runs that agree on their data share one pass. Returns their records.

    Raises RunError if two runs have one name, or a finished run of that name had other settings or another store.
    """
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RunError(f"Two runs would be named {twice[0]!r}. Give each other settings, or ask for it once.")
    todo = [run for run in runs if fresh or not _is_finished(store, runs_path / run.name, run)]
    passes = {data: [run for run in todo if run.config.data == data] for data in {run.config.data: 0 for run in todo}}
    for number, (data, together) in enumerate(passes.items(), start=1):
        if len(passes) > 1:
            say(f"Pass {number} of {len(passes)}: {', '.join(run.name for run in together)}")
        _train_pass(store, runs_path, data, together)
    return [load_record(runs_path / name) for name in names]


def _is_finished(store: Store, path: Path, run: Run) -> bool:
    if not (path / RECORD).exists():
        return False
    record = load_record(path)
    asked = {"train": to_dict(run.config), "store": store.content}
    found = {"train": record.get("train", {}), "store": record.get("store", {}).get("content")}
    if differing := differences(found, asked):
        raise RunError(
            f"{path} was trained otherwise ({'; '.join(differing)}). Use --fresh to train it again, or another --runs."
        )
    say(f"{run.name}: trained already, reused ({path}). Train it again with --fresh.")
    return True


def _train_pass(store: Store, runs_path: Path, data: DataConfig, runs: Sequence[Run]) -> None:
    loader = SegmentLoader(store, data)
    sample, workspace = loader.sample(SAMPLE_TOKENS), Workspace()
    live = []
    for run in runs:
        (runs_path / run.name).mkdir(parents=True, exist_ok=True)
        (runs_path / run.name / RECORD).unlink(missing_ok=True)
        (runs_path / run.name / METRICS).write_text("")
        live.append((run, Trainer(run.config, sample, workspace)))
    steps = max(run.config.steps for run in runs)
    per_step = loader.n_tokens / loader.n_segments * data.n_segments
    title = f"train {runs[0].name}" if len(runs) == 1 else f"train {len(runs)} runs"
    start = time.monotonic()
    with progress(title, total=round(steps * per_step)) as advance:
        for batch in itertools.islice(loader, steps):
            for run, trainer in live:
                if trainer.n_steps < run.config.steps:
                    _log(runs_path / run.name / METRICS, trainer, trainer.step(batch), time.monotonic() - start)
            advance(len(batch.x))
    for run, trainer in live:
        _save(store, loader, runs_path / run.name, run, trainer, time.monotonic() - start)


def _log(path: Path, trainer: Trainer, result: StepResult, seconds: float) -> None:
    config = trainer.config
    if trainer.n_steps % config.log_every and trainer.n_steps != config.steps:
        return
    line = {
        "step": trainer.n_steps,
        "tokens": trainer.n_tokens,
        "loss": result.loss,
        **result.losses,
        "explained_variance": result.explained_variance(),
        "l0": result.l0,
        "dead_fraction": trainer.dead_fraction(),
        "grad_norm": result.grad_norm,
        "lr": config.optimizer.learning_rate(trainer.n_steps - 1, config.steps),
        "seconds": round(seconds, 3),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _save(store: Store, loader: SegmentLoader, path: Path, run: Run, trainer: Trainer, seconds: float) -> None:
    recipe = store.manifest.recipe
    record = {
        "name": run.name,
        "preset": run.preset,
        "train": to_dict(run.config),
        "hook": loader.hook,
        "store": {"location": store.location, "content": store.content},
        "steps": trainer.n_steps,
        "tokens": trainer.n_tokens,
        "epochs": trainer.n_tokens / loader.n_tokens,
        "input_scale": trainer.scale,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "finished": True,
        "libraries": {"tcsae": __version__, "torch": importlib.metadata.version("torch")},
    }
    metadata = {
        "model_name": recipe.model.name,
        "hook_name": loader.hook,
        "dataset_path": recipe.corpus.name,
        "context_size": recipe.sequences.length,
        "prepend_bos": recipe.sequences.prepend_bos,
        "training_architecture": run.config.sae.activation,
    }
    save_sae(trainer.finished_sae(), path, record, metadata)
