"""Two SAEs on the same documents: the difference of each figure, and how sure its sign is."""

from pathlib import Path
from typing import Any

import click
import safetensors
import safetensors.torch
from torch import Tensor

from tcsae.evaluate.candidates import smoothed_file
from tcsae.evaluate.evaluation_files import REPLICATES
from tcsae.evaluate.intervals import interval, jackknife, point
from tcsae.shared.base.console import table
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest
from tcsae.shared.sae.folder import reason

AGAIN = "Evaluate again: tcsae eval --force"


def differences(runs_path: Path, one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{figure: {"a", "b", "difference", "interval"}} of two evaluations, resampling the same documents for both.

    Raises RunError if they are not of one store with the same positions counted, or a file of theirs is missing.
    """
    for key in ("store", "options"):
        ours, theirs = (_comparable(evaluation, key) for evaluation in (one, other))
        if ours != theirs:
            raise RunError(
                f"{one['name']} and {other['name']} differ in {key} ({ours}, {theirs}), so their documents cannot be "
                "paired. Give both the same: tcsae eval --force, with --skip-first if that is what differs."
            )
    found = {}
    rows = [_rows(runs_path, evaluation) for evaluation in (one, other)]
    for name in sorted(rows[0].keys() & rows[1].keys()):
        a, b = rows[0][name], rows[1][name]
        found[name] = {"a": point(a), "b": point(b), "difference": point(a - b), "interval": interval(a - b)}
    return found | _temporal_differences(one, other)


def _temporal_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the measures on all latents, leaving out the same group of documents in both; none if one was not measured."""
    if not (one.get("temporal") and other.get("temporal")):
        return {}
    ours, theirs = (evaluation["temporal"]["groups"]["all"]["measures"] for evaluation in (one, other))
    found = {}
    for name in [name for name in ours if name in theirs and "replicates" in ours[name]]:
        a, b = ours[name]["value"], theirs[name]["value"]
        left = list(zip(ours[name]["replicates"], theirs[name]["replicates"], strict=True))
        known = a is not None and b is not None and all(None not in pair for pair in left)
        between = jackknife(a - b, [first - second for first, second in left]) if known else None
        found[name] = {"a": a, "b": b, "difference": a - b if known else None, "interval": between}
    return found


def show_differences(runs_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Print them; a star where the interval leaves out zero."""
    rows = []
    for name, found in differences(runs_path, one, other).items():
        between = found["interval"]
        star = "*" if between and not between[0] <= 0 <= between[1] else ""
        rows.append([name, found["a"], found["b"], found["difference"], *(between or (None, None)), star])
    columns = ("", one["name"], other["name"], "difference", "95% from", "to", "")
    table(f"{one['name']} minus {other['name']}, paired over {one['n_documents']:,} documents", columns, rows)
    click.echo("* The interval leaves out zero.")


def _comparable(evaluation: dict[str, Any], key: str) -> Any:
    if key == "store":
        return evaluation["store"]["content"][:12]
    return {name: evaluation["options"][name] for name in ("hook", "skip_first", "splice", "split")}


def _rows(runs_path: Path, evaluation: dict[str, Any]) -> dict[str, Tensor]:
    """Every figure on each resampling. Raises RunError unless the file is the one written with the evaluation."""
    smooth = evaluation["options"].get("smooth")
    file = smoothed_file(REPLICATES, smooth)
    path = runs_path / evaluation["name"].removesuffix(f"+{smooth}") / file
    try:
        if evaluation["files"][file] != file_digest(path):
            raise RunError(f"{path} is of another evaluation than the figures beside it. {AGAIN}")
        return safetensors.torch.load_file(path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({reason(error)}). {AGAIN}") from error
