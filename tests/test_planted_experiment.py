"""Promise: the planted experiment goes on where it stopped, judges by rules written before, and writes its page."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_ranks import spawn

from tcsae.shared.base.distributed import Ranks
from tcsae.shared.base.errors import RunError
from tcsae.synthetic import experiment
from tcsae.synthetic.experiment import METHODS, Place, make_all
from tcsae.synthetic.identifiability import ARMS, PLAIN, PREDICTIONS, QUICK, TEMPORAL, WIDER, Grid
from tcsae.synthetic.planted_page import write_planted_page
from tcsae.train.presets import PRESETS


def grid(gain: float, *, at_one: float = 0.0, wider: float = 0.0, fast: float = 0.6) -> Grid:
    """F1 of .3, and `gain` more for the term where duration is 8 or more."""
    durations, snr = (1, 2, 8, 32), np.array([0.2, 1.2, 2.5, 4.0])
    plain = np.full((3, 4, 4), 0.3)
    temporal = plain + gain * np.array([0, 0.3, 1, 1.2])[:, None]
    temporal[:, 0] += at_one
    slow = {PLAIN: plain, TEMPORAL: temporal, WIDER: plain + wider}
    return Grid(durations, snr, slow, slow, {PLAIN: np.full((3, 4), 0.6), TEMPORAL: np.full((3, 4), fast)})


@pytest.mark.parametrize(
    "made, held",
    [
        (grid(0.2), [True, True, True, True, True]),
        (grid(0.2, at_one=0.2), [False, True, True, True, True]),
        (grid(0.02), [True, False, True, True, True]),
        (grid(0.2, wider=0.25), [True, True, False, True, True]),
        (grid(-0.1), [True, False, False, False, True]),
        (grid(0.2, fast=0.5), [True, True, True, True, False]),
    ],
)
def test_predictions_can_be_refuted(made, held):
    assert [prediction.judge(made).held for prediction in PREDICTIONS] == held


def test_the_methods_are_presets():
    assert set(METHODS) <= set(PRESETS)


@pytest.mark.slow
def test_the_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch):
    few = ("topk", "temporal-topk")
    monkeypatch.setattr(experiment, "METHODS", few)
    monkeypatch.setattr("tcsae.synthetic.planted_page.METHODS", few)
    size, place, trained = replace(QUICK, steps=10), Place(tmp_path / "work"), []
    train = experiment.train_runs

    def counted(store, folder, runs):
        trained.extend(f"{folder.name}/{run.name}" for run in runs)
        if len(trained) == 5:
            raise RunError("stopped here")
        return train(store, folder, runs)

    monkeypatch.setattr(experiment, "train_runs", counted)
    with pytest.raises(RunError, match="stopped here"):
        make_all(place, size)
    trained.clear()
    make_all(place, size)
    assert len(trained) == 6, "the two runs of the first cell were finished"
    page = write_planted_page(place, size, tmp_path / "out")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(first) == {"planted.md", "planted.svg", "planted.json"}
    assert all(prediction.sentence in page.read_text() for prediction in PREDICTIONS)
    numbers = json.loads(first["planted.json"])
    assert set(numbers["slow"]) == set(ARMS) and np.array(numbers["recovered"][PLAIN]).shape == (1, 2, 2)
    scores = next(place.runs("duration1-seed0").glob("*/planted_scores.json"))
    whole = scores.read_bytes()
    scores.write_bytes(whole.replace(b'"f1": [', b'"f1": [ 0.5, '))
    trained.clear()
    make_all(place, size)
    assert not trained and scores.read_bytes() == whole, "scored anew, nothing trained"
    write_planted_page(place, size, tmp_path / "out")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def do(_: Ranks) -> None:
        experiment.METHODS = few
        make_all(Place(tmp_path / "by-two"), size)

    spawn(2, do)
    write_planted_page(Place(tmp_path / "by-two"), size, tmp_path / "out")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}, "as one process makes it"
