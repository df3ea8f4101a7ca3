"""The model card of pushed runs: what they are, figures with intervals, whose data, the commands that repeat them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tcsae import __version__
from tcsae.shared.base.settings import to_dict
from tcsae.shared.store.format import Recipe, SequenceRecipe

FIGURES = {
    "explained_variance": "explained variance (centred, pooled R2)",
    "l0": "L0",
    "dead_fraction": "share of latents that never fire",
    "ce_loss_score": "CE score (share of the gap in cross-entropy to zero ablation that is recovered)",
    "kl_div_score": "KL score",
}
"""What the card shows of an evaluation, in this order."""
GIVEN = "as given"
"""Revision of a model or corpus that was not harvested."""
UNKNOWN_LICENCE = "not stated here: look at the data set's page"


class Pushed(NamedTuple):
    """A run, as far as its files say what it is."""

    name: str
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    """cfg.json."""
    evaluation: Mapping[str, Any] | None


def make_card(
    repo: str,
    runs: Sequence[Pushed],
    recipe: Recipe | None,
    *,
    licence: str | None = None,
    data_licence: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """README.md of a repository with these runs. `recipe`: of the store that they were trained on, if it is there.

    `figures`: paths in the repository of pictures to show.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tcsae.shared.hub", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["text"] = markdown_text
    return environment.get_template("card.md.j2").render(
        repo=repo,
        runs=[_values(run) for run in runs],
        model=runs[0].config["metadata"].get("model_name") or "unknown",
        data=corpus_name(runs[0], recipe),
        on_hub=recipe is not None and "/" in recipe.model.name and not recipe.model.revision.startswith("sha256:"),
        recipe=recipe,
        commands=repeat_commands(runs, recipe),
        licence=licence,
        data_licence=data_licence or UNKNOWN_LICENCE,
        figures=figures,
        version=__version__,
    )


def corpus_name(run: Pushed, recipe: Recipe | None) -> str:
    """The data, with config, split and revision where the store says them."""
    if recipe is None:
        return str(run.config["metadata"].get("dataset_path") or "unknown")
    corpus = recipe.corpus
    parts = [corpus.name, *([corpus.config] if corpus.config else []), f"split {corpus.split}", f"at {corpus.revision}"]
    return ", ".join(parts)


def _values(run: Pushed) -> dict[str, Any]:
    sae, record = run.record["sae"], run.record
    kind = sae["activation"] + (f", k = {sae['k']}" if sae["activation"] in ("topk", "batchtopk") else "")
    return {
        "name": run.name,
        "hook": record["hook"],
        "kind": kind,
        "d_sae": sae["d_sae"],
        "d_model": sae["d_model"],
        "steps": record["steps"],
        "tokens": record["tokens"],
        "preset": record["preset"],
        "content": (record["store"].get("content") or "unknown")[:12],
        "left_out": {name: n for name, n in record.get("left_out", {}).items() if n},
        "figures": list(_figures(run.evaluation)) if run.evaluation else [],
        "counted": _counted(run.evaluation) if run.evaluation else "",
    }


def _figures(evaluation: Mapping[str, Any]) -> Any:
    for name, about in FIGURES.items():
        value = evaluation["metrics"].get(name)
        interval = evaluation.get("intervals", {}).get(name)
        if value is not None:
            yield about, f"{value:.4g}", "" if not interval else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _counted(evaluation: Mapping[str, Any]) -> str:
    return (
        f"{evaluation['n_tokens']:,} tokens of {evaluation['n_documents']:,} held-out documents; intervals: "
        f"{evaluation['interval_rule']}"
    )


def repeat_commands(runs: Sequence[Pushed], recipe: Recipe | None) -> list[str]:
    """Shell lines that make the store, where it was harvested, and train and evaluate the runs."""
    lines = []
    if recipe is not None and recipe.model.revision != GIVEN:
        lines.append(shlex.join(harvest_command(recipe)))
    lines += [shlex.join(["tcsae", "train", "--config", f"{run.name}/{TRAIN_FILE}"]) for run in runs]
    return [*lines, "tcsae eval"]


def harvest_command(recipe: Recipe) -> list[str]:
    """The command that makes a store of this recipe, with what differs from the defaults."""
    model, corpus, sequences = recipe.model, recipe.corpus, recipe.sequences
    usual, local = SequenceRecipe(), "sha256:"
    from_here = corpus.revision.startswith(local) or "/" not in corpus.name
    options: dict[str, tuple[object, object]] = {
        "--model": (model.name, None),
        "--revision": (None if model.revision.startswith(local) else model.revision, None),
        "--dataset": (corpus.name, None),
        "--dataset-revision": (None if from_here else corpus.revision, None),
        "--dataset-config": (corpus.config, None),
        "--split": (corpus.split, "train"),
        "--sequence-length": (sequences.length, usual.length),
        "--min-length": (sequences.min_length, usual.min_length),
        "--eval-every": (sequences.eval_every, usual.eval_every),
        "--lm-dtype": (model.dtype, "float32"),
        "--batch-size": (model.batch_size, 32),
        "--seed": (corpus.seed, 0),
        "--codec": (recipe.codec, "float16"),
        "--codec-error": (recipe.codec_error, None),
        "--control": (recipe.control and recipe.control.kind, None),
    }
    if recipe.chat is not None:
        template = f"<template {recipe.chat.template[:15]}>"  # of which the store keeps the digest alone
        options |= {"--chat-template": (template, None), "--messages-field": (corpus.field, "messages")}
        options["--roles"] = (",".join(recipe.roles) or None, None)
    else:
        options["--tokens-field" if corpus.tokenized else "--text-field"] = (corpus.field, "text")
    command = ["tcsae", "harvest"]
    for option, (value, default) in options.items():
        if value is not None and value != default:
            command += [option, str(value)]
    for hook in recipe.hooks:
        command += ["--hook", hook.requested]
    if sequences.prepend_bos:
        command.append("--prepend-bos")
    size = ("--tokens", recipe.n_tokens) if recipe.n_sequences is None else ("--sequences", recipe.n_sequences)
    return [*command, size[0], str(size[1])]


TRAIN_FILE = "train.toml"
"""Beside a pushed run: its settings, for `tcsae train --config`."""


def train_file(record: Mapping[str, Any]) -> str:
    """A run's settings as `tcsae train --config` reads them."""
    lines, tables = [f"preset = {_toml(record['preset'])}"], []
    for key, value in record["train"].items():
        if isinstance(value, Mapping):
            tables += ["", f"[{key}]", *_table(value)]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _table(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines of a table; settings below it by dotted keys."""
    lines = []
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        lines += _table(value, f"{prefix}{name}.") if nested else [f"{prefix}{name} = {_toml(value)}"]
    return lines


def _toml(value: object) -> str:
    """A value; what is null is said as "none", which a setting reads as such."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def markdown_text(value: object) -> str:
    """Data as Markdown text: signs that would be taken for markup, or for a table's cells, are escaped."""
    text = " ".join(str(value).split())
    for sign in "\\`*_{}[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text


def store_card(repo: str, recipe: Recipe, counts: Mapping[str, Any], content: str) -> str:
    """README.md of a pushed store: its recipe, counts, and how to open it."""
    import json

    made = "" if recipe.model.revision == GIVEN else f"\nMade by\n\n    {shlex.join(harvest_command(recipe))}\n"
    rows = "\n".join(
        f"| {split} | {counts[split]['sequences']:,} | {counts[split]['tokens']:,} | {counts[split]['documents']:,} |"
        for split in ("train", "eval")
    )
    return f"""---
tags: [activations, tcsae, zarr]
---
# Activations of {markdown_text(recipe.model.name)} over {markdown_text(recipe.corpus.name)}

An activation store of [tcsae](https://pypi.org/project/tcsae/) {__version__}: a Zarr v3 group with core codecs only.

    tcsae --store mine.zarr pull --store --from {repo}
    tcsae --store mine.zarr train eval

| split | sequences | tokens | documents |
| --- | ---: | ---: | ---: |
{rows}

Content `{content}`. The text is that of the data set named, under its own licence.
{made}
```json
{json.dumps({"recipe": to_dict(recipe)}, indent=1, ensure_ascii=False)}
```
"""
