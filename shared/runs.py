"""The folder of runs: which trained SAEs it has, and what their evaluations say."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tcsae.shared.errors import RunError, unknown
from tcsae.shared.files import PARTIAL, file_digest
from tcsae.shared.sae import RECORD, WEIGHTS

EVALUATION = "eval.json"
METRICS = "metrics.jsonl"


def run_folders(runs_path: Path) -> list[Path]:
    """Every run's folder, finished or not, by name. Empty if there is no such folder of runs."""
    if not runs_path.is_dir():
        return []
    return sorted(path for path in runs_path.iterdir() if path.is_dir() and _is_run_name(path.name))


def is_finished(run_path: Path) -> bool:
    """Whether a run has been trained to its end: its record is written last."""
    return (run_path / RECORD).is_file()


def find_runs(runs_path: Path, names: Collection[str] = ()) -> list[Path]:
    """The folders of the named runs, in the order named, each once; without names: of all runs.

    Raises RunError if there is no run at all, or none of a given name (with the nearest).
    """
    folders = {path.name: path for path in run_folders(runs_path)}
    if not folders:
        raise RunError(f"No runs in {runs_path}. Train one: tcsae --runs {runs_path} train")
    for name in names:
        if name not in folders:
            raise RunError(f"{runs_path}: {unknown('run', name, folders)}")
    return [folders[name] for name in dict.fromkeys(names or folders)]


def load_evaluation(run_path: Path, content: str, file: str = EVALUATION) -> dict[str, Any] | None:
    """A run's eval.json if it is about the weights that lie there now and the store of this `content`; else None.

    `file`: that of its smoothed codes instead.
    """
    try:
        evaluation = json.loads((run_path / file).read_text())
        of_this_store = evaluation["store"]["content"] == content
        return evaluation if of_this_store and evaluation["weights"] == file_digest(run_path / WEIGHTS) else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours: evaluating again replaces it
        return None


def read_metrics(run_path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if it has not been written."""
    file = Path(run_path) / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _is_run_name(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(PARTIAL)
