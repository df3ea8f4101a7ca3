"""Promise: `train --dry-run` says passes, memory and time of what would be trained, and writes nothing."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.commands.group import cli
from tcsae.train.checks import memory_bytes
from tcsae.train.dry_run import estimate
from tcsae.train.plan import Request, plan_runs

SMALL = ("sae.d_sae=32", "sae.k=4", "data.n_segments=8", "data.segment_length=5")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tcsae.Store:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    with tcsae.create_store(path, hooks={"h": 8}, sequence_length=6) as creation:
        for split in ("train", "eval"):
            creation.append(split, {"h": rng.normal(size=(80, 6, 8)).astype(np.float32)})
    return tcsae.open_store(path)


def call(store: tcsae.Store, runs: Path, *arguments: str) -> Result:
    options = [f"--set={one}" for one in SMALL]
    return CliRunner().invoke(cli, [f"--store={store.location}", f"--runs={runs}", "train", *options, *arguments])


def test_runs_that_read_other_batches_are_another_pass(store, tmp_path):
    runs = plan_runs(store, Request(["topk", "relu-l1"], [*SMALL, "steps=50"], ["data.seed=0,1"]))
    estimated = estimate(store, tmp_path / "runs", runs)
    assert [[one.run.name for one in part.runs] for part in estimated.passes] == [
        [run.name for run in runs if run.config.data.seed == seed] for seed in (0, 1)
    ]
    (part, _) = estimated.passes
    assert part.memory_bytes >= memory_bytes([one.run.config for one in part.runs])
    assert part.seconds >= sum(50 * one.step_s for one in part.runs) > 0
    assert part.runs[0].epochs == pytest.approx(part.runs[0].tokens / (80 * 5))
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_it_and_the_same_command_trains(store, tmp_path):
    done = call(store, tmp_path / "runs", "--preset=topk", "--steps=5", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "Pass 1 of 1: topk-d_sae32-k4-n_segments8-segment_length5; about " in done.stdout
    assert "of memory, about 0 s" in done.stdout and "Nothing was written." in done.stdout
    assert not list(tmp_path.iterdir())
    assert call(store, tmp_path / "runs", "--preset=topk", "--steps=5").exit_code == 0
    again = call(store, tmp_path / "runs", "--preset=topk", "--steps=5", "--dry-run")
    assert "trained already. Train it again with --fresh." in again.stdout and "In all about 0 s" in again.stdout


def test_a_run_of_no_steps_takes_no_time(store, tmp_path):
    runs = plan_runs(store, Request(["logged-run2"], ["data.n_segments=8", "data.segment_length=5"]))
    (part,) = estimate(store, tmp_path, runs).passes
    assert part.seconds == 0


def test_what_training_refuses_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.train.checks._memory", lambda _: 1000)
    with pytest.raises(ConfigError, match="of memory; cpu has 1KB"):
        estimate(store, tmp_path, plan_runs(store, Request(["topk"], SMALL)))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call(store, tmp_path, "--dry-run")
    assert done.exit_code == 1 and "--dry-run in 2 processes: one is enough." in done.stderr
