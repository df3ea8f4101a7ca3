"""Promise: what README quotes of the pages of results is what their numbers say."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().partition("## Which temporal method?")[2].partition("\n## ")[0]
METHODS = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
PLANTED = json.loads((ROOT / "docs" / "results" / "planted.json").read_text())
VALUES = {row["method"]: row["values"] for row in METHODS["methods"]}
COLUMNS = {
    "EV": ("explained_variance", 4),
    "delta CE": ("delta_ce", 3),
    "rho(1)": ("rho_1_within", 3),
    "median rho(1)": ("rho_1_within_median", 3),
    "Jaccard": ("jaccard_corrected", 3),
    "position share": ("position_share", 3),
}


def mean(method: str, figure: str) -> float:
    return float(np.mean(VALUES[method][figure]))


def cost(method: str, figure: str = "explained_variance", twin: str = "TopK") -> float:
    return abs(mean(method, figure) - mean(twin, figure))


def test_the_table_is_that_of_the_methods_page():
    rows = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert head[1:] == list(COLUMNS) and len(rows) >= 5
    for name, *cells in rows:
        for cell, (figure, digits) in zip(cells, COLUMNS.values(), strict=True):
            assert cell == f"{mean(name, figure):.{digits}f}", (name, figure)


SPEED = METHODS["costs"]["TopK"]["tokens_s"] / METHODS["costs"]["TFA"]["tokens_s"]
SMOOTHED = "TopK, hysteresis=2"
CROSSCODER = "crosscoder, 3 positions"


@pytest.mark.parametrize(
    "sentence",
    [
        f"{len(VALUES)} methods",
        f"`tfa` explains {cost('TFA'):.3f} more than `topk`",
        f"at 1/{SPEED:.0f} of the speed",
        f"`temporal-topk` for {cost('contrastive'):.3f} of EV and {cost('contrastive', 'delta_ce'):.3f} nats",
        f"for {cost('local contrast'):.3f} of EV",
        f"for {cost(SMOOTHED):.3f} of EV: more overlap",
        f"names {mean(CROSSCODER, 'probe_document'):.2f} of documents (plain {mean('TopK', 'probe_document'):.2f})",
        f"for {cost(CROSSCODER):.3f} of EV and {cost(CROSSCODER, 'delta_ce'):.3f} nats",
        f"{cost('T-SAE', 'rho_1_within', 'matryoshka'):.2f} of rho(1)",
        f"for {cost('T-SAE', twin='matryoshka'):.3f} of",
        "slow features gain {}, {} and {} of F1".format(*PLANTED["verdicts"][1]["figure"].split(", ")),
    ],
)
def test_its_sentences_have_the_pages_figures(sentence):
    assert " ".join(sentence.split()) in " ".join(SECTION.split())


def test_what_it_says_of_all_methods_holds():
    trained = [name for name in VALUES if not name.startswith("TopK, ") and "untrained" not in name]
    assert max(mean(name, "jaccard_corrected") for name in trained) < mean(SMOOTHED, "jaccard_corrected")
    assert max(mean(name, "rho_1_within_median") for name in trained) < 0.03
    for name in ("TFA", "persistent SAE"):
        assert mean(name, "rho_1_within") < mean("TopK", "rho_1_within")
    penalised = mean("contrastive, position penalty", "position_share")
    assert penalised / mean("TopK", "position_share") == pytest.approx(1 / 3, abs=0.05)
    assert [one["held"] for one in PLANTED["verdicts"][1:3]] == [False, False]
