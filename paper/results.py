"""What was found of each arm: figures over seeds, and differences to a twin, seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.printed_tables import differences, seed_differences
from tcsae.harvest.documents import CorpusChoice
from tcsae.harvest.resolve import HarvestConfig, ModelChoice
from tcsae.harvest.run import harvest
from tcsae.paper.arms import CENTRED, MOMENTS, RANDOM, TEXT, Arm
from tcsae.paper.derived_stores import centred_store, moments_store
from tcsae.shared.store.format import ControlRecipe
from tcsae.shared.store.reader import Store, open_store

# The stores of the experiments: the text, its nulls, and synthetic activations of the paper's moments.

PYTHIA_SQUARED_NORM = 372.0
"""Its mean squared norm on OpenWebText, without BOS."""


@dataclass(frozen=True)
class Place:
    """Where an experiment's stores and runs lie."""

    work: Path
    device: str = "cpu"
    """Where SAEs are trained and evaluated."""

    def store(self, name: str) -> Path:
        return self.work / f"{name}.zarr"

    def runs(self, name: str) -> Path:
        return self.work / "runs" / name


@dataclass(frozen=True)
class Source:
    """The language model, the text, and how much of it."""

    model: str
    dataset: str
    n_tokens: int
    hooks: tuple[str, ...] = HarvestConfig().hooks
    codec: str = HarvestConfig().codec
    given: str = ""
    """What of it was asked for on the command line, as it was written there."""


def open_or_make(place: Place, name: str, asked: Source) -> Store:
    """The store of this name, made first where it is not there yet."""
    location = str(place.store(name))
    if name == MOMENTS:
        return moments_store(location)
    if name == CENTRED:
        return centred_store(location, open_store(str(place.store(RANDOM))))
    control = None if name == TEXT else ControlRecipe(kind=name)
    model, corpus = ModelChoice(name=asked.model), CorpusChoice(name=asked.dataset)
    config = HarvestConfig(
        model=model, corpus=corpus, n_tokens=asked.n_tokens, hooks=asked.hooks, codec=asked.codec, control=control
    )
    return harvest(location, config)


def squared_norm(store: Store) -> float:
    """Mean |x|^2 of the train split."""
    mean, variance = (np.asarray(store.array(f"statistics/{store.hook()}/{one}")[:]) for one in ("mean", "variance"))
    return float((mean**2 + variance).sum())


def natural_segments(store: Store, n_segments: int) -> int:
    """Whole sequences of any length that hold the tokens of so many full ones, position 0 left out of each."""
    usable = np.maximum(store.train.lengths - 1, 0)
    return round(n_segments * (store.sequence_length - 1) / float(usable[usable > 0].mean()))


GROUPS = ("all", "first_group", "frequency_matched")
"""Latents that temporal measures are of."""
X = "x"
"""The activations, in place of latents."""
BUDGET = 0.02
"""Nats of cross-entropy (2% of perplexity) that a temporal term may cost over its twin."""


class Gain(NamedTuple):
    """An arm minus its twin in one figure: of each seed, the difference and its 95% interval over documents."""

    differences: list[float]
    intervals: list[list[float] | None]

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def sure(self) -> int:
        """The sign, if every seed's interval leaves out 0 on that side; else 0."""
        if not self.intervals or any(one is None for one in self.intervals):
            return 0
        lows, highs = zip(*[one for one in self.intervals if one is not None], strict=True)
        return 1 if min(lows) > 0 else -1 if max(highs) < 0 else 0


@dataclass
class Results:
    """Evaluations of arms, as eval.json has them; `folders` is where each arm's runs lie."""

    evaluations: dict[Arm, list[dict[str, Any]]]
    folders: dict[str, Path]
    records: dict[Arm, list[dict[str, Any]]] = field(default_factory=dict)
    """What tcsae.json says of the same runs."""
    _gains: dict[tuple[Arm, Arm], list[dict[str, Any]]] = field(default_factory=dict)
    _over_seeds: dict[tuple[Arm, Arm], dict[str, dict[str, Any]]] = field(default_factory=dict)

    def values(self, arm: Arm, figure: str, group: str = GROUPS[0], null: bool = False) -> list[float]:
        """One a seed. `null`: what is left of a temporal measure beyond its null."""
        return [value_of(one, figure, group, null) for one in self.evaluations[arm]]

    def mean(self, arm: Arm, figure: str, group: str = GROUPS[0], null: bool = False) -> float:
        return float(np.mean(self.values(arm, figure, group, null)))

    def gain(self, arm: Arm, twin: Arm, figure: str) -> Gain:
        """`arm` minus `twin`, of the seeds that both have; without intervals for what is no mean over documents."""
        pairs = list(zip(self.evaluations[arm], self.evaluations[twin], strict=False))
        if (arm, twin) not in self._gains:
            self._gains[arm, twin] = [differences(self.folders[arm.store], *pair) for pair in pairs]
        gains = [one.get(_as_compared(figure)) for one in self._gains[arm, twin]]
        paired = [one and one["difference"] for one in gains]
        plain = [value_of(ours, figure) - value_of(theirs, figure) for ours, theirs in pairs]
        values = [other if one is None else one for one, other in zip(paired, plain, strict=True)]
        return Gain(values, [one and one["interval"] for one in gains])

    def p_value(self, arm: Arm, twin: Arm, figure: str) -> float | None:
        """Of no difference between them, over seeds and documents; None where the figure is not resampled."""
        if (arm, twin) not in self._over_seeds:
            ones, others = (self.evaluations[one] for one in (arm, twin))
            n = min(len(ones), len(others))
            self._over_seeds[arm, twin] = seed_differences(self.folders[arm.store], ones[:n], others[:n])
        return self._over_seeds[arm, twin].get(_as_compared(figure), {}).get("p")

    def curve(self, arm: Arm, name: str) -> list[float]:
        """A temporal measure over lags 1, 2 ..., mean over seeds."""
        curves = [one["temporal"]["groups"]["all"]["curves"][name] for one in self.evaluations[arm]]
        return [float(one) for one in np.mean(np.array(curves, dtype=float), axis=0)]


def _as_compared(figure: str) -> str:
    """What a comparison calls it: without an SAE the cross-entropy is the same for both."""
    return "ce_loss_with_sae" if figure == "delta_ce" else figure


def value_of(evaluation: dict[str, Any], figure: str, group: str = GROUPS[0], null: bool = False) -> float:
    """A figure of an evaluation: of eval.json's metrics, of its temporal measures, or the code's energy.

    `group` X: of the activations themselves. NaN where it was not measured (a small split has too few documents for
    probes; a store without a tail has no CE).
    """
    metrics = evaluation["metrics"]
    if figure == "delta_ce":
        pair = [metrics.get(f"ce_loss_{one}_sae") for one in ("with", "without")]
        value = None if None in pair or group == X else pair[0] - pair[1]
    elif figure in metrics:
        value = None if group == X else metrics[figure]
    elif figure == "energy":
        value = None if group == X else evaluation["temporal"]["scale"]["mean_squared_norm"]
    else:
        value = _measured(evaluation["temporal"], figure, group, null)
    return float("nan") if value is None else float(value)


def _measured(temporal: dict[str, Any], figure: str, group: str, null: bool) -> float | None:
    """A temporal measure; GROUP/NAME is that of another group, `position_removed`/NAME what is left of it then."""
    where, _, name = figure.rpartition("/")
    of_group = temporal.get("x", {}) if group == X else temporal["groups"][group]
    if where == "position_removed":
        return of_group.get(where, {}).get(name)
    if where:
        of_group = {} if group == X else temporal["groups"].get(where, {})
    return of_group.get("measures", {}).get(name, {}).get("difference" if null else "value")


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """y at x = `at` on the line through points (x, y); NaN beyond its ends."""
    xs, ys = zip(*sorted(points), strict=True)
    return float(np.interp(at, xs, ys, left=np.nan, right=np.nan))
