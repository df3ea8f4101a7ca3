"""A page that compares methods: the rates tried, the table, the frontier, a paragraph a method."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.paper.arms import Arm
from tcsae.paper.methods import FURTHER_RATES, METHODS, RATES, Method, table_arm
from tcsae.paper.pages.page import PageContext, finite, machine, rendered
from tcsae.paper.pages.pictures import STYLE
from tcsae.paper.results import Results, X, value_of
from tcsae.paper.sections import difference, markdown, number
from tcsae.paper.training_costs import Cost, cost_table
from tcsae.shared.base.files import whole_file, write_atomic, write_json
from tcsae.shared.sae.folder import writing

CURE = "Free some space, or give another --out."


class Column(NamedTuple):
    heading: str
    digits: int


COLUMNS = {
    "explained_variance": Column("EV", 4),
    "delta_ce": Column("delta CE, nats", 4),
    "l0": Column("L0", 1),
    "l0_total": Column("L0 with predicted", 0),
    "alive": Column("alive", 0),
    "slowness_to_x": Column("relative change", 3),
    "without_widest/slowness_to_x": Column("relative change without the widest 1%", 3),
    "rho_1_within": Column("rho(1)", 3),
    "without_widest/rho_1_within": Column("rho(1) without the widest 1%", 3),
    "rho_1_within_mean": Column("rho(1), mean over latents", 4),
    "rho_1_within_median": Column("rho(1), median latent", 4),
    "rho_8_within": Column("rho(8)", 4),
    "position_removed/rho_8_within": Column("rho(8) without position", 4),
    "jaccard_corrected": Column("Jaccard", 3),
    "boundary_auc": Column("join AUC", 3),
    "join_auc": Column("join AUC against restarts", 3),
    "position_share": Column("position share", 4),
    "probe_document": Column("probe: document", 3),
    "probe_token": Column("probe: token", 3),
    "probe_position": Column("probe: position", 3),
}
WIDE = "without_widest/"
"""Before a measure: of all latents but the widest 1%."""
PAIRED = (
    "explained_variance",
    "slowness_to_x",
    f"{WIDE}slowness_to_x",
    "rho_1_within",
    f"{WIDE}rho_1_within",
    "rho_8_within",
    "jaccard_corrected",
    "position_share",
)
"""Figures whose difference to the twin is shown."""
BOUGHT = ("rho_1_within", "rho_8_within", "jaccard_corrected")
"""What a temporal method is for."""


Arms = Mapping[str, Arm]
"""Of each method's name, the arm of the table."""


def _nothing(_results: Results, _arms: Arms) -> dict[str, Any]:
    return {}


class MethodsPage(NamedTuple):
    """The page of a comparison: NAME.md from NAME.md.j2, NAME.json, NAME.svg."""

    name: str
    """Of its command, too."""
    columns: Mapping[str, Column] = COLUMNS
    conclude: Callable[[Results, Arms], dict[str, Any]] = _nothing
    """What follows from the results, for the template and the JSON file."""


METHODS_PAGE = MethodsPage("methods")


class Chosen(NamedTuple):
    """A method's learning rate, and the explained variance that each rate tried has on the *choose* half."""

    rate: float
    tried: dict[float, float]


def figure(evaluation: Mapping[str, Any], name: str) -> float:
    """A column's figure of one evaluation; NaN where it was not measured."""
    metrics = evaluation["metrics"]
    if name == "alive":
        return evaluation["sae"]["d_sae"] * (1 - metrics["dead_fraction"])
    if name == "l0_total":
        return metrics.get("l0_total", math.nan)
    return value_of(dict(evaluation), name)


def mean(results: Results, arm: Arm, name: str) -> float:
    return float(np.mean([figure(one, name) for one in results.evaluations[arm]]))


def write_methods(
    out: Path,
    results: Results,
    chosen: Mapping[str, Chosen],
    made: PageContext,
    costs: Mapping[str, Cost],
    methods: Sequence[Method] = METHODS,
    page: MethodsPage = METHODS_PAGE,
) -> Path:
    """The page, its figure and its numbers as JSON, in the folder `out`; returns the page."""
    arms = {method.name: table_arm(method, chosen[method.name].rate) for method in methods}
    twins = {method.name: method.twin for method in methods}
    controls = {
        method.name: table_arm(method, chosen[method.name].rate, shuffled=True)
        for method in methods
        if method.shuffled is not None
    }
    follows = page.conclude(results, arms)
    text = rendered(
        f"{page.name}.md.j2",
        command=made.command,
        quick=made.quick,
        about=_about(made),
        rates=_rates(chosen, methods),
        table=_table(results, arms, twins, page.columns),
        ended=ended_early(results, arms),
        shuffled=_shuffled(results, arms, controls, twins),
        paragraphs=[_paragraph(results, method, arms) for method in methods if method.twin != method.name],
        costs=cost_table(costs),
        columns=[f"{column.heading}: `{name}`" for name, column in page.columns.items()],
        picture=f"{page.name}.svg",
        n_tokens=f"{methods[0].n_tokens:,}",
        multiples=", ".join(f"{one:g}" for one in RATES),
        further="; ".join(f"{name}: {', '.join(f'{one:g}' for one in rates)}" for name, rates in FURTHER_RATES.items()),
        at_the_edge=_at_the_edge(chosen, methods),
        **machine(made),
        **follows,
    )
    with writing(out, CURE):
        out.mkdir(parents=True, exist_ok=True)
        _draw(results, arms, out / f"{page.name}.svg")
        data = _data(results, arms, chosen, twins, page.columns)
        if controls:
            of_controls = [{"method": name} | _values(results, arm, page.columns) for name, arm in controls.items()]
            data["shuffled"] = of_controls
        data["costs"] = {name: cost._asdict() for name, cost in costs.items()}
        write_json(out / f"{page.name}.json", data | follows)
        write_atomic(out / f"{page.name}.md", text.encode())
    return out / f"{page.name}.md"


def _about(made: PageContext) -> str:
    store = next(iter(made.stores.values()))
    recipe, counts = store.manifest.recipe, store.manifest.counts
    return (
        f"{recipe.model.name}, {', '.join(store.hooks)}, width {store.d_model(store.hook())}; {recipe.corpus.name}, "
        f"{counts['train']['tokens']:,} train tokens; figures of half of {counts['eval']['tokens']:,} eval tokens."
    )


def _rates(chosen: Mapping[str, Chosen], methods: Sequence[Method]) -> str:
    rows = []
    for method in methods:
        if not method.smooth:
            rate, tried = chosen[method.name]
            cells = [f"{one:g}: {number(value, 4)}" for one, value in tried.items()]
            rows.append([method.name, f"{rate:g}", "; ".join(cells)])
    return markdown(["method", "chosen", "rate: explained variance on the choose half"], rows)


def _at_the_edge(chosen: Mapping[str, Chosen], methods: Sequence[Method]) -> str:
    """Methods for which a still larger rate might do better."""
    tuned = {method.name: chosen[method.name] for method in methods if not method.smooth}
    return "; ".join(name for name, (rate, tried) in tuned.items() if len(tried) > 1 and rate == max(tried)) or "none"


def _table(results: Results, arms: Arms, twins: Mapping[str, str], columns: Mapping[str, Column]) -> str:
    rows = []
    for name, arm in arms.items():
        if arms[twins[name]] == arm:
            rows.append([_of_x(name), *(number(_mean_of_x(results, arm, one), columns[one].digits) for one in columns)])
        cells = [_cell(results, arm, arms[twins[name]], column, columns[column].digits) for column in columns]
        rows.append([name, *cells])
    return markdown(["", *(column.heading for column in columns.values())], rows)


def ended_early(results: Results, arms: Arms) -> list[str]:
    """A line for each run that the guard ended before its last step: its figures are of what it had come to."""
    return [
        f"{name}, `{record['name']}`: after {record['steps']:,} of {record['train']['steps']:,} steps"
        for name, arm in arms.items()
        if not arm.smooth
        for record in results.records[arm]
        if record["ended"]
    ]


def _of_x(name: str) -> str:
    """Label of the activations themselves, before the row that nothing else is a twin of."""
    layer, colon, _ = name.rpartition(": ")
    return f"{layer}{colon}x, the activations"


def _mean_of_x(results: Results, arm: Arm, name: str) -> float:
    """A temporal figure of x in the evaluations of an arm; NaN for what only a code has."""
    return float(np.mean([value_of(one, name, X) for one in results.evaluations[arm]]))


def _cell(results: Results, arm: Arm, twin: Arm, column: str, digits: int) -> str:
    text = number(mean(results, arm, column), digits)
    if column not in PAIRED or twin == arm:
        return text
    return f"{text} ({difference(results.gain(arm, twin, column), digits)})"


def _shuffled(results: Results, arms: Arms, controls: Arms, twins: Mapping[str, str]) -> str:
    """What of each gain the shuffled twin has as well."""
    rows = []
    for method, control in controls.items():
        twin = arms[twins[method]]
        cells = [
            f"{number(_gain(results, arms[method], twin, name), 4)} / {number(_gain(results, control, twin, name), 4)}"
            for name in ("explained_variance", *BOUGHT)
        ]
        rows.append([method, *cells])
    headings = [COLUMNS[name].heading for name in ("explained_variance", *BOUGHT)]
    return markdown(["gain over its twin: in order / shuffled", *headings], rows)


def _gain(results: Results, arm: Arm, twin: Arm, name: str) -> float:
    return mean(results, arm, name) - mean(results, twin, name)


def _paragraph(results: Results, method: Method, arms: Arms) -> str:
    arm, twin = arms[method.name], arms[method.twin]
    ev, ce = (_gain(results, arm, twin, name) for name in ("explained_variance", "delta_ce"))
    bought = ", ".join(f"{COLUMNS[name].heading} {_gain(results, arm, twin, name):+.3f}" for name in BOUGHT)
    cost = f"Against {method.twin}: EV {ev:+.4f}, delta CE {ce:+.4f} nats; {bought}."
    return f"**{method.name}**. {method.about} {cost}"


NEAR = 0.14
"""Explained variance below the best method's from which on a method is not drawn: it would squeeze the others."""


def _draw(results: Results, arms: Arms, path: Path) -> None:
    """Explained variance against what it buys, a point a method."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(12, 5), layout="constrained")
        variances = {label: mean(results, arm, "explained_variance") for label, arm in arms.items()}
        best = max(variances.values())
        for axes, name in zip(drawing.subplots(1, 2), ("rho_1_within", "boundary_auc"), strict=True):
            for position, label in enumerate(arms, start=1):
                colour = f"C{position % 10}"
                x, y = variances[label], mean(results, arms[label], name)
                if x < best - NEAR:
                    axes.scatter([], [], s=18, color=colour, label=f"{position} {label}: EV {x:.2f}, not drawn")
                    continue
                axes.scatter(x, y, s=18, color=colour, label=f"{position} {label}")
                axes.annotate(str(position), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
            axes.set(xlabel="explained variance", ylabel=COLUMNS[name].heading)
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
        with whole_file(path) as partial:
            drawing.savefig(partial, format="svg", metadata={"Date": None})


def _data(
    results: Results,
    arms: Arms,
    chosen: Mapping[str, Chosen],
    twins: Mapping[str, str],
    columns: Mapping[str, Column],
) -> dict[str, Any]:
    rows = []
    for name, arm in arms.items():
        evaluations, twin = results.evaluations[arm], arms[twins[name]]
        row: dict[str, Any] = {
            "method": name,
            "rate": chosen[name].rate,
            **_values(results, arm, columns),
            "metrics": [one["metrics"] | _temporal(one) for one in evaluations],
        }
        if twin == arm:
            row["x"] = {column: finite(_mean_of_x(results, arm, column)) for column in columns}
        else:
            row["minus"] = twins[name]
            row["differences"] = {column: results.gain(arm, twin, column)._asdict() for column in PAIRED}
        rows.append(row)
    return {"tried": {name: one.tried for name, one in chosen.items()}, "methods": rows}


def _values(results: Results, arm: Arm, columns: Mapping[str, Column]) -> dict[str, Any]:
    """An arm's runs, and each column's figures of them."""
    evaluations = results.evaluations[arm]
    return {
        "preset": arm.preset,
        "runs": [one["name"] for one in evaluations],
        "values": {column: [finite(figure(one, column)) for one in evaluations] for column in columns},
    }


def _temporal(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """All temporal measures over all latents."""
    return {name: one["value"] for name, one in evaluation["temporal"]["groups"]["all"]["measures"].items()}
