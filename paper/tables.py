"""Markdown tables of arms: means over seeds and, in brackets, what differs from a twin."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tcsae.paper.arms import TEXT, Arm
from tcsae.paper.results import GROUPS, Gain, Results


class Figure(NamedTuple):
    """A column: its heading and how many digits it takes."""

    heading: str
    digits: int


FIGURES = {
    "explained_variance": Figure("EV", 4),
    "explained_variance_legacy": Figure("EV (legacy)", 4),
    "cossim": Figure("cosine", 4),
    "l2_ratio": Figure("L2 ratio", 4),
    "relative_reconstruction_bias": Figure("rel. bias", 3),
    "l0": Figure("L0", 1),
    "l1": Figure("L1", 1),
    "ce_loss_score": Figure("CE score", 4),
    "dead_fraction": Figure("dead", 3),
    "energy": Figure("mean squared norm of the code", 1),
    "slowness_to_x": Figure("slowness / x", 3),
    "rho_1_within": Figure("rho(1) in documents", 3),
    "rho_8_within": Figure("rho(8) in documents", 4),
    "jaccard_corrected": Figure("Jaccard", 3),
    "boundary_auc": Figure("join AUC", 3),
    "boundary_ratio": Figure("join ratio", 2),
    "position_share": Figure("position share", 4),
    "token_share": Figure("token share", 3),
    "document_share": Figure("document share", 3),
    "probe_document": Figure("probe: document", 3),
    "probe_token": Figure("probe: token", 3),
    "probe_position": Figure("probe: position", 3),
}
LEGEND = (
    "Means over seeds. In brackets: minus {twin}, seed by seed; a star where every seed's 95% interval over documents, "
    "paired, leaves out zero on that side."
)


class Line(NamedTuple):
    """A row of a table."""

    arm: Arm
    twin: Arm | None = None
    """What the brackets are in comparison with."""
    group: str = GROUPS[0]
    """Latents that temporal measures are of: all, the first group, or others that fire as often."""


def table(results: Results, lines: Sequence[Line], figures: Sequence[str]) -> str:
    """One row a line, one column a figure."""
    rows = []
    for line in lines:
        label = line.arm.label
        if line.arm.store != TEXT:
            label += f", {line.arm.store}"
        if line.group != "all":
            label += f": {line.group.replace('_', ' ')}"
        rows.append([label, *(_cell(results, line, figure) for figure in figures)])
    return markdown(["", *(FIGURES[figure].heading for figure in figures)], rows)


def _cell(results: Results, line: Line, figure: str) -> str:
    text = number(results.mean(line.arm, figure, line.group), FIGURES[figure].digits)
    if line.twin is None or figure == "energy" or line.group != "all":
        return text
    return f"{text} ({difference(results.gain(line.arm, line.twin, figure), FIGURES[figure].digits)})"


def difference(gain: Gain, digits: int) -> str:
    """The mean of a gain, signed, with its star."""
    if math.isnan(gain.mean):
        return "-"
    return f"{gain.mean:+.{digits}f}{'*' if gain.sure else ''}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return number(values[0], digits)
    return f"{np.mean(values):.{digits}f} ±{np.std(values, ddof=1):.{digits}f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
