"""Promise: progress says the rate, the time left in days, hours and minutes, and when a stage has become slow."""

import pytest

from tcsae.shared.base.console import duration
from tcsae.shared.base.meter import Meter


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (100, "2m"), (3570, "1h 0m"), (5 * 3600 + 720, "5h 12m"), (86400 * 2.15, "2d 4h")],
)
def test_durations_are_in_days_hours_and_minutes(seconds, text):
    assert duration(seconds) == text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def meter_and_clock() -> tuple[Meter, Clock]:
    clock = Clock()
    return Meter(10_000, "tokens", 1000, clock), clock


def run(meter: Meter, clock: Clock, seconds: int, rate: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        meter.add(rate)


def test_what_was_done_before_counts_for_the_total_not_for_the_rate(meter_and_clock):
    meter, clock = meter_and_clock
    assert meter.left == ""
    run(meter, clock, 10, 100)
    assert meter.line("EV 0.8") == "2K of 10K tokens, 100 tokens/s, 10 s, 80 s left, EV 0.8"
    run(meter, clock, 1, 8000)
    assert meter.left == ""


def test_a_stage_many_times_slower_than_its_best_says_so_until_it_has_recovered(meter_and_clock):
    meter, clock = meter_and_clock
    run(meter, clock, 20, 100)
    run(meter, clock, 10, 40)
    assert meter.slow == "", "not many times"
    run(meter, clock, 10, 10)
    assert meter.slow == "10 times slower than at its best: is the machine busy?"
    assert meter.line().endswith(meter.slow)
    run(meter, clock, 10, 100)
    assert meter.slow == ""
