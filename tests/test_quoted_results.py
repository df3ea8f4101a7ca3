"""Promise: what README quotes of the pages of results is what their numbers say."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcsae.paper.real_lm import FORMS as PRESETS_OF
from tcsae.paper.sections import FIGURES, SECTIONS, number
from tcsae.train.presets import DEFAULT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTION = README.partition("## Which temporal method?")[2].partition("\n## ")[0]
METHODS = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
PLANTED = json.loads((ROOT / "docs" / "results" / "planted.json").read_text())
REAL_LM = json.loads((ROOT / "docs" / "results" / "real-lm.json").read_text())
FORMS = {row["method"]: row for row in REAL_LM["methods"]}
PAPER = json.loads((ROOT / "docs" / "results" / "results.json").read_text())["questions"]
LABEL = next(name for name, preset, *_ in PRESETS_OF if preset == DEFAULT)
VALUES = {row["method"]: row["values"] for row in METHODS["methods"]}
SHUFFLED = {row["method"]: row["values"] for row in METHODS["shuffled"]}
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


def shuffled_gain(method: str, figure: str, twin: str = "TopK") -> float:
    """What the method's shuffled twin has over the row that both are compared with."""
    return float(np.mean(SHUFFLED[method][figure])) - mean(twin, figure)


def cost(method: str, figure: str = "explained_variance", twin: str = "TopK") -> float:
    return abs(mean(method, figure) - mean(twin, figure))


def test_the_table_is_that_of_the_methods_page():
    rows = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert head[1:] == list(COLUMNS) and len(rows) >= 5
    for name, *cells in rows:
        for cell, (figure, digits) in zip(cells, COLUMNS.values(), strict=True):
            assert cell == f"{mean(name, figure):.{digits}f}", (name, figure)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda one: one.key)
def test_the_papers_page_has_the_figures_of_its_numbers(section):
    page = (ROOT / "docs" / "results" / "README.md").read_text()
    text = page.partition(f"\n## {section.title}\n")[2].partition("\n## ")[0]
    _, _, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(PAPER[section.key])
    for (_, *cells), row in zip(rows, PAPER[section.key], strict=True):
        for cell, (name, values) in zip(cells, row["values"].items(), strict=True):
            value = np.mean([np.nan if one is None else one for one in values])
            assert cell.split()[0] == number(float(value), FIGURES[name].digits), (row["arm"], name)


FIRST = {
    "EV": ("explained_variance", 4),
    "delta CE": ("delta_ce", 3),
    "L0": ("l0", 1),
    "alive %": ("alive", 1),
    "Jaccard": ("jaccard_corrected", 3),
    "median persistence": ("rho_1_within_median", 3),
    "document probe": ("probe_document", 3),
}


def test_the_first_table_begins_with_the_real_language_model():
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")
    ]
    assert head[1:] == list(FIRST)
    for (name, *cells), form in zip(rows, ("x", "TopK", "BatchTopK", "TopK, ema-topk=0.3", LABEL), strict=False):
        assert name.startswith("SmolLM2") and (form != LABEL or DEFAULT in name)
        for cell, (figure, digits) in zip(cells, FIRST.values(), strict=True):
            assert cell == (of_x(figure, digits) if form == "x" else of_form(form, figure, digits)), (name, figure)
    assert [name.partition(":")[0] for name, *_ in rows[5:9]] == ["embedded"] * 4


def of_x(figure: str, digits: int) -> str:
    known = FORMS["layer 9: TopK"]["x"] | {"explained_variance": 1.0, "delta_ce": 0.0}
    return "-" if (value := known.get(figure)) is None else f"{value:.{digits}f}"


def of_form(form: str, figure: str, digits: int) -> str:
    value = at(9, form, figure)
    return f"{value / 40.96 if figure == 'alive' else value:.{digits}f}"


def at(layer: int, form: str, figure: str) -> float:
    return float(np.mean(FORMS[f"layer {layer}: {form}"]["values"][figure]))


def rises(layer: int, figure: str) -> str:
    return f"from {at(layer, 'TopK', figure):.3f} to {at(layer, LABEL, figure):.3f}"


@pytest.mark.parametrize(
    "sentence",
    [
        "it costs {:.4f} nats at layer 9 and {:.4f} at layer 19".format(
            *(at(layer, LABEL, "delta_ce") - at(layer, "TopK", "delta_ce") for layer in (9, 19))
        ),
        f"(Jaccard) goes {rises(9, 'jaccard_corrected')}, and {rises(19, 'jaccard_corrected')}",
        f"at layer 9 without the widest 1% persistence goes {rises(9, 'without_widest/rho_1_within')}",
        "`batchtopk`: {:.3f} nats at layer 9 (plain `topk` {:.3f})".format(
            *(at(9, form, "delta_ce") for form in ("BatchTopK", "TopK"))
        ),
    ],
)
def test_what_the_temporal_loss_buys_is_what_the_real_model_says(sentence):
    assert sentence in " ".join(README.split())
    assert abs(at(9, LABEL, "rho_1_within_median") - at(9, "TopK", "rho_1_within_median")) < 0.01
    assert at(9, LABEL, "probe_document") <= at(9, "TopK", "probe_document")
    assert at(9, "BatchTopK", "delta_ce") == min(at(9, form, "delta_ce") for form in ("TopK", "BatchTopK", LABEL))


def added(question: str, arm: str, figure: str, store: str = "text") -> float:
    """What an arm of the paper's page has over the plain SAE on the same store, seeds' mean."""

    def mean_of(name: str) -> float:
        (row,) = (
            one for one in PAPER[question] if one["latents"] == "all" and (one["arm"], one["store"]) == (name, store)
        )
        return float(np.mean(row["values"][figure]))

    return mean_of(arm) - mean_of("no temporal term")


def test_what_it_says_of_the_papers_questions_holds():
    text, term = " ".join(README.split()), "contrastive, weight 3"
    cost, gain = (added("shuffled", term, name) for name in ("explained_variance", "rho_8_within"))
    assert f"costs {-cost:.3f} of explained variance at 1,024 latents" in text
    assert added("shuffled", "contrastive, pairs at most 15 apart", "rho_8_within") == pytest.approx(gain, rel=0.1)
    smoothed = "no term, codes smoothed: ema-topk=0.2"
    assert f"at the same L0 costs {-added('smoothing', smoothed, 'explained_variance'):.3f} for a third" in text
    assert added("smoothing", smoothed, "rho_8_within") / gain == pytest.approx(1 / 3, abs=0.05)
    assert added("nulls", term, "rho_8_within", "permuted") / gain == pytest.approx(1 / 2, abs=0.1)
    assert added("nulls", term, "rho_8_within", "random-weights") / gain == pytest.approx(4, abs=0.5)
    jaccard = added("nulls", term, "jaccard_corrected")
    assert added("nulls", term, "jaccard_corrected", "permuted") / jaccard == pytest.approx(3 / 4, abs=0.05)
    assert added("nulls", term, "jaccard_corrected", "random-weights") / jaccard == pytest.approx(0.7, abs=0.03)
    assert "in random order the loss gains half as much at lag 8 and three quarters as much Jaccard" in text
    assert "never trained, four times as much at lag 8 and 0.7 times as much Jaccard" in text
    assert f"and {len(PAPER) - 1} more questions, on the embedded model" in text


SPEED = METHODS["costs"]["TopK"]["tokens_s"] / METHODS["costs"]["TFA"]["tokens_s"]
SMOOTHED = "TopK, hysteresis=2"
CROSSCODER = "crosscoder, 3 positions"


@pytest.mark.parametrize(
    "sentence",
    [
        f"{len(VALUES)} methods",
        f"`tfa` explains {cost('TFA'):.3f} more than `topk`",
        f"its shuffled twin {-shuffled_gain('TFA', 'explained_variance'):.3f} less)",
        f"at 1/{SPEED:.0f} of the speed",
        f"`{DEFAULT}`, the default, for {cost(LABEL):.3f} of EV and {cost(LABEL, 'delta_ce'):.3f} nats",
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


def gains(form: str, figure: str, twin: str = "TopK") -> float:
    return at(9, form, figure) - at(9, twin, figure)


def test_what_it_says_of_smollm2_holds():
    text = " ".join(SECTION.split())
    local, t_sae = ("local contrast", "TopK"), ("T-SAE", "BatchTopK")
    costs = [
        f"{gains(one, 'jaccard_corrected', twin):.3f}{of} for {gains(one, 'delta_ce', twin):.3f}"
        for (one, twin), of in ((local, " of Jaccard"), (t_sae, ""))
    ]
    assert f"local contrast gains {costs[0]} nats, T-SAE {costs[1]};" in text
    named = [at(9, one, "probe_document") for one in (CROSSCODER, "TopK")]
    assert (
        f"names {named[0]:.2f} of documents (plain {named[1]:.2f}) for {gains(CROSSCODER, 'delta_ce'):.3f} nats" in text
    )
    for name in ("persistent SAE", "TFA"):
        assert gains(name, "delta_ce") > 0 > max(gains(name, "rho_1_within"), gains(name, "jaccard_corrected"))


def test_the_methods_pages_shuffled_twins_are_those_of_its_numbers():
    page = (ROOT / "docs" / "results" / "methods.md").read_text()
    text = page.partition("\n## Does order matter?\n")[2].partition("\n## ")[0]
    _, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [name for name, *_ in rows] == list(SHUFFLED)
    minus = {row["method"]: row.get("minus") for row in METHODS["methods"]}
    figures = ("explained_variance", "rho_1_within", "rho_8_within", "jaccard_corrected")
    for name, *cells in rows:
        for cell, figure in zip(cells, figures, strict=True):
            gain = mean(name, figure) - mean(minus[name], figure)
            assert cell == f"{gain:.4f} / {shuffled_gain(name, figure, minus[name]):.4f}", (name, figure)


def test_what_it_says_of_shuffled_twins_holds():
    def pair(figure: str) -> str:
        shuffled, gain = shuffled_gain(LABEL, figure), mean(LABEL, figure) - mean("TopK", figure)
        assert shuffled / gain == pytest.approx(1 / 2, abs=0.05)
        return f"({shuffled:.3f} of {gain:.3f})"

    said = f"half of the rho(1) {pair('rho_1_within')} and half of the Jaccard {pair('jaccard_corrected')}"
    assert said in " ".join(SECTION.split())
    assert max(shuffled_gain("local contrast", one) for one in ("rho_1_within", "rho_8_within")) < 0


def test_what_it_says_of_all_methods_holds():
    trained = [name for name in VALUES if not name.startswith("TopK, ") and "untrained" not in name]
    assert max(mean(name, "jaccard_corrected") for name in trained) < mean(SMOOTHED, "jaccard_corrected")
    assert max(mean(name, "rho_1_within_median") for name in trained) < 0.03
    for name in ("TFA", "persistent SAE"):
        assert mean(name, "rho_1_within") < mean("TopK", "rho_1_within")
    penalised = mean("contrastive, position penalty", "position_share")
    assert penalised / mean("TopK", "position_share") == pytest.approx(1 / 3, abs=0.05)
    assert [one["held"] for one in PLANTED["verdicts"][1:3]] == [False, False]
