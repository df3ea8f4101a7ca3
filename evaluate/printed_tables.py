"""What `eval` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import safetensors
import safetensors.torch
from torch import Tensor

from tcsae.evaluate.candidates import smoothed_file
from tcsae.evaluate.evaluation_files import REPLICATES
from tcsae.evaluate.headline import MAIN
from tcsae.evaluate.intervals import interval, jackknife, point
from tcsae.evaluate.planted.planted_table import PREFIX, show_planted
from tcsae.shared.base.console import legible, sparkline, table
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest
from tcsae.shared.sae.folder import reason

# Two SAEs on the same documents: the difference of each figure, and how sure its sign is.

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
    paired = {}
    rows = [_rows(runs_path, evaluation) for evaluation in (one, other)]
    for name in sorted(rows[0].keys() & rows[1].keys()):
        a, b = rows[0][name], rows[1][name]
        paired[name] = {"a": point(a), "b": point(b), "difference": point(a - b), "interval": interval(a - b)}
    return paired | _temporal_differences(one, other)


def _temporal_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the measures on all latents, leaving out the same group of documents in both; none if one was not measured."""
    if not (one.get("temporal") and other.get("temporal")):
        return {}
    ours, theirs = (evaluation["temporal"]["groups"]["all"]["measures"] for evaluation in (one, other))
    paired = {}
    for name in [name for name in ours if name in theirs and "replicates" in ours[name]]:
        a, b = ours[name]["value"], theirs[name]["value"]
        replicates = list(zip(ours[name]["replicates"], theirs[name]["replicates"], strict=True))
        known = a is not None and b is not None and all(None not in pair for pair in replicates)
        bounds = jackknife(a - b, [first - second for first, second in replicates]) if known else None
        paired[name] = {"a": a, "b": b, "difference": a - b if known else None, "interval": bounds}
    return paired


def difference_table(
    one: dict[str, Any], other: dict[str, Any], paired: dict[str, dict[str, Any]], details: bool = False
) -> None:
    """Print `differences`, a star where the interval leaves out zero. Without `details` only `headline.MAIN`, and of
    these no figures that are equal.
    """
    rows = []
    for name, figure in paired.items():
        if not details and (name not in MAIN or figure["difference"] in (0, None)):
            continue
        interval = figure["interval"]
        star = "*" if interval and not interval[0] <= 0 <= interval[1] else ""
        rows.append([name, figure["a"], figure["b"], figure["difference"], *(interval or (None, None)), star])
    columns = ("", one["name"], other["name"], "difference", "95% from", "to", "")
    table(f"{one['name']} minus {other['name']}, paired over {one['n_documents']:,} documents", columns, rows)
    left_out = len(paired) - len(rows)
    click.echo(
        "* The interval leaves out zero."
        + (f" {left_out} more figures, equal ones and variants: --details." if left_out else "")
    )


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


COLUMNS = ("", "EV", "cos", "L2 ratio", "L0", "dead %", "CE", "CE score", "KL score")
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


def show(evaluations: Sequence[dict[str, Any]], runs: str, details: bool = False) -> None:
    """Print one table for each set of options, and how to read it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in evaluations:
        shared = {name: value for name, value in one["options"].items() if name != "smooth"}
        groups.setdefault(str(sorted(shared.items())), []).append(one)
    for group in groups.values():
        first = group[0]
        rows = [_row(name.replace("_", " "), figures, {}) for name, figures in first["baselines"].items()]
        rows += [_row(one["name"], one["metrics"], one["intervals"]) for one in group]
        hook, n_tokens, n_documents = first["options"]["hook"], first["n_tokens"], first["n_documents"]
        shown = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in rows)]  # no tail: no CE
        title = f"{hook}, {n_tokens:,} eval tokens of {n_documents:,} documents"
        table(title, [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in rows])
        click.echo(_legend(first))
        show_temporal(group, details)
        show_planted(group, details)
        if details:
            show_measures(group)
    if evaluations:
        click.echo(f"All figures, intervals and definitions: {legible(runs)}/NAME/eval.json")
    for rule in dict.fromkeys(one["smoothing"] for one in evaluations if "smoothing" in one):
        click.echo(f"Smoothed codes: {rule}.")


def show_measures(evaluations: Sequence[dict[str, Any]]) -> None:
    """Print the registered measures of codes: a table each, and what its figures are."""
    for name, first in evaluations[0].get("measures", {}).items():
        if name.startswith(PREFIX):
            continue
        columns = tuple(first["figures"])
        rows = [[one["name"], *one["measures"][name]["figures"].values()] for one in evaluations]
        if all(value is None for row in rows for value in row[1:]):
            continue
        table(name, ("", *(column.replace("_", " ") for column in columns)), rows)
        for column, definition in first["definitions"].items():
            click.echo(f"{column.replace('_', ' ')}: {definition}.")


def _row(name: str, figures: dict[str, Any], intervals: dict[str, Any]) -> list[object]:
    def cell(key: str) -> str | None:
        value, interval = figures[key], intervals.get(key)
        if value is None:
            return None
        if interval:
            return f"{value:.4f} ±{(interval[1] - interval[0]) / 2:.4f}"
        return f"{value:.4f} ±-" if key in intervals else f"{value:.4f}"

    dead = None if figures["dead_fraction"] is None else f"{100 * figures['dead_fraction']:.1f}"
    cosine, ratio, kl = (None if figures[key] is None else f"{figures[key]:.4f}" for key in SHARES)
    ce = None if figures["ce_loss_with_sae"] is None else f"{figures['ce_loss_with_sae']:.4g}"
    return [name, cell("explained_variance"), cosine, ratio, figures["l0"], dead, ce, cell("ce_loss_score"), kl]


SHARES = ("cossim", "l2_ratio", "kl_div_score")


def _legend(one: dict[str, Any]) -> str:
    skip_first = one["options"]["skip_first"]
    counted = f"positions from {skip_first} on" if skip_first else "all positions"
    if out := {name: n for name, n in one.get("left_out", {}).items() if name != "skip_first"}:
        counted += f" ({', '.join(f'{n:,} tokens left out by {name}' for name, n in out.items())})"
    ev = f"EV: centred, pooled explained variance over {counted}. ±: half the interval ({one['interval_rule']})."
    figures = one["metrics"]
    if one["no_tail"]:
        return f"{ev}\nNo tail, so no cross-entropies: {legible(one['no_tail'])}"
    if figures["ce_loss_without_sae"] is None:
        return f"{ev}\nNo cross-entropies: no counted position has a next token."
    clean, zero = figures["ce_loss_without_sae"], figures["ce_loss_with_ablation"]
    return (
        f"{ev}\nCE, CE score and KL score come through the tail (clean CE {clean:.4g} nats, zero-ablated {zero:.4g}); "
        f"the rest from activations alone.\nSplice: {one['splice']}."
    )


def show_temporal(evaluations: Sequence[dict[str, Any]], details: bool) -> None:
    """One row an SAE, value minus null; with `details` also a table of all measures for each."""
    measured = [one for one in evaluations if one.get("temporal")]
    if not measured:
        return
    rows = [_summary("x itself", measured[0]["temporal"]["x"])]
    for one in measured:
        for group, figures in one["temporal"]["groups"].items():
            if "rho_1" in figures["measures"]:
                name = one["name"] if group == "all" else f"  {group.replace('_', ' ')}"
                rows.append(_summary(name, figures))
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


def _summary(name: str, figures: dict[str, Any]) -> list[object]:
    measures, curve = figures["measures"], figures["curves"].get("rho_1_within", [])
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
    for group, figures in groups.items():
        prefix = "" if group == "all" else f"{group}: "
        for measure, row in figures["measures"].items():
            low, high = row["interval"] or (None, None)
            null = temporal["nulls"][measure]
            rows.append([prefix + measure, row["value"], row["null"], row["difference"], low, high, null])
        for name, curve in figures.get("curves", {}).items():
            curves.append([prefix + name.replace("rho_1", "rho"), *(curve[lag - 1] for lag in LAGS)])
    columns = ("measure", "value", "null", "difference", "95% from", "to", "null is")
    table(f"{title}: {temporal['pairs']}", columns, rows)
    table(f"{title}: autocorrelation by lag", ("", *map(str, LAGS)), curves)
