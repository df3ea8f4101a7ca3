"""The files of a report: pages from templates, data as classic scripts, and the marks that make a folder a report."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tcsae.evaluate.candidates import UNFINISHED, EvalRequest, Loaded, candidate, load, why_not_evaluable
from tcsae.evaluate.measures.core import DEFINITION_VERSION
from tcsae.evaluate.measures.core import DEFINITIONS as CORE_DEFINITIONS
from tcsae.evaluate.measures.cross_entropy import DEFINITIONS as TAIL_DEFINITIONS
from tcsae.evaluate.measures.temporal_run import DEFINITIONS as TEMPORAL_DEFINITIONS
from tcsae.evaluate.report.features.feature_data import OTHER_MEASURES
from tcsae.evaluate.report.features.feature_pass import MEASURES
from tcsae.evaluate.report.features.shown_feature import FORMAT, MARK, VERSION
from tcsae.evaluate.report.pages.glossary import Glossary
from tcsae.shared.base.errors import RunError, TcsaeError
from tcsae.shared.base.files import file_digest, write_json
from tcsae.shared.sae.folder import (
    EVALUATION,
    RECORD,
    WEIGHTS,
    find_runs,
    load_evaluation,
    read_metrics,
    read_object,
    reason,
)
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Store

# Which runs a report is about, which are left out and why.


class Included(NamedTuple):
    """A run with figures."""

    number: int
    """From 1, by which figures name it."""
    loaded: Loaded
    evaluation: dict[str, Any]
    """eval.json."""
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl that are steps."""

    @property
    def name(self) -> str:
        return self.loaded.run.path.name

    @property
    def skip_first(self) -> int:
        """First positions of each sequence that its evaluation did not count."""
        return self.evaluation["options"]["skip_first"]

    @property
    def rules(self) -> CountingRules:
        """Positions that its evaluation counted."""
        options = self.evaluation["options"]
        return CountingRules(
            skip_first=options["skip_first"],
            exclude_tokens=tuple(options.get("exclude_tokens", ())),
            positions=tuple(options.get("positions", ())),
            max_norm=options.get("max_norm"),
            hook=self.hook,
        )

    @property
    def hook(self) -> str:
        return self.evaluation["options"]["hook"]


class Excluded(NamedTuple):
    """A run without figures."""

    name: str
    why: str


def choose_runs(store: Store, runs_path: Path, names: Collection[str] = ()) -> tuple[list[Included], list[Excluded]]:
    """(runs with an evaluation that holds, the others). Raises RunError if there is no run, or none with figures."""
    included: list[Included] = []
    excluded: list[Excluded] = []
    for path in find_runs(runs_path, names):
        try:
            included.append(_included(store, path, len(included) + 1))
        except TcsaeError as error:
            excluded.append(Excluded(path.name, str(error)))
    if not included:
        first = excluded[0]
        raise RunError(f"No run in {runs_path} has figures to report. {first.name}: {first.why}")
    return included, excluded


def _why_not_evaluated(path: Path, store: Store) -> str:
    """What is wrong with an evaluation that does not hold."""
    if not (path / EVALUATION).exists():
        return "Not evaluated on this store"
    try:
        evaluation = read_object(path / EVALUATION, "")
        content, weights = evaluation["store"]["content"], evaluation["weights"]
        if evaluation["definition_version"] != DEFINITION_VERSION:
            return "Evaluated by the definitions of another version"
        if content != store.content or weights != file_digest(path / WEIGHTS):
            return "Its evaluation is of other weights, or of another store"
    except (RunError, OSError, KeyError, TypeError):
        pass
    return f"{EVALUATION} is damaged, or a file written with it is missing or of another evaluation"


def _included(store: Store, path: Path, number: int) -> Included:
    if (why := why_not_evaluable(path)) is not None:
        unfinished = f"Its training is unfinished (no {RECORD}). Go on: tcsae train"
        raise RunError(unfinished if why == UNFINISHED else f"It {why}.")
    run = candidate(store, path, EvalRequest())
    evaluation = load_evaluation(path, store.content)
    if evaluation is None or evaluation.get("definition_version") != DEFINITION_VERSION:
        raise RunError(f"{_why_not_evaluated(path, store)}: tcsae eval --run {path.name}")
    history = [line for line in read_metrics(path) if "event" not in line]
    return Included(number, load(run), evaluation | {"name": path.name}, history)


HERE = Path(__file__).parent.parent
DEFINITIONS = CORE_DEFINITIONS | TAIL_DEFINITIONS | MEASURES | OTHER_MEASURES | TEMPORAL_DEFINITIONS
"""What each figure is, by name."""
TEMPLATES, STYLE, SCRIPTS = HERE / "page", HERE / "page" / "style.css", HERE / "script"
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

    def __init__(self, folder: Path, **common: Any) -> None:
        """`common`: values that every page has."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self.folder = folder
        self.templates = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.glossary = Glossary(DEFINITIONS)
        self.templates.filters |= {"number": number, "path": lambda name: quote(name, safe="")}
        self.templates.filters["term"] = self.glossary.slug
        self.templates.globals |= common
        for file in (STYLE, *sorted(SCRIPTS.glob("*.js"))):
            self._write(f"page/{file.name}", file.read_text(encoding="utf-8"))

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
