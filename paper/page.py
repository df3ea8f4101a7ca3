"""docs/results: the page, its pictures, and every figure as JSON."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from tcsae.paper.arms import TEXT, Arm
from tcsae.paper.figures import draw
from tcsae.paper.first_table import paper_table
from tcsae.paper.predictions import PREDICTIONS
from tcsae.paper.results import Results, value_of
from tcsae.paper.sections import SECTIONS, TABLE, TABLE_ARMS, Section, arms_of
from tcsae.paper.stores import squared_norm
from tcsae.paper.tables import LEGEND, markdown, table
from tcsae.shared.base.files import write_atomic, write_json
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store

PAGE, DATA = "README.md", "results.json"
CURE = "Free some space, or give another --out; what is trained and evaluated stays."
STAGES = ("harvest", "train", "eval")
TABLE_TITLE = "The paper's table"
TABLE_QUESTION = (
    "What is printed, what a network that took no step gives in closed form (`evaluate/paper.py`), what it gives on "
    "synthetic activations of the moments that the paper's had (d = 512, mean norm 15.8, second moment over variance "
    "1.89; no language model there, so no CE) and on this store, and what the paper's equations give once they are "
    "trained: 512 GELU latents, batches of 32 sequences of 128, lambda_1 = 0.1. EV (legacy) is the paper's; EV is the "
    "centred, pooled one. Mean and standard deviation over seeds."
)
CUT = (
    "The language model's leakage after a spliced join: a sequence of the store never holds two documents, so there is "
    "none, and measuring it would take the language model again.",
    "Mutual information with the position: the variance share and the probe are there.",
    "A model with learned absolute positions as a positive control: there is none without a network.",
    "The gated term, weights by budget, other temperatures, partners at lags beyond 1 in the contrastive term.",
    "Ablating slow features and reading what follows: it takes the whole language model.",
    "Three seeds for each rung of the sparsity frontier, and for the rescaled lambda_1: one each, with intervals over "
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
            "picture": "",
        }
        shown.insert(0, body | {"made": _made(TABLE, TABLE_ARMS, results, made)})
    environment = Environment(
        loader=PackageLoader("tcsae.paper", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    about = _about(results, keys, made)
    text = environment.get_template("page.md.j2").render(sections=shown, cut=CUT, **about)
    with writing(out, CURE):
        write_json(out / DATA, _data(chosen, results, keys))
        write_atomic(out / PAGE, text.encode())
    return out / PAGE


def _about(results: Results, keys: Sequence[str], made: PageContext) -> dict[str, Any]:
    store = made.stores[TEXT]
    recipe, counts = store.manifest.recipe, store.manifest.counts
    spent = {stage: sum(one["processor_s"] for one in made.times if one["stage"] == stage) for stage in STAGES}
    whole = sum(spent.values())
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
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "minutes": _minutes(whole),
        "training": _minutes(spent["train"]),
        "evaluating": _minutes(spent["eval"]),
        "whole": _minutes(whole / 2),
        "budget": _budget(results, keys, made),
        "predictions": _predictions(results, keys),
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
    rows = [[title_of(key), one.text, _outcome(one.holds(results))] for key in keys for one in PREDICTIONS[key]]
    return markdown(["", "prediction", "came out"], rows)


def _outcome(held: bool) -> str:
    return "as predicted" if held else "**otherwise**"


def _section(section: Section, results: Results, made: PageContext) -> dict[str, str]:
    return {
        "title": section.title,
        "question": section.question,
        "table": table(results, section.lines, section.figures),
        "legend": LEGEND.format(twin=section.twin) if section.twin else "Means over seeds.",
        "picture": f"{section.picture}.svg" if section.picture else "",
        "made": _made(section.key, section.arms, results, made),
    }


def _made(key: str, arms: Sequence[Arm], results: Results, made: PageContext) -> str:
    """The command, seeds, steps and tokens of a table."""
    records = [record for arm in arms for record in results.records[arm] if record["steps"]]
    seeds = sorted({len(results.records[arm]) for arm in arms})
    parts = [f"`{made.command} --only {key}`", f"{' or '.join(map(str, seeds))} seeds"]
    for name, unit in (("steps", "steps"), ("tokens", "token visits a run")):
        found = sorted({record[name] for record in records})
        if found:
            parts.append(f"{found[0]:,}{f' to {found[-1]:,}' if len(found) > 1 else ''} {unit}")
    return "; ".join(parts) + "."


def _data(sections: Sequence[Section], results: Results, keys: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section in sections:
        found[section.key] = [_line(line.arm, line.twin, line.group, section, results) for line in section.lines]
    if TABLE in keys:
        found[TABLE] = [
            {"arm": arm.label, "preset": arm.preset, "store": arm.store, "metrics": [one["metrics"] for one in seeds]}
            for arm in TABLE_ARMS
            for seeds in [results.evaluations[arm]]
        ]
    held = {key: {one.text: one.holds(results) for one in PREDICTIONS[key]} for key in keys}
    return {"questions": found, "predictions": held}


def _line(arm: Arm, twin: Arm | None, group: str, section: Section, results: Results) -> dict[str, Any]:
    evaluations = results.evaluations[arm]
    line: dict[str, Any] = {
        "arm": arm.label,
        "runs": [one["name"] for one in evaluations],
        "store": arm.store,
        "latents": group,
        "values": {figure: [value_of(one, figure, group) for one in evaluations] for figure in section.figures},
    }
    if twin is not None and group == "all":
        gains = {figure: results.gain(arm, twin, figure) for figure in section.figures if figure != "energy"}
        line["minus"] = twin.label
        line["differences"] = {figure: gain._asdict() for figure, gain in gains.items()}
    return line
