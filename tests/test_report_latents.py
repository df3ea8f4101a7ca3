"""Promise: a report shows what `tcsae latents` measured of the SAEs it is about, and nothing of other weights."""

import json
import shutil

import pytest
import toy_eval

from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.latents.latents_file import LATENTS
from tcsae.evaluate.latents.run import measure_latents
from tcsae.evaluate.latents.settings_of_latents import MEANINGS, TITLES, Budget, LatentsRequest
from tcsae.evaluate.report.report import write_report
from tcsae.evaluate.run import evaluate_runs

pytestmark = pytest.mark.slow
BUDGET = Budget(tokens=1000, sample=4, widest=2, sequences=3, events=2, places=2)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(store, runs, folder of the report): the latents of a, not of b."""
    place = tmp_path_factory.mktemp("report")
    store = toy_eval.write_store(place / "a.zarr", toy_eval.make_model(), {"train": 4, "eval": 40})
    for i, name in enumerate("ab"):
        toy_eval.make_run(place / "runs", name, toy_eval.make_sae(seed=i), store)
    evaluate_runs(store, place / "runs", EvalRequest(temporal=False))
    measure_latents(store, place / "runs", LatentsRequest(names=("a",), budget=BUDGET))
    write_report(store, place / "runs", place / "report")
    return store, place / "runs", place / "report"


def test_each_part_is_a_table_with_its_meaning_and_glossary(reported):
    page = (reported[2] / "index.html").read_text()
    for part, title in TITLES.items():
        if part != "tokens":  # this store keeps no tokenizer
            assert title in page and MEANINGS[part].replace("'", "&#39;") in page
    assert TITLES["tokens"] not in page
    for slug in ("ce-lost", "bits", "twins", "auc-text"):
        assert f'glossary.html#{slug}"' in page, slug
    assert "random directions" in page and "shifted in time" in page


def test_single_latents_lead_to_their_features(reported):
    _, runs, folder = reported
    held = json.loads((runs / "a" / LATENTS).read_text())["parts"]["effects"]["columns"]
    page = (folder / "runs" / "a" / "index.html").read_text()
    assert all(f'href="features.html#latent={latent}"' in page for latent in held["latent"])
    assert "What are single latents for?" in page and "KL after an ablation" in page
    assert "What are single latents for?" not in (folder / "runs" / "b" / "index.html").read_text()


def test_a_report_is_of_the_figures_that_are_there(reported, tmp_path):
    store, runs, folder = reported
    shutil.copytree(runs, tmp_path / "runs")
    shutil.copytree(folder, tmp_path / "report")
    assert not write_report(store, tmp_path / "runs", tmp_path / "report").is_new
    file = tmp_path / "runs" / "a" / LATENTS
    file.write_text(file.read_text().replace('"bits"', '"bits "', 1))  # damaged
    assert write_report(store, tmp_path / "runs", tmp_path / "report").is_new
    assert "worth it?" not in (tmp_path / "report" / "index.html").read_text()
