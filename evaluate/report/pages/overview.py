"""What the report's first page says of all SAEs: where they come from, their figures, and how they trade them off."""

from collections.abc import Sequence
from typing import Any

from tcsae.evaluate.candidates import UNTRAINED
from tcsae.evaluate.measures import core as metrics
from tcsae.evaluate.measures import cross_entropy as tail_metrics
from tcsae.evaluate.measures import temporal_run
from tcsae.evaluate.report.pages.page_files import Excluded, Included
from tcsae.evaluate.report.pages.plots import Point, Series, curves_by_number, frontier
from tcsae.evaluate.report.pages.printed import COLUMNS as PAPER_COLUMNS
from tcsae.evaluate.report.pages.printed import paper_blocks
from tcsae.shared.base.console import size
from tcsae.shared.store.format import SPLITS
from tcsae.shared.store.reader import Store

RESULTS = {
    "explained_variance": "EV",
    "cossim": "cosine",
    "l2_ratio": "L2 ratio",
    "l0": "L0",
    "dead_fraction": "never on",
    "ce_loss_increase": "delta CE",
    "ce_perplexity_ratio": "ppl ratio",
    "ce_loss_score": "rec. zero",
    "ce_loss_score_mean": "rec. mean",
    "kl_div_score": "KL score",
}
TEMPORAL = {
    "jaccard_corrected": "Jaccard",
    "rho_1": "autocorrelation",
    "rho_1_within": "autocorr. within doc.",
    "rho_1_within_median": "median autocorr.",
    "rho_8_within": "persistence (lag 8)",
    "slowness_to_x": "change / x",
    "dwell": "dwell",
    "position_share": "position",
    "token_share": "token",
    "document_share": "document",
    "join_auc": "join",
    "probe_document": "probe: document",
    "probe_token": "probe: token",
    "probe_position": "probe: position",
}
SLOWNESS = "relative change (left: slower)"
FRONTIERS = (
    ("Variance at which sparsity?", "l0", "L0", "explained_variance", "explained variance"),
    ("Predictions at which sparsity?", "l0", "L0", "ce_loss_increase", "delta CE, nats"),
    ("What does slowness cost in variance?", "slowness_to_x", SLOWNESS, "explained_variance", "explained variance"),
    ("What does slowness cost in predictions?", "slowness_to_x", SLOWNESS, "ce_loss_increase", "delta CE, nats"),
)
HISTORIES = (("explained_variance", "explained variance, of the batch"), ("adjacent_correlation", "autocorrelation"))
DEFINITIONS = metrics.DEFINITIONS | tail_metrics.DEFINITIONS | temporal_run.DEFINITIONS

Cell = dict[str, Any]
"""{"value", "interval"} of a figure; {"value", "null", "difference", "interval"} with that of the difference."""


def overview(store: Store, included: Sequence[Included], excluded: Sequence[Excluded]) -> dict[str, Any]:
    """The values of overview.html."""
    evaluations = [one.evaluation for one in included]
    blocks = paper_blocks(evaluations)
    return {
        "provenance": provenance(store),
        "content": store.content,
        "runs": included,
        "excluded": excluded,
        "baselines": {name.replace("_", " "): found for name, found in evaluations[0]["baselines"].items()},
        "result_columns": RESULTS,
        "results": {one.number: _results(one.evaluation) for one in included},
        "temporal_columns": _measured(included),
        "temporal": {one.number: temporal_cells(one.evaluation) for one in included},
        "of_x": _of_x(included),
        "interval_rules": [evaluations[0]["interval_rule"], temporal_run.INTERVAL_RULE],
        "definitions": DEFINITIONS,
        "frontiers": _frontiers(included),
        "untrained": [one.number for one in included if one not in _trained(included)],
        "several_hooks": len({one.hook for one in included}) > 1,
        "histories": _histories(included),
        "paper_columns": PAPER_COLUMNS,
        "paper": blocks,
    }


def provenance(store: Store) -> dict[str, Any]:
    """What is in the store and where it comes from."""
    recipe = store.manifest.recipe
    counts = {split: store.manifest.counts[split] for split in SPLITS}
    return {
        "model": recipe.model.name,
        "model_revision": recipe.model.revision,
        "corpus": recipe.corpus.name,
        "corpus_revision": recipe.corpus.revision,
        "corpus_split": recipe.corpus.split,
        "length": recipe.sequences.length,
        "eval_every": recipe.sequences.eval_every,
        "hooks": [
            {"name": hook.requested, "d_model": hook.d_model, "tail": _tail(store, hook.requested)}
            for hook in recipe.hooks
        ],
        "codec": recipe.codec,
        "counts": counts,
        "size": size(sum(store.n_bytes().values())),
        "location": store.location,
        "content": store.content,
        "libraries": recipe.libraries,
        "times": {name.replace("_", " "): value for name, value in store.manifest.times.items() if value is not None},
    }


def _tail(store: Store, hook: str) -> str:
    tail = store.manifest.tails.get(hook, {"none": "none was saved"})
    if "none" in tail:
        return f"no tail: {tail['none']}"
    return f"tail of {tail['layers']} layer{'s' * (tail['layers'] != 1)}"


def _results(evaluation: dict[str, Any]) -> dict[str, Cell]:
    figures, intervals = evaluation["metrics"], evaluation["intervals"]
    return {name: cell(figures[name], intervals, name) for name in RESULTS}


def cell(value: float | None, intervals: dict[str, Any], name: str) -> Cell:
    """A figure with its interval; `no_interval` where it should have one and there are too few documents."""
    return {"value": value, "interval": intervals.get(name), "no_interval": intervals.get(name, 0) is None}


def temporal_cells(evaluation: dict[str, Any], group: str = "all") -> dict[str, Cell]:
    """Each temporal measure of a group of latents, with its null and the difference; empty if it was not measured."""
    if not evaluation.get("temporal"):
        return {}
    measures = evaluation["temporal"]["groups"].get(group, {"measures": {}})["measures"]
    return {name: _against_null(row) for name, row in measures.items()}


def _against_null(row: dict[str, Any]) -> Cell:
    return {name: row[name] for name in ("value", "null", "difference", "interval")}


def _measured(included: Sequence[Included]) -> dict[str, str]:
    measured = {name for one in included for name in temporal_cells(one.evaluation)}
    return {name: label for name, label in TEMPORAL.items() if name in measured}


def _of_x(included: Sequence[Included]) -> dict[str, dict[str, Cell]]:
    """Of x itself, and of x with a memory, which any slowness has to beat; empty if it was not measured."""
    for one in included:
        if temporal := one.evaluation.get("temporal"):
            parts = {"x itself": temporal["x"], "x smoothed": temporal["x"]["smoothed"]["ema"]}
            return {
                name: {measure: _against_null(row) for measure, row in part["measures"].items()}
                for name, part in parts.items()
            }
    return {}


def _value(one: Included, name: str) -> tuple[float | None, list[float] | None]:
    evaluation = one.evaluation
    if name in evaluation["metrics"]:
        return evaluation["metrics"][name], evaluation["intervals"].get(name)
    row = (evaluation.get("temporal") or {"groups": {"all": {"measures": {}}}})["groups"]["all"]["measures"].get(name)
    return (row["value"], None) if row else (None, None)


def _frontiers(included: Sequence[Included]) -> list[dict[str, str]]:
    """Figures of each pair of measures that two SAEs or more have."""
    made = []
    for title, x_name, x_label, y_name, y_label in FRONTIERS:
        points = []
        for one in _trained(included):
            (x, _), (y, interval) = _value(one, x_name), _value(one, y_name)
            if x is not None and y is not None:
                points.append(Point(one.number, x, y, interval))
        if len(points) > 1:  # one point is in the table
            summary = "; ".join(f"{point.number}: {point.x:.4g}, {point.y:.4g}" for point in points)
            svg = frontier(points, (x_label, y_label))
            made.append({"title": title, "svg": svg, "summary": summary})
    return made


def _trained(included: Sequence[Included]) -> list[Included]:
    """Without those that took no step on purpose: far off, they would squeeze the rest."""
    return [one for one in included if not one.evaluation["preset"].startswith(UNTRAINED)]


def _histories(included: Sequence[Included]) -> list[dict[str, str]]:
    made = []
    for key, label in HISTORIES:
        curves = []
        for one in included:
            points = [(line["step"], line[key]) for line in one.history if line.get(key) is not None]
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                curves.append((one.number, Series(one.name, steps, _smooth(values))))
        if curves:
            summary = "; ".join(f"{number}: {curve.y[-1]:.3g} at step {curve.x[-1]:,.0f}" for number, curve in curves)
            svg = curves_by_number(curves, ("optimiser step", label))
            made.append({"title": label, "svg": svg, "summary": f"Mean of the last five lines: {summary}"})
    return made


def _smooth(values: Sequence[float], over: int = 5) -> list[float]:
    """Mean over the last few lines: single batches are noisy."""
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(values))]
