"""The paper's table beside what untrained networks give, in closed form and here, and beside its equations trained."""

from collections.abc import Mapping, Sequence

import numpy as np

from tcsae.evaluate.report.pages.printed import ABOUT, PRINTED, closed_form
from tcsae.paper.arms import (
    LOGGED,
    MOMENTS,
    NARROW,
    NO_TERM,
    PAPER_RUNS,
    RESCALED,
    TEXT,
    TWO_PHASE,
    UNLOGGED,
    WRITTEN,
    Arm,
)
from tcsae.paper.derived_stores import D_MODEL, NORM, SPREAD
from tcsae.paper.results import Results
from tcsae.paper.sections import FIGURES, markdown, number, spread

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
