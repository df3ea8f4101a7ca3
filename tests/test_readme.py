"""Promise: every command in README.md runs as it stands there, in order, in one folder.

Sizes are small here: presets get 128 latents, the language model and the corpus are the tests' own, also where the page
names one of the Hub or an object store, and torchrun's command runs in one process (tests/test_parallel_*.py have
several). `make`, `pip`, and what writes to the Hub or reads from it are looked at, not run.
"""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tcsae.shared.commands.group import STAGES, cli
from tcsae.train.presets import DEFAULT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()
PROGRAMS = ("tcsae", ".venv/bin/tcsae", "torchrun", "make", "pip", "python")


def commands() -> list[list[str]]:
    """All commands of the page's indented blocks, without comments; `tcsae` however it is called."""
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]


def of_program(name: str) -> list[list[str]]:
    return [one for one in commands() if one[0].endswith(name)]


def test_the_page_has_commands_of_every_stage():
    used = {word for command in commands() for word in command} & STAGES.keys()
    assert used >= {"harvest", "train", "eval", "compare", "report", "feature", "presets", "copy"}
    indented = [line.split()[0] for line in PAGE.splitlines() if re.match(r"    \S", line)]
    rooms = ("harvest/", "train/", "evaluate/", "shared/", "data/", "paper/", "tests/")
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    words = {word for word in indented if word not in rooms and not any(word in block for block in code)}
    assert words <= set(PROGRAMS), "a line of another kind is not tried"


def test_make_has_these_targets_and_runs_the_twins():
    assert of_program("make")
    for command in of_program("make"):
        done = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    planned = ["make", "-n", "--no-print-directory", "run"]
    chain = subprocess.run(planned, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-1]
    words = [word for word in chain.split() if word in STAGES]
    assert words == ["harvest", "train", "eval", "report", "compare"]
    assert f"--preset {DEFAULT} --preset topk" in chain and f"--run {DEFAULT} --with topk" in chain


def test_pip_names_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert of_program("pip")
    for command in of_program("pip"):
        assert command[1:4] == ["install", "-c", "constraints.txt"] and (ROOT / "constraints.txt").exists()
        assert set(re.findall(r"\[(\w+)\]", command[-1])) <= extras.keys()


def test_scripts_that_it_names_are_there():
    named = re.findall(r"python (tests/\S+\.py)", PAGE)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


HUB = ("push", "pull")
CHAT = ("--chat-template",)
"""Run by tests/test_chat.py, on conversations: the toy tokenizer has no template."""


def test_commands_of_the_hub_parse():
    of_hub = [words for words in of_program("tcsae") if set(words) & set(HUB)]
    assert {word for words in of_hub for word in words} >= set(HUB)
    for words in of_hub:
        name = next(word for word in words if word in HUB)
        command = cli.get_command(click.Context(cli), name)
        command.make_context(name, words[words.index(name) + 1 :], parent=click.Context(cli))


def toy(command: list[str], lm: Path, corpus: Path) -> list[str]:
    """The command at the tests' size: what it names of the world replaced, what it leaves to defaults made small."""
    words = command[command.index("tcsae") + 1 :] if command[0] == "torchrun" else command[1:]
    words = [word.replace("s3://bucket/", "bucket-").replace("sae.d_sae=2048", "sae.d_sae=128") for word in words]
    replaced = {"--model": str(lm), "--dataset": str(corpus), "--tokens": "1500", "--steps": "6", "--device": "cpu"}
    replaced |= {"--lm-dtype": "float32"}  # halves are refused on a CPU
    words = [replaced.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "harvest" in words:
        at = words.index("harvest") + 1
        size = {**replaced, "--sequence-length": "32", "--eval-every": "4", "--batch-size": "4"}
        given = {key: value for key, value in size.items() if key not in words and key not in ("--steps", "--lm-dtype")}
        words[at:at] = [word for pair in given.items() for word in pair]
    if "train" in words:
        at = words.index("train") + 1
        words[at:at] = ["--set=data.n_segments=16", *([] if "--steps" in words else ["--steps", "6"])]
    return words


@pytest.fixture(scope="module")
def small_presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.train.presets.D_SAE", 128)
        yield


@pytest.mark.slow
def test_its_commands_run_in_order(small_presets, tiny_lm, tiny_corpus, tmp_path, monkeypatch):  # noqa: ARG001
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tcsae.train.plan.UNNAMED", ("steps", "log_every", "guard.", "data.n_segments"))
    first = f"tcsae harvest train --preset {DEFAULT} --preset topk eval report compare"  # of `make run`
    named = (one for one in commands() if "tcsae" in (one[0].removeprefix(".venv/bin/"), *one))
    called = [first.split(), *(one for one in named if not set(one) & {*HUB, *CHAT})]
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "layer4.npy", np.random.default_rng(0).normal(size=(40, 8, 16)).astype(np.float32))
    ran = []
    for command in called:
        words = toy(command, tiny_lm, tiny_corpus)
        done = CliRunner().invoke(cli, words[: words.index(">")] if ">" in words else words)
        assert done.exit_code == 0, f"{' '.join(command)} -> {' '.join(words)}\n{done.output}"
        if ">" in words:
            json.loads(done.stdout)
        ran.append(words)
    assert len(ran) > 20
    assert (tmp_path / "data" / "report" / "index.html").is_file()
    assert (tmp_path / "bucket-activations.zarr").exists() and (tmp_path / "null.zarr").exists()
    said = CliRunner().invoke(cli, ["compare", "--run", DEFAULT, "--with", "topk"]).stdout.splitlines()
    assert said[-5].startswith(f"{DEFAULT} reconstructs "), "make run ends on two sentences and where to look"
    assert said[-1] == "Curves, features and text: open data/report/index.html"


def test_its_store_of_own_activations_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGE[PAGE.index("## Your own activations") :]
    (code, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(code, {})
    import tcsae

    store = tcsae.open_store("arrays.zarr")
    assert (store.train.n_tokens, store.eval.n_tokens) == (36 * 64, 64 + 64 + 50 + 9)
