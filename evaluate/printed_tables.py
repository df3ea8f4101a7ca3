"""What `eval` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tcsae.evaluate.candidates import smoothed_file
from tcsae.evaluate.evaluation_files import REPLICATES
from tcsae.evaluate.headline import MAIN, NAMES
from tcsae.evaluate.intervals import interval, jackknife, jackknife_draws, over_seeds, p_value, point
from tcsae.evaluate.measures.temporal_run import WITHOUT_WIDEST
from tcsae.evaluate.planted.planted_table import PREFIX, show_planted
from tcsae.evaluate.temporal_tables import show_temporal
from tcsae.shared.base.console import legible, table
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest
from tcsae.shared.sae.folder import reason

# Two SAEs on the same documents: the difference of each figure, and how sure its sign is.

AGAIN = "Evaluate again: tcsae eval --force"


class Pair(NamedTuple):
    """A figure of two SAEs, and their difference on resamplings of the documents, or without each group of them."""

    a: float | None
    b: float | None
    draws: Tensor | None = None
    """The first row is the difference itself."""
    left: list[float] | None = None

    @property
    def difference(self) -> float | None:
        if self.draws is not None:
            return point(self.draws)
        return None if self.a is None or self.b is None or self.left is None else self.a - self.b

    def interval(self) -> list[float] | None:
        if self.draws is not None:
            return interval(self.draws)
        return None if self.left is None or self.difference is None else jackknife(self.difference, self.left)

    def rows(self) -> Tensor:
        """Draws of the difference; NaN alone where it is not known."""
        if self.draws is not None:
            return self.draws
        known = self.left is not None and self.difference is not None
        return jackknife_draws(self.difference or 0.0, self.left or []) if known else torch.full((1,), torch.nan)

    def shown(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "difference": self.difference, "interval": self.interval()}


def differences(runs_path: Path, one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{figure: {"a", "b", "difference", "interval"}} of two evaluations, resampling the same documents for both.

    Raises RunError if they are not of one store with the same positions counted, or a file of theirs is missing.
    """
    return {name: pair.shown() for name, pair in _pairs(runs_path, one, other).items()}


def seed_differences(
    runs_path: Path, ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """As `differences`, of means over seeds: the first of `ones` is paired with the first of `others`, and so on.

    Intervals and p-values ("p", two-sided) are hierarchical: seeds are drawn, and of each the same documents. Raises
    RunError as `differences`.
    """
    for one in ones[1:]:
        check_comparable(ones[0], one)
    seeds = [_pairs(runs_path, one, other) for one, other in zip(ones, others, strict=True)]
    paired = {}
    for name in [name for name in seeds[0] if all(name in pairs for pairs in seeds)]:
        pairs = [one[name] for one in seeds]
        rows = [pair.rows() for pair in pairs]
        n_rows = min(map(len, rows))
        over_all = over_seeds(torch.stack([row[:n_rows].double() for row in rows]))
        shown = Pair(_mean([pair.a for pair in pairs]), _mean([pair.b for pair in pairs]), over_all).shown()
        paired[name] = shown | {"p": p_value(over_all)}
    return paired


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def check_comparable(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises RunError unless two evaluations are of one store with the same documents and positions counted."""
    for key in ("store", "options"):
        ours, theirs = (_comparable(evaluation, key) for evaluation in (one, other))
        if ours != theirs:
            raise RunError(
                f"{one['name']} and {other['name']} differ in {key} ({ours}, {theirs}), so their documents cannot be "
                "paired. Give both the same --documents, --skip-first, --positions, --splice, --ce-tokens and "
                "--probe-latents in tcsae eval --force; data.exclude_tokens and data.max_norm are as in training."
            )


def _pairs(runs_path: Path, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Pair]:
    check_comparable(one, other)
    ours, theirs = (_rows(runs_path, evaluation) for evaluation in (one, other))
    pairs = {
        name: Pair(point(ours[name]), point(theirs[name]), ours[name] - theirs[name])
        for name in sorted(ours.keys() & theirs.keys())
    }
    return pairs | _temporal_pairs(one, other)


def _temporal_pairs(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Pair]:
    """Of the measures on all latents, and on all but the widest; none if one was not measured."""
    if not (one.get("temporal") and other.get("temporal")):
        return {}
    pairs: dict[str, Pair] = {}
    for group, ending in (("all", ""), (WITHOUT_WIDEST, f"_{WITHOUT_WIDEST}")):
        ours, theirs = (
            evaluation["temporal"]["groups"].get(group, {"measures": {}})["measures"] for evaluation in (one, other)
        )
        for name in [name for name in ours if name in theirs and "replicates" in ours[name]]:
            a, b = ours[name]["value"], theirs[name]["value"]
            replicates = list(zip(ours[name]["replicates"], theirs[name]["replicates"], strict=True))
            known = a is not None and b is not None and all(None not in pair for pair in replicates)
            left = [first - second for first, second in replicates] if known else None
            pairs[name + ending] = Pair(a, b, left=left)
    return pairs


def difference_table(
    one: dict[str, Any],
    other: dict[str, Any],
    paired: dict[str, dict[str, Any]],
    details: bool = False,
    n_seeds: int = 1,
) -> None:
    """Print `differences`, or `seed_differences` with the first seed's evaluations; a star where the interval leaves
    out zero. Without `details` only `headline.MAIN`, and of these no figures that are equal.
    """
    rows = []
    for name in sorted(paired, key=lambda name: MAIN.index(name) if name in MAIN else len(MAIN)):
        figure = paired[name]
        if not details and (name not in MAIN or figure["difference"] in (0, None)):
            continue
        interval = figure["interval"]
        star = "*" if interval and not interval[0] <= 0 <= interval[1] else ""
        rows.append(
            [NAMES.get(name, name), figure["a"], figure["b"], figure["difference"], *(interval or (None, None)), star]
        )
    columns = ("", one["name"], other["name"], "difference", "95% from", "to", "")
    seeds = f" and {n_seeds} seeds" if n_seeds > 1 else ""
    title = f"{one['name']} minus {other['name']}, paired over {one['n_documents']:,} documents{seeds}"
    table(title, columns, rows)
    left_out = len(paired) - len(rows)
    click.echo(
        "* The interval leaves out zero."
        + (f" {left_out} more figures, equal ones and variants: --details." if left_out else "")
    )


OF_NO_DOCUMENT = ("smooth", "temporal", "baselines", "precision")
"""Options that change no document, position or prediction that is counted."""


def _comparable(evaluation: dict[str, Any], key: str) -> Any:
    if key == "store":
        return evaluation["store"]["content"][:12]
    return {name: value for name, value in evaluation["options"].items() if name not in OF_NO_DOCUMENT}


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


COLUMNS = {
    "EV": "explained_variance",
    "L0": "l0",
    "never on %": "dead_fraction",
    "delta CE": "ce_loss_increase",
    "ppl ratio": "ce_perplexity_ratio",
    "rec. zero": "ce_loss_score",
    "rec. mean": "ce_loss_score_mean",
    "KL score": "kl_div_score",
}
"""Of the first table, by heading."""
SMALLEST_COSINE = 0.05
"""Of x and xhat, for a bias that means something: an untrained SAE's came out at 86 +- 233."""
WITH_INTERVAL = ("explained_variance", "ce_loss_increase")
DETAILS = {
    "Cross-entropy, nats a token": {
        "CE": "ce_loss_with_sae",
        "clean": "ce_loss_without_sae",
        "zero": "ce_loss_with_ablation",
        "mean x": "ce_loss_with_mean",
        "unigrams": "ce_loss_with_unigrams",
        "rec. zero": "ce_loss_score",
        "rec. mean": "ce_loss_score_mean",
        "rec. unigrams": "ce_loss_score_unigrams",
    },
    "Reconstruction": {
        "EV (legacy)": "explained_variance_legacy",
        "cos": "cossim",
        "L2 ratio": "l2_ratio",
        "rel. bias": "relative_reconstruction_bias",
        "L1": "l1",
    },
}
"""Tables of --details: figures by heading."""


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
        columns = ("", *COLUMNS)
        shown = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]  # no tail: no CE
        title = f"{hook}, {n_tokens:,} eval tokens of {n_documents:,} documents"
        table(title, [columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
        click.echo(_legend(first))
        if details:
            show_figures(group)
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


def show_figures(evaluations: Sequence[dict[str, Any]]) -> None:
    """Print the tables of DETAILS; without a tail none of cross-entropies."""
    for title, columns in DETAILS.items():
        rows = [[one["name"], *(_figure(one["metrics"], key) for key in columns.values())] for one in evaluations]
        if any(value is not None for row in rows for value in row[1:]):
            table(title, ("", *columns), rows)


def _figure(figures: dict[str, Any], key: str) -> float | None:
    """None for a ratio of two numbers that are both next to nothing: xhat all but orthogonal to x."""
    orthogonal = key == "relative_reconstruction_bias" and abs(figures["cossim"] or 0) < SMALLEST_COSINE
    return None if orthogonal else figures[key]


def _row(name: str, figures: dict[str, Any], intervals: dict[str, Any]) -> list[object]:
    return [name, *(_cell(figures[key], intervals.get(key), key, key in intervals) for key in COLUMNS.values())]


def _cell(value: float | None, interval: list[float] | None, key: str, has_intervals: bool) -> object:
    """As printed; `interval` stands beside a few, a dash in its place where documents are too few."""
    if value is None or key == "l0":
        return value
    if key == "dead_fraction":
        return f"{100 * value:.1f}"
    if key not in WITH_INTERVAL or not has_intervals:
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"
    return f"{value:.4f} ±{(interval[1] - interval[0]) / 2:.4f}" if interval else f"{value:.4f} ±-"


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
    of_part = f" Cross-entropies: of the first {one['n_predictions']:,} predictions." * ("ce_tokens" in one["options"])
    clean, zero, mean = (figures[f"ce_loss_{key}"] for key in ("without_sae", "with_ablation", "with_mean"))
    return (
        f"{ev}\ndelta CE: nats a token that the reconstruction costs, through the tail. ppl ratio: e^delta CE. rec.: "
        f"share recovered of the gap\nfrom {clean:.4g} nats to those of an ablation, {zero:.4g} (zeros in place of x) "
        f"or {mean:.4g} (its mean). never on: in this split.\nSplice: {one['splice']}.{of_part}"
    )
