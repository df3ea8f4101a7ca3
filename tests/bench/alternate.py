"""What all benchmarks share: contestants take turns in one process, and a figure comes with its range.

from alternate import alternate, one_core, report

one_core()
times = alternate({"ours": ours, "theirs": theirs})   # callables that do some work and return how many units
times.show("token", base="theirs")
report("name", times, base="theirs")                  # one line of JSON, the last on stdout
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Seconds a unit of one contestant over another's, each round's pair taken alone."""

    median: float
    low: float
    high: float

    def verdict(self, bar: float = 1.0) -> str:
        """below or above the bar; inconclusive when the range holds it."""
        return "below" if self.high < bar else "above" if self.low > bar else "inconclusive"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Times:
    """Seconds a unit of each contestant, one for each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """How many times the base's time `name` takes."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def show(self, unit: str, base: str) -> None:
        """A table on stdout."""
        print(f"{'':44s} {unit + 's/s':>12s}   x {base}")
        for name in self.seconds:
            print(f"{name:44s} {1 / self.median(name):12,.0f}   {self.ratio(name, base)}")

    def figures(self, base: str) -> dict[str, Any]:
        """Median rate and ratio to the base of each contestant."""
        rates = {name: {"units_per_s": 1 / self.median(name)} for name in self.seconds}
        return {name: rate | self.ratio(name, base)._asdict() for name, rate in rates.items()}


def alternate(contestants: Mapping[str, Callable[[], int]], rounds: int = 5, least_s: float = 0.5) -> Times:
    """Time the contestants in turn, the order reversed every other round, so that drift falls on all of them.

    A contestant does a piece of work and returns how many units (tokens) that was. It is repeated within a round until
    `least_s` seconds are over: rounds of some milliseconds gave narrow ranges around a wrong ratio.
    """
    for run in contestants.values():
        run()  # warm-up: imports, page cache, buffers
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            n_units, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < least_s or not n_units:
                n_units += contestants[name]()
            seconds[name].append(elapsed / n_units)
    return Times(seconds)


def one_core() -> None:
    """One thread, on one core: ratios on several depend on who else runs. Call it before anything is computed."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def tune_malloc() -> None:
    """Keep freed memory, as `tcsae train` does."""
    from tcsae.shared.base.device import keep_freed_memory

    if not keep_freed_memory():
        raise SystemExit("mallopt refused the thresholds.")


def report(name: str, times: Times | None = None, base: str = "", **more: Any) -> None:
    """One line of JSON, the last on stdout: the figures, and what they were measured on."""
    if times is not None:
        more |= {"base": base, "rounds": len(times.seconds[base]), "figures": times.figures(base)}
    print(json.dumps({"bench": name, **more, "commit": commit(), "machine": machine(), "load": os.getloadavg()[0]}))


def commit() -> str:
    """The checked out commit, with a + if tracked files differ from it; unknown outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return ", ".join([platform.platform(), *models[:1], f"{os.cpu_count()} cores"])
