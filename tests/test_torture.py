"""Promise: `make torture` calls a result good only if it is: its own judgement of ends, files and counts."""

import importlib
import json
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def torture():
    """The modules of tests/torture, which import each other by their plain names."""
    names = ("stages", "kills", "damage", "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).with_name("torture")))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("code", "output", "refused"),
    [
        (1, "Reading.\nError: a.zarr is damaged.\n", True),
        (2, "Usage: tcsae\n\nError: No such option.", True),
        (1, "", False),
        (1, "Traceback (most recent call last):\n  ...\nError: x", False),
        (0, "Error: x", False),
        (-9, "Error: x", False),
        (70, "ValueError: x", False),
    ],
)
def test_a_refusal_is_one_line_and_its_exit_code(torture, code, output, refused):
    assert torture["stages"].Ended(code, output).refused is refused


@pytest.mark.parametrize(
    ("code", "output", "wrong"),
    [
        (0, "", None),
        (-15, "", None),
        (143, "Stopped.", None),
        (1, "Error: x", "exit code"),
        (130, "", "exit code"),
        (-6, "", "exit code"),
        (70, "ValueError: x", "traceback"),
        (143, "Traceback (most recent call last):", "traceback"),
        (-999, "", "hung"),
    ],
)
def test_how_a_command_takes_sigterm(torture, code, output, wrong):
    assert torture["kills"].misbehaved(torture["stages"].Ended(code, output), signal.SIGTERM) == wrong


@pytest.mark.parametrize(
    ("code", "output", "found", "outcome"),
    [
        (0, "", b"as before", "same"),
        (0, "", b"other", "silent"),
        (0, "metrics.jsonl is damaged: line 3 is left out.", b"other", "said"),
        (0, "a1: left out. Its evaluation is damaged.", b"other", "said"),
        (0, "another: left out.\nb: evaluated.", b"other", "silent"),
        (1, "Error: runs/a1/metrics.jsonl is damaged.", b"other", "refused"),
        (1, "", b"as before", "traceback"),
        (70, "KeyError: 'x'", b"as before", "traceback"),
        (-11, "", b"as before", "traceback"),
    ],
)
def test_what_a_damaged_place_may_give(torture, code, output, found, outcome):
    stages, damage = torture["stages"], torture["damage"]
    reader = next(one for one in damage.READERS if one.name == "report")
    ended = stages.Ended(code, output)
    expected = {"report/index.html": b"as before"}
    got, _ = damage.judge(reader, ended, {"report/index.html": found}, expected, "runs/a1/metrics.jsonl", "told")
    assert got == outcome


def test_damage_that_verify_does_not_find_is_silent(torture):
    stages, damage = torture["stages"], torture["damage"]
    reader = next(one for one in damage.READERS if one.name == "verify")
    assert damage.judge(reader, stages.Ended(0, "whole"), {}, {}, "a.zarr/zarr.json", "told")[0] == "silent"


def test_times_alone_may_differ(torture):
    stages = torture["stages"]

    def files(**values: object) -> dict[str, bytes]:
        return {"runs/a/eval.json": json.dumps({"l0": 4, "seconds": 1} | values).encode(), "report/index.html": b"x"}

    first = stages.timeless(files())
    assert stages.differences(first, stages.timeless(files(seconds=2))) == []
    assert stages.differences(first, stages.timeless(files(l0=5))) == ["runs/a/eval.json"]
    assert stages.differences(first, {**first, "report/index.html": b"y"}) == ["report/index.html"]
    assert stages.differences(first, {**first, "runs/a/more": b""}) == ["runs/a/more"]


@pytest.mark.parametrize("outcome", ["lost", "silent", "traceback", "hung", "left over", "exit code"])
def test_one_bad_trial_fails_the_whole(torture, outcome, capsys):
    show = torture["run"].show
    assert show(Counter({("kills", "eval", "same"): 9, ("damage", "x", "refused"): 3})) == 0
    assert show(Counter({("kills", "eval", "same"): 9, ("kills", "eval", outcome): 1})) == 1
    assert f"{outcome}" in capsys.readouterr().out
