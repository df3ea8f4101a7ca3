"""Summary of a store and its runs on one screen. Read-only, and without a language model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tcsae.shared.base.console import echo, size, table
from tcsae.shared.base.errors import RunError, StoreError
from tcsae.shared.lm.token_text import legible
from tcsae.shared.sae.folder import is_finished, load_evaluation, load_record, run_folders
from tcsae.shared.store.format import SEALED, SPLITS, Manifest, shards_of
from tcsae.shared.store.journal import PLAN, RETAINED, SEQUENCES, read_record, recorded
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.reader import Store, check_manifest, open_store, read_attributes

SHOWN_CHARACTERS = 240
OUTLIER = 10
"""Median norms."""


def show(location: str, runs_path: Path, n_sequences: int, split: str, details: bool = False) -> None:
    """Print the store at `location`, sealed or unfinished, some of its sequences as text, and the runs; with `details`
    also digests and revisions.
    """
    objects = objects_at(location)
    values = read_attributes(objects)
    if values is not None and (manifest := check_manifest(location, values)).state != SEALED:
        _echo([f"Store {location}: unfinished. The same harvest goes on where it stopped."])
        _echo(_recipe(manifest, details))
        _echo(_harvested(objects, manifest))
        show_runs(runs_path, "")
        return
    store = open_store(location)
    content = f", content {store.content[:12]}" if details else ""
    _echo([f"Store {location}: sealed, format {store.manifest.version}{content}"])
    _echo(_recipe(store.manifest, details))
    _echo(_contents(store))
    for hook in store.hooks:
        _echo(_hook(store, hook))
    _echo(_texts(store, split, n_sequences))
    show_runs(runs_path, store.content)


def show_runs(runs_path: Path, content: str) -> None:
    """A table of the runs; figures of those whose evaluation is about this `content` and the weights that lie there."""
    rows = [_run_row(path, content) for path in run_folders(runs_path)]
    if not rows:
        click.echo(f"No runs in {runs_path}. Train one: tcsae --runs {runs_path} train")
        return
    columns = ("run", "preset", "activation", "latents", "steps", "tokens", "L0", "EV", "CE score")
    table(f"Runs in {runs_path}; L0, EV and CE score as last evaluated on this store", columns, rows)


def _run_row(path: Path, content: str) -> list[object]:
    if not is_finished(path):
        return [path.name, "unfinished", *[None] * 7]
    try:
        record = load_record(path)
    except RunError:
        return [path.name, "damaged", *[None] * 7]
    sae, figures = record.get("sae", {}), (load_evaluation(path, content) or {}).get("metrics", {})
    activation = str(sae.get("activation"))
    if "topk" in activation:
        activation += f" {sae.get('k')}"
    shape = [record.get("preset"), activation, sae.get("d_sae"), record.get("steps"), record.get("tokens")]
    return [path.name, *shape, *(figures.get(key) for key in ("l0", "explained_variance", "ce_loss_score"))]


def _recipe(manifest: Manifest, details: bool) -> Iterator[str]:
    """The lines about what was harvested, and how."""

    def revision(text: str) -> str:
        return f", revision {_short(text)}" if details else ""

    model, corpus, sequences = manifest.recipe.model, manifest.recipe.corpus, manifest.recipe.sequences
    hooks = ", ".join(f"{hook.requested} (d_model {hook.d_model})" for hook in manifest.recipe.hooks)
    order = f", shuffled with seed {corpus.seed}" if corpus.seed else ""
    yield f"  model      {model.name}{revision(model.revision)}, {model.dtype} on {model.device}"
    yield f"  corpus     {corpus.name}{revision(corpus.revision)}, split {corpus.split}{order}"
    yield (
        f"  sequences  up to {sequences.length} tokens of one document, {'a' if sequences.prepend_bos else 'no'} BOS; "
        + (f"one document in {sequences.eval_every} is eval" if sequences.eval_every else "both splits were given")
    )
    if manifest.recipe.control:
        yield f"  control    {manifest.recipe.control}"
    yield f"  hooks      {hooks}, stored as {manifest.recipe.codec}"


def _harvested(objects: Objects, manifest: Manifest) -> Iterator[str]:
    """How far an unfinished harvest is, from its journal, which is only read."""
    plan, sequences = read_record(objects, PLAN), read_record(objects, SEQUENCES)
    if plan is None:
        n = (sequences or {}).get("n_sequences", dict.fromkeys(SPLITS, 0))
        yield f"  phase 1 of 2, sequences: {n['train']:,} train and {n['eval']:,} eval written, activations not begun"
        return
    counts = plan["counts"]
    shards = {shard.name for shard in shards_of(replace(manifest, counts=counts))}
    retained = (read_record(objects, RETAINED) or {"shards": {}})["shards"]
    left = shards - retained.keys() - recorded(objects)
    yield from _splits(counts)
    yield f"  phase 2 of 2, activations: {len(shards) - len(left):,} of {len(shards):,} shards written"


def _contents(store: Store) -> Iterator[str]:
    """Counts, dates and sizes."""
    counts, parts = store.manifest.counts, store.n_bytes()
    yield from _splits(counts)
    times = [f"{_words(name)} {value}" for name, value in store.manifest.times.items() if value is not None]
    if times:
        yield f"  harvest    {', '.join(times)}"
    n_tokens = max(1, store.train.n_tokens + store.eval.n_tokens)
    total = sum(parts.values())
    yield f"  disk       {size(total)}, {total / n_tokens:.1f} bytes per valid token"
    for name, n_bytes in sorted(parts.items(), key=lambda part: -part[1]):
        yield f"             {size(n_bytes):>8} {n_bytes / n_tokens:8.2f} {name}"


def _splits(counts: Mapping[str, Any]) -> Iterator[str]:
    for split in ("train", "eval"):
        one = counts[split]
        yield (
            f"  {split:<11}{one['tokens']:,} tokens in {one['sequences']:,} sequences of {one['documents']:,} documents"
        )
    rest = [f"{_words(name)} {value:,}" for name, value in counts.items() if type(value) is int]
    if rest:
        yield f"  counts     {', '.join(rest)}"


def _hook(store: Store, hook: str) -> Iterator[str]:
    """Statistics of the train split, and whether there is a tail."""
    import numpy as np

    from tcsae.shared.store.counted import norm_median
    from tcsae.shared.store.format import NORM_EDGES

    mean, variance, histogram = (
        store.values(f"statistics/{hook}/{name}") for name in ("mean", "variance", "norm_histogram")
    )
    tail = store.manifest.tails.get(hook, {"none": "none was saved"})
    yield f"Hook {hook}"
    rms, of_mean = np.sqrt((variance + mean**2).sum()), np.sqrt((mean**2).sum())
    yield (
        f"  norm of x  RMS {rms:.4g}, median about {_quantile(histogram, 0.5):.3g}, one in 1,000 above about "
        f"{_quantile(histogram, 0.999):.3g}; norm of the mean {of_mean:.4g}"
    )
    if n_outliers := int(histogram[1:][NORM_EDGES[:-1] >= OUTLIER * norm_median(store, hook)].sum()):
        yield (
            f"  outliers   {n_outliers:,} of {int(histogram.sum()):,} train tokens ({store.train.n_sequences:,} begin "
            f"a sequence) have over {OUTLIER} median norms: data.skip_first=1 leaves out the first ones, "
            f"data.max_norm={OUTLIER} all"
        )
    if "none" in tail:
        yield f"  tail       none, so no cross-entropies: {tail['none']}"
    else:
        off = f"log-probabilities within {tail['max_difference']:.2g} nats of the whole model's"
        yield f"  tail       {tail['layers']} layer{'s' * (tail['layers'] != 1)}, {off}"


def _quantile(histogram: Any, share: float) -> float:
    """Middle of the bin in which a share of the norms is reached; bins are an eighth of a doubling wide."""
    total = int(histogram.sum())
    if not total:
        return float("nan")
    number = int((histogram.cumsum() >= share * total).argmax())
    return 2.0 ** ((number - 0.5) / 8 - 20)


def _texts(store: Store, split_name: str, n_asked: int) -> Iterator[str]:
    """Sequences from all over a split, as text."""
    split = store.split(split_name)
    n = min(n_asked, split.n_sequences)
    if n < 1:
        return
    yield f"Text of {n} of {split.n_sequences:,} {split_name} sequences"
    decode = _decoder(store)
    for i in (k * split.n_sequences // n for k in range(n)):
        length = int(split.lengths[i])
        text = legible(decode(split.tokens[i, :length].tolist()))
        more = "…" if len(text) > SHOWN_CHARACTERS else ""
        where = f"document {split.documents[i]}, from token {split.starts[i]}, {length} tokens"
        yield f"  [{where}] {text[:SHOWN_CHARACTERS]}{more}"


def _decoder(store: Store) -> Callable[[list[int]], str]:
    """Token ids to text by the store's own tokenizer; without one, the ids themselves."""
    if store.tokenizer_path is None:
        return lambda ids: f"(no tokenizer in the store) {' '.join(map(str, ids))}"
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            store.tokenizer_path, local_files_only=True, trust_remote_code=False
        ).decode
    except Exception as error:  # whole bytes that are no tokenizer, of whatever kind
        raise StoreError(f"{store.tokenizer_path} cannot be loaded as a tokenizer ({error}).") from error


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(revision: str) -> str:
    """A digest or commit, cut to what people compare."""
    return revision if len(revision) <= 24 else f"{revision[:19]}…"


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        echo(line)
