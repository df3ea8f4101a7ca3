"""Train many runs from one pass over a store, and leave each as an SAE folder."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch

from tcsae.shared.base.console import progress, say, size
from tcsae.shared.base.device import precision
from tcsae.shared.base.distributed import ALONE, Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.settings import differences, to_dict
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.base.trackers import open_tracker
from tcsae.shared.sae.folder import METRICS, load_record
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sources import load_sae
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch
from tcsae.train.checkpoint import checkpoints, read_about, remember, restore, save_checkpoint
from tcsae.train.checks import check_memory, check_parallel, memory_bytes
from tcsae.train.collectives import Collectives
from tcsae.train.config import DataConfig, TrainConfig
from tcsae.train.guard import UnstableError, watched
from tcsae.train.loader import SegmentLoader
from tcsae.train.log import NoLog, RunLog, metrics_line
from tcsae.train.plan import Run
from tcsae.train.record import clear_run, goes_on, is_trained, save_run, writable_folder
from tcsae.train.start.linear import fit_linear
from tcsae.train.trainer import Trainer

SAMPLE_TOKENS = 32_768
"""Tokens that the input scale, the first decoder bias and a batchtopk's threshold are taken from."""

RESTORES = 2
"""Instabilities that a run with guard.action=restore survives."""


def train_runs(
    store: Store,
    runs_path: Path,
    runs: Sequence[Run],
    fresh: bool = False,
    tracker: str | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; runs that agree on their data share one pass. Returns their records.

    Raises RunError if two runs have one name, another process trains one of them, or what lies under a run's name had
    other settings or another store; Stopped, with checkpoints on disk, on SIGINT or SIGTERM.
    """
    names = check_names(runs)
    device = torch.device(device)
    untrained = [run for run in runs if fresh or not is_trained(store, runs_path / run.name, run, ranks.world)]
    check_memory(store, [run.config for run in untrained], device)
    with ExitStack() as folders:
        if ranks.rank:
            wait_for_all(ranks)  # the first has cleared away what is trained again
            todo = [run for run in runs if not is_trained(store, runs_path / run.name, run, ranks.world)]
        else:
            todo = _begin(store, runs_path, runs, fresh, ranks.world, folders)
            wait_for_all(ranks)
        datas = dict.fromkeys(run.config.data for run in todo)
        for number, data in enumerate(datas, start=1):
            members = [run for run in todo if run.config.data == data]
            if len(datas) > 1:
                say(f"Pass {number} of {len(datas)}, as batches differ: {', '.join(run.name for run in members)}")
            _Pass(store, runs_path, data, members, tracker, device, ranks).train()
        wait_for_all(ranks)
    return [load_record(runs_path / name) for name in names]


def _begin(
    store: Store, runs_path: Path, runs: Sequence[Run], fresh: bool, world: int, folders: ExitStack
) -> list[Run]:
    """The runs that are to be trained, their folders taken for this process and, with `fresh`, cleared."""
    todo = []
    for run in runs:
        path = runs_path / run.name
        trained = not fresh and is_trained(store, path, run, world)
        if not trained:
            folders.enter_context(writable_folder(path))
            if fresh:
                clear_run(path)
            trained = is_trained(store, path, run, world)  # by another process, until just now
        if trained:
            say(f"{run.name}: trained already, reused ({path}). Train it again with --fresh.")
        else:
            todo.append(run)
            if not checkpoints(path):
                clear_run(path)
    return todo


def check_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names. Raises RunError if two have the same."""
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RunError(f"Two runs would be named {twice[0]!r}. Give each other settings, or ask for it once.")
    return names


class Member:
    """One run of a pass; in several processes, only the one that `writes` leaves files."""

    def __init__(
        self, run: Run, path: Path, trainer: Trainer, about: dict[str, Any], tracker: str | None, writes: bool
    ) -> None:
        self.writes = writes
        self.run, self.path, self.trainer, self.about = run, path, trainer, about
        self.started, self.seconds = time.monotonic(), 0.0
        self.saved = self.started
        n_bytes = 0
        if saved := checkpoints(path):
            record = read_about(saved[-1])
            restore(saved[-1], trainer)
            n_bytes, self.seconds = record["metrics_bytes"], record["seconds"]
            say(f"{run.name}: goes on at step {trainer.progress.n_steps}")
            for what in ("threads", "device", "precision"):
                if (before := record.get(what, about[what])) != about[what]:  # older versions did not tell the device
                    say(f"{run.name}: {what} {before} before, {about[what]} now: rounding will differ.")
        self.steps_on_disk = trainer.progress.n_steps
        config = run.config
        self.log: RunLog | NoLog = NoLog()
        if writes:
            with disk_errors(path):
                passed_on = open_tracker(tracker, path, to_dict(config), trainer.progress.n_steps)
                self.log = RunLog(path / METRICS, n_bytes, passed_on)
        self.bring_back = remember(trainer) if config.guard.action == "restore" else None

    @property
    def live(self) -> bool:
        progress = self.trainer.progress
        return not progress.ended and progress.n_steps < self.run.config.steps

    def step(self, batch: Batch, number: int) -> None:
        """Train on batch `number` of the pass, unless a checkpoint says that it has been trained on."""
        trainer, config = self.trainer, self.run.config
        if number < trainer.progress.n_steps or not self.live:
            return
        if batch.longest < config.sae.window:
            trainer.count(batch)
            why = f"Batch {number}: data.max_norm={config.data.max_norm} leaves no token of it."
            if batch.longest:
                why = f"Batch {number}: no segment of it has sae.window={config.sae.window} positions."
            self.log.write({"event": "skipped", "step": trainer.progress.n_steps, "why": why})
            return
        try:
            result = trainer.step(batch)
            n = trainer.progress.n_steps
            logs = n % config.log_every == 0 or n == config.steps
            saves = bool(config.guard.checkpoint_steps) and n % config.guard.checkpoint_steps == 0 and self.live
            late = self.saves_between and time.monotonic() - self.saved > 60 * config.guard.checkpoint_minutes
            if logs or saves or late:
                trainer.settle()
        except UnstableError as error:
            self._unstable(error)
            if error.batch is not batch:  # this one has moved nothing yet
                self.step(batch, number)
            return
        if logs:
            line = {**metrics_line(trainer, result), "seconds": round(self.elapsed(), 3)}
            self.log.write(line)
            if not self._watch(line["adjacent_correlation"], batch):
                return
        if saves:
            self.checkpoint()
            if self.bring_back is not None:
                self.bring_back = remember(trainer)
        elif late:
            self.checkpoint_between()

    def _watch(self, correlation: float, batch: Batch) -> bool:
        """Whether the code's adjacent correlation is stable; else the run is ended or brought back."""
        progress, fall = self.trainer.progress, self.run.config.guard.correlation
        try:
            if fall:
                mean = watched(correlation, progress.mean_correlation, fall, progress.n_steps, batch)
                progress.mean_correlation = mean
        except UnstableError as error:
            self._unstable(error)
            return False
        return True

    def settle(self) -> None:
        """Wait for the verdict on the last step, and act on it."""
        try:
            self.trainer.settle()
        except UnstableError as error:
            self._unstable(error)

    def _unstable(self, error: UnstableError) -> None:
        """End the run, or bring back its last good state and leave the batch out."""
        progress = self.trainer.progress
        why = f"Batch {progress.n_steps}, {error}"
        if self.bring_back is None or progress.n_restored >= RESTORES:
            progress.ended = why
            self.log.write({"event": "ended", "step": progress.n_steps, "why": why})
            say(f"{self.run.name}: ended. {why}")
            return
        self.bring_back()
        progress.n_restored += 1
        if not error.counted:
            self.trainer.count(error.batch)
        self.log.write({"event": "restored", "step": progress.n_steps, "why": why})
        say(f"{self.run.name}: brought back to its last good state. {why}")

    @property
    def saves_between(self) -> bool:
        """Whether it has checkpoints at no step of their own: when time has passed, or training is interrupted.

        Not a run that would be brought back: started again there, it would be brought back to there.
        """
        return bool(self.run.config.guard.checkpoint_steps) and self.bring_back is None and self.live

    def checkpoint_between(self) -> None:
        if self.saves_between:
            self.checkpoint()

    def checkpoint(self) -> None:
        self.saved = time.monotonic()
        self.steps_on_disk = self.trainer.progress.n_steps
        if not self.writes:
            return
        with disk_errors(self.path):
            state = {"metrics_bytes": self.log.n_bytes(), "seconds": self.elapsed()}
            save_checkpoint(self.path, self.trainer, {**state, **self.about})

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


def pass_loader(
    store: Store, data: DataConfig, configs: Sequence[TrainConfig], device: torch.device, ranks: Ranks = ALONE
) -> SegmentLoader:
    """The loader of runs that read the same batches. Raises ConfigError for a temporal term that no window can move."""
    text = any(config.temporal.reads_text for config in configs)
    loader = SegmentLoader(store, data, device=device, ranks=ranks, text=text)
    for config in configs:
        loader.check_windows(config)
    return loader


class _Pass:
    """Runs that read the same batches."""

    def __init__(
        self,
        store: Store,
        runs_path: Path,
        data: DataConfig,
        runs: Sequence[Run],
        tracker: str | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.store, self.runs, self.tracker, self.runs_path = store, runs, tracker, runs_path
        self.device = device
        self.loader = pass_loader(store, data, [run.config for run in runs], device, ranks)
        samples = {
            window: self.loader.sample(SAMPLE_TOKENS, window) for window in {run.config.sae.window for run in runs}
        }
        self.members = [self._member(run, samples[run.config.sae.window]) for run in runs]

    def _member(self, run: Run, sample: torch.Tensor) -> Member:
        initial = None
        if run.init_from is not None:
            initial = initial_weights(self.runs_path / run.init_from, run)
        linear = fit_linear(self.store, run.config)
        trainer = Trainer(run.config, sample, self.store.sequence_length, initial, linear=linear)
        about = {
            "train": to_dict(run.config),
            "store": {"content": self.store.content},
            "from": run.init_from,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "precision": precision(),
            "ranks": self.ranks.world,
        }
        return Member(run, self.runs_path / run.name, trainer, about, self.tracker, self.ranks.rank == 0)

    def train(self) -> None:
        """All steps of all runs; on SIGINT or SIGTERM each run leaves a checkpoint, between two steps."""
        done = min(member.trainer.progress.n_steps for member in self.members)
        last = max(run.config.steps for run in self.runs)
        self.loader.n_batches_done = done
        self._announce()
        title = f"train {self.runs[0].name}" if len(self.runs) == 1 else f"train {len(self.runs)} runs"
        per_step = self.loader.n_tokens / self.loader.n_segments * self.loader.config.n_segments
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            advance = stack.enter_context(progress(title, round(last * per_step), done=round(done * per_step)))
            for member in self.members:
                stack.callback(member.log.close)
            for number, batch in self._batches(done, last):
                for member in self.members:
                    member.step(batch, number)
                advance(batch.n_whole)
                self._stop_here(stop, last)
            for member in self.members:
                if goes_on(member.run, member.trainer.progress):
                    member.checkpoint()
        for member in self.members if self.ranks.rank == 0 else ():
            save_run(self.store, self.loader, member.path, member.run, member.trainer, member.elapsed())
            for file in checkpoints(member.path)[: -1 if goes_on(member.run, member.trainer.progress) else None]:
                file.unlink()

    def _stop_here(self, stop: StopRequest, last: int) -> None:
        """Raises Stopped, after a checkpoint of every run, if a signal came; in several processes, to any of them."""
        requested = Collectives(self.ranks).any(torch.tensor([stop.requested]))
        if not requested.item():
            return
        for member in self.members:
            member.settle()
            member.checkpoint_between()
        n_on_disk = min(member.steps_on_disk for member in self.members)
        if stop.number is None:
            stop.number = SIGTERM  # another process received it
        stop.check(
            f"step {n_on_disk:,} of {last:,} is on disk"
            if n_on_disk
            else "nothing is on disk, as no checkpoint was due"
        )

    def _batches(self, done: int, last: int) -> Iterator[tuple[int, Batch]]:
        """Numbered batches while any run is unfinished."""
        for number, batch in zip(range(done, last), self.loader, strict=False):
            if not any(member.live for member in self.members):
                return
            yield number, batch

    def _announce(self) -> None:
        """Memory, before it is used, and what an epoch leaves out."""
        on = f"{torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else f"on {self.device}"
        loader = self.loader
        out = loader.left_out() | ({"min_sequence_length": loader.n_short} if loader.n_short else {})
        reasons = ", ".join(f"{n:,} by data.{name}" for name, n in out.items())
        tokens = f"{loader.n_tokens:,} tokens an epoch (left out: {reasons})"
        if loader.config.max_norm is not None:
            tokens += f", less those above data.max_norm={loader.config.max_norm}"
        total = memory_bytes([run.config for run in self.runs]) + 2 * loader.block_bytes()
        say(f"{len(self.runs)} run(s), {tokens}, about {size(total)} of memory, {on}")


def initial_weights(path: Path, run: Run) -> SparseAutoencoder:
    """The SAE that a run starts from: one of ours, or of others below --runs in any format that `tcsae.load_sae` reads.

    Raises RunError if it cannot be trained on as the run asks.
    """
    sae = load_sae(path)
    if differing := differences(sae.config, run.config.sae):
        settings = to_dict(sae.config)
        cure = " ".join(f"--set sae.{key}={settings[key]}" for key in (one.partition(":")[0] for one in differing))
        raise RunError(f"{path.name} is another SAE than {run.name} asks for ({'; '.join(differing)}). Give {cure}.")
    if type(sae) is not SparseAutoencoder and not sae.metadata.record:
        raise RunError(f"{path.name} is a {type(sae).__name__}, which is not trained here. Start from another SAE.")
    norms = sae.W_dec.detach().norm(dim=1)
    theirs = not sae.metadata.record and sae.config.activation != "gelu"
    if theirs and run.config.optimizer.unit_decoder and not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        raise RunError(
            f"{path.name} has decoder rows of norm {norms.min():.3g} to {norms.max():.3g}, which the first step would "
            "make 1. Set optimizer.unit_decoder=false, or fold them first: tcsae convert --to unit-decoder."
        )
    return sae


def train_parallel(
    store: Store,
    runs_path: Path,
    runs: Sequence[Run],
    ranks: Ranks,
    fresh: bool = False,
    tracker: str | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """As `train_runs`, by one of several processes. Returns the records that this one is to show: rank 0's all of them,
    once the others are done; without a rendezvous each its own.
    """
    check_names(runs)
    if len(runs) == 1:
        check_parallel(runs[0].config, ranks.world, device)
        start_group(ranks, device)
        train_runs(store, runs_path, runs, fresh, tracker, device, ranks)
        return [load_record(runs_path / runs[0].name)] if ranks.rank == 0 else []
    mine = deal(runs, ranks)
    names = ", ".join(run.name for run in mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ranks.rank} of {ranks.world} trains {names}.")
    records = train_runs(store, runs_path, mine, fresh, tracker, device)
    if not has_rendezvous():
        return records
    wait_for_all(ranks)
    return [load_record(runs_path / run.name) for run in runs] if ranks.rank == 0 else []


def deal(items: Sequence[Any], ranks: Ranks) -> list[Any]:
    """This rank's share."""
    return list(items[ranks.rank :: ranks.world])
