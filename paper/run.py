"""From arms to evaluations: stores, runs and figures, each made only where it is not there yet."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcsae.evaluate.candidates import EvalRequest, smoothed_file
from tcsae.evaluate.measures.core import DEFINITION_VERSION
from tcsae.evaluate.run import evaluate_parallel, evaluate_runs
from tcsae.paper.arms import NO_HARVEST, TEXT, Arm
from tcsae.paper.pages.page import PageContext, title_of, write_page
from tcsae.paper.results import (
    PYTHIA_SQUARED_NORM,
    Place,
    Results,
    Source,
    natural_segments,
    open_or_make,
    squared_norm,
)
from tcsae.paper.sections import KEYS, arms_of
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import ranks, wait_for_all
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.folder import EVALUATION, is_finished, load_evaluation, load_record, reason, writing
from tcsae.shared.store.reader import Store, open_store
from tcsae.train.plan import Request, Run, plan_runs
from tcsae.train.presets import WARMUP_STEPS
from tcsae.train.run import train_parallel, train_runs

TIMES = "times.jsonl"


@dataclass(frozen=True)
class Size:
    """How much is done."""

    n_tokens: int
    most_seeds: int
    shorter: int
    """Steps are divided by it."""
    name: str
    most_untrained: int = 8
    """Seeds of an arm without steps: its spread over seeds is what it is there for."""

    def seeds(self, arm: Arm) -> int:
        return min(arm.n_seeds, self.most_seeds if arm.n_steps else self.most_untrained)


FULL = Size(1_000_000, most_seeds=3, shorter=1, name="")
QUICK = Size(60_000, most_seeds=1, shorter=25, name=" --quick", most_untrained=2)


def answer(place: Place, out: Path, asked: Source, keys: Sequence[str], size: Size) -> None:
    """Harvest, train and evaluate what the questions need, and write the page about all that are complete.

    In several processes runs are dealt out; rank 0 writes the page. Raises ConfigError for an unknown question.
    """
    for key in keys:
        if key not in KEYS:
            raise ConfigError(unknown("question", key, KEYS))
    ours, stores = ranks(), {}
    for key in keys or KEYS:
        arms = arms_of(key)
        if ours.rank == 0:
            say(f"{title_of(key)} (--only {key}): {len(arms)} arms")
        for name in dict.fromkeys([TEXT, *(arm.store for arm in arms)]):
            if name not in stores:
                stores[name] = make_store(place, name, asked, key)
        with timed(place, key, "train"):
            train_arms(place, stores, arms, size)
        with timed(place, key, "eval"):
            evaluate_arms(place, stores, arms, size)
    if ours.rank == 0:
        say(f"The page: {_page(place, out, asked, size)}")


def make_store(place: Place, name: str, asked: Source, key: str) -> Store:
    """A store, made first by all processes together, or by rank 0 where it is no harvest."""
    ours = ranks()
    with timed(place, key, "harvest"):
        if ours.rank == 0 or name not in NO_HARVEST:
            open_or_make(place, name, asked)
    if ours.parallel:
        wait_for_all(ours)
    return open_store(str(place.store(name)))


@contextmanager
def timed(place: Place, key: str, stage: str) -> Iterator[None]:
    """Note the processor time that a stage takes, in every process."""
    start = time.process_time()
    try:
        yield
    finally:  # of what was interrupted as well
        _note(place, key, stage, time.process_time() - start)


def _note(place: Place, key: str, stage: str, spent: float) -> None:
    if spent > 1:
        with writing(place.work / TIMES, "Free some space, or give another --work."):
            place.work.mkdir(parents=True, exist_ok=True)
            with (place.work / TIMES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "stage": stage, "processor_s": round(spent, 1)}) + "\n")


def plan(store: Store, arm: Arm, size: Size) -> list[Run]:
    """An arm's runs, one a seed."""
    settings = [_filled(one, store) for one in arm.settings]
    settings.append(f"steps={arm.n_steps // size.shorter}")
    if size.shorter > 1 and arm.preset.startswith("written"):  # whose warm-up no short run cuts
        settings.append(f"optimizer.warmup_steps={WARMUP_STEPS // size.shorter}")
    seeds = range(arm.first_seed, arm.first_seed + size.seeds(arm))
    varied = [[f"{name}={seed}" for name in arm.vary] for seed in seeds]
    return [run for one in varied for run in plan_runs(store, Request((arm.preset,), [*settings, *one]))]


def _filled(setting: str, store: Store) -> str:
    """A setting whose value follows from the store."""
    if "{natural}" in setting:
        return setting.format(natural=natural_segments(store, 16))
    if "{d_model}" in setting:
        return setting.format(d_model=store.d_model(store.hook()))
    if "{rescaled}" in setting:
        return setting.format(rescaled=round(0.1 * (squared_norm(store) / PYTHIA_SQUARED_NORM) ** 0.5, 4))
    return setting


def train_arms(place: Place, stores: dict[str, Store], arms: Iterable[Arm], size: Size) -> None:
    """Train what is not trained yet, in one pass for all that agree on their data."""
    ours = ranks()
    for name, runs in _by_store(stores, arms, size).items():
        if ours.parallel:  # whatever is finished: all ranks have to come to the same meetings
            train_parallel(stores[name], place.runs(name), runs, ours, device=place.device)
        elif todo := [run for run in runs if not is_finished(place.runs(name) / run.name)]:
            train_runs(stores[name], place.runs(name), todo, device=place.device)


def evaluate_arms(place: Place, stores: dict[str, Store], arms: Sequence[Arm], size: Size) -> None:
    """Evaluate what is not evaluated yet."""
    ours = ranks()
    for options in dict.fromkeys(map(_options, arms)):
        for name, runs in _by_store(stores, [arm for arm in arms if _options(arm) == options], size).items():
            request = replace(options, names=[run.name for run in runs])
            if ours.parallel:
                evaluate_parallel(stores[name], place.runs(name), request, ours, place.device)
            else:
                evaluate_runs(stores[name], place.runs(name), request, device=place.device)


def _options(arm: Arm) -> EvalRequest:
    smooth = (arm.smooth,) if arm.smooth else ()
    return EvalRequest(temporal=arm.temporal, smooth=smooth, documents=arm.documents, ce_tokens=arm.ce_tokens)


def _by_store(stores: dict[str, Store], arms: Iterable[Arm], size: Size) -> dict[str, list[Run]]:
    runs_of: dict[str, dict[str, Run]] = {}
    for arm in arms:
        of_store = runs_of.setdefault(arm.store, {})
        for run in plan(stores[arm.store], arm, size):
            other = of_store.setdefault(run.name, run)
            assert other == run, f"{run.name}: two arms, one folder"
    return {name: list(runs.values()) for name, runs in runs_of.items()}


def _page(place: Place, out: Path, asked: Source, size: Size) -> Path:
    """Write the page about the questions whose arms are all trained and evaluated."""
    results = Results({}, {})
    stores: dict[str, Store] = {}
    complete = [key for key in KEYS if all(load_arm(place, arm, size, stores, results) for arm in arms_of(key))]
    made = PageContext(f"tcsae paper{size.name}{asked.given}", bool(size.name), stores, read_times(place))
    return write_page(out, results, complete, made)


def load_arm(place: Place, arm: Arm, size: Size, stores: dict[str, Store], results: Results) -> bool:
    """Read an arm's records and evaluations into `results`; False if one is missing."""
    if arm in results.evaluations:
        return True
    if arm.store not in stores:
        if not (place.store(arm.store) / "zarr.json").exists():
            return False
        stores[arm.store] = open_store(str(place.store(arm.store)))
        results.folders[arm.store] = place.runs(arm.store)
    store = stores[arm.store]
    folders = [place.runs(arm.store) / run.name for run in plan(store, arm, size)]
    if not all(map(is_finished, folders)):
        return False
    file = smoothed_file(EVALUATION, arm.smooth or None)
    evaluations = [load_evaluation(folder, store.content, file) for folder in folders]
    if any(one is None or one.get("definition_version") != DEFINITION_VERSION for one in evaluations):
        return False
    asked = (arm.documents, arm.ce_tokens)
    options = [one["options"] for one in evaluations if one]
    if any((one.get("documents", "all"), one.get("ce_tokens")) != asked for one in options):
        return False
    results.evaluations[arm] = [one for one in evaluations if one is not None]
    results.records[arm] = [load_record(folder) for folder in folders]
    return True


def read_times(place: Place) -> list[dict[str, Any]]:
    """The lines of times.jsonl; those that are damaged are left out, and how many is said."""
    path = place.work / TIMES
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        say(f"{path} cannot be read ({reason(error)}): the page leaves the times out.")
        return []
    lines = [line for line in map(_time, texts) if line is not None]
    if n_bad := len(texts) - len(lines):
        say(f"{path}: {n_bad} of {len(texts)} lines are damaged and left out.")
    return lines


def _time(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        spent = float(line["processor_s"])
        return {"key": str(line["key"]), "stage": str(line["stage"]), "processor_s": spent}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
