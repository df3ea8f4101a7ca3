"""Promise: a finished run goes on to more steps exactly, or is refused with what of its schedule that would change."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

import tcsae
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.settings import with_settings
from tcsae.train.checkpoint import checkpoints
from tcsae.train.plan import Request, Run, plan_runs
from tcsae.train.presets import preset
from tcsae.train.record import steps_dependence
from tcsae.train.run import train_runs

WIDTH, LENGTH = 8, 6
SMALL = (
    *("sae.d_sae=24", "sae.k=3", "data.n_segments=8", "data.segment_length=5", "log_every=5"),
    *("temporal.weight=0.5", "temporal.kind=difference"),
)
CONSTANT = ("optimizer.decay=none", "optimizer.warmup_steps=1", "dead.after_share=1")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tcsae.Store:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH) as creation:
        for split in ("train", "eval"):
            creation.append(split, {"h": rng.normal(size=(60, LENGTH, WIDTH)).astype(np.float32)})
    return tcsae.open_store(path)


def planned(store: tcsae.Store, steps: int, *settings: str) -> list[Run]:
    return plan_runs(store, Request(["topk"], [*SMALL, *settings, f"steps={steps}"]))


def weights(folder: Path) -> dict:
    return safetensors.torch.load_file(folder / "sae_weights.safetensors")


@pytest.mark.slow
def test_a_longer_run_is_the_one_trained_at_once(store, tmp_path):
    (short,), (long,) = planned(store, 20, *CONSTANT), planned(store, 45, *CONSTANT)
    train_runs(store, tmp_path / "pieces", [short])
    first = weights(tmp_path / "pieces" / short.name)
    (record,) = train_runs(store, tmp_path / "pieces", [long])
    train_runs(store, tmp_path / "once", [long])
    ours, theirs = (weights(tmp_path / name / long.name) for name in ("pieces", "once"))
    assert record["steps"] == 45
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not all((ours[name] == first[name]).all() for name in theirs)
    files = [tmp_path / name / long.name / "metrics.jsonl" for name in ("pieces", "once")]
    steps = [[line.split(",")[0] for line in file.read_text().splitlines()] for file in files]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_killed_on_its_longer_way_it_is_still_the_shorter_run(store, tmp_path):
    (short,), (long,) = planned(store, 20, *CONSTANT), planned(store, 45, *CONSTANT)
    train_runs(store, tmp_path, [short])
    before = weights(tmp_path / short.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.train.run.save_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_runs(store, tmp_path, [long])
    assert tcsae.load_sae(tmp_path / short.name)
    assert all((weights(tmp_path / short.name)[name] == one).all() for name, one in before.items())
    (record,) = train_runs(store, tmp_path, [long])
    assert record["steps"] == 45


@pytest.mark.parametrize(
    "settings, reason",
    [
        ((), r"the learning rate differs from step 0 on \(optimizer.decay='linear'"),
        (("optimizer.warmup_steps=1",), "the learning rate differs from step 17 on"),
        (("optimizer.warmup_steps=1", "optimizer.decay=cosine"), "the learning rate differs from step 2 on"),
        (CONSTANT[:2], "dead.after_share=0.1 is a share of the tokens"),
        ((*CONSTANT, "temporal.warmup=0.5"), "temporal.warmup=0.5 is a share of the steps"),
    ],
)
def test_a_schedule_that_depends_on_the_steps_is_refused_by_name(store, tmp_path, settings, reason):
    (short,), (long,) = planned(store, 20, *settings), planned(store, 45, *settings)
    train_runs(store, tmp_path, [short])
    assert not checkpoints(tmp_path / short.name), "nothing can follow, so nothing is kept"
    with pytest.raises(
        RunError, match=rf"train.steps: 20, not 45.*It cannot go on to 45 steps: .*{reason}.*--init-from"
    ):
        train_runs(store, tmp_path, [long])


def test_other_reasons(store, tmp_path):
    (short,), (long,) = planned(store, 20, *CONSTANT), planned(store, 45, *CONSTANT)
    train_runs(store, tmp_path, [short])
    with pytest.raises(RunError, match=r"It has 20 steps: nothing can go on\."):
        train_runs(store, tmp_path, planned(store, 10, *CONSTANT))
    (checkpoint,) = checkpoints(tmp_path / short.name)
    checkpoint.unlink()
    with pytest.raises(RunError, match="It cannot go on: its last checkpoint is gone. Its weights alone: --init-from"):
        train_runs(store, tmp_path, [long])


def test_a_limit_of_dead_latents_in_tokens_does_not_depend_on_the_steps():
    config = with_settings(preset("topk", WIDTH), [*CONSTANT[:2], "dead.after_tokens=1000", "steps=100"])
    assert steps_dependence(config, 100, 200, 50_000) == []
    assert steps_dependence(config, 100, 200, 15_000)
