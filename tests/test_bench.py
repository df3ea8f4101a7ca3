"""Promise: what the benchmarks stand on measures what it says, pairs rounds, and reports machine-readably."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def bench():
    path = Path(__file__).parent / "bench" / "alternate.py"
    spec = importlib.util.spec_from_file_location("alternate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def busy(n_steps, calls, name):
    def run():
        calls.append(name)
        for _ in range(n_steps):
            pass
        return 10

    return run


def test_contestants_take_turns_and_the_order_is_reversed(bench):
    calls = []
    times = bench.alternate({"a": busy(20_000, calls, "a"), "b": busy(40_000, calls, "b")}, rounds=3, least_s=0.0)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab", "a warm-up, then rounds of one call each"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "b": 3}


def test_a_round_repeats_its_work_until_it_is_long_enough(bench):
    calls = []
    bench.alternate({"a": busy(1, calls, "a")}, rounds=1, least_s=0.01)
    assert len(calls) > 10


def test_units_are_counted(bench, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    times = bench.alternate({"a": lambda: 4, "b": lambda: 8}, rounds=2, least_s=3.0)
    # The clock moves a second a look: start, three looks within the round, the last one ends it.
    assert times.seconds == {"a": [3 / 8, 3 / 8], "b": [3 / 16, 3 / 16]}


def test_ratios_pair_the_rounds(bench):
    times = bench.Times({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 3.0]})
    assert times.ratio("a", "b") == (2.0, 0.5, 3.0)
    assert times.ratio("a", "b").verdict() == "inconclusive"
    assert times.ratio("a", "b").verdict(bar=0.4) == "above"
    assert times.ratio("a", "b").verdict(bar=3.1) == "below"


def test_the_report_is_one_line_of_json(bench, capsys):
    times = bench.Times({"a": [1.0, 4.0], "b": [2.0, 2.0]})
    times.show("token", base="b")
    table = capsys.readouterr().out
    assert "1.25 (0.50 to 2.00)" in table
    bench.report("smoke", times, base="b", batch=4)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    result = json.loads(line)
    assert result["figures"]["a"] == {"units_per_s": 0.4, "median": 1.25, "low": 0.5, "high": 2.0}
    assert (result["bench"], result["rounds"], result["base"], result["batch"]) == ("smoke", 2, "b", 4)
    assert result["commit"] and result["machine"]
