"""The files of a report: pages from templates, data as classic scripts, and the marks that make a folder a report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import write_json
from tcsae.shared.sae.folder import read_object, reason

HERE = Path(__file__).parent / "page"
STATIC = ("style.css", "theme.js", "table.js", "browser.js")
MARK = "report.json"
FORMAT, VERSION = "tcsae-report", 1
CURE = "The report that was there stays. Free some space, or give another --out."
PER_FILE = 32
"""Sequences whose tokens one file holds."""


def script(call: str, *values: Any) -> str:
    """A classic script that hands values to the page: fetch and modules are blocked where a page opens from disk.

    ASCII only and without any <, so that no text can end a script element or a line.
    """
    arguments = [json.dumps(value, separators=(",", ":"), allow_nan=False) for value in values]
    return f"tcsae.{call}({','.join(arguments)});\n".replace("<", "\\u003c")


class Pages:
    """Writes below one folder."""

    def __init__(self, folder: Path) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self.folder = folder
        self.templates = Environment(
            loader=FileSystemLoader(HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters |= {"number": number, "path": lambda name: quote(name, safe="")}
        for name in STATIC:
            self._write(f"page/{name}", (HERE / name).read_text(encoding="utf-8"))

    def page(self, path: str, template: str, **values: Any) -> None:
        """A page from a template; `values` are data: markup in them shows as text."""
        depth = path.count("/")
        self._write(path, self.templates.get_template(template).render(root="../" * depth, **values))

    def data(self, path: str, call: str, *values: Any) -> None:
        """A script with data."""
        self._write(path, script(call, *values))

    def sequences(self, rows: Mapping[int, Any]) -> None:
        """Sequences by their number, PER_FILE a file."""
        files: dict[int, dict[int, Any]] = {}
        for sequence, row in sorted(rows.items()):
            files.setdefault(sequence // PER_FILE, {})[sequence] = row
        for file, held in files.items():
            self.data(f"sequences/{file}.js", "sequences", held)

    def _write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="")


def number(value: Any) -> str:
    """A figure as tables show it: four significant digits, thousands apart, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def mark(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Say that `folder` is a report, and of what."""
    write_json(folder / MARK, {"format": FORMAT, "version": VERSION, "made_of": made_of})


def made_of(folder: Path) -> dict[str, Any] | None:
    """What the report in `folder` was made of; None if nothing is there yet.

    Raises RunError if something else is there: nothing but a report is ever replaced.
    """
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
    except OSError as error:
        raise RunError(f"{folder} cannot be read ({reason(error)}). Allow it, or give another --out.") from error
    try:
        held = read_object(folder / MARK, "")
    except RunError:
        held = {}
    if held.get("format") == FORMAT:
        identity = held.get("made_of")
        return identity if isinstance(identity, dict) else {}
    raise RunError(f"{folder} is there, and it is no report. Give another --out, or move it away.")
