"""docs/results: the page, its pictures, and every figure as JSON."""

import importlib.metadata
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from tcsae.paper.arms import FRONTIER, TEXT, Arm
from tcsae.paper.pages.paper_table import paper_table
from tcsae.paper.pages.pictures import draw
from tcsae.paper.predictions import CHANGED, DROPPED, PREDICTIONS, chosen
from tcsae.paper.primary_figures import primary_line
from tcsae.paper.results import BUDGET, Results, squared_norm, value_of
from tcsae.paper.sections import LEGEND, SECTIONS, TABLE, TABLE_ARMS, Section, arms_of, markdown, table
from tcsae.shared.base.files import remove_dead_partials_in, write_atomic, write_json
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store

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
        loader=PackageLoader("tcsae.paper.pages", "."),
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
