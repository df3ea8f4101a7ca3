"""Promise: --compile makes a step's tensor work one graph that computes the same, without a break, or is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import tcsae.shared.base.device as device_module
from tcsae.shared.base.device import compiled, set_compile
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.train.checks import check_compile
from tcsae.train.presets import preset

CASES = {
    "topk": [],
    "temporal-matryoshka": [],
    "jumprelu": [],
    "relu-l1": ["sae.layer_norm=in_out", "init.input_scale=none"],
    "written-run3": [],
}
"""Every kind of code, groups, layer norms."""


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_the_same():
    """In a process of its own: what checks types in tests cannot be traced."""
    script = Path(__file__).with_name("compiled_steps.py")
    command = [sys.executable, str(script), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["breaks"] == 0
    assert {name: one for name, one in result["largest"].items() if not one < 1e-5} == {}
    assert result["largest"].keys() == CASES.keys() and result["graphs"] >= len(CASES)
    assert result["broken"], "a function in which values decide was one graph"


def test_by_default_nothing_is_compiled():
    assert compiled(check_compile) is check_compile


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_where_no_compiler_reads_the_kernels_it_is_refused(device):
    with pytest.raises(ConfigError, match=f"--compile on {device}: shapes there follow from values.*Leave it away"):
        set_compile(torch.device(device))


def test_without_triton_it_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--compile takes Triton, which is not installed"):
        set_compile(torch.device("cuda"))
    assert device_module._backend == [""]


@pytest.mark.parametrize(
    ("name", "settings", "world", "words"),
    [
        ("persistent", [], 1, "sae.predictor='decay': its passes over sequences"),
        ("tfa", [], 1, "sae.predictor='attention'"),
        ("topk", ["temporal.budget=0.1"], 1, "temporal.budget=0.1: it takes gradients"),
        ("topk", [], 2, "2 processes: they meet"),
    ],
)
def test_what_is_no_single_graph_is_refused(name, settings, world, words):
    with pytest.raises(ConfigError, match=f"--compile with {words}.* Leave --compile away."):
        check_compile([with_settings(preset(name, 8), settings)], world)


def test_the_command_has_it():
    assert "--compile" in CliRunner().invoke(cli, ["train", "--help"]).output
