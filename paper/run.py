"""From arms to evaluations: stores, runs and figures, each made only where it is not there yet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tcsae.evaluate.candidates import Request as Evaluation
from tcsae.evaluate.run import evaluate_runs
from tcsae.paper.arms import Arm
from tcsae.paper.stores import PYTHIA_SQUARED_NORM, Place, natural_segments, squared_norm
from tcsae.shared.store import Store
from tcsae.train.plan import Request, Run, plan_runs
from tcsae.train.run import train_runs


@dataclass(frozen=True)
class Size:
    """How much is done."""

    n_tokens: int
    most_seeds: int
    shorter: int = 1
    """Steps are divided by it."""


FULL = Size(n_tokens=1_000_000, most_seeds=8)
QUICK = Size(n_tokens=100_000, most_seeds=2, shorter=10)


def plan(store: Store, arm: Arm, size: Size) -> list[Run]:
    """An arm's runs, one a seed."""
    known = {
        "natural": natural_segments(store, 16),
        "rescaled": round(0.1 * (squared_norm(store) / PYTHIA_SQUARED_NORM) ** 0.5, 4),
    }
    settings = [one.format(**known) for one in arm.settings]
    seeds = ",".join(map(str, range(min(arm.n_seeds, size.most_seeds))))
    steps = f"steps={arm.n_steps // size.shorter}"
    return plan_runs(store, Request((arm.preset,), [*settings, steps], (f"init_seed={seeds}",)))


def train(place: Place, stores: dict[str, Store], arms: Iterable[Arm], size: Size) -> None:
    """Train what is not trained yet, in one pass for all that agree on their data."""
    for name, runs in _by_store(stores, arms, size).items():
        train_runs(stores[name], place.runs(name), runs)


def evaluate(place: Place, stores: dict[str, Store], arms: Sequence[Arm], size: Size) -> None:
    """Evaluate what is not evaluated yet."""
    for temporal in (True, False):
        chosen = [arm for arm in arms if arm.temporal == temporal]
        for name, runs in _by_store(stores, chosen, size).items():
            evaluate_runs(
                stores[name], place.runs(name), Evaluation(names=[run.name for run in runs], temporal=temporal)
            )


def _by_store(stores: dict[str, Store], arms: Iterable[Arm], size: Size) -> dict[str, list[Run]]:
    found: dict[str, dict[str, Run]] = {}
    for arm in arms:
        runs = plan(stores[arm.store], arm, size)
        found.setdefault(arm.store, {}).update({run.name: run for run in runs})
    return {name: list(runs.values()) for name, runs in found.items()}


Evaluations = dict[Arm, list[dict[str, Any]]]
"""Of each arm, its seeds' evaluations in order."""
