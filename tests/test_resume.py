"""Promise: a run that was killed goes on as if it had not been, and one run's trouble is nobody else's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_interrupted import stopping_at

import tcsae.train.run as run_module
from tcsae.shared.base.errors import RunError, Stopped
from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.checkpoint import checkpoints, read_about
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs
from tcsae.train.trainer import Trainer

HOOK, LENGTH, WIDTH = "blocks.0.hook_resid_post", 10, 8
SETTINGS = (
    "sae.d_sae=48", "sae.k=3", "steps=60", "data.n_segments=24", "data.segment_length=5", "log_every=7",
    "guard.checkpoint_steps=13", "dead.after_share=0.05", "dead.aux_k=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = str(tmp_path_factory.mktemp("resume") / "a.zarr")
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        n_tokens=1,
    )
    writer = open_writer(path, recipe, Layout(sequences_per_chunk=16))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH + 1, 200).astype(np.int32)
    rows = Rows(np.zeros((200, LENGTH), np.int32), lengths, np.arange(200), np.zeros(200, np.int32))
    writer.commit({"train": rows, "eval": rows}, {})
    writer.finish_sequences({s: {"sequences": 200, "tokens": int(lengths.sum()), "documents": 200} for s in SPLITS})
    directions = rng.normal(size=(12, WIDTH))
    for shard in writer.missing_shards():
        n = shard.stop - shard.start
        code = rng.random((n, LENGTH, 12)) * (rng.random((n, LENGTH, 12)) < 0.2)
        writer.write_shard(shard, {HOOK: (code @ directions).astype(np.float32)})
    writer.seal({}, [], {})
    return open_store(path)


def mixed_runs(extra: tuple[str, ...] = ()) -> list[Run]:
    """relu, topk, batchtopk, jumprelu, AuxK firing, temporal ones, two widths."""
    asked = {
        "topk": ("topk", ()),
        "relu": ("relu-l1", ()),
        "batch": ("batchtopk", ()),
        "jump": ("jumprelu", ()),
        "wide": ("topk", ("sae.d_sae=96",)),
        "slow": ("temporal-topk", ("temporal.position_penalty=0.1",)),
        "contrast": ("temporal-matryoshka", ()),
        "paper": ("written-run3", ()),
        "direction": ("direction", ("temporal.contrast.gap=1", "linear.kind=pca", "sae.activation=batchtopk")),
        "t-sae": ("t-sae-past", ("temporal.contrast.per_segment=2",)),
        "seeded": ("topk", ("init_seed=5", "steps=40")),
    }
    return [
        Run(name, chosen, with_settings(preset(chosen, WIDTH), [*SETTINGS, *own, *extra]))
        for name, (chosen, own) in asked.items()
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path / "sae_weights.safetensors")


def lines(path: Path) -> list[dict]:
    result = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in result]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return lines(one) == lines(other) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> Path:
    """Every run trained alone, without interruption."""
    path = tmp_path_factory.mktemp("alone")
    for run in mixed_runs():
        train_runs(store, path, [run])
    return path


@pytest.mark.slow
def test_many_in_one_pass_equal_each_alone_and_aux_fired(store, alone, tmp_path):
    runs = mixed_runs()
    train_runs(store, tmp_path, runs)
    assert all(same(tmp_path / run.name, alone / run.name) for run in runs)
    assert any(line["aux"] > 0 for run in runs for line in lines(alone / run.name) if "aux" in line)
    assert any(line["dead_fraction"] > 0 for line in lines(alone / "wide"))


class KilledError(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [[14, 2, 30], *(pytest.param(kills, marks=pytest.mark.slow) for kills in ([1], [13, 26, 7], [59]))]
)
def test_killed_and_started_again_equals_uninterrupted(store, alone, tmp_path, monkeypatch, kills):
    real = run_module.Member.step

    def mortal(self, batch, number):
        if left and self.run.name == "batch" and left[0] == 0:
            left.pop(0)
            raise KilledError
        if left and self.run.name == "batch":
            left[0] -= 1
        real(self, batch, number)

    monkeypatch.setattr(run_module.Member, "step", mortal)
    left = list(kills)
    deaths = 0
    while True:
        try:
            train_runs(store, tmp_path, mixed_runs())
            break
        except KilledError:
            deaths += 1
    assert deaths == len(kills)
    for run in mixed_runs():
        assert same(tmp_path / run.name, alone / run.name), run.name
        assert not list((tmp_path / run.name).glob("checkpoint*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_checkpoints_between_two_steps(store, alone, tmp_path, monkeypatch, number):
    real = run_module.Member.step

    def signalled(self, batch, step):
        if step == 20 and self.run.name == "topk":
            os.kill(os.getpid(), number)
        real(self, batch, step)

    monkeypatch.setattr(run_module.Member, "step", signalled)
    with pytest.raises(Stopped, match=rf"{number.name}: step 21 of \d+ is on disk") as stopped:
        train_runs(store, tmp_path, mixed_runs())
    assert stopped.value.exit_code == 128 + number
    for run in mixed_runs():
        assert (tmp_path / run.name / "checkpoint-000000021.safetensors").exists()
        assert not list((tmp_path / run.name).glob("*.lock"))
    monkeypatch.setattr(run_module.Member, "step", real)
    train_runs(store, tmp_path, mixed_runs())
    assert all(same(tmp_path / run.name, alone / run.name) for run in mixed_runs())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["count", "gradients", "_guard", "_project_decoder_gradient"])
def test_a_break_within_a_step_saves_nothing_of_it(store, alone, tmp_path, monkeypatch, place):
    """A second Ctrl-C raises wherever the program is; half a step's moments must not reach the disk."""
    real, calls = getattr(Trainer, place), []

    def broken(self, *given):
        calls.append(place)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(Trainer, place, broken)
    run = mixed_runs()[:1]
    with pytest.raises(KeyboardInterrupt):
        train_runs(store, tmp_path, run)
    monkeypatch.setattr(Trainer, place, real)
    train_runs(store, tmp_path, run)
    assert same(tmp_path / run[0].name, alone / run[0].name)


@pytest.mark.slow
def test_checkpoints_come_after_minutes_too_and_the_last_ones_stay(store, alone, tmp_path, monkeypatch):
    real, kept = run_module.Member.step, []

    def step(self, batch, number):
        real(self, batch, number)
        kept.append([int(file.stem[-9:]) for file in run_module.checkpoints(self.path)])
        if number == 9:
            raise KilledError

    monkeypatch.setattr(run_module.Member, "step", step)
    run = mixed_runs(("guard.checkpoint_minutes=1e-9", "guard.keep=3"))[0]
    with pytest.raises(KilledError):
        train_runs(store, tmp_path, [run])
    assert kept[:5] == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    monkeypatch.setattr(run_module.Member, "step", real)
    train_runs(store, tmp_path, [run])
    assert same(tmp_path / run.name, alone / run.name)


@pytest.mark.parametrize("guard", ["guard.checkpoint_steps=0", "guard.action=restore"])
def test_a_run_without_checkpoints_by_time_is_not_waited_for(store, tmp_path, monkeypatch, guard):
    """Each wait is one for the GPU."""
    real, waits = Trainer.settle, []
    monkeypatch.setattr(Trainer, "settle", lambda self: (waits.append(self.progress.n_steps), real(self)))
    settings = [*SETTINGS, "steps=10", "guard.checkpoint_steps=100", guard]
    for minutes in ("10", "1e-9"):
        config = with_settings(preset("topk", WIDTH), [*settings, f"guard.checkpoint_minutes={minutes}"])
        train_runs(store, tmp_path / minutes, [Run("a", "topk", config)])
    assert waits == [7, 10] * 2, "where a line is logged"


@pytest.mark.slow
@pytest.mark.parametrize("number", [15, 20, 28])
def test_a_restored_run_that_was_interrupted_equals_one_that_was_not(store, tmp_path, monkeypatch, number):
    """It is brought back to the same state, whenever it was interrupted before."""
    poison(monkeypatch, "topk", {22, 30})
    runs = mixed_runs(("guard.action=restore",))[:1]
    train_runs(store, tmp_path / "whole", runs)
    poisoned = run_module.Member.step

    def step(self, batch, at):
        if at == number:
            raise KeyboardInterrupt
        poisoned(self, batch, at)

    monkeypatch.setattr(run_module.Member, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_runs(store, tmp_path / "parts", runs)
    monkeypatch.setattr(run_module.Member, "step", poisoned)
    train_runs(store, tmp_path / "parts", runs)
    assert same(tmp_path / "whole" / "topk", tmp_path / "parts" / "topk")


@pytest.mark.slow
def test_changed_settings_are_refused_also_half_way(store, tmp_path, monkeypatch):
    real = run_module.Member.step

    def interrupted(self, batch, number):
        if number == 20:
            raise KeyboardInterrupt
        real(self, batch, number)

    monkeypatch.setattr(run_module.Member, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_runs(store, tmp_path, mixed_runs()[:1])
    monkeypatch.setattr(run_module.Member, "step", real)
    other = [run._replace(config=with_settings(run.config, ["sae.k=4"])) for run in mixed_runs()[:1]]
    with pytest.raises(RunError, match=r"trained otherwise \(train.sae.k: 3, not 4\). Use --fresh"):
        train_runs(store, tmp_path, other)
    (record,) = train_runs(store, tmp_path, other, fresh=True)
    assert record["sae"]["k"] == 4


def poison(monkeypatch, name: str, numbers: set[int]) -> None:
    """The named run sees NaN in these batches."""
    real = run_module.Member.step

    def step(self, batch, number):
        bad = self.run.name == name and number in numbers
        real(self, batch._replace(x=batch.x * float("nan")) if bad else batch, number)

    monkeypatch.setattr(run_module.Member, "step", step)


@pytest.mark.slow
def test_a_run_that_goes_nan_ends_alone_with_step_and_batch_named(store, alone, tmp_path, monkeypatch):
    poison(monkeypatch, "topk", {17})
    records = {record["name"]: record for record in train_runs(store, tmp_path, mixed_runs())}
    assert records["topk"]["ended"].startswith("Batch 17, step 17: loss nan")
    assert records["topk"]["steps"] == 17
    assert weights(tmp_path / "topk")["W_dec"].isfinite().all()
    assert lines(tmp_path / "topk")[-1]["event"] == "ended"
    assert all(same(tmp_path / run.name, alone / run.name) for run in mixed_runs() if run.name != "topk")


@pytest.mark.slow
def test_a_run_can_be_brought_back_to_its_last_good_state(store, alone, tmp_path, monkeypatch):
    poison(monkeypatch, "topk", {17, 30})
    runs = mixed_runs(("guard.action=restore",))[:2]
    record, other = train_runs(store, tmp_path, runs)
    assert (record["restored"], record["ended"], record["steps"]) == (2, "", 60)
    assert [line["step"] for line in lines(tmp_path / "topk") if "event" in line] == [18, 31]
    assert weights(tmp_path / "topk")["W_dec"].isfinite().all()
    a, b = weights(tmp_path / "relu"), weights(alone / "relu")
    assert other["restored"] == 0
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_third_instability_ends_a_restored_run(store, tmp_path, monkeypatch):
    poison(monkeypatch, "topk", {17, 30, 31})
    (record,) = train_runs(store, tmp_path, mixed_runs(("guard.action=restore",))[:1])
    assert record["restored"] == 2
    assert record["ended"].startswith("Batch 31")


@pytest.mark.slow
def test_start_from_another_run(store, tmp_path):
    first = mixed_runs()[0]
    train_runs(store, tmp_path, [first])
    again = first._replace(name="again", init_from=first.name, config=with_settings(first.config, ["steps=0"]))
    (record,) = train_runs(store, tmp_path, [again])
    assert record["from"] == "topk"
    for key, tensor in weights(tmp_path / "again").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "topk")[key])
    other = again._replace(name="other", config=with_settings(first.config, ["sae.k=5"]))
    with pytest.raises(RunError, match=r"topk is another SAE than other asks for \(k: 3, not 5\)"):
        train_runs(store, tmp_path, [other])


@pytest.mark.slow
def test_the_real_command_killed_with_9_goes_on_to_the_same_weights(store, tmp_path):
    settings = [*SETTINGS, "steps=900", "guard.checkpoint_steps=100"]
    command = [sys.executable, "-m", "tcsae", "--store", store.location, "--runs"]
    options = ["train", "--preset", "topk", "--preset", "batchtopk", *(f"--set={one}" for one in settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, env=environment, capture_output=True)
    for _ in range(3):
        child = subprocess.Popen(
            [*command, str(tmp_path / "killed"), *options], env=environment, stderr=subprocess.PIPE
        )
        before = set((tmp_path / "killed").rglob("checkpoint*"))
        deadline = time.monotonic() + 60
        while not set((tmp_path / "killed").rglob("checkpoint-*00.safetensors")) - before:
            assert time.monotonic() < deadline
            if child.poll() is not None:
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stderr.close()
    done = subprocess.run(
        [*command, str(tmp_path / "killed"), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 2
    assert all(same(tmp_path / "whole" / name, tmp_path / "killed" / name) for name in names)


@pytest.mark.slow
def test_a_checkpoint_older_than_devices_goes_on(store, alone, tmp_path, monkeypatch, capsys):
    run = next(run for run in mixed_runs() if run.name == "topk")
    with stopping_at(30, monkeypatch, KilledError), pytest.raises(KilledError):
        train_runs(store, tmp_path, [run])
    (file,) = checkpoints(tmp_path / "topk")
    about = read_about(file)
    del about["device"], about["ranks"]  # what older versions did not tell
    file.write_bytes(safetensors.torch.save(safetensors.torch.load_file(file), {"tcsae": json.dumps(about)}))
    train_runs(store, tmp_path, [run])
    assert "goes on at step 26" in capsys.readouterr().err
    assert same(tmp_path / "topk", alone / "topk")


@pytest.mark.slow
def test_a_checkpoint_that_is_not_what_was_written_is_refused_and_an_older_one_goes_on(
    store, alone, tmp_path, monkeypatch
):
    run = next(run for run in mixed_runs(("guard.keep=2",)) if run.name == "topk")
    with stopping_at(30, monkeypatch, KilledError), pytest.raises(KilledError):
        train_runs(store, tmp_path, [run])
    _, file = checkpoints(tmp_path / "topk")
    data = file.read_bytes()
    begin = int.from_bytes(data[:8], "little") + 8
    about = data.index(b"n_tokens") + 14
    for at in (begin, (begin + len(data)) // 2, len(data) - 1, about):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(
            RunError, match=r"checkpoint-000000026.safetensors is damaged .*its (digest|checksum) does not"
        ):
            train_runs(store, tmp_path, [run])
    file.unlink()
    train_runs(store, tmp_path, [run])
    assert same(tmp_path / "topk", alone / "topk")
