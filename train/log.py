"""What a run says of itself while it trains: one line of metrics.jsonl now and then, and trackers that repeat it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcsae.shared.base.device import sum_dtype
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.base.windows import n_windows, pair_weights
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch
from tcsae.train.losses.difference import Pairs, difference_dense, difference_sparse
from tcsae.train.trainer import StepResult, Trainer

TRACKERS = ("tensorboard", "wandb")


def metrics_line(trainer: Trainer, batch: Batch, result: StepResult) -> dict[str, Any]:
    """The figures of a step, over its whole batch: where several processes have a part each, all have to ask for them.

    Losses and norms are in the units of training. adjacent_correlation: pooled over latents,
    sum cov(f_t, f_t+1) / sum var(f). code_norm: root mean ||f||^2.
    """
    config, progress, state, adder = trainer.config, trainer.progress, result.state, trainer.adder
    total = adder.tensor((state.target - adder.mean(state.target, state.n)).square().sum())
    missed = adder.tensor(state.error.square().sum())
    code_square, correlation = _code_figures(trainer, batch, result)
    return {
        "step": progress.n_steps,
        "tokens": progress.n_tokens,
        "loss": result.loss,
        **result.losses,
        "explained_variance": float(1 - missed / total),
        "l0": result.l0,
        "dead_fraction": float(trainer.dead().float().mean()),
        "adjacent_correlation": correlation,
        "code_norm": code_square**0.5,
        "decoder_norm": trainer.sae.W_dec.detach().norm(dim=1).mean().item(),
        "grad_norm": result.grad_norm,
        "temporal_weight": result.temporal_weight,
        "lr": config.optimizer.learning_rate(progress.n_steps - 1, config.steps),
    }


def _code_figures(trainer: Trainer, batch: Batch, result: StepResult) -> tuple[float, float]:
    """(mean ||f||^2, adjacent correlation): E ||f_t+1 - f_t||^2 = 2 sum_j var(f_j) (1 - rho_j)."""
    code, wide, adder = result.state.code, sum_dtype(batch.x.device), trainer.adder
    weights = torch.from_numpy(pair_weights(batch.lengths, 2)).to(batch.x)
    pairs = [Pairs(1, weights / max(1, int(n_windows(batch.all.lengths, 2).sum())))]
    if isinstance(code, SparseCode):
        values = code.values.to(wide)
        square, mean = values.square().sum(), values.new_zeros(code.d_sae).index_add_(0, code.latents, values)
        zeros = trainer.workspace.zeros(code.n_tokens, code.d_sae)
        difference = difference_sparse(code, pairs, torch.zeros_like(code.values), zeros)
    else:
        square, mean = code.square().sum().to(wide), code.sum(0, dtype=wide)
        difference = difference_dense(code, pairs, trainer.workspace.get("temporal", *code.shape).zero_())
    n, square, mean = batch.n_whole, adder.tensor(square), adder.tensor(mean)
    difference = adder.tensor(difference)
    variance = float(square / n - (mean / n).square().sum())
    return float(square / n), 1 - float(difference) / (2 * variance) if variance > 0 else 0.0


class Tracker(NamedTuple):
    """Somebody else's record of a run."""

    log: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


class RunLog:
    """A run's metrics.jsonl, appended line by line and cut back to where a checkpoint left it."""

    def __init__(self, path: Path, n_bytes: int, tracker: Tracker | None = None) -> None:
        self.path = path
        self._file = path.open("ab")
        self._file.truncate(n_bytes)
        self._tracker = tracker

    def write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        if self._tracker and "event" not in line:
            self._tracker.log(line)

    def n_bytes(self) -> int:
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.close()


class NoLog:
    """What a process keeps that writes nothing."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def n_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def open_tracker(kind: str | None, folder: Path, config: dict[str, Any]) -> Tracker | None:
    """What passes lines of metrics on to TensorBoard or Weights & Biases, or None without a tracker.

    Raises ConfigError if the tracker is unknown or not installed.
    """
    if kind is None:
        return None
    if kind not in TRACKERS:
        raise ConfigError(unknown("tracker", kind, TRACKERS))
    try:
        return _tensorboard(folder) if kind == "tensorboard" else _wandb(folder, config)
    except ImportError as error:
        raise ConfigError(
            f"--tracker {kind} needs a package that is not there ({error}): pip install {kind}"
        ) from error


def _tensorboard(folder: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(folder: Path, config: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(project="tcsae", name=folder.name, dir=str(folder), config=config, reinit="create_new")

    def log(line: dict[str, Any]) -> None:
        run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    return Tracker(log, run.finish)
