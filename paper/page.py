"""docs/results: the page, its pictures, and every figure as JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcsae.evaluate.report.pages.printed import ABOUT, PRINTED, closed_form
from tcsae.paper.arms import (
    CONTRASTIVE,
    FEWER,
    FRONTIER,
    LOGGED,
    MOMENTS,
    NAMES,
    NARROW,
    NO_TERM,
    PAPER_RUNS,
    PLAIN,
    RELATIVE,
    RESCALED,
    RUNGS,
    SMOOTHED,
    TEXT,
    TWO_PHASE,
    UNLOGGED,
    WINDOWS,
    WRITTEN,
    Arm,
)
from tcsae.paper.derived_stores import D_MODEL, NORM, SPREAD
from tcsae.paper.primary_figures import primary_line
from tcsae.paper.results import BUDGET, Results
from tcsae.paper.sections import FIGURES, markdown, number, spread
from tcsae.shared.base.files import remove_dead_partials_in, whole_file, write_atomic, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import importlib.metadata
import os
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from tcsae.paper.predictions import CHANGED, DROPPED, PREDICTIONS, chosen
from tcsae.paper.results import squared_norm, value_of
from tcsae.paper.sections import LEGEND, SECTIONS, TABLE, TABLE_ARMS, Section, arms_of, table
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store

# The paper's table beside what untrained networks give, in closed form and here, and beside its equations trained.

COLUMNS = (
    "explained_variance_legacy",
    "explained_variance",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "l0",
    "l1",
    "ce_loss_score",
)
UNITS = 512
NORMED = ("run4",)
"""Runs with a layer norm before the encoder."""
RUN_1 = (
    'Run 1 ("0 steps completed") has no figure in the paper. A network that took no step and gives nothing has a '
    "legacy EV of 1 - {spread} = {value:.2f} on activations of these moments, and L0, L1 and L2 ratio 0."
)
MORE_OF_RUN_3 = (RESCALED, NARROW, NO_TERM, TWO_PHASE)


def paper_table(results: Results) -> str:
    """One table a run of the paper, a line for each way to come by its figures."""
    parts = []
    for run in PAPER_RUNS:
        rows = [] if run == UNLOGGED else _untrained(results, run)
        for arm in (WRITTEN[run], *(MORE_OF_RUN_3 if run == "run3" else ())):
            made = results.records[arm][0]
            weight = made["train"]["sparsity"]["l1"]
            rows.append(_measured(results, arm, f"**{arm.label}** (lambda_1 = {weight:g}, {made['steps']:,} steps)"))
        columns = [f"Run {run[-1]}: {ABOUT[run]}", *(FIGURES[name].heading for name in COLUMNS)]
        parts.append(markdown(columns, rows))
    parts.insert(1, RUN_1.format(spread=SPREAD, value=1 - SPREAD))
    return "\n\n".join(parts)


def _untrained(results: Results, run: str) -> list[list[str]]:
    """What is printed, and what a network without a step gives in closed form and here."""
    rows = [_row("printed in the paper", PRINTED[run])]
    rows.append(_row(f"closed form, {UNITS} units, no step", _expected(run, D_MODEL, NORM, SPREAD)))
    rows.append(_measured(results, LOGGED[MOMENTS, run], "the same network, synthetic activations"))
    untrained = results.evaluations[LOGGED[TEXT, run]][0]
    spread_here = 1 - untrained["baselines"]["zero_output"]["explained_variance_legacy"]
    d_model, norm = untrained["sae"]["d_model"], untrained["metrics"]["l2_norm_in"]
    rows.append(_row(f"closed form, d = {d_model}, no step", _expected(run, d_model, norm, spread_here)))
    rows.append(_measured(results, LOGGED[TEXT, run], "the same network, the store's activations"))
    return rows


def _expected(run: str, d_model: int, norm: float, spread: float) -> Mapping[str, float]:
    if run == "run0":  # all weights zero
        return {"explained_variance_legacy": 1 - spread, "l2_ratio": 0.0, "l0": 0.0, "l1": 0.0}
    return closed_form(d_model, UNITS, norm, spread, run in NORMED)


def _row(label: str, figures: Mapping[str, float]) -> list[str]:
    return [label, *(number(figures.get(name), _digits(name)) for name in COLUMNS)]


def _measured(results: Results, arm: Arm, label: str) -> list[str]:
    seeds = f", {len(results.evaluations[arm])} seeds" if len(results.evaluations[arm]) > 1 else ""
    return [label + seeds, *(_over_seeds(results.values(arm, name), _digits(name)) for name in COLUMNS)]


def _over_seeds(values: Sequence[float], digits: int) -> str:
    """A dash where a ratio of nothing by nothing scatters: it has no mean."""
    scatters = float(np.std(values)) > max(1.0, abs(float(np.mean(values))))
    return "-" if np.isnan(values).any() or scatters else spread(values, digits)


def _digits(name: str) -> int:
    return min(FIGURES[name].digits, 3)


# Pictures of the results, as SVG files that a README can show.

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tcsae",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}
LAGS = (1, 2, 4, 8, 16, 32)


def draw(name: str, results: Results, path: Path) -> None:
    """Write the picture of this name to `path`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = PICTURES[name](results)
        with whole_file(path) as file:
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


def frontier(results: Results) -> "Figure":
    """Relative change against explained variance and delta CE, a line a kind of term."""
    figure, axes = _panels(2)
    for ax, score, label in zip(
        axes, ("explained_variance", "delta_ce"), ("explained variance", "delta CE (nats)"), strict=True
    ):
        for marker, (kind, arms) in zip("osD", FRONTIER.items(), strict=True):
            _path(ax, results, [PLAIN, *arms], score, NAMES[kind], marker)
        _path(ax, results, [PLAIN, *FEWER], score, "fewer active latents", "x")
        ax.set_xlabel("relative change (left: slower)")
        ax.set_ylabel(label)
    axes[0].legend()
    return figure


def smoothing(results: Results) -> "Figure":
    """Explained variance against slowness: the contrastive term, and a plain SAE smoothed."""
    figure, (ax,) = _panels(1)
    _path(ax, results, [PLAIN, *FRONTIER["contrastive"]], "explained_variance", "contrastive, trained", "o")
    for marker, rule in zip("sD^v", ("ema", "ema-topk", "mean", "hysteresis"), strict=True):
        arms = [PLAIN, *(one for one in SMOOTHED if one.smooth.startswith(f"{rule}="))]
        _path(ax, results, arms, "explained_variance", f"smoothed after training: {rule}", marker)
    ax.set_xlabel("relative change (left: slower)")
    ax.set_ylabel("explained variance")
    ax.legend()
    return figure


def lags(results: Results) -> "Figure":
    """Autocorrelation within documents over lags, of windows and terms that see lag 1 or up to 7."""
    figure, (ax,) = _panels(1)
    for marker, arm in zip("osD^v", (PLAIN, RELATIVE, CONTRASTIVE, WINDOWS[1], WINDOWS[3]), strict=True):
        curve = results.curve(arm, "rho_1_within")
        shown = [lag for lag in LAGS if lag <= len(curve)]
        ax.plot(shown, [curve[lag - 1] for lag in shown], marker=marker, markersize=4, linewidth=1.2, label=arm.label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(LAGS, [str(lag) for lag in LAGS])
    ax.set_xlabel("lag (tokens)")
    ax.set_ylabel("autocorrelation within documents")
    ax.legend()
    return figure


def sparsity(results: Results) -> "Figure":
    """Legacy explained variance against L0, and the paper's runs."""
    figure, (ax,) = _panels(1)
    arms = sorted([CONTRASTIVE, *RUNGS], key=lambda arm: results.mean(arm, "l0"))
    xs = [results.mean(arm, "l0") for arm in arms]
    ax.plot(xs, [results.mean(arm, LEGACY) for arm in arms], marker="o", markersize=4, label="temporal-topk, trained")
    for name, marker in (("run2", "s"), ("run4", "D")):
        shown = {"run2": "paper, runs 2 and 3", "run4": "paper, run 4"}[name]
        ax.plot(PRINTED[name]["l0"], PRINTED[name][LEGACY], marker, markersize=5, label=shown)
    ax.axhline(0, color="#808080", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks((8, 16, 32, 64, 128, 256), ["8", "16", "32", "64", "128", "256"])
    ax.set_xlabel("L0")
    ax.set_ylabel("explained variance (legacy)")
    ax.legend()
    return figure


LEGACY = "explained_variance_legacy"
PICTURES: dict[str, Callable[[Results], "Figure"]] = {
    "frontier": frontier,
    "smoothing": smoothing,
    "lags": lags,
    "sparsity": sparsity,
}


def _panels(n: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * n, 3.2), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _path(ax: "Axes", results: Results, arms: Sequence[Arm], score: str, label: str, marker: str) -> None:
    """A line through arms, in their order, with the range of seeds at each."""
    xs, ys = ([results.values(arm, name) for arm in arms] for name in ("slowness_to_x", score))
    middle = [[sum(one) / len(one) for one in values] for values in (xs, ys)]
    bars: list[list[list[float]]] = [
        [[at - min(one) for at, one in zip(means, values, strict=True)],
         [max(one) - at for at, one in zip(means, values, strict=True)]]
        for means, values in zip(middle, (xs, ys), strict=True)
    ]  # fmt: skip
    ax.errorbar(
        middle[0], middle[1], xerr=bars[0], yerr=bars[1], marker=marker, markersize=4, linewidth=1.2, label=label
    )


PAGE, DATA = "README.md", "results.json"
CURE = "Free some space, or give another --out; what is trained and evaluated stays."
STAGES = ("harvest", "train", "eval")
TABLE_TITLE = "The paper's table"
TABLE_QUESTION = (
    "What is printed, what a network that took no step gives in closed form (`evaluate/report/pages/printed.py`), what "
    "it gives on synthetic activations of the moments that the paper's had (d = 512, mean norm 15.8, second moment "
    "over variance 1.89; no language model there, so no CE) and on this store, and what the paper's equations give "
    "once they are trained: 512 GELU latents, batches of 32 sequences of 128, lambda_1 = 0.1. EV (legacy) is the "
    "paper's; EV is the centred, pooled one. Mean and standard deviation over seeds; a dash for a ratio that scatters "
    "about nothing. The moments are read off the logs that came with the paper: 1.89 is 1 less run 1's logged EV, so "
    "that the EV of runs 2 and 3 is no independent test, and the second moment of 372 that lambda_1 is rescaled by "
    "does not follow from the mean norm. A printed figure counts as given within three standard deviations, of at "
    "least 2% each."
)
CUT = (
    "The language model's leakage after a spliced join: a sequence of the store never holds two documents, so there is "
    "none, and measuring it would take the language model again.",
    "Mutual information with the position: the variance share and the probe are there.",
    "A model with learned absolute positions as a positive control: there is none without a network.",
    "The gated term, weights by budget, other temperatures, partners at lags beyond 1 in the contrastive term.",
    "Ablating slow features and reading what follows: the tail has it exactly, but it is no question of the paper.",
    "Three seeds for each rung of the sparsity frontier and for the paper's runs: one or two each, with intervals over "
    "documents in results.json.",
)


class PageContext(NamedTuple):
    """What the page is about besides its results."""

    command: str
    quick: bool
    stores: dict[str, Store]
    times: list[dict[str, Any]]
    """Lines of times.jsonl: key, stage, processor seconds."""


def write_page(out: Path, results: Results, keys: Sequence[str], made: PageContext) -> Path:
    """Write the page about the questions `keys`, which are complete, into the folder `out`; returns the page."""
    chosen = [section for section in SECTIONS if section.key in keys]
    with writing(out, CURE):
        out.mkdir(parents=True, exist_ok=True)
        for section in chosen:
            if section.picture:
                draw(section.picture, results, out / f"{section.picture}.svg")
    shown = [_section(section, results, made) for section in chosen]
    if TABLE in keys:
        body = {
            "title": TABLE_TITLE,
            "question": TABLE_QUESTION,
            "table": paper_table(results),
            "legend": "",
            "primary": "",
            "picture": "",
        }
        shown.insert(0, body | {"made": _made(TABLE, TABLE_ARMS, results, made)})
    after = {"dropped": markdown(["taken back", "why"], DROPPED), "changed": CHANGED}
    text = rendered("page.md.j2", sections=shown, cut=CUT, **after, **_about(results, keys, made))
    remove_dead_partials_in(out)
    with writing(out, CURE):
        write_json(out / DATA, _data(chosen, results, keys))
        write_atomic(out / PAGE, text.encode())
    return out / PAGE


def rendered(template: str, **values: Any) -> str:
    """A template of this folder, filled; every value has to be there."""
    environment = Environment(
        loader=PackageLoader("tcsae.paper", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _about(results: Results, keys: Sequence[str], made: PageContext) -> dict[str, Any]:
    store = made.stores[TEXT]
    recipe, counts = store.manifest.recipe, store.manifest.counts
    return {
        "command": made.command,
        "quick": made.quick,
        "n_tokens": f"{recipe.n_tokens:,}",
        "model": recipe.model.name,
        "hook": store.hook(),
        "d_model": store.d_model(store.hook()),
        "dataset": recipe.corpus.name,
        "train_tokens": f"{counts['train']['tokens']:,}",
        "eval_tokens": f"{counts['eval']['tokens']:,}",
        "documents": f"{counts['eval']['documents']:,}",
        "squared_norm": f"{squared_norm(store):.1f}",
        **machine(made),
        "budget": _budget(results, keys, made),
        "predictions": _predictions(results, keys),
    }


def machine(made: PageContext) -> dict[str, Any]:
    """What it ran on, and the processor time of its stages in minutes ("" where none was noted)."""
    spent = {stage: sum(one["processor_s"] for one in made.times if one["stage"] == stage) for stage in STAGES}
    whole = sum(spent.values())
    return {
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "minutes": _minutes(whole),
        "harvesting": _minutes(spent["harvest"]),
        "training": _minutes(spent["train"]),
        "evaluating": _minutes(spent["eval"]),
        "whole": _minutes(whole / 2),
    }


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds else ""


def _budget(results: Results, keys: Sequence[str], made: PageContext) -> str:
    """A line a question: what it trains that no question before it has trained."""
    rows, seen = [], set[Arm]()
    for key in keys:
        new = [arm for arm in arms_of(key) if arm not in seen and not arm.smooth]
        seen |= set(new)
        records = [record for arm in new for record in results.records[arm]]
        steps = sorted({record["steps"] for record in records})
        spent = sum(one["processor_s"] for one in made.times if one["key"] == key)
        tokens = sum(record["tokens"] for record in records)
        shown = "-" if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        rows.append([title_of(key), str(len(new)), str(len(records)), shown, f"{tokens / 1e6:.1f}M", _minutes(spent)])
    return markdown(["question", "new arms", "runs", "steps", "tokens", "core-minutes"], rows)


def title_of(key: str) -> str:
    """A question's heading."""
    return TABLE_TITLE if key == TABLE else next(one.title for one in SECTIONS if one.key == key)


def _predictions(results: Results, keys: Sequence[str]) -> str:
    rows = [
        [title_of(key), one.text, _outcome(one.holds(results)), one.known or "no"]
        for key in keys
        for one in PREDICTIONS[key]
    ]
    return markdown(["", "prediction", "came out", "known beforehand"], rows)


def _outcome(held: bool) -> str:
    return "as predicted" if held else "**otherwise**"


def _section(section: Section, results: Results, made: PageContext) -> dict[str, str]:
    return {
        "title": section.title,
        "question": section.question,
        "table": table(results, section.lines, section.figures),
        "legend": (LEGEND.format(twin=section.twin) if section.twin else "Means over seeds.")
        + (_choice(results) if section.key == "frontier" else ""),
        "primary": primary_line(section, results),
        "picture": f"{section.picture}.svg" if section.picture else "",
        "made": _made(section.key, section.arms, results, made),
    }


def _choice(results: Results) -> str:
    """Which weight of each kind is the slowest within the budget on the documents that no table is of."""
    names = "; ".join(chosen(results, kind).label for kind in FRONTIER)
    return f" Slowest within {BUDGET:g} nats on the other half of the documents, which no table is of: {names}."


def _made(key: str, arms: Sequence[Arm], results: Results, made: PageContext) -> str:
    """The command, seeds, steps and tokens of a table."""
    records = [record for arm in arms for record in results.records[arm] if record["steps"]]
    seeds = sorted({len(results.records[arm]) for arm in arms})
    parts = [f"`{made.command} --only {key}`", f"{' or '.join(map(str, seeds))} seeds"]
    for name, unit in (("steps", "steps"), ("tokens", "token visits a run")):
        values = sorted({record[name] for record in records})
        if values:
            parts.append(f"{values[0]:,}{f' to {values[-1]:,}' if len(values) > 1 else ''} {unit}")
    return "; ".join(parts) + "."


def _data(sections: Sequence[Section], results: Results, keys: Sequence[str]) -> dict[str, Any]:
    questions: dict[str, Any] = {}
    for section in sections:
        questions[section.key] = [_line(line.arm, line.twin, line.group, section, results) for line in section.lines]
    if TABLE in keys:
        questions[TABLE] = [
            {"arm": arm.label, "preset": arm.preset, "store": arm.store, "metrics": [one["metrics"] for one in seeds]}
            for arm in TABLE_ARMS
            for seeds in [results.evaluations[arm]]
        ]
    held = {key: {one.text: one.holds(results) for one in PREDICTIONS[key]} for key in keys}
    return {"questions": questions, "predictions": held}


def finite(value: float) -> float | None:
    """As JSON has it: None for what was not measured."""
    return value if math.isfinite(value) else None


def _line(arm: Arm, twin: Arm | None, group: str, section: Section, results: Results) -> dict[str, Any]:
    evaluations = results.evaluations[arm]
    line: dict[str, Any] = {
        "arm": arm.label,
        "runs": [one["name"] for one in evaluations],
        "store": arm.store,
        "latents": group,
        "values": {figure: [finite(value_of(one, figure, group)) for one in evaluations] for figure in section.figures},
    }
    if twin is not None and group == "all":
        gains = {figure: results.gain(arm, twin, figure) for figure in section.figures if figure != "energy"}
        line["minus"] = twin.label
        line["differences"] = {figure: gain._asdict() for figure, gain in gains.items()}
    return line
