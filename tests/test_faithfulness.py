"""Promise: docs/faithfulness.md names only presets and files that exist, and misses none of the paper's presets."""

import re
from pathlib import Path

from tcsae.shared.base.settings import to_settings
from tcsae.train.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "faithfulness.md").read_text()
ROWS = [
    line
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| the paper's sentence"))
]
VERDICTS = ("as written", "inferred", "different", "as logged")


def test_files_exist():
    named = re.findall(r"`([\w/.]+\.(?:py|md))`", TEXT)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_presets_exist_and_the_paper_s_are_all_named():
    named = set(re.findall(r"`((?:written|logged|temporal)-[\w-]+)`", TEXT))
    assert named and named <= PRESETS.keys()
    papers = {name for name in PRESETS if name.startswith(("written-", "logged-")) and not name.endswith("-shuffled")}
    assert papers - named == {"logged-run5"}, "which the paper does not report"


def test_settings_exist():
    keys = {line.partition("=")[0] for line in to_settings(preset("written-run3", 8))}
    named = set(re.findall(r"`(\w+\.\w+)=", TEXT))
    assert named and named <= keys


def test_every_row_says_how_faithful_it_is():
    assert len(ROWS) > 30
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert cells[3].startswith(VERDICTS), row
