"""Promise: a tracker repeats what metrics.jsonl says, offline too; one that is not there is named."""

import json
import struct
import time

import pytest

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.sae.folder import read_metrics
from tcsae.train.log import RunLog, open_tracker

BLOCK = 32 << 10
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


def wandb_records(file):
    """An offline run's file: a header of 7 bytes, then LevelDB's log of blocks, in which a record may lie in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, n, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + n > len(data):  # being written
            break
        parts += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, "wandb")
    (file,) = tmp_path.rglob("run-*.wandb")
    records, end = wandb_records(file), time.monotonic() + 60
    # A process of wandb's own writes the file, now and then only after the run has finished here.
    while not any(one.HasField("exit") for one in records) and time.monotonic() < end:
        time.sleep(0.1)
        records = wandb_records(file)
    items = [one.history.item for one in records if one.HasField("history")]
    lines = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in one} for one in items]
    assert [{key: value for key, value in line.items() if key in LINES[0]} for line in lines] == [
        {key: value for key, value in line.items() if key != "step"} for line in LINES
    ]
    assert [line["_step"] for line in lines] == [line["step"] for line in LINES]


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


def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match="^--tracker wandb: No API key configured. Use .* WANDB_MODE=offline"
    ) as caught:
        open_tracker("wandb", tmp_path, {})
    assert "\n" not in str(caught.value)
