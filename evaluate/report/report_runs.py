"""Which runs a report is about, which are left out and why."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.evaluate.candidates import UNFINISHED, EvalRequest, Loaded, candidate, load, why_not_evaluable
from tcsae.evaluate.measures.core import DEFINITION_VERSION
from tcsae.shared.base.errors import RunError, TcsaeError
from tcsae.shared.base.files import file_digest
from tcsae.shared.sae.folder import EVALUATION, RECORD, WEIGHTS, find_runs, load_evaluation, read_metrics, read_object
from tcsae.shared.store.reader import Store


class Included(NamedTuple):
    """A run with figures."""

    number: int
    """From 1, by which figures name it."""
    loaded: Loaded
    evaluation: dict[str, Any]
    """eval.json."""
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl that are steps."""

    @property
    def name(self) -> str:
        return self.loaded.run.path.name

    @property
    def skip_first(self) -> int:
        """First positions of each sequence that its evaluation did not count."""
        return self.evaluation["options"]["skip_first"]

    @property
    def hook(self) -> str:
        return self.evaluation["options"]["hook"]


class Excluded(NamedTuple):
    """A run without figures."""

    name: str
    why: str


def choose_runs(store: Store, runs_path: Path, names: Collection[str] = ()) -> tuple[list[Included], list[Excluded]]:
    """(runs with an evaluation that holds, the others). Raises RunError if there is no run, or none with figures."""
    included: list[Included] = []
    excluded: list[Excluded] = []
    for path in find_runs(runs_path, names):
        try:
            included.append(_included(store, path, len(included) + 1))
        except TcsaeError as error:
            excluded.append(Excluded(path.name, str(error)))
    if not included:
        first = excluded[0]
        raise RunError(f"No run in {runs_path} has figures to report. {first.name}: {first.why}")
    return included, excluded


def _why_not_evaluated(path: Path, store: Store) -> str:
    """What is wrong with an evaluation that does not hold."""
    if not (path / EVALUATION).exists():
        return "Not evaluated on this store"
    try:
        found = read_object(path / EVALUATION, "")
        content, weights = found["store"]["content"], found["weights"]
        if found["definition_version"] != DEFINITION_VERSION:
            return "Evaluated by the definitions of another version"
        if content != store.content or weights != file_digest(path / WEIGHTS):
            return "Its evaluation is of other weights, or of another store"
    except (RunError, OSError, KeyError, TypeError):
        pass
    return f"{EVALUATION} is damaged, or a file written with it is missing or of another evaluation"


def _included(store: Store, path: Path, number: int) -> Included:
    if (why := why_not_evaluable(path)) is not None:
        unfinished = f"Its training is unfinished (no {RECORD}). Go on: tcsae train"
        raise RunError(unfinished if why == UNFINISHED else f"It {why}.")
    run = candidate(store, path, EvalRequest())
    evaluation = load_evaluation(path, store.content)
    if evaluation is None or evaluation.get("definition_version") != DEFINITION_VERSION:
        raise RunError(f"{_why_not_evaluated(path, store)}: tcsae eval --run {path.name}")
    history = [line for line in read_metrics(path) if "event" not in line]
    return Included(number, load(run), evaluation | {"name": path.name}, history)
