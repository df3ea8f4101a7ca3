"""Train many runs from one pass over a store, and leave each as an SAE folder."""

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tcsae import __version__
from tcsae.shared.base.console import progress, say, size
from tcsae.shared.base.distributed import ALONE, Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.settings import differences, from_dict, to_dict
from tcsae.shared.sae.folder import METRICS, RECORD, load_record, load_sae, save_sae
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch
from tcsae.train.checkpoint import checkpoints, read_about, remember, restore, save_checkpoint
from tcsae.train.config import DataConfig, TrainConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.log import NoLog, RunLog, metrics_line, open_tracker
from tcsae.train.plan import Run
from tcsae.train.processes import check_parallel, deal
from tcsae.train.trainer import Trainer

# A finished run becomes an SAE folder that says everything about itself.


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


SAMPLE_TOKENS = 32_768
"""Tokens that the input scale, the first decoder bias and a batchtopk's threshold are taken from."""
RETIRED = {"optimizer.gradients": "written"}
RESTORES = 2
"""Instabilities that a run with guard.action=restore survives."""


def train_runs(
    store: Store,
    runs_path: Path,
    runs: Sequence[Run],
    fresh: bool = False,
    tracker: str | None = None,
    device: torch.device | str = "cpu",
    ours: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; runs that agree on their data share one pass. Returns their records.

    Raises RunError if two runs have one name, or what lies under a run's name had other settings or another store.
    """
    names = check_names(runs)
    if ours.rank:
        wait_for_all(ours)  # rank 0 clears away what is to be trained again
    fresh = fresh and ours.rank == 0
    todo = [run for run in runs if not _is_finished(store, runs_path / run.name, run, fresh, ours.world)]
    if not ours.rank:
        wait_for_all(ours)
    passes = {data: [run for run in todo if run.config.data == data] for data in {run.config.data: 0 for run in todo}}
    for number, (data, together) in enumerate(passes.items(), start=1):
        if len(passes) > 1:
            say(f"Pass {number} of {len(passes)}, as batches differ: {', '.join(run.name for run in together)}")
        _Pass(store, runs_path, data, together, tracker, torch.device(device), ours).train()
    wait_for_all(ours)
    return [load_record(runs_path / name) for name in names]


def check_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names. Raises RunError if two have the same."""
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RunError(f"Two runs would be named {twice[0]!r}. Give each other settings, or ask for it once.")
    return names


def _is_finished(store: Store, path: Path, run: Run, fresh: bool, world: int) -> bool:
    """Whether the run is there already; clears its folder if it is to be trained anew.

    Raises RunError, naming the differences, if what is there is another run.
    """
    kept = checkpoints(path)
    if not fresh and (path / RECORD).exists():
        found = load_record(path)
    elif not fresh and kept:
        found = read_about(kept[-1])
    else:
        for file in (*kept, path / RECORD, path / METRICS):
            file.unlink(missing_ok=True)
        return False
    settings = _with_defaults(found.get("train", {}))
    told = {"train": settings, "store": found.get("store", {}).get("content"), "from": found.get("from")}
    asked = {"train": to_dict(run.config), "store": store.content, "from": run.init_from}
    if not (path / RECORD).exists() and (was := found.get("ranks", 1)) != world:
        raise RunError(
            f"{path} was begun by {was} process(es), this start has {world}, whose sums round otherwise. Go on with "
            f"{was}, or use --fresh to train it again."
        )
    if differing := differences(told, asked):
        raise RunError(
            f"{path} was trained otherwise ({'; '.join(differing)}). Use --fresh to train it again, or another --runs."
        )
    if (path / RECORD).exists():
        say(f"{run.name}: trained already, reused ({path}). Train it again with --fresh.")
        return True
    return False


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as recorded; what did not exist yet in the version that wrote them was as the default is, and a retired
    setting at its only value that is left is as good as absent.
    """
    settings = {
        key: {k: v for k, v in value.items() if RETIRED.get(f"{key}.{k}") != v} if isinstance(value, dict) else value
        for key, value in settings.items()
    }
    try:
        return to_dict(from_dict(TrainConfig, settings))
    except ConfigError:  # a setting that is gone, or none at all: it differs
        return settings


class _Member:
    """A run of a pass: its trainer, its log, and what to do when it is interrupted or unstable."""

    def __init__(
        self, run: Run, path: Path, trainer: Trainer, about: dict[str, Any], tracker: str | None, writes: bool
    ) -> None:
        self.writes = writes
        self.run, self.path, self.trainer, self.about = run, path, trainer, about
        self.started, self.seconds = time.monotonic(), 0.0
        self.saved = self.started
        n_bytes = 0
        if kept := checkpoints(path):
            told = read_about(kept[-1])
            restore(kept[-1], trainer)
            n_bytes, self.seconds = told["metrics_bytes"], told["seconds"]
            say(f"{run.name}: goes on at step {trainer.progress.n_steps}")
            for what in ("threads", "device"):
                if (before := told.get(what, about[what])) != about[what]:  # older versions did not tell the device
                    say(f"{run.name}: {what} {before} before, {about[what]} now: rounding will differ.")
        config = run.config
        self.log: RunLog | NoLog = NoLog()
        if writes:
            self.log = RunLog(path / METRICS, n_bytes, open_tracker(tracker, path, to_dict(config)))
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
        if not batch.n_whole:
            trainer.count(batch)
            why = f"Batch {number}: data.max_norm={config.data.max_norm} leaves no segment of it."
            self.log.write({"event": "skipped", "step": trainer.progress.n_steps, "why": why})
            return
        try:
            result = trainer.step(batch)
        except RunError as error:
            self._unstable(str(error), batch, number)
            return
        n = trainer.progress.n_steps
        if n % config.log_every == 0 or n == config.steps:
            self.log.write({**metrics_line(trainer, batch, result), "seconds": round(self.elapsed(), 3)})
        if config.guard.checkpoint_steps and n % config.guard.checkpoint_steps == 0 and self.live:
            self.checkpoint()
            if self.bring_back is not None:
                self.bring_back = remember(trainer)
        elif time.monotonic() - self.saved > 60 * config.guard.checkpoint_minutes:
            self.checkpoint_between()

    def _unstable(self, why: str, batch: Batch, number: int) -> None:
        """End the run, or bring back its last good state and leave this batch out."""
        progress = self.trainer.progress
        why = f"Batch {number}, {why}"
        if self.bring_back is None or progress.n_restored >= RESTORES:
            progress.ended = why
            self.log.write({"event": "ended", "step": progress.n_steps, "why": why})
            say(f"{self.run.name}: ended. {why}")
            return
        self.bring_back()
        progress.n_restored += 1
        self.trainer.count(batch)
        self.log.write({"event": "restored", "step": progress.n_steps, "why": why})
        say(f"{self.run.name}: brought back to its last good state. {why}")

    def checkpoint_between(self) -> None:
        """A checkpoint at no step of its own: when time has passed, or training is interrupted.

        Not of a run that would be brought back: started again there, it would be brought back to there.
        """
        if self.run.config.guard.checkpoint_steps and self.bring_back is None and self.live:
            self.checkpoint()

    def checkpoint(self) -> None:
        self.saved = time.monotonic()
        if not self.writes:
            return
        told = {"metrics_bytes": self.log.n_bytes(), "seconds": self.elapsed(), **self.about}
        save_checkpoint(self.path, self.trainer, told)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


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
        self.loader = SegmentLoader(store, data, device=device, ranks=ranks)
        sample = self.loader.sample(SAMPLE_TOKENS)
        self.members = [self._member(run, sample) for run in runs]

    def _member(self, run: Run, sample: torch.Tensor) -> _Member:
        path = self.runs_path / run.name
        path.mkdir(parents=True, exist_ok=True)
        initial = None
        if run.init_from is not None:
            initial = load_sae(self.runs_path / run.init_from)
            if differing := differences(initial.config, run.config.sae):
                raise RunError(f"{run.init_from} is another SAE than {run.name} asks for ({'; '.join(differing)}).")
        trainer = Trainer(run.config, sample, self.store.sequence_length, initial)
        about = {
            "train": to_dict(run.config),
            "store": {"content": self.store.content},
            "from": run.init_from,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "ranks": self.ranks.world,
        }
        return _Member(run, path, trainer, about, self.tracker, self.ranks.rank == 0)

    def train(self) -> None:
        """All steps of all runs; on an interruption each run leaves a checkpoint."""
        done = min(member.trainer.progress.n_steps for member in self.members)
        last = max(run.config.steps for run in self.runs)
        self.loader.n_batches_done = done
        self._announce()
        title = f"train {self.runs[0].name}" if len(self.runs) == 1 else f"train {len(self.runs)} runs"
        per_step = self.loader.n_tokens / self.loader.n_segments * self.loader.config.n_segments
        with ExitStack() as stack:
            advance = stack.enter_context(progress(title, round(last * per_step), done=round(done * per_step)))
            for member in self.members:
                stack.callback(member.log.close)
            try:
                for number, batch in self._batches(done, last):
                    for member in self.members:
                        member.step(batch, number)
                    advance(batch.n_whole)
            except KeyboardInterrupt:
                for member in self.members:
                    member.checkpoint_between()
                raise
        for member in self.members if self.ranks.rank == 0 else ():
            save_run(self.store, self.loader, member.path, member.run, member.trainer, member.elapsed())
            for file in checkpoints(member.path):
                file.unlink()

    def _batches(self, done: int, last: int) -> Iterator[tuple[int, Batch]]:
        """Numbered batches while any run wants them."""
        for number, batch in zip(range(done, last), self.loader, strict=False):
            if not any(member.live for member in self.members):
                return
            yield number, batch

    def _announce(self) -> None:
        """Memory, before it is used: weights, gradients and two moments of each run, buffers, two blocks of data."""
        weights = sum(parameter.numel() * 4 for one in self.members for parameter in one.trainer.sae.parameters())
        n = self.loader.config.n_segments * self.loader.config.segment_length
        buffers = 4 * n * max(run.config.sae.d_sae for run in self.runs) * 4
        on = f"{torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else f"on {self.device}"
        loader = self.loader
        short = f", {loader.n_short:,} by data.min_sequence_length" if loader.n_short else ""
        tokens = f"{loader.n_tokens:,} tokens an epoch ({loader.n_skipped:,} left out by data.skip_first{short})"
        total = 4 * weights + buffers + 2 * self.loader.block_bytes()
        say(f"{len(self.runs)} run(s), {tokens}, about {size(total)} of memory, {on}")


def train_together(
    store: Store,
    runs_path: Path,
    runs: Sequence[Run],
    ours: Ranks,
    fresh: bool = False,
    tracker: str | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """As `train_runs`, by one of several processes. Returns the records that this one is to show: rank 0's all of them,
    once the others are done; without a rendezvous each its own.
    """
    check_names(runs)
    if len(runs) == 1:
        check_parallel(runs[0].config, ours.world, device)
        start_group(ours, device)
        train_runs(store, runs_path, runs, fresh, tracker, device, ours)
        return [load_record(runs_path / runs[0].name)] if ours.rank == 0 else []
    mine = deal(runs, ours)
    names = ", ".join(run.name for run in mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ours.rank} of {ours.world} trains {names}.")
    records = train_runs(store, runs_path, mine, fresh, tracker, device)
    if not has_rendezvous():
        return records
    wait_for_all(ours)
    return [load_record(runs_path / run.name) for run in runs] if ours.rank == 0 else []
