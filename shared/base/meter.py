"""Speed of a stage: its rate, the time left, and whether it has slowed down."""

import time
from collections.abc import Callable

INTERVAL_S = 5.0
"""Rates are compared between intervals this long: shorter ones hold single slow reads of a disk."""
SLOW = 4
"""A stage that takes this many times its best is slow. One busy process beside it on 2 cores costs up to 14 times."""


def si(value: float) -> str:
    """A number with three digits and a suffix: 71.5K, 1.5M."""
    for scale, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 34m, 5h 12m, 2d 3h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes}m"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days}d {hours}h"


class Meter:
    """Counts units of work. `done` of `total` were done before it began (a resumed stage)."""

    def __init__(self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._clock, self._before = clock, done
        self._start = self._since = clock()
        self._counted = done
        """Units at the start of the current interval."""
        self._best = self._last = 0.0
        """Units a second in the best interval and in the last."""

    def add(self, n: int) -> None:
        self.done += n
        now = self._clock()
        if now - self._since >= INTERVAL_S:
            self._last = (self.done - self._counted) / (now - self._since)
            self._best = max(self._best, self._last)
            self._since, self._counted = now, self.done

    @property
    def seconds(self) -> float:
        return max(self._clock() - self._start, 1e-9)

    @property
    def rate(self) -> str:
        """Units a second since the start."""
        return f"{si((self.done - self._before) / self.seconds)} {self.unit}/s"

    @property
    def left(self) -> str:
        """Time left, at the mean rate so far; empty while that is unknown, and at the end."""
        new = self.done - self._before
        if new <= 0 or self.done >= self.total:
            return ""
        return f"{duration((self.total - self.done) * self.seconds / new)} left"

    @property
    def slow(self) -> str:
        """How many times its best a step takes now, where that is many; else empty."""
        if not self._last or self._best < SLOW * self._last:
            return ""
        return f"{self._best / self._last:.0f} times slower than at its best: is the machine busy?"

    def line(self, note: str = "") -> str:
        """All of it: 300K of 5.1M tokens, 70.1K tokens/s, 12 s, 68 s left, NOTE."""
        parts = (f"{si(self.done)} of {si(self.total)} {self.unit}", self.rate, duration(self.seconds))
        return ", ".join(filter(None, (*parts, self.left, note, self.slow)))
