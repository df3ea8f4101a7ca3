"""Promise: each question of the paper is answered from its own arms alone: its table, predictions and picture."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from tcsae.paper import results as results_module
from tcsae.paper.arms import PLAIN, SMALL, TEXT, WITHOUT, Arm
from tcsae.paper.page import COLUMNS, PICTURES, draw, paper_table
from tcsae.paper.predictions import PREDICTIONS
from tcsae.paper.results import GROUPS, Gain, Results
from tcsae.paper.sections import FIGURES, KEYS, SECTIONS, TABLE, Line, arms_of, difference, markdown, table


def fake_evaluation(rng: np.random.Generator, name: str) -> dict[str, Any]:
    core = [*COLUMNS, "dead_fraction", "l2_norm_in"]
    measures = {name: {"value": rng.random(), "difference": rng.random()} for name in FIGURES if name not in core}
    curve = rng.random(32).tolist()
    return {
        "name": name,
        "sae": {"d_model": 128},
        "metrics": {one: rng.random() for one in core},
        "baselines": {"zero_output": {"explained_variance_legacy": -0.9}},
        "temporal": {
            "scale": {"mean_squared_norm": rng.random()},
            "groups": {group: {"measures": measures, "curves": {"rho_1_within": curve}} for group in GROUPS},
        },
    }


def fake_record() -> dict[str, Any]:
    return {"steps": 10, "tokens": 1000, "train": {"sparsity": {"l1": 0.1}}}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Results of the given arms, of random numbers."""
    rng = np.random.default_rng(0)

    def differences(_folder, one, other):
        names = [name for name in FIGURES if name not in ("energy", "dead_fraction")]
        values = {name: results_module.value_of(one, name) - results_module.value_of(other, name) for name in names}
        return {name: {"difference": value, "interval": [value - 0.1, value + 0.1]} for name, value in values.items()}

    monkeypatch.setattr(results_module, "differences", differences)

    def make(arms: list[Arm]) -> Results:
        found = {arm: [fake_evaluation(rng, f"run{i}") for i in range(arm.n_seeds)] for arm in arms}
        records = {arm: [fake_record() for _ in range(arm.n_seeds)] for arm in arms}
        return Results(found, {arm.store: tmp_path for arm in arms}, records)

    return make


@pytest.mark.parametrize("key", KEYS)
def test_a_question_needs_its_own_arms_only(fake, tmp_path, key):
    results = fake(arms_of(key))
    assert all(one.holds(results) in (True, False) for one in PREDICTIONS[key])
    if key == TABLE:
        assert paper_table(results).count("printed in the paper") == 4
        return
    section = next(one for one in SECTIONS if one.key == key)
    assert table(results, section.lines, section.figures).count("\n") == 1 + len(section.lines)
    if section.picture:
        draw(section.picture, results, tmp_path / "a.svg")
        assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_every_question_predicts_and_every_picture_is_shown():
    assert set(PREDICTIONS) == set(KEYS)
    assert all(PREDICTIONS.values())
    assert {section.picture for section in SECTIONS if section.picture} == set(PICTURES)


def test_arms_of_one_label_and_store_are_one_arm():
    """Else a table would have two lines that nobody can tell apart."""
    arms = {arm for key in KEYS if key != TABLE for arm in arms_of(key)}
    labels = [(arm.label, arm.store) for arm in arms]
    assert len(labels) == len(set(labels))


def test_each_arm_left_out_changes_one_setting():
    for arm in WITHOUT:
        assert arm.settings[: len(SMALL)] == SMALL
        assert len(arm.settings) == len(SMALL) + 1
        assert (arm.store, arm.n_seeds, arm.n_steps) == (TEXT, PLAIN.n_seeds, PLAIN.n_steps)


@pytest.mark.parametrize("intervals", list(itertools.permutations([[0.1, 0.2], [-0.1, 0.3], [0.2, 0.4]])))
def test_a_gain_is_sure_if_every_seed_is(intervals):
    assert Gain([0.1] * 3, intervals).sure == 0
    assert Gain([0.1] * 2, [one for one in intervals if one[0] > 0]).sure == 1
    assert Gain([-0.1] * 2, [[-one[1], -one[0]] for one in intervals if one[0] > 0]).sure == -1
    assert Gain([0.1], [None]).sure == 0


def test_cells():
    assert difference(Gain([0.01, 0.03], [[0.005, 0.02], [0.01, 0.04]]), 3) == "+0.020*"
    assert difference(Gain([-0.01], [[-0.02, 0.01]]), 3) == "-0.010"
    assert difference(Gain([math.nan], [None]), 3) == "-"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_line_shows_the_twin_it_is_compared_with(fake):
    results = fake([PLAIN, WITHOUT[0]])
    last = table(results, [Line(PLAIN), Line(WITHOUT[0], PLAIN)], ["explained_variance"]).splitlines()[-1]
    ours, theirs = (results.mean(arm, "explained_variance") for arm in (WITHOUT[0], PLAIN))
    assert f"{ours:.4f} ({ours - theirs:+.4f}" in last
    assert json.dumps(results.values(PLAIN, "explained_variance"))
