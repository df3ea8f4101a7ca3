"""What the planted experiment is, and what would refute the temporal term: written before the runs were made.

The grid holds everything about a single token fixed (rates, amplitudes, superposition, noise) and changes only how
long slow features last, so a gain of the term at duration 1 would be an artefact, and one that does not grow with
duration is not about slowness.

The strengths were set after a look at one cell (duration 16, seed 0): nothing was recovered at a signal to noise of
1.4 and all at 5, by either method; their F1 there was .803 (TopK) and .796 (temporal TopK). No other cell was seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

PLAIN, TEMPORAL, WIDER = "topk", "temporal-topk", "topk, k + 2"
ARMS = (PLAIN, TEMPORAL, WIDER)
SMALLEST = 0.05
"""Difference in F1 that counts: less is no reason to choose a method."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done."""

    name: str
    durations: tuple[int, ...]
    amplitudes: tuple[float, ...]
    per_cell: int
    """Features of each amplitude."""
    n_seeds: int
    steps: int
    planting: tuple[str, ...] = ()
    """Settings of `tcsae synthetic`."""
    sae: tuple[str, ...] = ("sae.d_sae=288", "sae.k=8")
    k: int = 8


FULL = Size(
    name="",
    durations=(1, 2, 4, 8, 16, 32, 64),
    amplitudes=(0.15, 0.3, 0.45, 0.6, 0.9),
    per_cell=8,
    n_seeds=3,
    steps=1000,
)
QUICK = Size(
    name=" --quick",
    durations=(1, 16),
    amplitudes=(0.3, 1.0),
    per_cell=4,
    n_seeds=1,
    steps=40,
    planting=("n_tokens=20K", "n_features=48", "d_model=16", "n_roots=2", "n_children=3", "n_dense=2"),
    sae=("sae.d_sae=56", "sae.k=4", "data.n_segments=32"),
    k=4,
)


class Grid(NamedTuple):
    """F1 of slow features' latents: [seed, duration, signal to noise] of each arm, and of the fast ones."""

    durations: tuple[int, ...]
    snr: Float[ndarray, " n_amplitudes"]
    slow: Mapping[str, Float[ndarray, "n_seeds n_durations n_amplitudes"]]
    recovered: Mapping[str, Float[ndarray, "n_seeds n_durations n_amplitudes"]]
    fast: Mapping[str, Float[ndarray, "n_seeds n_durations"]]

    def gain(self, arm: str = TEMPORAL, over: str = PLAIN) -> Float[ndarray, "n_seeds n_durations n_amplitudes"]:
        return self.slow[arm] - self.slow[over]

    def long(self) -> ndarray:
        """Durations of at least 8 tokens."""
        return np.array(self.durations) >= 8

    def middling(self) -> ndarray:
        """Signal to noise between 1 and 3.5: below nothing is seen in one token, above everything is."""
        return (self.snr >= 1) & (self.snr <= 3.5)


class Verdict(NamedTuple):
    """What came of a prediction."""

    held: bool
    figure: str


@dataclass(frozen=True)
class Prediction:
    """One sentence, and what would refute it."""

    sentence: str
    refuted_if: str
    judge: Callable[[Grid], Verdict]


def _null(grid: Grid) -> Verdict:
    gain = float(grid.gain()[:, grid.durations.index(1)].mean())
    return Verdict(gain < SMALLEST, f"{gain:+.3f}")


def _helps(grid: Grid) -> Verdict:
    gains = grid.gain()[:, grid.long()][:, :, grid.middling()].mean((1, 2))
    return Verdict(bool((gains >= SMALLEST).all()), ", ".join(f"{gain:+.3f}" for gain in gains))


def _wider(grid: Grid) -> Verdict:
    gains = grid.gain(over=WIDER)[:, grid.long()][:, :, grid.middling()].mean((1, 2))
    return Verdict(bool((gains > 0).all()), ", ".join(f"{gain:+.3f}" for gain in gains))


def _grows(grid: Grid) -> Verdict:
    from scipy.stats import spearmanr

    gains = grid.gain()[:, :, grid.middling()].mean((0, 2))
    order = float(spearmanr(grid.durations, gains).statistic)
    return Verdict(order > 0.5, f"{order:+.2f}")


def _cost(grid: Grid) -> Verdict:
    cost = float((grid.fast[PLAIN] - grid.fast[TEMPORAL]).mean())
    return Verdict(cost <= 0.02, f"{cost:+.3f}")


PREDICTIONS = (
    Prediction(
        "Where nothing is slow, the term recovers no more.",
        f"temporal TopK's F1 of the rare features is above TopK's by {SMALLEST} or more at duration 1 (mean over "
        "signal to noise and seeds): then what it gains elsewhere is not slowness",
        _null,
    ),
    Prediction(
        "Where features are slow and of middling strength, the term recovers more of them.",
        f"temporal TopK's F1 of slow features is not above TopK's by {SMALLEST} in every seed, at durations of 8 or "
        "more and a signal to noise of 1 to 3.5",
        _helps,
    ),
    Prediction(
        "Two more active latents do not do the same.",
        "TopK with k + 2 has the F1 of temporal TopK with k, or more, in some seed, over the same cells",
        _wider,
    ),
    Prediction(
        "The gain grows with duration.",
        "the rank correlation of duration and gain in F1 (mean over seeds, signal to noise of 1 to 3.5) is 0.5 or less",
        _grows,
    ),
    Prediction(
        "Fast features do not pay for it.",
        "the F1 of fast features falls by more than 0.02 (mean over durations and seeds)",
        _cost,
    ),
)
