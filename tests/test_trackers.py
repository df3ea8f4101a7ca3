"""Promise: a tracker repeats what metrics.jsonl says, offline too; one that is not there is named."""

import json
import struct
import time

import pytest

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.trackers import log_results, open_tracker
from tcsae.shared.sae.folder import read_metrics
from tcsae.train.log import RunLog

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
        result = [(event.step, event.value) for event in events.Scalars(name)]
        assert result == [(line["step"], line[name]) for line in LINES]


def test_tensorboard_goes_on_without_what_lies_beyond_the_checkpoint(tmp_path):
    log(tmp_path, "tensorboard")
    time.sleep(1.1)  # files are named by the second
    again = open_tracker("tensorboard", tmp_path, {}, n_steps=25)
    again.log({"step": 50, "loss": 1.5})
    again.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(25, 3.5), (50, 1.5)]


class Wandb:
    """A stand-in of the library: what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.logged: list[tuple] = []
        self.summary: dict = {}
        self.artifacts: list = []

    def init(self, **options):
        self.calls.append(options)
        self.id = options["id"]
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.calls.append({"finished": True})

    def Artifact(self, name, type):  # noqa: A002
        self.artifacts.append(artifact := Artifact(name, type))
        return artifact

    def log_artifact(self, artifact):
        artifact.logged = True


class Artifact:
    def __init__(self, name, kind):
        self.name, self.kind, self.folders, self.logged = name, kind, [], False

    def add_dir(self, folder):
        self.folders.append(folder)


def test_wandb_resumes_one_run_until_it_is_trained_afresh(tmp_path, monkeypatch):
    from tcsae.train.record import clear_run

    wandb = Wandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    path = tmp_path / "one"
    path.mkdir()
    for n_steps in (0, 25):
        open_tracker("wandb", path, {"steps": 50}, n_steps).close()
    first, second = (call for call in wandb.calls if "id" in call)
    assert first == second
    assert (first["resume"], first["name"], first["config"]) == ("allow", "one", {"steps": 50})
    (path / "tracker.json").write_text("no json")
    open_tracker("wandb", path, {})
    assert wandb.calls[-1]["id"] != first["id"]
    clear_run(path)
    open_tracker("wandb", path, {})
    assert len({call["id"] for call in wandb.calls if "id" in call}) == 3


def test_figures_and_the_report_are_logged_to_the_run(tmp_path, monkeypatch):
    wandb, run, report = Wandb(), tmp_path / "one", tmp_path / "report"
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    run.mkdir()
    report.mkdir()
    (report / "index.html").write_text("<p>")
    open_tracker("wandb", run, {}).close()
    log_results("wandb", run, {"explained_variance": 0.5}, report)
    assert len({call["id"] for call in wandb.calls if "id" in call}) == 1
    assert wandb.summary == {"eval/explained_variance": 0.5}
    assert [(one.kind, one.folders, one.logged) for one in wandb.artifacts] == [("report", [str(report)], True)]
    log_results("tensorboard", run, {"explained_variance": 0.5}, report)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("eval/explained_variance")[0].value == 0.5
    assert events.Tags()["tensors"] == ["report/text_summary"]
    with pytest.raises(ConfigError, match="Unknown tracker 'mlflow'"):
        log_results("mlflow", run, {}, report)


def wandb_records(file):
    """An offline run's file: a header of 7 bytes, then LevelDB's log of blocks, in which a record may lie in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, result, parts = file.read_bytes(), 7, [], b""
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
            result.append(Record.FromString(parts))
            parts = b""
    return result


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
