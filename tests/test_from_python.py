"""Promise: README's "From Python" and the quickstart notebook run as they stand."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From Python")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def test_blocks_are_code():
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    latent = names["latent"]
    assert f"latent {latent} of topk" in shown and "⟦" in shown and "explained_variance" in shown
    assert shown.count("⟦") > 10, "a text and the contexts of a feature, shaded"
    assert not names["logits"].isnan().any()


@pytest.mark.slow
def test_the_notebook_runs_as_it_stands(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs: they go stale"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    pages = [output.data["text/html"] for output in results if "text/html" in output.data]
    assert sum("explained_variance" in page for page in pages) >= 1
    assert sum("background:#" in page for page in pages) == 2, "a text and a feature, shaded"
