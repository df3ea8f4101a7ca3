"""What a run says of itself while it trains: one line of metrics.jsonl now and then, and trackers that repeat it."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tcsae.shared.base.trackers import Tracker
from tcsae.shared.sae.ops import Code, group_sums, square_norms
from tcsae.train.batch import Batch
from tcsae.train.losses.difference import mean_difference, pairs_of
from tcsae.train.trainer import StepResult, Trainer


def metrics_line(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    """The figures of a step, over its whole batch: where several processes have a part each, all have to ask for them.

    Losses and norms are in the units of training. adjacent_correlation: pooled over latents,
    sum cov(f_t, f_t+1) / sum var(f). code_norm: root mean ||f||^2.
    """
    batch = result.batch
    config, progress, group = trainer.config, trainer.progress, batch.group
    x, error = result.x, result.x_hat - result.x
    total = group.sum_((x - group.mean(x, batch.n_whole)).square().sum())
    missed = group.sum_(error.square().sum())
    code_square, correlation = _code_figures(result.code, batch)
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


@torch.no_grad()
def _code_figures(code: Code, batch: Batch) -> tuple[float, float]:
    """(mean ||f||^2, adjacent correlation): E ||f_t+1 - f_t||^2 = 2 sum_j var(f_j) (1 - rho_j)."""
    n, group = batch.n_whole, batch.group
    everything = torch.zeros(len(batch.x), dtype=torch.int64, device=batch.x.device)
    square, total = square_norms(code).sum(), group_sums(code, everything, 1)[0]
    difference = group.sum_(mean_difference(code, pairs_of(batch, 2)))
    square, mean = group.sum_(square) / n, group.sum_(total.to(square)) / n
    variance = float(square - mean.square().sum())
    return float(square), 1 - float(difference) / (2 * variance) if variance > 0 else 0.0


class RunLog:
    """A run's metrics.jsonl, appended line by line and cut back to where a checkpoint left it."""

    def __init__(self, path: Path, n_bytes: int, tracker: Tracker | None = None) -> None:
        self.path = path
        self._file = path.open("ab")
        # A file that lost its end with the power stays as it is: to lengthen it would write zeros.
        self._file.truncate(min(n_bytes, path.stat().st_size))
        self._tracker = tracker

    def write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        if self._tracker and "event" not in line:
            self._tracker.log(line)

    def n_bytes(self) -> int:
        """Length of the file, which is on the disk then: a checkpoint refers to it."""
        os.fsync(self._file.fileno())
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
