"""Promise: a signal or a disk that refuses ends eval, report, feature and export in one line, with nothing half
written; what was finished stays, and the same command goes on.
"""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import toy_eval as toy
from click.testing import CliRunner, Result

from tcsae.evaluate import batches, one_pass
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.report.features import feature_pass
from tcsae.evaluate.run import evaluate_runs
from tcsae.paper.results import Place
from tcsae.paper.run import TIMES, read_times
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import Store

pytestmark = pytest.mark.slow


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy.write_store(tmp_path_factory.mktemp("store") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """Two runs, evaluated."""
    runs = tmp_path_factory.mktemp("runs") / "runs"
    for seed in range(2):
        toy.make_run(runs, f"run{seed}", toy.make_sae(seed=seed), store)
    evaluate_runs(store, runs, EvalRequest(temporal=False))
    return runs


@pytest.fixture
def runs(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def call(store: Store, runs: Path, *arguments: str) -> Result:
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {
    "eval": (("eval", "--force", "--no-temporal"), one_pass),
    "report": (("report", "--force"), feature_pass),
    "feature": (
        ("feature", "--run", "run0", "--id", "1", "--split", "train"),
        feature_pass,
    ),  # the report has it of eval
}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_pass_after_the_batch_at_hand(store, runs, monkeypatch, command, number):
    arguments, module = COMMANDS[command]
    assert call(store, runs, "report").exit_code == 0
    monkeypatch.setattr(batches, "BATCH_TOKENS", 4 * toy.LENGTH)
    before, handler, seen = tree(runs.parent), signal.getsignal(number), []

    def signalled(*given, **more):
        for batch in batches.batches(*given, **more):
            seen.append(batch)
            if len(seen) == 2:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(module, "batches", signalled)
    done = call(store, runs, *arguments)
    assert done.exit_code == CODES[number]
    assert len(seen) == 2, "the batch at hand is the last one"
    assert done.stderr.splitlines()[-1].startswith(f"Stopped by {signal.Signals(number).name}: ")
    assert done.stderr.splitlines()[-1].endswith("The same command goes on from there.")
    assert tree(runs.parent) == before
    assert signal.getsignal(number) is handler


def test_a_signal_between_two_runs_leaves_the_finished_one(store, runs, monkeypatch):
    """Written are run0's files, whole; the rerun evaluates run1 alone."""
    for name in ("run0", "run1"):
        (runs / name / "eval.json").unlink()
    from tcsae.evaluate import run

    write = run.write_evaluation

    def write_and_signal(*given):
        result = write(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(run, "write_evaluation", write_and_signal)
    done = call(store, runs, "eval", "--no-temporal")
    assert done.exit_code == 143
    assert "1 of 2 evaluations of this pass are written" in done.stderr
    assert [(runs / name / "eval.json").exists() for name in ("run0", "run1")] == [True, False]
    monkeypatch.undo()
    done = call(store, runs, "eval", "--no-temporal")
    assert "Evaluated already: run0." in done.stderr
    assert done.exit_code == 0


@pytest.fixture
def small_files():
    """As on a full disk, no file can grow beyond a size: writing on fails with an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


FULL = {
    "eval": (("eval", "--force", "--no-temporal"), "runs"),
    "report": (("report", "--force"), "report"),
    "export saelens": (("export", "--run", "run0", "--to", "saelens"), "export-saelens"),
    "export dictionary_learning": (("export", "--run", "run0", "--to", "dictionary_learning"), "export-dictionary"),
}


@pytest.mark.parametrize("n_bytes", [0, 5000])
@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_one_line_and_what_was_there_stays(store, runs, small_files, command, n_bytes):
    arguments, place = FULL[command]
    for name in ("run0", "run1"):  # what an export names
        path = runs / name / "tcsae.json"
        more = {"train": {"optimizer": {"lr": 1.0}, "init_seed": 0, "data": {"skip_first": 1}}, "libraries": {}}
        record = json.loads(path.read_text()) | more
        del record["files"]["tcsae.json"]
        path.write_text(json.dumps(record))
    config = runs / "run0" / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"metadata": {"model_name": "m", "context_size": 8}}))
    record = json.loads((runs / "run0" / "tcsae.json").read_text())
    del record["files"]
    (runs / "run0" / "tcsae.json").write_text(json.dumps(record))
    assert call(store, runs, *arguments).exit_code == 0
    before = tree(runs.parent)
    small_files(n_bytes)
    done = call(store, runs, *arguments)
    small_files(resource.RLIM_INFINITY)
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert place in line
    assert "cannot be written (File too large)" in line
    assert tree(runs.parent).keys() == before.keys(), "no temporary file is left"
    if command != "eval" or not n_bytes:
        assert tree(runs.parent) == before
    done = call(store, runs, *arguments)
    assert done.exit_code == 0, "the same command goes on"


@pytest.mark.parametrize("arguments", [("report", "--out"), ("export", "--run", "run0", "--to", "saelens", "--out")])
@pytest.mark.parametrize("kind", ["a name too long", "below a file"])
def test_a_place_that_cannot_be_is_one_line(store, runs, tmp_path, arguments, kind):
    (tmp_path / "file").write_text("text")
    place = tmp_path / ("x" * 300) if kind == "a name too long" else tmp_path / "file" / "below"
    done = call(store, runs, *arguments, str(place))
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert str(place) in line


@pytest.mark.parametrize("command", ["eval", "report", "feature"])
def test_a_folder_of_runs_that_cannot_be_is_one_line(store, tmp_path, command):
    arguments = ("--id", "1") if command == "feature" else ()
    done = call(store, tmp_path / ("x" * 300), command, *arguments)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "cannot be read (File name too long)" in line


def test_what_cannot_be_written_is_known_before_the_pass(store, runs, small_files, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.run.measure", None)
    small_files(0)
    done = call(store, runs, "eval", "--force")
    assert done.exit_code == 1
    assert f"Error: {runs / 'run0'} cannot be written" in done.stderr


def test_damaged_lines_of_the_papers_times_are_counted_and_left_out(tmp_path, capsys):
    place = Place(tmp_path)
    good = json.dumps({"key": "table", "stage": "train", "processor_s": 2.5})
    bad = b'{"key": 1', b"[]", bytes(20), good.replace("2.5", '"long"').encode()
    (tmp_path / TIMES).write_bytes(b"\n".join((good.encode(), *bad)))
    assert read_times(place) == [{"key": "table", "stage": "train", "processor_s": 2.5}]
    assert "4 of 5 lines are damaged" in capsys.readouterr().err.replace("\n", " ")
