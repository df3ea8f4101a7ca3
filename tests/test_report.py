"""Promise: `tcsae report` writes one whole folder, says what it left out, replaces nothing that is not its own, and
shows text as text; `tcsae feature` shows the same of one latent in the terminal.
"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from tcsae.evaluate.report.pages.page_files import script
from tcsae.evaluate.report.pages.plots import Point, Series, curves_by_number, frontier, histogram, lines
from tcsae.evaluate.report.pages.printed import PRINTED, closed_form
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_evaluation
from tcsae.shared.store.reader import open_store


@pytest.fixture(scope="module")
def written(reported) -> Path:
    return reported


def value(path: Path):
    """What a data script hands to the page."""
    text = path.read_text(encoding="ascii")
    match = re.fullmatch(r"tcsae\.\w+\((.*)\);\n", text, flags=re.DOTALL)
    return json.loads(match[1])


def runs_of(evaluated: Path) -> list[str]:
    content = open_store(evaluated / "a.zarr").content
    return [path.name for path in (evaluated / "runs").iterdir() if load_evaluation(path, content)]


class Tags(HTMLParser):
    """Collects what a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.mark.slow
def test_every_page_and_every_link_is_there(written, evaluated):
    from urllib.parse import unquote

    pages, glossary = list(written.rglob("*.html")), (written / "glossary.html").read_text()
    assert len(pages) == 3 + 3 * len(runs_of(evaluated)), "overview, comparison, glossary; figures, features and map"
    for page in pages:
        parser = Tags()
        parser.feed(page.read_text())
        assert len(parser.tags) > 30
        for tag, attributes in parser.tags:
            assert not {name for name in attributes if name.startswith("on")}, "no handler in the markup"
            link = attributes.get("href") or attributes.get("src")
            if link is None or link.startswith("data:"):
                continue
            assert ":" not in link.split("/")[0], f"{tag} points outside: {link}"
            path = unquote(link.split("#")[0])
            assert not path or (page.parent / path).is_file(), f"{page}: {link}"
            if link.startswith("#m"):
                assert f'id="{link[1:]}"' in page.read_text()
            if "glossary.html#" in link:
                assert f'id="{link.split("#")[1]}"' in glossary, link


@pytest.mark.slow
def test_an_sae_s_page_says_what_few_latents_make_of_a_figure(written, evaluated):
    held = {name: json.loads((evaluated / "runs" / name / "eval.json").read_text()) for name in runs_of(evaluated)}
    measured = {name: one["temporal"] for name, one in held.items() if one["temporal"]}
    assert len(measured) > 1
    for name, temporal in measured.items():
        page = (written / "runs" / name / "index.html").read_text()
        section = page[page.index('id="h-latents"') :].partition("</section>")[0]
        (row,) = (one for one in section.split("<tr>") if ">slowness_to_x<" in one)
        shown = [float(one) for one in re.findall(r'data-value="([^"]+)"', row)]
        groups = temporal["groups"]
        assert shown[0] == groups["all"]["measures"]["slowness_to_x"]["value"]
        assert shown[-3] == groups["without_widest"]["measures"]["slowness_to_x"]["value"]
        assert shown[-2] == groups["all"]["position_removed"]["slowness_to_x"]
    assert "x smoothed" in (written / "index.html").read_text()


def test_what_was_left_out_is_said_with_the_reason(written, evaluated):
    page = (written / "index.html").read_text()
    section = page[page.index('id="excluded"') :]
    assert "<dt>unfinished</dt><dd>Its training is unfinished (no tcsae.json). Go on: tcsae train</dd>" in section
    assert re.search(r"<dt>relu-l1\S*</dt><dd>no figures: its SAE has taken 0 optimiser steps", section)
    assert page.count('class="no"') >= len(runs_of(evaluated))


@pytest.mark.slow
def test_the_same_report_is_not_written_again(written, evaluated, toy_report, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    (copy / "trace").write_text("kept if nothing is written")
    done = toy_report.call(evaluated, "report", "--out", str(copy))
    assert done.exit_code == 0
    assert "Nothing has changed since it was written" in done.stderr
    assert (copy / "trace").exists()
    assert "unfinished: left out. Its training is unfinished" in done.stderr
    name = next(name for name in runs_of(evaluated) if name.startswith("topk"))
    done = toy_report.call(evaluated, "report", "--out", str(copy), "--run", name, "--max-tokens", "500")
    assert done.exit_code == 0, done.output
    assert not (copy / "trace").exists(), "another question, another report"
    assert [path.name for path in (copy / "runs").iterdir()] == [name]
    (copy / "trace").write_text("")
    toy_report.call(evaluated, "report", "--out", str(copy), "--run", name, "--max-tokens", "500", "--force")
    assert not (copy / "trace").exists()
    assert "Report of 1 SAE, " in done.stdout
    assert str(copy / "index.html") in done.stdout


def test_nothing_but_a_report_is_replaced(evaluated, toy_report, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    done = toy_report.call(evaluated, "report", "--out", str(tmp_path / "mine"))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith(
        "mine is there, and it is no report. Give another --out, or move it away."
    )
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    assert "is no report" in toy_report.call(evaluated, "report", "--out", str(tmp_path / "file")).stderr


@pytest.mark.slow
def test_a_report_that_fails_leaves_the_old_one(written, evaluated, toy_report, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    before = sorted(str(path) for path in copy.rglob("*"))
    monkeypatch.setattr("tcsae.evaluate.report.report.overview", lambda *_: 1 / 0)
    less = ("--run", runs_of(evaluated)[0], "--max-tokens", "500")
    done = toy_report.call(evaluated, "report", "--out", str(copy), "--force", *less)
    assert isinstance(done.exception, ZeroDivisionError)
    assert sorted(str(path) for path in copy.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_without_any_figures_there_is_no_report(evaluated, toy_report, tmp_path):
    shutil.copytree(evaluated / "runs", tmp_path / "runs")
    shutil.copytree(evaluated / "a.zarr", tmp_path / "a.zarr")
    for file in (tmp_path / "runs").glob("*/eval.json"):
        file.unlink()
    done = toy_report.call(tmp_path, "report")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: No run in {tmp_path / 'runs'} has figures to report. ")
    assert "Not evaluated on this store: tcsae eval --run" in done.stderr
    assert not (tmp_path / "report").exists()
    name = runs_of(evaluated)[0]
    result = json.loads((evaluated / "runs" / name / "eval.json").read_text())
    (tmp_path / "runs" / name / "eval.json").write_text(json.dumps(result | {"weights": "other"}))
    done = toy_report.call(tmp_path, "report", "--run", name)
    assert "Its evaluation is of other weights, or of another store: tcsae eval --run" in done.stderr
    (tmp_path / "runs" / name / "eval.json").write_text(json.dumps(result | {"definition_version": 0}))
    assert "by the definitions of another version" in toy_report.call(tmp_path, "report", "--run", name).stderr


def test_text_of_the_corpus_is_data_everywhere(written, toy_report):
    for file in written.rglob("*"):
        if file.suffix not in (".html", ".js") or file.parent.name == "page":
            continue
        text = file.read_text(encoding="utf-8")
        assert "hacked" not in text, "whole words of text stand nowhere: sequences are token numbers"
        assert "<img" not in text
        if file.suffix == ".js":
            assert "<" not in text
            assert text.isascii()
    vocabulary = value(written / "sequences" / "vocabulary.js")
    assert "<" in vocabulary.values()
    row = next(row for row in value(written / "sequences" / "0.js").values() if row[1] == 0)
    text = "".join(vocabulary[str(token)] for token in row[2])
    assert toy_report.HOSTILE[:40] in text
    assert "\\x1b" in vocabulary.values()
    assert not re.search(r"[\u202e\u2028\x00-\x1f]", "".join(vocabulary.values()))


def test_a_script_cannot_be_ended_by_its_data():
    text = script("index", {"a": "</script><!--\u2028\u2029\U0001f600\ud800", "b": None})
    assert text.isascii()
    assert "<" not in text
    assert text.count("\n") == 1
    with pytest.raises(ValueError, match="Out of range"):
        script("index", float("nan"))


def test_the_index_holds_every_measure_of_every_live_latent(written, evaluated):
    name = next(name for name in runs_of(evaluated) if name.startswith("temporal-matryoshka"))
    folder = written / "runs" / name / "data"
    index = value(folder / "index.js")
    n = len(index["latents"])
    assert n > 5
    assert {len(column) for column in index["columns"].values()} == {n}
    assert len(index["fires"]) == len(index["promotes"]) == len(index["group"]) == n
    assert set(index["group"]) == {0, 1}
    chunks: dict = {}
    for file in folder.glob("[0-9]*.js"):
        chunks |= value(file)
    assert sorted(map(int, chunks)) == index["latents"]
    store = open_store(evaluated / "a.zarr")
    for latent, feature in chunks.items():
        at = index["latents"].index(int(latent))
        assert len(feature["rho"]) == 32
        assert len(feature["up"]) == len(feature["down"]) == 8
        peaks = [max(values) for _, quantile, _, values in feature["contexts"] if quantile is None]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == index["columns"]["max"][at]
        for sequence, _, positions, values in feature["contexts"]:
            assert len(positions) == len(values)
            assert max(positions) < store.eval.lengths[sequence]
            held = value(written / "sequences" / f"{sequence // 32}.js")[str(sequence)]
            assert held[2] == store.eval.tokens[sequence, : store.eval.lengths[sequence]].tolist()


def test_the_paper_s_table_stands_beside_ours(written, evaluated):
    page = (written / "index.html").read_text()
    section = page[page.index('id="paper"') : page.index('id="excluded"')]
    assert "Run 2: Xavier initialisation" in section
    assert "printed in the paper" in section
    assert "closed form for this store" in section
    assert "here: no step, as logged" in section
    assert "Run 0" not in section, "its preset was not run"
    assert "249.1" in section
    name = next(name for name in runs_of(evaluated) if name.startswith("logged-run2"))
    ours = load_evaluation(evaluated / "runs" / name, open_store(evaluated / "a.zarr").content)["metrics"]
    assert f"{ours['l0']:.4g}" in section


def test_the_closed_form_gives_the_printed_figures():
    """d = F = 512, |x| = 15.8, E[|x|^2 / |x - mu|^2] = 1.89 as measured at the paper's place."""
    plain = closed_form(512, 512, 15.8, 1.89)
    assert plain["l0"] == 256
    assert plain["l1"] == pytest.approx(PRINTED["run2"]["l1"], rel=0.03)
    assert plain["l2_ratio"] == pytest.approx(PRINTED["run2"]["l2_ratio"], abs=0.04)
    assert plain["explained_variance_legacy"] == pytest.approx(PRINTED["run2"]["explained_variance_legacy"], abs=0.12)
    normed = closed_form(512, 512, 15.8, 1.89, normed=True)
    assert normed["l1"] == pytest.approx(PRINTED["run4"]["l1"], rel=0.06)
    assert normed["l2_ratio"] == pytest.approx(PRINTED["run4"]["l2_ratio"], abs=0.03)
    assert normed["explained_variance_legacy"] == pytest.approx(PRINTED["run4"]["explained_variance_legacy"], abs=0.12)


def test_figures_take_the_page_s_colours():
    import numpy as np

    curve = Series("a <b>", [1, 2, 3], [0.1, 0.3, 0.2])
    figures = [
        lines([curve, curve], ("x", "y"), [(0.1, "null")]),
        curves_by_number([(1, curve), (2, curve)], ("x", "y")),
        frontier([Point(1, 16, 0.8, [0.7, 0.9]), Point(2, 16, 0.9)], ("L0", "EV")),
        histogram([("first", np.arange(50.0)), ("rest", np.arange(20.0))], "dwell"),
        histogram([("all", np.array([0.0, 1e-4, 1e-2, np.nan]))], "density", log=True),
    ]
    for svg in figures:
        assert svg.startswith("<svg ")
        assert svg.endswith("</svg>")
        assert "var(--c1)" in svg
        assert "#0" not in svg.replace("url(#", "").replace('href="#', ""), "no fixed colour"
        assert "<style" not in svg, "it would hold for the whole page"
        assert "<b>" not in svg
    assert histogram([("none", np.array([np.nan]))], "dwell") == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--id", "3"], "runs. Name one: --run "),
        (["--run", "nowhere", "--id", "3"], "Unknown run 'nowhere'."),
        (["--run", "TOPK", "--id", "4800"], "has latents 0 to 47."),
        (["--run", "unfinished", "--id", "0"], "its training is unfinished"),
    ],
)
def test_feature_says_what_is_wrong(evaluated, toy_report, arguments, message):
    topk = next(name for name in runs_of(evaluated) if name.startswith("topk"))
    done = toy_report.call(evaluated, "feature", *(topk if one == "TOPK" else one for one in arguments))
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_one_feature_in_the_terminal(evaluated, toy_report, written, monkeypatch):
    name = next(name for name in runs_of(evaluated) if name.startswith("topk"))
    latent = value(written / "runs" / name / "data" / "index.js")["latents"][0]
    done = toy_report.call(evaluated, "feature", "--run", name, "--id", str(latent), "--contexts", "2")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    for text in (f"Latent {latent} of {name}", "persistence", "fires on", "promotes", "suppresses", "near, by decoder"):
        assert text in done.stdout, text
    assert done.stdout.count("▕") == 2, "a row of bars for each sequence"
    assert "⟦" in done.stdout
    assert "\x1b" not in done.stdout, "no colour, and nothing of the corpus, commands a pipe"
    monkeypatch.setenv("FORCE_COLOR", "1")
    shaded = toy_report.call(evaluated, "feature", "--run", name, "--id", str(latent), "--contexts", "1").stdout
    assert re.search(r"\x1b\[1;4;[\d;]*m", shaded), "the strongest token is bold and underlined"
    assert "⟦" not in shaded
    assert "\x1b[31m" not in shaded, "the corpus's own"


@pytest.mark.slow
def test_without_tail_tokenizer_or_record_the_pages_say_so(tmp_path):
    """A store of somebody's own activations, and an SAE of another tool."""
    import toy_eval as toy

    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES, with_tail=False)
    ours = toy.make_run(tmp_path / "runs", "gelu", toy.make_sae("gelu"), store)
    theirs = tmp_path / "runs" / "theirs"
    shutil.copytree(toy.make_run(tmp_path / "other", "relu", toy.make_sae("relu"), store), theirs)
    (theirs / "tcsae.json").unlink()
    config = json.loads((theirs / "cfg.json").read_text())
    config["metadata"]["hook_name"] = toy.HOOK
    (theirs / "cfg.json").write_text(json.dumps(config))
    arguments = ["--store", store.location, "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(cli, [*arguments, "eval", "report"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    out = tmp_path / "report"
    assert "no tail: the hook is no residual stream" in (out / "index.html").read_text()
    assert "has no tail for blocks.1.hook_resid_post" in (out / "runs" / ours.name / "features.html").read_text()
    assert "Preset SAELens standard" in (out / "runs" / "theirs" / "index.html").read_text()
    index = value(out / "runs" / "theirs" / "data" / "index.js")
    assert index["promotes"] is None
    assert 3 not in index["latents"], "it never fires"
    assert set(value(out / "sequences" / "vocabulary.js").values()) <= {f"⟨{i}⟩" for i in range(toy.VOCABULARY)}
    done = CliRunner().invoke(cli, [*arguments, "feature", "--run", "theirs", "--id", "3"])
    assert done.exit_code == 0, done.output
    assert "It is active at none of the " in done.stdout
    done = CliRunner().invoke(cli, [*arguments, "feature", "--run", "theirs", "--id", "4"])
    assert "no logit lens: " in done.stdout
