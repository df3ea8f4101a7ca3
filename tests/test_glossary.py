"""Promise: data/README.md explains every column of every table in one entry, in one sentence."""

import ast
import re
from pathlib import Path

import pytest

from tcsae.evaluate import headline, printed_tables, temporal_tables
from tcsae.evaluate.latents.parts import DEFINITIONS as LATENTS
from tcsae.evaluate.measures.concentration import DENSE_DEFINITIONS
from tcsae.evaluate.measures.registry import MEASURES
from tcsae.evaluate.report.pages.printed import COLUMNS as PAPER

ROOT = Path(__file__).parent.parent
TITLE = "### Columns of the tables\n"
PAGE = (ROOT / "data" / "README.md").read_text()
SECTION = PAGE.partition("## Glossary\n")[2].partition("\n## ")[0]
ENTRIES = [" ".join(one.split()) for one in re.findall(r"^- (.+?)(?=^- |\n\n|\Z)", SECTION, re.MULTILINE | re.DOTALL)]
TERMS = [term for entry in ENTRIES for term in entry.partition(": ")[0].split(", ")]


def columns(path: str) -> list[str]:
    """Texts of the tuple that a file's `columns = (...)` names."""
    (texts,) = re.findall(r"columns = (\(.*\))\n", (ROOT / path).read_text())
    return list(ast.literal_eval(texts))


SHOWN = {
    "eval": [*printed_tables.COLUMNS, *temporal_tables.SUMMARY, "rho(k)"],
    "eval's measures": list(temporal_tables.SUMMARY.values()),
    "eval --details": ["value", "null", "difference", "95% from", "to", "null is", *temporal_tables.BY_LATENT],
    "eval's further figures": [heading for columns in printed_tables.DETAILS.values() for heading in columns],
    "measures of codes": [name.replace("_", " ") for one in MEASURES.values() for name in one(4).figures()],
    "dense latents": [name.replace("_", " ") for name in DENSE_DEFINITIONS],
    "latents": [name for part in LATENTS.values() for name in part],
    "compare": list(headline.COLUMNS),
    "train": columns("train/command.py"),
    "train --dry-run": ["run", "latents", "steps", "tokens", "epochs", "ms a step"],
    "inspect": columns("shared/store/inspect.py"),
    "the paper's": [*PAPER, *PAPER.values()],
}


@pytest.mark.parametrize("table", SHOWN)
def test_every_column_has_an_entry(table):
    known = {term.lower().replace("_", " ") for term in TERMS}
    assert [name for name in SHOWN[table] if name and name.lower().replace("_", " ") not in known] == []


def test_an_entry_is_one_line_of_one_sentence():
    assert TITLE in SECTION and "(data/README.md#columns-of-the-tables)" in (ROOT / "README.md").read_text()
    entries = [entry for entry in ENTRIES if ": " in entry]
    assert len(entries) == len(ENTRIES) > 60
    for entry in entries:
        text = entry.partition(": ")[2]
        assert text.endswith(".") and len(entry) < 170, entry
        assert ". " not in text.replace("e.g. ", ""), entry


def test_no_term_is_explained_twice():
    assert sorted({term for term in TERMS if TERMS.count(term) > 1}) == []
