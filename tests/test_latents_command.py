"""Promise: `tcsae latents` measures each part once, says what it cannot, and keeps no figure of other weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_eval
from click.testing import CliRunner

from tcsae.evaluate.latents.latents_file import LATENTS, load_latents
from tcsae.evaluate.latents.parts import intervals
from tcsae.evaluate.latents.run import measure_latents
from tcsae.evaluate.latents.settings_of_latents import PARTS, Budget, LatentsRequest
from tcsae.evaluate.latents.shared_inputs import Chosen
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import WEIGHTS
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder

BUDGET = Budget(tokens=1000, sample=4, widest=2, sequences=3, events=2, places=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    model = toy_eval.make_model()
    return toy_eval.write_store(tmp_path_factory.mktemp("latents") / "a.zarr", model, {"train": 4, "eval": 40})


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """Two runs, measured."""
    runs = tmp_path_factory.mktemp("runs")
    toy_eval.make_run(runs, "a", toy_eval.make_sae(), store)
    toy_eval.make_run(runs, "b", toy_eval.make_sae(seed=1), store)
    return runs, measure_latents(store, runs, LatentsRequest(budget=BUDGET))


@pytest.fixture
def runs(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "runs")
    return tmp_path / "runs"


def command(store, runs, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), "latents", *arguments])


@pytest.mark.slow
def test_every_part_has_its_rows_and_every_figure_a_definition(store, done):
    runs, measured = done
    assert measured.refused == [] and list(measured.runs) == ["a", "b"] and measured.processor_s > 0
    held = load_latents(runs / "a", store.content)
    assert held is not None and held["parts"] == measured.runs["a"]["parts"]
    assert list(held["parts"]) == list(PARTS)
    for part in held["parts"].values():
        assert all(row.keys() <= part["definitions"].keys() for row in part["rows"].values())
        assert part["options"]["sample"] == 4 and part["processor_seconds"] >= 0 and part["n_tokens"] > 200
    assert held["parts"]["bits"]["rows"]["SAE"]["error_added"] == pytest.approx(0.01, abs=0.005)
    effects = held["parts"]["effects"]
    assert list(effects["rows"]) == ["SAE", "the widest 1% at once", "random directions"]
    assert effects["rows"]["SAE"].keys() == effects["definitions"].keys()
    columns = effects["columns"]
    assert 0 < effects["tail_tokens"] < 20_000
    assert len(effects["kl_by_lag"]) == 5 and {len(one) for one in effects["kl_by_lag"].values()} == {17}
    assert {len(column) for column in columns.values()} == {6} and sum(columns["is_sample"]) == 4
    assert all(len(one) == 5 for one in columns["promoted"]) and columns["promoted"][0][0].startswith("⟨")
    assert held["parts"]["tokens"]["rows"] == {} and "keeps no tokenizer" in held["parts"]["tokens"]["note"]
    assert "NaN" not in (runs / "a" / LATENTS).read_text()


def test_intervals_are_over_the_latents_drawn():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    columns = {"ce_lost": [*values[:-1].tolist(), None], "auc_text": (0.9 + 0.1 * values).tolist()}
    every = Chosen(np.arange(400), np.arange(0), np.arange(1))
    result = intervals(columns, every)
    low, high = result["ce_lost"]
    assert low < np.median(values[:-1]) < high and high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.25)
    share = (values > 0).mean()
    assert result["readable"] == pytest.approx([share - 0.049, share + 0.049], abs=0.015) and "kl_after" not in result
    assert intervals(columns, every._replace(are_drawn=False)) == {}
    assert intervals(columns, every._replace(sample=np.arange(7))) == {}


def test_what_is_done_is_not_done_again(store, runs):
    before = {name: (runs / name / LATENTS).read_bytes() for name in "ab"}
    again = measure_latents(store, runs, LatentsRequest(budget=BUDGET))
    assert {name: (runs / name / LATENTS).read_bytes() for name in "ab"} == before and again.processor_s < 1
    one_part = LatentsRequest(names=("a",), parts=("bits",), latents=(5,), budget=BUDGET)
    held = measure_latents(store, runs, one_part).runs["a"]
    assert held["parts"]["bits"]["options"]["latents"] == [5], "other options: measured again"
    assert held["parts"]["effects"]["options"]["latents"] == [] and list(held["parts"]) == list(PARTS)


def test_a_part_alone_is_what_it_is_among_all(store, runs):
    for part in PARTS:
        before = load_latents(runs / "a", store.content)["parts"][part]
        request = LatentsRequest(names=("a",), parts=(part,), force=True, budget=BUDGET)
        after = measure_latents(store, runs, request).runs["a"]["parts"][part]
        assert all(after[name] == before[name] for name in after.keys() - {"processor_seconds"}), part


@pytest.mark.parametrize("change", ["weights", "text", "figure", "store", "version"])
def test_figures_of_anything_else_are_none(store, runs, change):
    file, content = runs / "a" / LATENTS, store.content
    held = json.loads(file.read_text())
    if change == "weights":
        weights = (runs / "a" / WEIGHTS).read_bytes()
        (runs / "a" / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif change == "text":
        file.write_text(file.read_text()[:-20])
    elif change == "store":
        content = "f" * 64
    else:
        held["parts"]["bits"]["rows"]["SAE"]["bits"] = 0.0
        held["version"] += change == "version"
        file.write_text(json.dumps(held))
    assert load_latents(runs / "a", content) is None and load_latents(runs / "b", store.content) is not None


@pytest.mark.slow
def test_the_tables_name_cost_and_single_latents(store, runs):
    done = command(store, runs, "--tokens", "1000", "--sample", "2", "--widest", "1", "--part", "effects", "--details")
    assert done.exit_code == 0, done.output
    for text in ("a: random directions", "the latents looked at", "s of processor time", "steer side effect: rise of"):
        assert text in " ".join(done.output.split())
    assert "in bits a token" not in done.output, "measured before, and not asked for"
    as_json = command(store, runs, "--part", "bits", "--tokens", "1000", "--json")
    document = json.loads(as_json.output[as_json.output.index("{") : as_json.output.rindex("}") + 1])
    assert document["runs"].keys() == {"a", "b"} and document["runs"]["a"]["parts"]["bits"]["rows"]["SAE"]["bits"] > 0


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["--latents", "3,x"], 2, "give numbers of latents with commas between"),
        (["--latents", "40", "--part", "effects"], 1, "--latents 40: the SAE has latents 0 to 39. Name some of these."),
        (["--run", "dense"], 1, "no run with a sparse code that can be measured. dense: its code is dense (gelu)"),
        (["--run", "wide"], 1, "its latents write to 2 positions at once (a crosscoder)"),
        (["--run", "nobody"], 1, "nobody"),
    ],
)
def test_what_cannot_be_is_one_line(store, runs, arguments, code, says):
    dense = SparseAutoencoder(SaeConfig(d_model=toy_eval.WIDTH, d_sae=8, activation="gelu"))
    toy_eval.make_run(runs, "dense", dense, store)
    wide = SparseAutoencoder(SaeConfig(d_model=toy_eval.WIDTH, d_sae=8, activation="topk", k=2, window=2))
    for tensor in wide.parameters():
        tensor.data = torch.randn(tensor.shape)
    toy_eval.make_run(runs, "wide", wide, store)
    done = command(store, runs, *arguments)
    assert done.exit_code == code and says in " ".join(done.output.split()), done.output
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("most, fewer", [(10**9, False), (2_000, True), (1, True)])
def test_the_tail_keeps_to_its_budget(store, runs, most, fewer):
    budget = replace(BUDGET, sequences=8, events=6, places=6, tail_tokens=most)
    request = LatentsRequest(names=("a",), parts=("effects",), budget=budget)
    effects = measure_latents(store, runs, request).runs["a"]["parts"]["effects"]
    full = 10 * toy_eval.LENGTH * (8 + 3 * 6 + 4 * 6)
    assert (effects["tail_tokens"] < 0.4 * full) == fewer
    assert effects["tail_tokens"] < max(1.5 * most, 2_500), "at least one sequence, event and place"


def test_without_a_tail_reconstruction_is_all_there_is(tmp_path):
    model = toy_eval.make_model()
    store = toy_eval.write_store(tmp_path / "a.zarr", model, {"train": 4, "eval": 40}, with_tail=False)
    toy_eval.make_run(tmp_path / "runs", "a", toy_eval.make_sae(), store)
    held = measure_latents(store, tmp_path / "runs", LatentsRequest(parts=("effects",), budget=BUDGET)).runs["a"]
    effects = held["parts"]["effects"]
    assert "no residual stream" in effects["note"] and effects["rows"]["SAE"]["ce_lost"] is None
    assert effects["rows"]["SAE"]["ev_lost"] is not None and len(effects["columns"]["ev_lost"]) == 6
    before = (tmp_path / "runs" / "a" / LATENTS).read_bytes()
    measure_latents(store, tmp_path / "runs", LatentsRequest(parts=("effects",), budget=BUDGET))
    assert (tmp_path / "runs" / "a" / LATENTS).read_bytes() == before, "still none, so nothing to do"


def test_an_sae_that_is_never_on_has_no_figures_and_no_error(store, tmp_path):
    sae = toy_eval.make_sae("relu")
    sae.b_enc.data[:] = -1e6
    toy_eval.make_run(tmp_path / "runs", "off", sae, store)
    held = measure_latents(store, tmp_path / "runs", LatentsRequest(budget=BUDGET)).runs["off"]["parts"]
    assert held["bits"]["rows"]["SAE"]["bits"] is None and held["effects"]["note"] == "No latent is live."
    assert held["text"]["rows"]["SAE"]["auc_text"] is None
