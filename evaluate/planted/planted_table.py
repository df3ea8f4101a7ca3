"""What `eval` prints of a store of planted features: how much of them each SAE recovers."""

from collections.abc import Sequence
from typing import Any

from tcsae.evaluate.planted.truth import CLASSES
from tcsae.shared.base.console import echo, table

OVERALL = ("mcc", "f1", "recovered", "uniqueness", "false_splits", "antipodal_pairs", "absorption")
PREFIX = "planted"


def show_planted(evaluations: Sequence[dict[str, Any]], details: bool) -> None:
    """A table of all classes; with `details` one of each SAE with all figures, and their definitions."""
    measured = [one for one in evaluations if PREFIX in one.get("measures", {})]
    if not measured:
        return
    classes = [name for name in CLASSES if f"{PREFIX}_{name}" in measured[0]["measures"]]
    rows = []
    for one in measured:
        measures = one["measures"]
        of_classes = [measures[f"{PREFIX}_{name}"]["figures"]["f1"] for name in classes]
        rows.append([one["name"], *(measures[PREFIX]["figures"][name] for name in OVERALL), *of_classes])
    titles = [name.replace("_", " ") for name in (*OVERALL, *(f"F1 {name}" for name in classes))]
    table("Recovery of planted features", ("", *titles), rows)
    if not details:
        echo("F1 of each class: of the latents matched with its features. Every figure of every class: --details.")
        return
    for one in measured:
        _show_classes(one, classes)
    definitions: dict[str, str] = {}
    for name in (PREFIX, *(f"{PREFIX}_{one}" for one in classes)):
        definitions |= measured[0]["measures"][name]["definitions"]
    for name, text in definitions.items():
        echo(f"{name.replace('_', ' ')}: {text}.")


def _show_classes(evaluation: dict[str, Any], classes: Sequence[str]) -> None:
    """Figures down, classes across."""
    figures = {name: evaluation["measures"][f"{PREFIX}_{name}"]["figures"] for name in classes}
    names = dict.fromkeys(key for one in figures.values() for key in one)
    rows = [[key.replace("_", " "), *(figures[name].get(key) for name in classes)] for key in names]
    table(f"{evaluation['name']}: by class", ("", *(name.replace("_", " ") for name in classes)), rows)
