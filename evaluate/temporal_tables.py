"""What `eval` prints of temporal and position measures."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from tcsae.evaluate.measures.latent_terms import MEAN, MEDIAN, WIDEST
from tcsae.evaluate.measures.probes import DEFINITIONS as PROBES
from tcsae.evaluate.measures.probes import EMA_DECAY, PROBE_LATENTS
from tcsae.evaluate.measures.temporal_figures import SPREAD
from tcsae.evaluate.measures.temporal_run import SMOOTHED, WITHOUT_WIDEST
from tcsae.shared.base.console import sparkline, table

SUMMARY = {
    "Jaccard": "jaccard_corrected",
    "rho(1)": "rho_1_within",
    "median": "rho_1_within_median",
    "change/x": "slowness_to_x",
    "dwell": "dwell",
    "position": "position_share",
    "token": "token_share",
    "document": "document_share",
    "join": "join_auc",
}
AS_IT_IS = ("slowness_to_x",)
"""Measures whose point of reference is 1, that of x, and not their null."""
LEGEND = (
    "rho(1): variance-weighted within-document autocorrelation at lag 1. median: the median latent's. rho(k): "
    "lags 1 to 32.\n"
    "change/x: relative change, null not taken off (lower is slower; 1 = as fast as the model's activations).\n"
    "Jaccard: chance-corrected. join: AUC of joins of documents against restarts of the context inside one.\n"
    f"x smoothed: with a memory of {EMA_DECAY}. Few latents can make what is pooled by variance: without widest leaves "
    f"out the widest {WIDEST:.0%}.\n"
    "A star: the 95% interval of value minus null leaves out zero."
)
BY_LATENT = ("pooled (null)", "median (null)", "mean latent", "without widest", "without position", "x itself")
"""Columns of values; nulls in brackets."""
CURVE_WIDTH = 6
LAGS = (1, 2, 4, 8, 16, 32)
"""At which the curves are printed; eval.json has every lag."""


def show_temporal(evaluations: Sequence[dict[str, Any]], details: bool) -> None:
    """One row an SAE, value minus null; with `details` also tables of all measures for each."""
    measured = [one for one in evaluations if one.get("temporal")]
    if not measured:
        return
    first = measured[0]["temporal"]
    rows = [_summary("x itself", first["x"]), _summary("x smoothed", first["x"]["smoothed"]["ema"])]
    for one in measured:
        for group, figures in one["temporal"]["groups"].items():
            if "rho_1" in figures["measures"]:
                name = one["name"] if group == "all" else f"  {group.replace('_', ' ')}"
                rows.append(_summary(name, figures))
    table("Temporal and position measures, each minus its null", ("", *SUMMARY, "rho(k)"), rows)
    click.echo(LEGEND)
    if not details:
        click.echo("Every measure with its value, null and interval: --details.")
        return
    _details("x itself", first, {"all": first["x"]})
    for one in measured:
        shown = {
            name: one for name, one in one["temporal"]["groups"].items() if name not in (WITHOUT_WIDEST, *SMOOTHED)
        }
        _details(one["name"], one["temporal"], shown)
        _by_latent(one["name"], one["temporal"])
    _probes(measured)
    click.echo(f"Interval: {first['interval_rule']}.")
    click.echo("Nulls: " + "; ".join(f"{name}: {text}" for name, text in first["null_definitions"].items()) + ".")


def _summary(name: str, figures: dict[str, Any]) -> list[object]:
    measures, curve = figures["measures"], figures["curves"].get("rho_1_within", [])
    curve = sparkline([value for value in curve if value is not None], CURVE_WIDTH)
    return [name, *(_shown(measures.get(measure), measure in AS_IT_IS) for measure in SUMMARY.values()), curve]


def _shown(row: dict[str, Any] | None, as_it_is: bool) -> str | None:
    """The value minus its null, or `as_it_is`."""
    if row is None or row["difference"] is None:
        return None
    interval = row["interval"]
    star = "*" if interval and not interval[0] <= 0 <= interval[1] else " "
    return f"{row['value' if as_it_is else 'difference']:.3f}{star}"


def _details(title: str, temporal: dict[str, Any], groups: dict[str, Any]) -> None:
    """Two tables: the measures of each group of latents, and how its autocorrelation falls with the lag."""
    rows, curves = [], []
    for group, figures in groups.items():
        prefix = "" if group == "all" else f"{group}: "
        for measure, row in figures["measures"].items():
            if measure.endswith(MEAN):
                continue
            low, high = row["interval"] or (None, None)
            null = temporal["nulls"][measure]
            rows.append([prefix + measure, row["value"], row["null"], row["difference"], low, high, null])
        for name, curve in figures.get("curves", {}).items():
            curves.append([prefix + name.replace("rho_1", "rho"), *(curve[lag - 1] for lag in LAGS)])
    columns = ("measure", "value", "null", "difference", "95% from", "to", "null is")
    table(f"{title}: {temporal['pairs']}", columns, rows)
    table(f"{title}: autocorrelation by lag", ("", *map(str, LAGS)), curves)


def by_latent(temporal: Mapping[str, Any]) -> dict[str, list[dict[str, float | None]]]:
    """What few latents make of each pooled figure, and what position does: {"value", "null"} in the order of BY_LATENT,
    the null of the first two alone.
    """
    pooled, rest = (temporal["groups"][name]["measures"] for name in ("all", WITHOUT_WIDEST))
    removed, x = temporal["groups"]["all"]["position_removed"], temporal["x"]["measures"]
    rows = {}
    for name in SPREAD:
        of_x = x[name]["value"] if name in x else None
        with_null = [{key: row[key] for key in ("value", "null")} for row in (pooled[name], pooled[name + MEDIAN])]
        values = (pooled[name + MEAN]["value"], rest[name]["value"], removed.get(name), of_x)
        rows[name] = [*with_null, *({"value": value, "null": None} for value in values)]
    return rows


def _by_latent(title: str, temporal: dict[str, Any]) -> None:
    rows = [[name, *map(_with_null, cells)] for name, cells in by_latent(temporal).items()]
    table(f"{title}: what few latents make of a figure, and what position does", ("", *BY_LATENT), rows)


def _with_null(row: Mapping[str, Any]) -> str | None:
    value, null = row["value"], row["null"]
    return None if value is None else f"{value:.4f}" + ("" if null is None else f" ({null:.4f})")


def _probes(measured: Sequence[dict[str, Any]]) -> None:
    """What linear probes name, of x and of each code, plain and smoothed; nothing where none was fitted."""
    x = measured[0]["temporal"]["x"]
    parts = {"x itself": x} | {f"x {name}": figures for name, figures in x.get("smoothed", {}).items()}
    for one in measured:
        groups = one["temporal"]["groups"]
        parts |= {one["name"]: groups["all"]}
        parts |= {f"{one['name']} {name}": groups[name] for name in SMOOTHED if name in groups}
    rows: list[list[object]] = []
    for name, figures in parts.items():
        if PROBES.keys() <= figures["measures"].keys():
            rows.append([name.replace("_", " "), *(_with_null(figures["measures"][probe]) for probe in PROBES)])
    if rows:
        n_latents = measured[0]["options"].get("probe_latents", PROBE_LATENTS)
        title = f"Probes of the {n_latents} latents of largest variance: share of tokens named"
        table(f"{title}, in brackets that of the commonest class", ("", *PROBES), rows)
