"""Promise: what README quotes of a page of results is what that page's numbers say."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
METHODS = ROOT / "docs" / "results" / "methods.json"
SECTION = "## Which temporal method?"
COLUMNS = {
    "EV": ("explained_variance", 4),
    "delta CE": ("delta_ce", 3),
    "rho(1)": ("rho_1_within", 3),
    "median rho(1)": ("rho_1_within_median", 3),
    "Jaccard": ("jaccard_corrected", 3),
    "position share": ("position_share", 3),
}


def quoted() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_readme_quotes_the_methods_page():
    if not METHODS.exists():
        pytest.skip("docs/results/methods.json is not there: `make methods` writes it")
    head, _, *rows = quoted()
    values = {row["method"]: row["values"] for row in json.loads(METHODS.read_text())["methods"]}
    assert head[1:] == list(COLUMNS) and len(rows) >= 5
    for name, *cells in rows:
        for cell, (key, digits) in zip(cells, COLUMNS.values(), strict=True):
            assert cell == f"{np.mean(values[name][key]):.{digits}f}", (name, key)
