"""Promise: the code's adjacent correlation is tracked, and a fall ends a run or brings its last good state back."""

import json

import numpy as np
import pytest
import torch

import tcsae
import tcsae.train.run as run_module
from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch
from tcsae.train.guard import CORRELATION_DECAY, UnstableError, watched
from tcsae.train.plan import Run
from tcsae.train.presets import CORRELATION_FALL, PRESETS, preset
from tcsae.train.run import train_runs

WIDTH, LENGTH, STEPS, BAD_STEP = 8, 12, 24, 15
SETTINGS = (
    "sae.d_sae=32",
    "data.segment_length=12",
    "data.n_segments=8",
    "data.skip_first=0",
    f"steps={STEPS}",
    "log_every=1",
    "guard.checkpoint_steps=4",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Activations that hardly change within a sequence."""
    path = tmp_path_factory.mktemp("slow") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH, codec="float32") as creation:
        for split, n in (("train", 200), ("eval", 4)):
            slow = rng.normal(size=(n, 1, WIDTH)) + 0.1 * rng.normal(size=(n, LENGTH, WIDTH))
            creation.append(split, {"h": slow.astype("f4")})
    return tcsae.open_store(path)


def train(store, path, fall: float, action: str, monkeypatch) -> tuple[dict, list[dict]]:
    """The record and the log of a run one of whose batches has its tokens in random order: the loss does not mind."""
    real = run_module.Member.step

    def step(self, batch, number):
        order = torch.randperm(len(batch.x), generator=torch.Generator().manual_seed(0))
        real(self, batch._replace(x=batch.x[order]) if number == BAD_STEP else batch, number)

    settings = [*SETTINGS, f"guard.correlation={fall}", f"guard.action={action}"]
    run = Run("a", "written-run3", with_settings(preset("written-run3", WIDTH), settings))
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Member, "step", step)
        (record,) = train_runs(store, path, [run])
    return record, [json.loads(line) for line in (path / "a" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fall, action", [(0.5, "end"), (0.5, "restore"), (0.0, "end")])
def test_an_injected_fall_ends_the_run_or_is_brought_back(store, tmp_path, fall, action, monkeypatch):
    record, lines = train(store, tmp_path, fall, action, monkeypatch)
    seen = {line["step"]: line["adjacent_correlation"] for line in lines if "event" not in line}
    events = [line for line in lines if "event" in line]
    assert seen[BAD_STEP] > 0.8 and seen[BAD_STEP + 1] < 0.3, "the injection has to be what it should be"
    if fall != 0.5:
        assert (events, record["steps"], record["ended"]) == ([], STEPS, "")
        return
    (event,) = events
    assert event["event"] == ("ended" if action == "end" else "restored")
    assert event["step"] == BAD_STEP + 1
    assert "adjacent correlation" in event["why"] and "guard.correlation" in event["why"]
    assert record["steps"] == (BAD_STEP + 1 if action == "end" else STEPS)
    assert bool(record["ended"]) == (action == "end")
    assert record["restored"] == (action == "restore")


def test_it_follows_slow_changes_and_stops_at_a_fall():
    mean, batch = None, Batch(torch.zeros(4, WIDTH), np.array([4]), np.zeros(1, np.int64), np.zeros(1, np.int64))
    for value in np.linspace(0.9, 0.1, 60):
        mean = watched(float(value), mean, 0.2, 0, batch)
    assert watched(0.3, 0.4, 0.2, 0, batch) == pytest.approx(0.4 * CORRELATION_DECAY + 0.3 * (1 - CORRELATION_DECAY))
    with pytest.raises(UnstableError, match=r"is 0.100, its running mean 0.400, and a fall by 0.2 is allowed"):
        watched(0.1, 0.4, 0.2, 7, batch)


def test_the_paper_s_runs_track_it_from_run_2_on():
    falls = {name: make.make(WIDTH).guard.correlation for name, make in PRESETS.items()}
    watching = {name for name, fall in falls.items() if fall and not name.endswith("-shuffled")}
    assert watching == {"written-run2", "written-run3", "written-run4", "written-two-phase"}
    assert set(falls.values()) == {0.0, CORRELATION_FALL}
