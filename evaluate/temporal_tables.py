"""The temporal and position measures as `eval` prints them."""

from collections.abc import Sequence
from typing import Any

import click

from tcsae.shared.console import sparkline, table

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
        "A star: the 95% interval leaves out zero. Medians over latents; all else pooled over them. "
        "rho(k): within documents, lags 1 to 32."
    )
    if not details:
        click.echo("Every measure with its value, null and interval: --details.")
        return
    for one in measured:
        _details(one)


def _summary(name: str, found: dict[str, Any]) -> list[object]:
    measures, curve = found["measures"], found["curves"].get("rho_1_within", [])
    curve = sparkline([value for value in curve if value is not None], CURVE_WIDTH)
    return [name, *(_difference(measures.get(measure)) for measure in SUMMARY.values()), curve]


def _difference(row: dict[str, Any] | None) -> str | None:
    if row is None or row["difference"] is None:
        return None
    interval = row["interval"]
    return f"{row['difference']:.3f}{'*' if interval and not interval[0] <= 0 <= interval[1] else ' '}"


def _details(one: dict[str, Any]) -> None:
    temporal, rows = one["temporal"], []
    named = {group: found["measures"] for group, found in temporal["groups"].items()} | {"x": temporal["x"]["measures"]}
    for group, measures in named.items():
        for measure, row in measures.items():
            low, high = row["interval"] or (None, None)
            null = temporal["nulls"][measure]
            label = measure if group == "all" else f"{group}: {measure}"
            rows.append([label, row["value"], row["null"], row["difference"], low, high, null])
    columns = ("measure", "value", "null", "difference", "95% from", "to", "null is")
    table(f"{one['name']}: {temporal['pairs']}", columns, rows)
    click.echo(f"Interval: {temporal['interval_rule']}.")
    click.echo("Nulls: " + "; ".join(f"{name}: {text}" for name, text in temporal["null_definitions"].items()) + ".")
