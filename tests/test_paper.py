"""Promise: `tcsae paper --quick` runs every experiment through the real stages, to the signs that it should have."""

import json
import re

import pytest
from click.testing import CliRunner

from tcsae.paper.sections import KEYS, SECTIONS, TABLE
from tcsae.shared.commands.group import cli

pytestmark = pytest.mark.slow


def run(*args: str):
    return CliRunner().invoke(cli, ["paper", *map(str, args)], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of results, the options that made it, what was printed)."""
    folder = tmp_path_factory.mktemp("paper")
    options = ("--quick", "--work", folder / "work", "--out", folder / "results")
    result = run(*options)
    assert result.exit_code == 0, result.output
    return folder / "results", options, result.output


@pytest.fixture(scope="module")
def data(made):
    return json.loads((made[0] / "results.json").read_text())


def test_the_page_answers_every_question_and_shows_every_picture(made):
    text = (made[0] / "README.md").read_text()
    assert all(f"## {section.title}\n" in text for section in SECTIONS)
    assert "A quick run" in text
    shown = re.findall(r"\]\((\w+\.svg)\)", text)
    assert len(shown) == sum(bool(section.picture) for section in SECTIONS)
    assert all((made[0] / picture).stat().st_size > 5000 for picture in shown)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > len(SECTIONS)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert not re.search(r"^\|.*\n[^|\n]", text, re.MULTILINE), "a line right after a table would be one of its rows"


def test_every_line_has_its_figures(data):
    assert set(data["questions"]) == set(data["predictions"]) == set(KEYS)
    for section in SECTIONS:
        lines = data["questions"][section.key]
        assert len(lines) == len(section.lines)
        for line in lines:
            assert set(line["values"]) == set(section.figures)
            assert all(len(values) == len(line["runs"]) for values in line["values"].values())


def test_signs(data):
    """Untrained networks are below the mean output, trained ones above; more latents explain more."""
    rows = [
        row for row in data["questions"][TABLE] if "as many latents" not in row["arm"]
    ]  # a quick run's steps are few
    assert rows
    for row in rows:
        trained = row["preset"].startswith("written")
        for metrics in row["metrics"]:
            assert (metrics["explained_variance_legacy"] > 0) == trained
    for key in ("frontier", "windows", "without", "default"):
        lines = [line for line in data["questions"][key] if line["latents"] != "x"]
        assert lines and all(min(line["values"]["explained_variance"]) > 0.3 for line in lines)
    rungs = [line["values"]["explained_variance"][0] for line in data["questions"]["sparsity"]]
    assert rungs[0] < rungs[2] < rungs[-1]
    smoothed = {line["arm"]: line["values"] for line in data["questions"]["smoothing"]}
    plain, mean = smoothed["no temporal term"], smoothed["no term, codes smoothed: mean=2"]
    assert mean["explained_variance"] < plain["explained_variance"]
    assert mean["slowness_to_x"] < plain["slowness_to_x"]
    untrained = next(iter(data["predictions"][TABLE].values()))
    assert untrained, "networks that took no step give the paper's figures"


def test_again_it_does_nothing_twice(made):
    out, options, first = made
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = run(*options)
    assert again.exit_code == 0
    assert "trained already" not in first
    assert "tokens/s" not in again.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_one_question_alone(made, tmp_path):
    result = run("--quick", "--work", made[1][2], "--out", tmp_path, "--only", "lengths")
    assert result.exit_code == 0
    assert (tmp_path / "README.md").exists()


def test_an_unknown_question_is_refused():
    result = CliRunner().invoke(cli, ["paper", "--only", "lenghts"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: Unknown question 'lenghts'")
    assert "lengths" in result.output


@pytest.mark.parametrize("option", ["--store", "--runs"])
def test_it_has_stores_and_runs_of_its_own(option):
    result = CliRunner().invoke(cli, [option, "a", "paper", "--quick"])
    assert result.exit_code == 2
    assert f"{option} is not for paper, which has stores and runs of its own below --work" in result.output


def test_any_model_and_text(make_lm, tiny_corpus, tmp_path):
    from transformers import GPTNeoXConfig

    shape = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
    model = make_lm(tmp_path / "lm", GPTNeoXConfig(vocab_size=300, max_position_embeddings=128, **shape))
    given = ("--model", model, "--dataset", tiny_corpus, "--tokens", "4K", "--only", "position", "--only", "nulls")
    result = run("--quick", *given, "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| activations | lm, blocks.4.hook_resid_post, width 16;" in text
    assert "## Consistent over time, or only over position?" in text
    assert "permuted" in text


def test_a_short_context_is_refused_in_one_line(tiny_lm, tiny_corpus, tmp_path):
    given = ("--model", tiny_lm, "--dataset", tiny_corpus, "--work", tmp_path / "work", "--out", tmp_path / "out")
    result = CliRunner().invoke(cli, ["paper", "--quick", *map(str, given)])
    assert result.exit_code == 1
    assert "Error: A sequence length of 128 is over the context of tiny" in result.output
