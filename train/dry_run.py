"""What a training will take, before it begins: passes over the store, memory, and time measured on a few steps."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tcsae.shared.store.reader import Store
from tcsae.train.checks import check_memory, memory_bytes
from tcsae.train.config import DataConfig
from tcsae.train.plan import Run
from tcsae.train.record import is_trained
from tcsae.train.run import SAMPLE_TOKENS, check_names, pass_loader
from tcsae.train.trainer import Trainer

N_WARM, N_TIMED = 2, 3
"""Steps of each run before its time is taken, and steps that are timed."""


@dataclass(frozen=True)
class RunEstimate:
    """One run's share of a pass."""

    run: Run
    tokens: int
    epochs: float
    step_s: float

    @property
    def seconds(self) -> float:
        return self.step_s * self.run.config.steps


@dataclass(frozen=True)
class PassEstimate:
    """Runs that read the same batches, side by side."""

    runs: Sequence[RunEstimate]
    memory_bytes: int
    batch_s: float
    """Seconds a batch of the loader, were it to wait for nothing."""

    @property
    def seconds(self) -> float:
        """The steps, and the batches of the longest run: an upper bound, since batches are read ahead."""
        return sum(one.seconds for one in self.runs) + self.batch_s * max(one.run.config.steps for one in self.runs)


@dataclass(frozen=True)
class TrainEstimate:
    """What `train` would do. `trained`: names of the runs that are finished already."""

    passes: Sequence[PassEstimate]
    trained: Sequence[str]


def estimate(
    store: Store, runs_path: Path, runs: Sequence[Run], fresh: bool = False, device: torch.device | str = "cpu"
) -> TrainEstimate:
    """Time a few steps of every unfinished run on batches of the store. Writes nothing.

    Raises what `train_runs` raises before its first step: RunError for names and folders that do not fit, ConfigError
    for too little memory or a temporal term that no window can move.
    """
    check_names(runs)
    device = torch.device(device)
    left = [run for run in runs if fresh or not is_trained(store, runs_path / run.name, run, 1)]
    check_memory(store, [run.config for run in left], device)
    datas = dict.fromkeys(run.config.data for run in left)
    passes = [_pass(store, data, [run for run in left if run.config.data == data], device) for data in datas]
    names = {run.name for run in left}
    return TrainEstimate(passes, [run.name for run in runs if run.name not in names])


def _pass(store: Store, data: DataConfig, runs: Sequence[Run], device: torch.device) -> PassEstimate:
    loader = pass_loader(store, data, [run.config for run in runs], device)
    start = time.perf_counter()
    batches = [batch._replace(x=batch.x.clone()) for batch in itertools.islice(loader, N_WARM + N_TIMED)]
    # The first batch waits for a whole block, whose batches then cost nothing more.
    per_block = max(1, data.buffer_sequences * loader.n_segments // max(1, store.train.n_sequences) // data.n_segments)
    batch_s = (time.perf_counter() - start) / max(per_block, len(batches))
    estimates = []
    for run in runs:
        trainer = Trainer(run.config, loader.sample(SAMPLE_TOKENS, run.config.sae.window), store.sequence_length)
        for batch in batches[:N_WARM] if run.config.steps else ():
            trainer.step(batch)
        start = time.perf_counter()
        for batch in batches[N_WARM:] if run.config.steps else ():
            trainer.step(batch)
        trainer.settle()  # on a GPU steps are only queued
        step_s = (time.perf_counter() - start) / N_TIMED
        tokens = round(loader.n_tokens / loader.n_segments * data.n_segments * run.config.steps)
        estimates.append(RunEstimate(run, tokens, tokens / loader.n_tokens, step_s))
    memory = memory_bytes([run.config for run in runs]) + 2 * loader.block_bytes()
    return PassEstimate(estimates, memory, batch_s)
