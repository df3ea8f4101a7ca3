"""The `eval` command."""

from collections.abc import Sequence
from typing import Any

import click

from tcsae.shared.cli import Place, StageCommand


@click.command(name="eval", cls=StageCommand)
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option("--force", is_flag=True, help="Evaluate again what is evaluated already.")
@click.pass_obj
def evaluate(place: Place, names: tuple[str, ...], force: bool) -> None:
    """Score trained SAEs on the store's eval split, without the language model.

    Writes eval.json into each run's folder and prints a table, below the baselines of a zero and a mean output. The
    cross-entropies need the tail: the layers after the hook, which the store holds.
    """
    from pathlib import Path

    from tcsae.evaluate.run import evaluate_runs
    from tcsae.shared.console import say
    from tcsae.shared.errors import RunError
    from tcsae.shared.store import open_store

    store = open_store(place.store)
    evaluations, refused = evaluate_runs(store, Path(place.runs), names, force)
    show(evaluations, place.runs)
    if refused:
        for line in refused[:-1]:
            say(f"Error: {line}")
        raise RunError(refused[-1])


def show(evaluations: Sequence[dict[str, Any]], runs: str) -> None:
    """Print one table for each hook and number of skipped positions, and how to read it."""
    from tcsae.shared.console import table

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in evaluations:
        groups.setdefault((one["options"]["hook"], one["options"]["skip_first"]), []).append(one)
    columns = ("", "EV", "EV all", "cos", "L2 ratio", "L0", "dead %", "CE", "CE score", "latents", "tokens")
    for (hook, skip_first), group in groups.items():
        first = group[0]
        rows = [_row(name.replace("_", " "), figures) for name, figures in first["baselines"].items()]
        rows += [_row(one["name"], one["metrics"], one["sae"]["d_sae"], one["tokens"]) for one in group]
        table(f"{hook}, {first['n_tokens']:,} eval tokens of {first['n_documents']:,} documents", columns, rows)
        click.echo(_legend(first, skip_first))
    if evaluations:
        click.echo(f"All figures and their definitions: {runs}/NAME/eval.json")


def _row(name: str, figures: dict[str, Any], latents: int | None = None, tokens: int | None = None) -> list[object]:
    shares = ("explained_variance", "explained_variance_all_positions", "cossim", "l2_ratio", "ce_loss_score")
    ev, ev_all, cosine, ratio, score = (None if figures[key] is None else f"{figures[key]:.4f}" for key in shares)
    dead = None if figures["dead_fraction"] is None else f"{100 * figures['dead_fraction']:.1f}"
    ce = figures["ce_loss_with_sae"]
    seen = None if tokens is None else f"{tokens / 1e6:.3g}M"
    return [name, ev, ev_all, cosine, ratio, figures["l0"], dead, ce, score, latents, seen]


def _legend(one: dict[str, Any], skip_first: int) -> str:
    counted = f"positions from {skip_first} on" if skip_first else "all positions"
    ev = f"EV: centred, pooled explained variance over {counted}; EV all: over all positions. Tokens: seen in training."
    figures = one["metrics"]
    if one["no_tail"]:
        return f"{ev} No tail, so no cross-entropies: {one['no_tail']}"
    if figures["ce_loss_without_sae"] is None:
        return f"{ev} No cross-entropies: no counted position has a next token."
    clean, zero = figures["ce_loss_without_sae"], figures["ce_loss_with_ablation"]
    return (
        f"{ev}\nCE and CE score come through the tail: clean CE {clean:.4g} nats, zero-ablated {zero:.4g}; "
        f"the rest from activations alone."
    )
