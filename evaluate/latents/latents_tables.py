"""What `tcsae latents` prints."""

from collections.abc import Collection
from typing import Any

from tcsae.evaluate.latents.run import MeasuredLatents
from tcsae.evaluate.latents.settings_of_latents import MEANINGS, SAE, TITLES
from tcsae.shared.base.console import echo, table

SHOWN = ("density", "ev_lost", "ce_lost", "ce_lost_per_firing", "later_share", "steer_strength", "steer_side_effect")
SHOWN_TEXT = ("auc_token", "auc_text", "intruder")
WORDS = 3


def show(measured: MeasuredLatents, asked: Collection[str], details: bool) -> None:
    """A table for each part asked for with figures down and runs across, how it is read, and the cost."""
    runs = [one | {"parts": {k: v for k, v in one["parts"].items() if k in asked}} for one in measured.runs.values()]
    parts = [part for part in TITLES if any(part in one["parts"] for one in runs)]
    for part in parts:
        _show_part(part, [one for one in runs if part in one["parts"]], details)
    if details:
        for one in runs:
            _show_latents(one)
            _show_labels(one)
    n = max(part["n_tokens"] for one in runs for part in one["parts"].values())
    seconds = sum(part["processor_seconds"] for one in runs for part in one["parts"].values())
    through = sum(part.get("tail_tokens", 0) for one in runs for part in one["parts"].values())
    echo(
        f"{len(runs)} SAE{'s' * (len(runs) != 1)}, {n:,} eval tokens, {through:,} tokens through the tail; "
        f"{measured.processor_s:.1f} s of processor time now, {seconds:.1f} s for the parts shown. Definitions of "
        "all figures, and every latent looked at: --details."
    )


def _show_part(part: str, runs: list[dict[str, Any]], details: bool) -> None:
    definitions = runs[0]["parts"][part]["definitions"]
    columns = [(one["name"], row) for one in runs for row in one["parts"][part]["rows"]]
    if columns:
        heads = [name if row == SAE else f"{name}: {row}" for name, row in columns]
        part_of = {one["name"]: one["parts"][part] for one in runs}
        rows = [[figure, *(_cell(part_of[name], row, figure) for name, row in columns)] for figure in definitions]
        table(TITLES[part], ("", *heads), [[row[0].replace("_", " "), *row[1:]] for row in rows])
        echo(MEANINGS[part])
        if any(one["parts"][part].get("intervals") for one in runs):
            echo("In brackets: 95% intervals over resampled latents, of those drawn.")
        for name, text in definitions.items() if details else ():
            echo(f"{name.replace('_', ' ')}: {text}.")
    for one in runs:
        if note := one["parts"][part]["note"]:
            echo(f"{one['name']}: {note}")


def _cell(part: dict[str, Any], row: str, figure: str) -> object:
    """A figure, that of the SAE with its 95% interval over the latents drawn."""
    value, bounds = part["rows"][row].get(figure), part.get("intervals", {}).get(figure)
    if row != SAE or bounds is None or value is None:
        return value
    return f"{value:.4g} [{bounds[0]:.2g}, {bounds[1]:.2g}]"


def _show_latents(one: dict[str, Any]) -> None:
    """A line a latent, of both parts that look at single ones."""
    effects, text = (one["parts"].get(part, {"columns": {}})["columns"] for part in ("effects", "text"))
    of_text = {latent: i for i, latent in enumerate(text.get("latent", []))}
    latents = effects.get("latent") or text.get("latent", [])
    names = [name for name in SHOWN if name in effects]
    rows = []
    for i, latent in enumerate(latents):
        at = of_text.get(latent)
        of_latent = [effects[name][i] for name in names]
        of_latent += [text[name][at] if at is not None else None for name in SHOWN_TEXT if name in text]
        words = effects.get("promoted", [[]] * len(latents))[i][:WORDS]
        rows.append([latent, *of_latent, " ".join(map(repr, words))])
    heads = [name.replace("_", " ") for name in (*names, *(name for name in SHOWN_TEXT if name in text))]
    if rows:
        table(f"{one['name']}: the latents looked at", ("latent", *heads, "promotes"), rows)


def _show_labels(one: dict[str, Any]) -> None:
    labels = one["parts"].get("tokens", {}).get("labels")
    if labels:
        names = ("x_f1", "label_f1", "split_f1", "splits", "absorption")
        rows = [[label.replace("_", " "), *(values[name] for name in names)] for label, values in labels.items()]
        table(f"{one['name']}: labels of token ids", ("", *(name.replace("_", " ") for name in names)), rows)
