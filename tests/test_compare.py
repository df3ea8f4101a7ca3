"""Promise: `tcsae compare` says what one SAE costs and gains against another, in figures and in two sentences."""

import json
import re
from pathlib import Path

import pytest
import toy_eval as toy
from click.testing import CliRunner, Result

from tcsae.evaluate import headline
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.layout import record_digest


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    store = toy.write_store(folder / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    for name, seed in (("plain", 0), ("temporal", 4)):
        toy.make_run(folder / "runs", name, toy.make_sae(seed=seed), store)
    record = folder / "runs" / "temporal" / "tcsae.json"
    values = json.loads(record.read_text())
    values["train"] = {**values.get("train", {}), "temporal": {"weight": 3.0}}
    files = values.pop("files")
    record.write_text(json.dumps({**values, "files": files | {"tcsae.json": record_digest(values)}}))
    return folder


def call(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [f"--store={place / 'a.zarr'}", f"--runs={place / 'runs'}", "compare", *arguments])


def evaluation(place: Path, name: str) -> dict:
    return json.loads((place / "runs" / name / "eval.json").read_text())


@pytest.mark.slow
def test_two_runs_need_no_names_and_end_on_two_sentences(place):
    done = call(place)
    assert done.exit_code == 0, done.output
    assert "temporal minus plain, paired over 10 documents" in done.stdout
    ours, theirs = evaluation(place, "temporal"), evaluation(place, "plain")
    said = next(line for line in done.stdout.splitlines() if line.startswith("temporal reconstructs"))
    for one in (ours, theirs):
        assert f"{one['metrics']['explained_variance']:.4f}" in said
        assert f"{headline.delta_ce(one['metrics']):.3f}" in said
    assert f"Every figure, interval and definition: {place / 'runs'}/temporal/eval.json" in done.stdout
    assert "open " not in done.stdout, "there is no report"
    rows = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│ ")]
    assert rows[-3:] == ["x itself", "plain", "temporal"]


def test_each_column_has_the_figure_of_its_name(place):
    done = call(place, "--json")
    *_, row = json.loads(done.stdout)["rows"]
    one = evaluation(place, row["run"])
    metrics, measures = one["metrics"], one["temporal"]["groups"]["all"]["measures"]
    expected = {
        "run": "temporal",
        "EV": metrics["explained_variance"],
        "delta CE": metrics["ce_loss_with_sae"] - metrics["ce_loss_without_sae"],
        "L0": metrics["l0"],
        "alive %": 100 * (1 - metrics["dead_fraction"]),
        "Jaccard": measures["jaccard_corrected"]["value"],
        "median persistence": measures["rho_1_within_median"]["value"],
        "document probe": measures.get("probe_document", {}).get("value"),  # too little text here
    }
    assert row == expected
    figures = [value for value in expected.values() if value is not None]
    assert len(set(figures)) == len(figures) >= 6, "no two are alike, so that none can stand for another"


def test_details_print_variants_and_equal_figures(place):
    short, full = call(place).stdout, call(place, "--details").stdout
    assert "explained_variance_saebench" in full and "explained_variance_saebench" not in short
    assert re.search(r"\d+ more figures, equal ones and variants: --details", short)
    assert "--details" not in full
    assert "│ l0  " in full and "│ l0  " not in short, "both have as many active latents"


def test_smoothed_codes_are_a_run_of_their_own(place):
    done = call(place, "--run", "temporal", "--with", "plain", "--with", "plain+ema=0.3", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert [row["run"] for row in printed["rows"]] == ["x itself", "plain", "plain+ema=0.3", "temporal"]
    assert [one["with"] for one in printed["comparisons"]] == ["plain", "plain+ema=0.3"]
    assert not (place / "runs" / "temporal" / "eval+ema=0.3.json").exists(), "only what was named is smoothed"
    for one in printed["comparisons"]:
        assert one["differences"]["mse"]["interval"] and one["sentences"]


@pytest.mark.parametrize("other", ["plain", "plain+ema=0.3"])
def test_the_other_run_alone_can_be_named(place, other):
    done = call(place, "--with", other, "--json")
    assert done.exit_code == 0, done.output
    assert [row["run"] for row in json.loads(done.stdout)["rows"]] == ["x itself", other, "temporal"]


def test_where_there_are_not_two_the_runs_have_to_be_named(place, tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    toy.make_run(tmp_path / "runs", "single", toy.make_sae(), store)
    done = call(tmp_path)
    assert done.exit_code == 1
    assert "holds 1 runs (single); without --run and --with compare takes two. Name them: --run A" in done.stderr
    for named in (("--run", "temporal"), ()):
        assert "Unknown run 'planin'. Did you mean 'plain'?" in call(place, *named, "--with", "planin").stderr


@pytest.mark.parametrize(
    "bounds, word", [((0.1, 0.2), "better than"), ((-0.2, -0.1), "worse than"), ((-0.1, 0.1), "as well as")]
)
def test_a_word_stands_only_where_the_interval_leaves_out_zero(place, bounds, word):
    call(place)
    ours, theirs = evaluation(place, "temporal"), evaluation(place, "plain")
    differences = {"explained_variance": {"interval": bounds}, headline.POOLED: {"interval": bounds}}
    cost, gain = headline.sentences(ours, theirs, differences)
    assert f"reconstructs {word} plain" in cost
    more = {"better": "more", "worse": "less", "as": "no more"}[word.split()[0]]
    assert f"its code is {more} persistent" in gain
    assert "its median latent no more" in gain, "of which nothing is known"


def test_without_temporal_measures_or_a_tail_there_is_one_sentence(place):
    call(place)
    ours, theirs = (evaluation(place, name) | {"temporal": None} for name in ("temporal", "plain"))
    for one in (ours, theirs):
        one["metrics"] |= dict.fromkeys(("ce_loss_without_sae", "ce_loss_with_sae"))
    (said,) = headline.sentences(ours, theirs, {})
    assert "cross-entropy" not in said
    assert headline.shown(headline.rows([ours])[0]) == ["x itself", "1.0000", *[None] * 6]
