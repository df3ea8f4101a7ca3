"""A run's whole state in one file: a run that was killed goes on as if it had not been."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import write_atomic
from tcsae.train.trainer import Progress, Trainer

PATTERN = "checkpoint-*.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def checkpoints(path: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(path.glob(PATTERN))


def save_checkpoint(path: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Write weights, moments and counters atomically, then drop all but the last guard.keep.

    `about` is kept as JSON: settings, store, threads, length of metrics.jsonl.
    """
    text = json.dumps({"progress": asdict(trainer.progress), **about})
    file = path / f"checkpoint-{trainer.progress.n_steps:09d}.safetensors"
    tensors = {name: tensor.cpu() for name, tensor in _tensors(trainer).items()}
    sums = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "crc32c": _crc32c(tensors)}
    write_atomic(file, safetensors.torch.save(tensors, {"tcsae": text, **sums}))
    for old in checkpoints(path)[: -trainer.config.guard.keep]:
        old.unlink()


def read_about(file: Path) -> dict[str, Any]:
    """The `about` of `save_checkpoint`, and the run's progress. Raises RunError if the file is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        text = metadata["tcsae"]
        if metadata.get("sha256") not in (None, hashlib.sha256(text.encode()).hexdigest()):
            raise ValueError("its digest does not fit")
        return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _damaged(file, error) from error


def restore(file: Path, trainer: Trainer) -> None:
    """Bring weights, moments, counters and progress of a fresh trainer to the checkpoint's, whatever its device.

    Raises RunError if the file is damaged.
    """
    try:
        tensors = _checked_tensors(file)
        progress = Progress(**read_about(file)["progress"])
        step = tensors.get("adam.0.step")
        if step is not None:  # a trainer that never stepped has no moments yet
            for i, parameter in enumerate(trainer.parameters):
                state = {name: tensors[f"adam.{i}.{name}"].to(parameter.device) for name in MOMENTS}
                trainer.optimizer.state[parameter] = state
        for name, tensor in _weights(trainer).items():
            with torch.no_grad():
                tensor.copy_(tensors[name])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise _damaged(file, error) from error
    trainer.progress = progress
    trainer.restart()


def _checked_tensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError unless they are what was written; checkpoints of older versions cannot tell."""
    with safetensors.safe_open(file, "pt") as opened:
        recorded = opened.metadata().get("crc32c")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
    if recorded not in (None, _crc32c(tensors)):
        raise ValueError("its checksum does not fit")
    return tensors


def _crc32c(tensors: dict[str, Tensor]) -> str:
    """Of all names and values: safetensors itself has no checksum, and a sha256 takes 20 times as long."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = google_crc32c.extend(crc, name.encode())
        crc = google_crc32c.extend(crc, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{crc:08x}"


def _damaged(file: Path, error: Exception) -> RunError:
    return RunError(f"{file} is damaged ({error}). Remove it: the run goes on from an older one, or anew.")


def remember(trainer: Trainer) -> Callable[[], None]:
    """Keep a copy of the state in memory; calling the result brings weights, moments and counters back.

    Progress stays, but for the running means: the loader never rewinds.
    """
    copies = {name: tensor.clone() for name, tensor in _tensors(trainer).items()}
    means = {name: getattr(trainer.progress, name) for name in ("mean_loss", "mean_correlation")}

    def bring_back() -> None:
        for name, tensor in _tensors(trainer).items():
            with torch.no_grad():
                tensor.copy_(copies[name]) if name in copies else tensor.zero_()
        for name, mean in means.items():
            setattr(trainer.progress, name, mean)
        trainer.restart()

    return bring_back


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {f"sae.{name}": tensor.detach() for name, tensor in trainer.sae.named_parameters()}
    tensors["tokens_since_fired"] = trainer.tokens_since_fired
    if trainer.head is not None:
        tensors |= {f"head.{name}": tensor.detach() for name, tensor in trainer.head.named_parameters()}
    if trainer.positions is not None:
        tensors |= {"positions.sums": trainer.positions.sums, "positions.counts": trainer.positions.counts}
    return tensors


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = _weights(trainer)
    for i, parameter in enumerate(trainer.parameters):
        if state := trainer.optimizer.state.get(parameter):
            tensors |= {f"adam.{i}.{name}": state[name] for name in MOMENTS}
    return tensors
