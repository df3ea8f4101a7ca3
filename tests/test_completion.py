"""Promise: a shell completes commands, options, presets and the runs that are there."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tcsae.shared.commands.completion import preset_names
from tcsae.shared.commands.group import cli
from tcsae.train.presets import PRESETS

TEMPORAL = [name for name in PRESETS if name.startswith("temporal-") and not name.endswith("-shuffled")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell):
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0, done.output
    assert "_TCSAE_COMPLETE" in done.stdout and f"{shell}_complete" in done.stdout


def test_an_unknown_shell_is_refused():
    done = CliRunner().invoke(cli, ["completion", "csh"])
    assert done.exit_code == 2 and "'csh' is not one of 'bash', 'zsh', 'fish'" in done.stderr


def test_presets_are_read_without_torch_and_are_all_there():
    assert preset_names(click.Context(cli)) == {
        name: preset.about for name, preset in PRESETS.items() if not name.endswith("-shuffled")
    }


@pytest.fixture
def completed(tmp_path):
    for name, file in (("topk-k16", "tcsae.json"), ("topk-begun", "other"), ("relu", "tcsae.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()

    def complete(line: str) -> list[str]:
        words = line.replace("RUNS", str(tmp_path)).split(" ")
        values = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_TCSAE_COMPLETE": "bash_complete"}
        done = subprocess.run(
            [sys.executable, "-m", "tcsae"], env=os.environ | values, capture_output=True, text=True, check=True
        )
        return [one.partition(",")[2] for one in done.stdout.split()]

    return complete


@pytest.mark.parametrize(
    "line, values",
    [
        ("tcsae comp", ["compare", "completion"]),
        ("tcsae train --preset temporal-", TEMPORAL),
        ("tcsae --runs RUNS train eval --run t", ["topk-k16"]),
        ("tcsae --runs RUNS compare --run relu --with ", ["relu", "topk-k16"]),
        ("tcsae --runs RUNS/none eval --run ", []),
    ],
)
def test_values_are_completed(completed, line, values):
    assert completed(line) == values
