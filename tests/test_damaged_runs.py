"""Promise: whatever is wrong with a file of a run, every command says so in one line that names it, or needs no such
file; damage never changes a figure without a word, and a history that is damaged stops nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toy_eval as toy
from click.testing import CliRunner, Result

from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.errors import RunError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_evaluation, load_record, load_sae, read_metrics, save_sae
from tcsae.shared.sae.layout import record_digest
from tcsae.shared.store.reader import Store

WEIGHTS, CONFIG, RECORD, METRICS, EVALUATION = (
    "sae_weights.safetensors",
    "cfg.json",
    "tcsae.json",
    "metrics.jsonl",
    "eval.json",
)
LINES = "".join(
    json.dumps({"step": step, "explained_variance": 0.1 * step, "adjacent_correlation": 0.2}) + "\n"
    for step in range(1, 5)
)
COMMANDS = {
    "eval": ("eval", "--no-temporal"),
    "report": ("report", "--force"),
    "feature": ("feature", "--id", "1"),
    "export": ("export", "--to", "saelens", "--run", "run"),
    "inspect": ("inspect", "--sequences", "0"),
}
CONTENTS = {
    "empty": b"",
    "a list": b"[1]",
    "nothing": b"null",
    "no keys": b"{}",
    "deep": b"[" * 100_000,
    "a page": b"<html>404</html>",
}
"""What a file holds instead."""
CHANGES = {
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "not utf-8": lambda data: b"\xff\xfe" + data,
    "a flipped bit": lambda data: data[: (at := 2 * len(data) // 3)] + bytes([data[at] ^ 1]) + data[at + 1 :],
}
DAMAGES = [*CONTENTS, *CHANGES]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy.write_store(tmp_path_factory.mktemp("store") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """A folder of runs with an evaluated one."""
    runs = tmp_path_factory.mktemp("runs") / "runs"
    path = toy.make_run(runs, "run", toy.make_sae(), store)
    (path / METRICS).write_text(LINES)
    evaluate_runs(store, runs, EvalRequest(temporal=False))
    return runs


@pytest.fixture
def runs(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def call(store: Store, runs: Path, *arguments: str) -> Result:
    """The command; a traceback is an error of the test."""
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def check_line(done: Result, file: str) -> None:
    assert done.exit_code == 1, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert file in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]


def damage(file: Path, kind: str) -> None:
    file.write_bytes(CONTENTS[kind] if kind in CONTENTS else CHANGES[kind](file.read_bytes()))


@pytest.mark.parametrize("command", ["eval", "report", "feature", "export", "inspect"])
@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "a flipped bit"])
def test_a_damaged_record_is_named(store, runs, command, kind):
    damage(runs / "run" / RECORD, kind)
    done = call(store, runs, *COMMANDS[command])
    if command == "inspect":
        assert done.exit_code == 0
        assert "damaged" in done.stdout
    else:
        check_line(done, RECORD)


@pytest.mark.parametrize("command", ["report", "feature", "export"])
@pytest.mark.parametrize(
    "file, kind", [*((WEIGHTS, kind) for kind in DAMAGES), (CONFIG, "half"), (CONFIG, "a flipped bit")]
)
def test_a_damaged_sae_is_named(store, runs, command, file, kind):
    damage(runs / "run" / file, kind)
    done = call(store, runs, *COMMANDS[command])
    if command == "report" and file == WEIGHTS:  # the evaluation is of other weights then
        check_line(done, "Its evaluation is of other weights")
    else:
        check_line(done, file)


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_figure_comes_of_damaged_weights(store, runs, kind):
    damage(runs / "run" / WEIGHTS, kind)
    check_line(call(store, runs, *COMMANDS["eval"]), WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_evaluation_is_done_again_and_no_report_is_made_of_it(store, runs, kind):
    path = runs / "run" / EVALUATION
    before = json.loads(path.read_text())
    damage(path, kind)
    check_line(call(store, runs, *COMMANDS["report"]), EVALUATION)
    for command in ("feature", "export", "inspect"):
        assert call(store, runs, *COMMANDS[command]).exit_code == 0
    done = call(store, runs, *COMMANDS["eval"])
    assert done.exit_code == 0
    assert "Evaluated already" not in done.stderr
    for name, value in json.loads(path.read_text())["metrics"].items():
        assert value == (before["metrics"][name] and pytest.approx(before["metrics"][name], rel=1e-12)), name


@pytest.mark.parametrize(
    "changes, file",
    [
        ({"preset": 5}, RECORD),
        ({"hook": ["a"]}, RECORD),
        ({"steps": "many"}, RECORD),
        ({"steps": -1}, RECORD),
        ({"tokens": {}}, RECORD),
        ({"store": "here"}, RECORD),
        ({"train": None}, RECORD),
        ({"train": {"data": {"skip_first": "one"}}}, RECORD),
        ({"train": {"data": {"skip_first": True}}}, RECORD),
        ({"sae": 3}, RECORD),
        ({"sae": {"d_model": 16, "d_sae": 10**12, "k": 5}}, WEIGHTS),
        ({"sae": {"d_model": 16, "d_sae": 40, "k": 41}}, RECORD),
        ({"sae": {"d_model": 16, "d_sae": 40, "k": 6}}, RECORD),
        ({"sae": {"d_model": 16, "d_sae": 40, "activation": "tanh"}}, RECORD),
    ],
)
def test_nonsense_in_a_record_is_named(store, runs, changes, file):
    path = runs / "run" / RECORD
    record = json.loads(path.read_text()) | changes
    record["files"][RECORD] = record_digest(record)
    path.write_text(json.dumps(record))
    (runs / "run" / EVALUATION).unlink()
    check_line(call(store, runs, *COMMANDS["eval"]), file)


@pytest.mark.parametrize("name", [RECORD, CONFIG, WEIGHTS])
def test_a_file_that_is_missing_or_a_folder_is_named(store, runs, name):
    path = runs / "run" / name
    path.unlink()
    check_line(call(store, runs, "export", "--to", "saelens", "--run", "run"), name)
    path.mkdir()
    check_line(call(store, runs, "export", "--to", "saelens", "--run", "run"), name)


HISTORIES = {
    "torn": LINES[:-20].encode(),
    "zeros": bytes(300) + b"\n" + LINES.encode(),
    "not utf-8": b"\xff\xfe\n" + LINES.encode(),
    "not objects": b'[1]\n"a"\nnull\n3\n' + LINES.encode(),
    "no step": b'{"loss": 1}\n' + LINES.encode(),
    "no numbers": b'{"step": 1, "explained_variance": "high"}\n{"step": true, "loss": 1}\n' + LINES.encode(),
    "too large": b'{"step": ' + b"9" * 400 + b"}\n" + LINES.encode(),
    "deep": b"[" * 100_000 + b"\n" + LINES.encode(),
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_lines_of_a_history_that_are_damaged_are_counted_and_left_out(tmp_path, capsys, kind):
    (tmp_path / METRICS).write_bytes(HISTORIES[kind])
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4][: 3 if kind == "torn" else 4]
    n_bad = len(HISTORIES[kind].splitlines()) - len(lines)
    said = capsys.readouterr().err
    assert f"{METRICS}: {n_bad} of {len(lines) + n_bad} lines are damaged" in said.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torn", "zeros", "no numbers"])
def test_a_damaged_history_does_not_stop_the_report(store, runs, kind):
    (runs / "run" / METRICS).write_bytes(HISTORIES[kind])
    done = call(store, runs, *COMMANDS["report"])
    assert done.exit_code == 0, done.stderr
    assert "lines are damaged and left out" in done.stderr.replace("\n", " ")


def test_a_history_that_is_no_file_is_none(tmp_path, capsys):
    (tmp_path / METRICS).mkdir()
    assert read_metrics(tmp_path) == []
    assert "there is no history of this run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval_replicates.safetensors", "saebench_core.json"])
@pytest.mark.parametrize("kind", ["of another evaluation", "missing", "a flipped bit"])
def test_an_evaluation_holds_only_with_the_files_written_with_it(store, runs, name, kind):
    """As after a kill between two of them: never a mixed pair that --compare believes."""
    toy.make_run(runs, "other", toy.make_sae(seed=3), store)
    evaluate_runs(store, runs, EvalRequest(temporal=False))
    path = runs / "run" / name
    before = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "a flipped bit":
        damage(path, kind)
    else:
        shutil.copy(runs / "other" / name, path)
    assert load_evaluation(runs / "run", store.content) is None
    done = call(store, runs, "eval", "--no-temporal", "--compare", "run", "--with", "other")
    assert done.exit_code == 0, done.stderr
    assert "Evaluated already: other." in done.stderr
    if name.endswith(".safetensors"):
        assert path.read_bytes() == before


def test_an_unfinished_run_of_ours_is_no_sae_of_others(store, runs):
    """Killed between cfg.json and tcsae.json, it has all that SAELens' layout has."""
    (runs / "run" / RECORD).unlink()
    done = call(store, runs, "eval")
    assert done.exit_code == 1
    assert "has no tcsae.json: its training is unfinished" in done.stderr


def test_loading_says_which_of_our_own_files_is_bad(runs):
    path = runs / "run"
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    tensors["b_dec"][0] = torch.inf
    safetensors.torch.save_file(tensors, path / WEIGHTS)
    with pytest.raises(RunError, match=r"1 values of b_dec in sae_weights.safetensors are NaN or infinite"):
        load_sae(path)
    tensors["b_dec"][0] = 1.0
    safetensors.torch.save_file(tensors, path / WEIGHTS)
    with pytest.raises(RunError, match="its digest is not that in tcsae.json"):
        load_sae(path)
    (path / RECORD).write_text(json.dumps({key: one for key, one in load_record(path).items() if key != "files"}))
    assert load_sae(path).b_dec[0] == 1, "a record of an older version names no files"


def flips(data: bytes) -> list[bytes]:
    """Digits that are others: JSON all the same."""
    places = [i for i, byte in enumerate(data) if chr(byte) in "12345"]
    return [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in places[:: max(1, len(places) // 12)]]


def test_a_digit_of_a_record_that_changed_is_damage(runs):
    file = runs / "run" / RECORD
    data = file.read_bytes()
    body = data[: data.index(b'"files"')]
    for flipped in flips(body):
        file.write_bytes(flipped + data[len(body) :])
        with pytest.raises(RunError, match=r"tcsae.json is (damaged: its digest does not fit|no JSON)"):
            load_record(runs / "run")
    file.write_bytes(data)
    load_record(runs / "run")


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_history_that_is_not_the_training_s_is_said(runs, store, capsys, damage):
    path = toy.make_run(runs, "other", toy.make_sae(), store)
    (path / METRICS).write_text(LINES)
    save_sae(toy.make_sae(), path, {key: one for key, one in load_record(path).items() if key != "files"}, {})
    assert len(read_metrics(path)) == 4
    assert "metrics.jsonl" not in capsys.readouterr().err
    data = (path / METRICS).read_bytes()
    if damage == "missing":
        (path / METRICS).unlink()
    else:
        (path / METRICS).write_bytes(flips(data)[1] if damage == "flipped" else data[: data.index(b"\n") + 1])
    assert len(read_metrics(path)) == {"flipped": 4, "cut": 1, "missing": 0}[damage]
    assert {"missing": "is missing"}.get(damage, "is not what the training wrote") in capsys.readouterr().err
