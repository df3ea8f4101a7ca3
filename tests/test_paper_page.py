"""Promise: each question of the paper is answered from its own arms alone: its table, predictions and picture."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from tcsae.paper import results as results_module
from tcsae.paper.arms import CHOOSING, FRONTIER, PLAIN, SMALL, TEXT, WITHOUT, Arm
from tcsae.paper.pages.paper_table import COLUMNS, paper_table
from tcsae.paper.pages.pictures import PICTURES, draw
from tcsae.paper.predictions import PREDICTIONS, chosen, slower_at_equal_cost
from tcsae.paper.primary_figures import PRIMARY, primary_line
from tcsae.paper.results import BUDGET, GROUPS, Gain, Results, X, interpolated
from tcsae.paper.sections import FIGURES, KEYS, SECTIONS, TABLE, Line, Section, arms_of, difference, markdown, table


def fake_evaluation(rng: np.random.Generator, name: str) -> dict[str, Any]:
    core = [*COLUMNS, "dead_fraction", "l2_norm_in", "ce_loss_with_sae", "ce_loss_without_sae"]
    names = [name for name in FIGURES if name not in (*core, "delta_ce")]
    measures = {name: {"value": rng.random(), "difference": rng.random()} for name in names}
    curve = rng.random(32).tolist()
    return {
        "name": name,
        "sae": {"d_model": 128},
        "metrics": {one: rng.random() for one in core},
        "baselines": {"zero_output": {"explained_variance_legacy": -0.9}},
        "temporal": {
            "scale": {"mean_squared_norm": rng.random()},
            "x": {"measures": {name: {"value": 1.0} for name in ("slowness_to_x", "rho_8_within")}},
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
        names = [*(name for name in FIGURES if name not in ("energy", "dead_fraction", "delta_ce")), "ce_loss_with_sae"]
        values = {name: results_module.value_of(one, name) - results_module.value_of(other, name) for name in names}
        return {name: {"difference": value, "interval": [value - 0.1, value + 0.1]} for name, value in values.items()}

    def seed_differences(folder, ones, others):
        return {name: one | {"p": 0.004} for name, one in differences(folder, ones[0], others[0]).items()}

    monkeypatch.setattr(results_module, "differences", differences)
    monkeypatch.setattr(results_module, "seed_differences", seed_differences)

    def make(arms: list[Arm]) -> Results:
        result = {arm: [fake_evaluation(rng, f"run{i}") for i in range(arm.n_seeds)] for arm in arms}
        records = {arm: [fake_record() for _ in range(arm.n_seeds)] for arm in arms}
        return Results(result, {arm.store: tmp_path for arm in arms}, records)

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
    compares = any(line.twin is not None for line in section.lines)
    assert (primary_line(section, results) != "") == (key in PRIMARY) == compares
    assert key not in PRIMARY or PRIMARY[key] in section.figures
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


@pytest.mark.parametrize(
    "p, gain, holds",
    [(0.004, 0.2, True), (0.02, 0.2, False), (0.004, 0.04, False)],  # .02 is above .05 / 3
)
def test_a_primary_figure_matters_if_it_is_sure_and_large(fake, p, gain, holds):
    plain, arms = Arm("plain"), [Arm(f"arm {i}", "topk", (f"sae.k={i}",)) for i in range(3)]
    section = Section("frontier", "", "", tuple(Line(arm, plain) for arm in arms), ("slowness_to_x",))
    results = fake([plain, *arms])
    for arm in arms:
        results._over_seeds[arm, plain] = {"slowness_to_x": {"p": p if arm == arms[0] else 0.9}}
        results._gains[arm, plain] = [{"slowness_to_x": {"difference": gain, "interval": None}}] * 3
    assert ("these matter: arm 0 (+" in primary_line(section, results)) == holds
    assert ("these matter: none." in primary_line(section, results)) != holds


def test_cells():
    assert difference(Gain([0.01, 0.03], [[0.005, 0.02], [0.01, 0.04]]), 3) == "+0.020*"
    assert difference(Gain([-0.01], [[-0.02, 0.01]]), 3) == "-0.010"
    assert difference(Gain([math.nan], [None]), 3) == "-"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_activations_are_a_line_of_their_own(fake):
    shown = table(
        fake([PLAIN]), [Line(PLAIN, None, X)], ["explained_variance", "delta_ce", "slowness_to_x", "rho_1_within"]
    )
    assert shown.splitlines()[-1] == "| x, the activations | - | - | 1.000 | - |"


def test_a_curve_is_read_between_its_points_and_not_beyond():
    points = [(0.0, 1.0), (0.04, 0.2), (0.01, 0.8)]
    assert interpolated(points, 0.025) == pytest.approx(0.5)
    assert math.isnan(interpolated(points, 0.05)) and math.isnan(interpolated(points, -0.01))


def costly(results: Results, arm: Arm, cost: float, slowness: float) -> None:
    for one in results.evaluations[arm]:
        one["metrics"] |= {"ce_loss_with_sae": 3.0 + cost, "ce_loss_without_sae": 2.5}
        one["temporal"]["groups"]["all"]["measures"]["slowness_to_x"]["value"] = slowness


def test_weights_are_chosen_on_the_other_half_and_kinds_compared_at_equal_cost(fake):
    arms = [PLAIN, *FRONTIER["contrastive"], *FRONTIER["difference"]]
    results = fake([*arms, *(CHOOSING[arm] for arm in arms)])
    for at, arm in enumerate(FRONTIER["contrastive"]):
        costly(results, CHOOSING[arm], (0.2 + 0.7 * at) * BUDGET, 1.0 - 0.2 * at)
        costly(results, arm, 0.5 * at * BUDGET, 1.0 - 0.2 * at)
    for at, arm in enumerate(FRONTIER["difference"]):
        costly(results, arm, 5 * at * BUDGET, 1.0 - 0.4 * at)  # slower at its dearest, and 10 times as dear
    costly(results, PLAIN, 0.0, 1.2)
    costly(results, CHOOSING[PLAIN], 0.0, 1.2)
    assert chosen(results, "contrastive") == FRONTIER["contrastive"][1], "the next is over the budget"
    assert slower_at_equal_cost(results, "contrastive", "difference")
    assert not slower_at_equal_cost(results, "difference", "contrastive")


def test_no_figure_is_of_documents_that_a_weight_was_chosen_on():
    arms = {arm for key in KEYS if key != TABLE for arm in arms_of(key)}
    choosing = {arm for arm in arms if arm.documents == "choose"}
    assert choosing == set(CHOOSING.values())
    assert {arm.documents for arm in arms - choosing} == {"report"}
    assert all(arm.first_seed >= PLAIN.n_seeds for arm in choosing), "nor of a seed"


def test_a_line_shows_the_twin_it_is_compared_with(fake):
    results = fake([PLAIN, WITHOUT[0]])
    last = table(results, [Line(PLAIN), Line(WITHOUT[0], PLAIN)], ["explained_variance"]).splitlines()[-1]
    ours, theirs = (results.mean(arm, "explained_variance") for arm in (WITHOUT[0], PLAIN))
    assert f"{ours:.4f} ({ours - theirs:+.4f}" in last
    assert json.dumps(results.values(PLAIN, "explained_variance"))
