"""The temporal and position measures as `eval` prints them."""

from collections.abc import Sequence
from typing import Any

import click

from tcsae.shared.base.console import sparkline, table

SUMMARY = {
    "jaccard": "jaccard_corrected",
    "rho doc": "rho_1_within",
    "median": "rho_1_within_median",
    "slow/x": "slowness_to_x",
    "dwell": "dwell",
    "position": "position_share",
    "token": "token_share",
    "document": "document_share",
    "join AUC": "boundary_auc",
}

CURVE_WIDTH = 6
LAGS = (1, 2, 4, 8, 16, 32)
"""At which the curves are printed; eval.json has every lag."""


def show_temporal(evaluations: Sequence[dict[str, Any]], details: bool) -> None:
    """One row an SAE, value minus null; with `details` also a table of all measures for each."""
    measured = [one for one in evaluations if one.get("temporal")]
    if not measured:
        return
    rows = [_summary("x itself", measured[0]["temporal"]["x"])]
    for one in measured:
        for group, found in one["temporal"]["groups"].items():
            if "rho_1" in found["measures"]:
                name = one["name"] if group == "all" else f"  {group.replace('_', ' ')}"
                rows.append(_summary(name, found))
    table("Temporal and position measures, each minus its null", ("", *SUMMARY, "rho(k)"), rows)
    click.echo(
        "A star: the 95% interval leaves out zero. slow/x: below 0 is slower than x itself, relative to permuted "
        "positions.\nMedians over latents; all else pooled over them. rho(k): within documents, lags 1 to 32."
    )
    if not details:
        click.echo("Every measure with its value, null and interval: --details.")
        return
    first = measured[0]["temporal"]
    _details("x itself", first, {"all": first["x"]})
    for one in measured:
        _details(one["name"], one["temporal"], one["temporal"]["groups"])
    click.echo(f"Interval: {first['interval_rule']}.")
    click.echo("Nulls: " + "; ".join(f"{name}: {text}" for name, text in first["null_definitions"].items()) + ".")


def _summary(name: str, found: dict[str, Any]) -> list[object]:
    measures, curve = found["measures"], found["curves"].get("rho_1_within", [])
    curve = sparkline([value for value in curve if value is not None], CURVE_WIDTH)
    return [name, *(_difference(measures.get(measure)) for measure in SUMMARY.values()), curve]


def _difference(row: dict[str, Any] | None) -> str | None:
    if row is None or row["difference"] is None:
        return None
    interval = row["interval"]
    return f"{row['difference']:.3f}{'*' if interval and not interval[0] <= 0 <= interval[1] else ' '}"


def _details(title: str, temporal: dict[str, Any], groups: dict[str, Any]) -> None:
    """Two tables: the measures of each group of latents, and how its autocorrelation falls with the lag."""
    rows, curves = [], []
    for group, found in groups.items():
        prefix = "" if group == "all" else f"{group}: "
        for measure, row in found["measures"].items():
            low, high = row["interval"] or (None, None)
            null = temporal["nulls"][measure]
            rows.append([prefix + measure, row["value"], row["null"], row["difference"], low, high, null])
        for name, curve in found.get("curves", {}).items():
            curves.append([prefix + name.replace("rho_1", "rho"), *(curve[lag - 1] for lag in LAGS)])
    columns = ("measure", "value", "null", "difference", "95% from", "to", "null is")
    table(f"{title}: {temporal['pairs']}", columns, rows)
    table(f"{title}: autocorrelation by lag", ("", *map(str, LAGS)), curves)
