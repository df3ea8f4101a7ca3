"""Promise: a command that needs what is damaged or missing of a store stops in one line; it never goes on with less
than was sealed. Where a library is broken, its reason is named.
"""

import shutil
from pathlib import Path

import pytest
import toy_eval as toy
from click.testing import CliRunner

from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.errors import InstallError, broken_library
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.reader import open_store

TAIL = f"tail/{toy.HOOK}"
COMMANDS = {
    "eval": ("eval", "--force", "--no-temporal"),
    "report": ("report", "--force"),
    "feature": ("feature", "--id", "1"),
    "inspect": ("inspect", "--sequences", "0"),
}
TAIL_FAULTS = {
    "config emptied": (f"{TAIL}/config.json", lambda _: b""),
    "config edited": (f"{TAIL}/config.json", lambda data: data.replace(b"0.", b"1.", 1)),
    "config missing": (f"{TAIL}/config.json", None),
    "weights flipped": (f"{TAIL}/model.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "weights cut": (f"{TAIL}/model.safetensors", lambda data: data[: len(data) // 2]),
    "weights missing": (f"{TAIL}/model.safetensors", None),
}
SIZE_FAULTS = {
    "tokens missing": ("train/tokens/c/0/0", None),
    "activations emptied": (f"train/activations/{toy.HOOK}/c/0/0/0", lambda _: b""),
    "activations longer": (f"train/activations/{toy.HOOK}/c/0/0/0", lambda data: data + b"\0"),
    "metadata missing": ("train/starts/zarr.json", None),
    "sums missing": (f"statistics/{toy.HOOK}/sums/c/0", None),
}
CASES = [(command, fault) for command in ("eval", "report", "feature") for fault in TAIL_FAULTS]
CASES += [(command, fault) for command in ("report", "inspect") for fault in SIZE_FAULTS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A store and an evaluated run."""
    place = tmp_path_factory.mktemp("relied")
    store = toy.write_store(place / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    toy.make_run(place / "runs", "run", toy.make_sae(), store)
    evaluate_runs(store, place / "runs", EvalRequest(temporal=False))
    return place


def call(place: Path, *arguments: str):
    return CliRunner().invoke(cli, ["--store", str(place / "a.zarr"), "--runs", str(place / "runs"), *arguments])


@pytest.mark.parametrize(("command", "fault"), CASES, ids=[f"{command}, {fault}" for command, fault in CASES])
def test_damage_of_what_a_command_needs_stops_it(whole, tmp_path, command, fault):
    place = Path(shutil.copytree(whole, tmp_path / "place"))
    key, change = (TAIL_FAULTS | SIZE_FAULTS)[fault]
    file = place / "a.zarr" / key
    data = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(data))
    before = (place / "runs" / "run" / "eval.json").read_bytes()
    done = call(place, *COMMANDS[command])
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert key.removesuffix("/zarr.json") in lines[0]
    assert "Harvest" in lines[0]
    assert (place / "runs" / "run" / "eval.json").read_bytes() == before
    assert not (place / "report").exists()


def test_a_store_that_was_sealed_without_a_tail_is_evaluated_without(tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES, with_tail=False)
    toy.make_run(tmp_path / "runs", "run", toy.make_sae(), store)
    (one,) = evaluate_runs(store, tmp_path / "runs", EvalRequest(temporal=False)).evaluations
    assert "has no tail for" in one["no_tail"]


def fails_deep_inside(*_, **__):
    """As transformers does where torchvision, say, is another build than torch."""
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'GPTNeoXForCausalLM'. Are its requirements met?") from error


@pytest.mark.parametrize("place", ["loading", "making", "eval"])
def test_a_broken_library_is_no_missing_tail(whole, monkeypatch, place):
    from transformers import AutoModelForCausalLM

    from tcsae.shared.lm.tail import make_tail

    model = toy.make_model()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails_deep_inside)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails_deep_inside)
    says = (
        r"an import fails \(RuntimeError: operator torchvision::nms does not exist\)\. Install or repair that library"
    )
    if place == "eval":
        done = call(whole, *COMMANDS["eval"])
        assert done.exit_code == 1
        assert "operator torchvision::nms does not exist" in done.stderr
    else:
        path = open_store(whole / "a.zarr").tail_path(toy.HOOK)
        with pytest.raises(InstallError, match=says):
            Tail.load(path) if place == "loading" else make_tail(model, 1)


def test_the_first_reason_of_an_import_that_failed_is_named():
    error = ImportError("libGL.so.1: cannot open shared object file")
    assert "The tokenizer at x cannot be loaded, as an import fails (ImportError: libGL.so.1" in str(
        broken_library("The tokenizer at x", error)
    )
