"""Promise: `tcsae methods` tunes on one half of the documents, reports on the other, and shows what came out."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcsae.paper import methods_run
from tcsae.paper.methods import METHODS, RATES, SHUFFLED, Method, table_arm, tuning_arm
from tcsae.paper.methods_run import compare_methods
from tcsae.paper.pages.methods_page import ended_early
from tcsae.paper.results import Place, Results, Source
from tcsae.paper.run import FULL, Size, plan
from tcsae.paper.training_costs import FILE, training_costs
from tcsae.shared.base.errors import NoTailError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.sae.folder import load_record
from tcsae.shared.store.create import create_store
from tcsae.shared.store.reader import open_store
from tcsae.train.presets import PRESETS, preset

TINY = ("sae.d_sae=48", "sae.k=4", "data.n_segments=16")
FEW = (
    Method("TopK", "topk", TINY),
    Method("TopK", "topk", TINY, smooth="ema=0.3", about="Averaged."),
    Method("contrastive", "temporal-topk", TINY, shuffled=SHUFFLED, about="Contrasted."),
    Method("crosscoder, 3 positions", "crosscoder-3", TINY, shuffled=SHUFFLED, about="Windows."),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_settings_of_every_row_are_settings(method):
    arms = [tuning_arm(method, 1e-3), table_arm(method, 1e-3)]
    if method.shuffled is not None:
        arms.append(table_arm(method, 1e-3, shuffled=True))
    for arm in arms:
        assert arm.preset in PRESETS
        config = with_settings(preset(arm.preset, 128), list(arm.settings))
        assert config.data.n_segments * config.data.segment_length == method.batch
        assert config.optimizer.lr == 1e-3
        assert config.sae.d_sae == 1024
    assert method.twin in {one.name for one in METHODS}


def test_no_two_rows_share_a_run():
    store = open_store(Path(__file__).parent / "golden" / "store-v1.zarr")
    arms = [arm(method, rate) for method in METHODS for rate in (1e-3, 4e-3) for arm in (tuning_arm, table_arm)]
    arms += [table_arm(method, 4e-3, shuffled=True) for method in METHODS if method.shuffled is not None]
    configs: dict[str, object] = {}
    for run in (run for arm in arms for run in plan(store, arm, FULL)):
        assert configs.setdefault(run.name, run.config) == run.config, run.name


def test_a_shuffled_twin_sees_no_order():
    for method in METHODS:
        if method.shuffled is not None:
            arm = table_arm(method, 1e-3, shuffled=True)
            assert with_settings(preset(arm.preset, 128), list(arm.settings)).temporal.order != "text"


def test_tuning_and_table_share_no_seed_and_no_document():
    for method in METHODS:
        tuned, shown = tuning_arm(method, 1e-3), table_arm(method, 1e-3)
        assert (tuned.documents, shown.documents) == ("choose", "report")
        assert tuned.first_seed >= shown.first_seed + shown.n_seeds
        assert set(shown.vary) == {"init_seed", "data.seed"}


def test_without_a_tail_there_is_no_delta_ce_and_nothing_is_trained(monkeypatch, tmp_path):
    path = tmp_path / "text.zarr"
    with create_store(path, hooks={"h": 4}, sequence_length=8) as creation:
        for split in ("train", "eval"):
            creation.append(split, {"h": np.ones((2, 8, 4), np.float32)})
    monkeypatch.setattr(methods_run, "make_store", lambda *_: open_store(path))
    with pytest.raises(NoTailError, match="has no tail for h: "):
        compare_methods(Place(tmp_path), tmp_path / "out", Source("embedded", "pydocs", 10), FULL, FEW)
    assert [one.name for one in tmp_path.iterdir()] == ["text.zarr"]


def test_runs_that_the_guard_ended_are_listed():
    arms = {method.name: table_arm(method, 4e-3) for method in FEW}
    whole = {"name": "whole", "steps": 300, "train": {"steps": 300}, "ended": ""}
    short = {"name": "short", "steps": 1200, "train": {"steps": 2500}, "ended": "Batch 1200, step 1200: loss nan"}
    records = {arm: [whole, whole] for arm in arms.values()} | {arms["contrastive"]: [whole, short]}
    results = Results({}, {}, records)
    assert ended_early(results, arms) == ["contrastive, `short`: after 1,200 of 2,500 steps"]


def test_a_method_that_explodes_at_once_has_no_rate(tmp_path):
    store = open_store(Path(__file__).parent / "golden" / "store-v1.zarr")
    stable = table_arm(FEW[0], 4e-3)
    explodes = table_arm(FEW[2], 1e30)
    costs = training_costs(Place(tmp_path), store, {"stable": stable, "explodes": explodes}, FULL)
    assert costs["stable"].tokens_s and costs["explodes"].tokens_s is None and costs["explodes"].n_parameters
    assert list(json.loads((tmp_path / FILE).read_text())) == [plan(store, stable, FULL)[0].name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place, out = Place(tmp_path_factory.mktemp("methods")), tmp_path_factory.mktemp("out")
    asked, size = Source("embedded", "pydocs", 30_000), Size(30_000, most_seeds=2, shorter=60, name=" --quick")
    compare_methods(place, out, asked, size, FEW)
    return place, out, asked, size


@pytest.mark.slow
def test_the_page_has_every_row_and_the_rate_that_did_best(made):
    place, out, _, _ = made
    page, data = (out / "methods.md").read_text(), json.loads((out / "methods.json").read_text())
    assert [row["method"] for row in data["methods"]] == [method.name for method in FEW]
    for row in data["methods"]:
        tried = {float(rate): value for rate, value in data["tried"][row["method"]].items()}
        assert len(tried) == len(RATES)
        assert row["rate"] == max(tried, key=tried.get)
        assert len(row["values"]["explained_variance"]) == 2
        assert f"\n| {row['method']} | {sum(row['values']['explained_variance']) / 2:.4f}" in page
        assert row["method"] == "TopK" or row["minus"] == "TopK"
        assert ("x" in row) == (row["method"] == "TopK")
    of_x = data["methods"][0]["x"]
    assert f"\n| x, the activations | - | - | - | - | - | {of_x['slowness_to_x']:.3f}" in page
    assert page.count("crosscoder, 3 positions") >= 4
    costs = data["costs"]
    assert set(costs) == {method.name for method in FEW if not method.smooth}
    assert costs["TopK"]["n_parameters"] == 2 * 48 * 128 + 48 + 128 and costs["TopK"]["tokens_s"] > 0
    assert f"| TopK | {costs['TopK']['n_parameters']:,} | {costs['TopK']['tokens_s']:,.0f} | 1.00 |" in page
    assert (out / "methods.svg").read_bytes().startswith(b"<?xml")
    records = [load_record(path.parent) for path in place.runs("text").glob("*/tcsae.json")]
    assert {record["train"]["data"]["seed"] for record in records} == {0, 1, 100}


@pytest.mark.slow
def test_shuffled_twins_have_figures_of_their_own_runs(made):
    place, out, _, _ = made
    page, data = (out / "methods.md").read_text(), json.loads((out / "methods.json").read_text())
    plain, twins = ({row["method"]: row["values"] for row in data[key]} for key in ("methods", "shuffled"))
    assert list(twins) == [method.name for method in FEW if method.shuffled is not None]
    for row in data["shuffled"]:
        evaluations = [json.loads((place.runs("text") / run / "eval.json").read_text()) for run in row["runs"]]
        assert all("-shuffled" in one["name"] for one in evaluations)
        values = row["values"]["explained_variance"]
        assert values == [one["metrics"]["explained_variance"] for one in evaluations]
        own, base = (sum(plain[name]["explained_variance"]) for name in (row["method"], "TopK"))
        assert f"\n| {row['method']} | {(own - base) / 2:.4f} / {(sum(values) - base) / 2:.4f} | " in page


@pytest.mark.slow
def test_started_again_it_trains_nothing_and_writes_the_same_page(made, tmp_path):
    place, out, asked, size = made
    before = {path: path.stat().st_mtime_ns for path in place.work.rglob("sae_weights.safetensors")}
    compare_methods(place, tmp_path, asked, size, FEW)
    assert {path: path.stat().st_mtime_ns for path in place.work.rglob("sae_weights.safetensors")} == before
    for name in ("methods.md", "methods.json", "methods.svg"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
