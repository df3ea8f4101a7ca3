"""Promise: a tracker repeats what metrics.jsonl says, offline too; one that is not there is named."""

import json

import pytest

from tcsae.shared.errors import ConfigError
from tcsae.shared.runs import read_metrics
from tcsae.train.tracking import RunLog, open_tracker

LINES = [{"step": 25, "tokens": 100, "loss": 3.5, "l0": 4.0}, {"step": 50, "tokens": 200, "loss": 2.5, "l0": 3.0}]


def log(path, kind):
    log = RunLog(path / "metrics.jsonl", 0, open_tracker(kind, path, {"steps": 50}))
    for line in LINES:
        log.write(line)
    log.write({"event": "restored", "step": 51, "why": "a test"})
    log.close()
    assert read_metrics(path)[:2] == LINES


def test_tensorboard(tmp_path):
    log(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("tokens", "loss", "l0"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], line[name]) for line in LINES]


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, "wandb")
    (record,) = tmp_path.rglob("run-*.wandb")
    data = record.read_bytes()
    assert all(name.encode() in data for name in ("loss", "l0", "tokens"))


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path):
    log(tmp_path, None)
    file = tmp_path / "metrics.jsonl"
    kept = len(json.dumps(LINES[0])) + 1
    again = RunLog(file, kept)
    again.write(LINES[1])
    again.close()
    assert read_metrics(tmp_path) == LINES
    assert read_metrics(tmp_path / "nowhere") == []


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Unknown tracker 'tensorbord'. Did you mean 'tensorboard'\?"):
        open_tracker("tensorbord", tmp_path, {})
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--tracker wandb needs a package that is not there .*pip install wandb"):
        open_tracker("wandb", tmp_path, {})
