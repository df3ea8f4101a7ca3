"""What `eval` prints."""

from collections.abc import Sequence
from typing import Any

import click

from tcsae.evaluate.measures.temporal_tables import show_temporal
from tcsae.shared.base.console import legible, table

COLUMNS = ("", "EV", "cos", "L2 ratio", "L0", "dead %", "CE", "CE score", "KL score")


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
        table(f"{hook}, {n_tokens:,} eval tokens of {n_documents:,} documents", COLUMNS, rows)
        click.echo(_legend(first))
        show_temporal(group, details)
        if details:
            show_measures(group)
    if evaluations:
        click.echo(f"All figures, intervals and definitions: {legible(runs)}/NAME/eval.json")
    for rule in dict.fromkeys(one["smoothing"] for one in evaluations if "smoothing" in one):
        click.echo(f"Smoothed codes: {rule}.")


def show_measures(evaluations: Sequence[dict[str, Any]]) -> None:
    """Print the registered measures of codes: a table each, and what its figures are."""
    for name, first in evaluations[0].get("measures", {}).items():
        columns = tuple(first["figures"])
        rows = [[one["name"], *one["measures"][name]["figures"].values()] for one in evaluations]
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
