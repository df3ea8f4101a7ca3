"""What training costs: each method's parameters, and the tokens that its steps take in a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tcsae.paper.arms import Arm
from tcsae.paper.results import Place
from tcsae.paper.run import Size, plan
from tcsae.paper.sections import markdown
from tcsae.shared.base.console import say
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import write_json
from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.folder import read_object, writing
from tcsae.shared.store.reader import Store
from tcsae.train.dry_run import estimate
from tcsae.train.guard import UnstableError
from tcsae.train.plan import Run

FILE = "costs.json"
"""In the folder of the work: tokens a second of each run that was timed."""
CURE = "Free some space, or give another --work."


class Cost(NamedTuple):
    """Of one method."""

    n_parameters: int
    tokens_s: float | None
    """Of the step alone, some steps after the first; None for an SAE that takes no step, or no three stable ones."""


def training_costs(place: Place, store: Store, arms: Mapping[str, Arm], size: Size) -> dict[str, Cost]:
    """Of each method, by its first seed's run. What was timed before is not timed again."""
    runs = {name: plan(store, arm, size)[0] for name, arm in arms.items()}
    rates = _read(place.work / FILE)
    todo = {run.name: run for run in runs.values() if run.config.steps and run.name not in rates}
    if todo:
        say(f"Timing steps of {len(todo)} methods")
        timed = {name: _tokens_per_second(place, store, run) for name, run in todo.items()}
        rates |= {name: rate for name, rate in timed.items() if rate is not None}
        with writing(place.work / FILE, CURE):
            write_json(place.work / FILE, rates)
    return {
        name: Cost(sum(one.numel() for one in new_sae(run.config.sae).parameters()), rates.get(run.name))
        for name, run in runs.items()
    }


def _tokens_per_second(place: Place, store: Store, run: Run) -> float | None:
    """None for a run that the guard stops in its first steps."""
    try:
        (one,) = estimate(store, place.work, [run], fresh=True, device=place.device).passes[0].runs
    except UnstableError as error:
        say(f"{run.name} cannot be timed. {error}")
        return None
    return round(one.tokens / one.seconds, 1)


def _read(path: Path) -> dict[str, float]:
    """Empty where there is none; a damaged file is written anew."""
    try:
        return {name: float(rate) for name, rate in read_object(path, "").items()} if path.exists() else {}
    except (RunError, TypeError, ValueError):
        return {}


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Rates as shares of the first method's."""
    first = next(iter(costs.values())).tokens_s
    rows = []
    for name, (n_parameters, tokens_s) in costs.items():
        share = "-" if tokens_s is None or first is None else f"{tokens_s / first:.2f}"
        rows.append([name, f"{n_parameters:,}", "-" if tokens_s is None else f"{tokens_s:,.0f}", share])
    return markdown(["method", "parameters", "tokens/s of its steps", "of the first row's"], rows)
