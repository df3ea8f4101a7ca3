"""Promise: --quiet leaves results and errors, --log-file keeps what was said, --json prints one document."""

import json
import shutil
from pathlib import Path

import pytest
import toy_eval as toy
import toy_store as small
from click.testing import CliRunner, Result

from tcsae.shared.base.console import OUTPUT, progress, say
from tcsae.shared.commands.group import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A store (a.zarr) with two evaluated runs, and one that is unfinished."""
    folder = tmp_path_factory.mktemp("place")
    store = toy.write_store(folder / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    for name, seed in (("one", 0), ("two", 4)):
        toy.make_run(folder / "runs", name, toy.make_sae(seed=seed), store)
    assert call(folder, "eval").exit_code == 0
    (folder / "runs" / "begun").mkdir()
    return folder


@pytest.fixture(autouse=True)
def restored():
    yield
    OUTPUT.quiet, OUTPUT.log = False, None


def call(place: Path, *arguments: str, before: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(cli, [*before, f"--store={place / 'a.zarr'}", f"--runs={place / 'runs'}", *arguments])


@pytest.mark.slow
def test_quiet_leaves_results_and_errors(place):
    loud, quiet = call(place, "eval", "--force"), call(place, "eval", "--force", before=("--quiet",))
    assert "eval 2 SAEs" in loud.stderr
    assert quiet.stderr == "" and quiet.stdout == loud.stdout
    failed = call(place, "eval", "--run", "three", before=("-q",))
    assert failed.exit_code == 1 and "Unknown run 'three'" in failed.stderr


def test_quiet_hides_no_error_of_many(place, tmp_path):
    shutil.copytree(place, tmp_path / "place")
    for name in ("one", "two"):
        (tmp_path / "place" / "runs" / name / "sae_weights.safetensors").write_bytes(b"no")
    done = call(tmp_path / "place", "eval", before=("--quiet",))
    lines = done.stderr.splitlines()
    assert done.exit_code == 1 and len(lines) == 2
    assert all(line.startswith(f"Error: {name}: ") for line, name in zip(lines, ("one", "two"), strict=True))


def test_quiet_belongs_before_the_command(place):
    done = call(place, "eval", "--quiet")
    assert done.exit_code == 2
    assert "--quiet belongs before the command: tcsae --quiet eval ..." in done.stderr


@pytest.mark.slow
def test_a_log_file_is_appended_to_also_when_quiet(place, tmp_path):
    file = tmp_path / "log.txt"
    for quiet in ((), ("--quiet",)):
        call(place, "eval", "--force", before=(*quiet, "--log-file", str(file)))
        call(place, "eval", "--run", "three", before=(*quiet, "--log-file", str(file)))
    lines = file.read_text().splitlines()
    assert sum("eval 2 SAEs: " in line for line in lines) == 2
    assert sum("Error: " in line and "Unknown run 'three'" in line for line in lines) == 2
    assert all(line[:2] == "20" and line[19] in "+-" for line in lines), "each with its time"
    assert OUTPUT.log is None, "closed"


def test_a_log_file_that_cannot_be_written(place, tmp_path):
    done = call(place, "inspect", before=("--log-file", str(tmp_path / "none" / "log.txt")))
    assert done.exit_code == 1
    assert "log.txt cannot be written (No such file or directory). Give another file." in done.stderr


def test_a_library_user_hears_what_is_said(capsys):
    say("a remark")
    with progress("stage", 1) as advance:
        advance(1)
    assert capsys.readouterr().err.splitlines()[0] == "a remark"


def test_eval_as_json_is_what_lies_in_the_folders(place):
    printed = json.loads(call(place, "eval", "--json").stdout)["evaluations"]
    assert printed == [json.loads((place / "runs" / name / "eval.json").read_text()) for name in ("one", "two")]
    pair = json.loads(call(place, "eval", "--json", "--compare", "one", "--with", "two").stdout)
    assert (pair["run"], pair["with"]) == ("one", "two") and pair["differences"]["mse"]["interval"]


def test_inspect_as_json(place):
    shown = json.loads(call(place, "inspect", "--json").stdout)
    assert shown["store"]["state"] == "sealed" and shown["store"]["recipe"]["codec"] == "float16"
    assert sum(shown["store"]["bytes"].values()) > 0
    states = {run["name"]: run["state"] for run in shown["runs"]}
    assert states == {"begun": "unfinished", "one": "finished", "two": "finished"}
    assert shown["runs"][1]["metrics"]["l0"] > 0


def test_verify_as_json(tmp_path):
    small.make(tmp_path / "a.zarr")
    whole = json.loads(call(tmp_path, "verify", "--json").stdout)
    assert whole["whole"] and whole["faults"] == [] and whole["bytes"] > 0
    (tmp_path / "a.zarr" / small.WEIGHTS).unlink()
    done = call(tmp_path, "verify", "--json")
    assert done.exit_code == 1
    printed = json.loads(done.stdout)
    assert not printed["whole"] and printed["faults"] == [f"{small.WEIGHTS}: it is missing"]
