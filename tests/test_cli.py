"""Promise: the command line says what is wrong in one line, with the right exit code, on the right stream."""

import importlib.metadata
import resource
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import tcsae
from tcsae.shared.commands.group import STAGES, cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, list(arguments), prog_name="tcsae")


@pytest.mark.parametrize("command", [[], *([name] for name in STAGES)])
def test_help_teaches_and_is_fast(run, command):
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert len(done.output.splitlines()) > 8
    seconds = []
    for _ in range(3):
        before = _seconds_of_children()
        subprocess.run([sys.executable, "-m", "tcsae", *command, "--help"], check=True, capture_output=True)
        seconds.append(_seconds_of_children() - before)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


def _seconds_of_children() -> float:
    """Of the processor: how long a command waits for one says nothing about it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", STAGES)
def test_every_option_has_help(name):
    command = cli.get_command(click.Context(cli), name)
    assert command.help
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert not [option.name for option in options if not option.help]


def test_version(run):
    assert run("--version").output.split()[-1] == tcsae.__version__ == importlib.metadata.version("tcsae")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["train", "--store", "x"], 2, "--store belongs before the command: tcsae --store PATH train ..."),
        (["eval", "--runs", "x"], 2, "--runs belongs before the command: tcsae --runs PATH eval ..."),
        (["harvst"], 2, "Unknown command 'harvst'. Did you mean 'harvest'? There is: harvest, import, train, eval, "),
        (["train", "--sted", "3"], 2, "No such option"),
        (["harvest", "--tokens", "lots"], 2, "'lots' is not a count"),
        (["train"], 1, "No activation store at data/activations.zarr. Make one: tcsae --store"),
        (["eval"], 1, "No activation store at data/activations.zarr"),
        (["inspect"], 1, "No activation store at data/activations.zarr"),
        (["--store", "ftp://b/a", "eval"], 1, "'ftp://b/a': unknown kind of URL. There is s3://, gs://, az://"),
    ],
)
def test_mistakes_are_one_line(run, arguments, code, message):
    done = run(*arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.output
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")


def test_module_is_the_same_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tcsae", "train"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: No activation store at data/activations.zarr")
