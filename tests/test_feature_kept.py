"""Promise: `tcsae feature` answers from the report, without torch, where that is of the same figures, weights and text;
else it computes, and shows the same.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tcsae.evaluate.report.features import feature_computed
from tcsae.evaluate.report.features.shown_feature import MARK


@pytest.fixture
def place(evaluated, reported, tmp_path) -> Path:
    """A store, one run and the report of all."""
    name = next(path.name for path in (reported / "runs").iterdir() if path.name.startswith("topk"))
    shutil.copytree(evaluated / "a.zarr", tmp_path / "a.zarr")
    shutil.copytree(evaluated / "runs" / name, tmp_path / "runs" / name)
    shutil.copytree(reported, tmp_path / "report")
    return tmp_path


def latents(place: Path) -> list[int]:
    (run,) = (place / "runs").iterdir()
    text = (place / "report" / "runs" / run.name / "data" / "index.js").read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])["latents"]


def test_the_report_s_answer_is_the_computed_one(place, toy_report):
    latent = str(latents(place)[2])
    kept = toy_report.call(place, "feature", "--id", latent)
    shutil.rmtree(place / "report")
    computed = toy_report.call(place, "feature", "--id", latent)
    assert kept.exit_code == computed.exit_code == 0
    assert kept.stdout == computed.stdout
    assert "activations " in kept.stdout and "opposite decoder" in kept.stdout


def test_it_loads_neither_torch_nor_zarr(place):
    """Both take seconds to import: within 2 s there is no time for them."""
    arguments = [
        "--store",
        str(place / "a.zarr"),
        "--runs",
        str(place / "runs"),
        "feature",
        "--id",
        str(latents(place)[0]),
    ]
    program = (
        "import sys\nfrom tcsae.shared.commands.group import cli\n"
        f"try:\n    cli({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sorted({'torch', 'zarr', 'numpy', 'transformers'} & set(sys.modules)), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("Latent ")
    assert done.stdout.splitlines()[-1].split() == ["loaded"]


def test_a_latent_that_is_dead_or_not_there(place, toy_report, monkeypatch):
    monkeypatch.setattr(feature_computed, "computed_feature", None)
    dead = next(latent for latent in range(48) if latent not in latents(place)) if len(latents(place)) < 48 else None
    if dead is not None:
        assert "It is active at none of the " in toy_report.call(place, "feature", "--id", str(dead)).stdout
    done = toy_report.call(place, "feature", "--id", "4800")
    assert done.exit_code == 1
    assert "has latents 0 to 47." in done.stderr


def other_text(report: Path, run: Path) -> None:  # noqa: ARG001
    mark = json.loads((report / MARK).read_text())
    mark["made_of"]["max_tokens"] = 100
    (report / MARK).write_text(json.dumps(mark))


def other_store(report: Path, run: Path) -> None:  # noqa: ARG001
    mark = json.loads((report / MARK).read_text())
    mark["made_of"]["content"] = "0" * 64
    (report / MARK).write_text(json.dumps(mark))


def other_evaluation(report: Path, run: Path) -> None:  # noqa: ARG001
    (run / "eval.json").write_text((run / "eval.json").read_text() + " ")


def no_chunk(report: Path, run: Path) -> None:
    for file in (report / "runs" / run.name / "data").glob("[0-9]*.js"):
        file.write_text("tcsae.features({")


def no_mark(report: Path, run: Path) -> None:  # noqa: ARG001
    (report / MARK).unlink()


@pytest.mark.parametrize("change", [other_text, other_store, other_evaluation, no_chunk, no_mark])
def test_of_anything_else_it_computes(place, toy_report, monkeypatch, change):
    (run,) = (place / "runs").iterdir()
    change(place / "report", run)
    seen = []
    monkeypatch.setattr(feature_computed, "computed_feature", lambda *given: seen.append(given) or 1 / 0)
    done = toy_report.call(place, "feature", "--id", str(latents(place)[0]))
    assert isinstance(done.exception, ZeroDivisionError)
    assert len(seen) == 1
