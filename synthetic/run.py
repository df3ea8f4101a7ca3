"""Writing a planted store: an activation store as any other, and its truth beside it.

Shards hold a fixed range of sequences, and a document is drawn from random numbers of its own, so that a store which
was killed goes on where it stopped and ends with the same bytes.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int
from numpy import ndarray

from tcsae.evaluate.planted.truth import CLASSES, MODEL, Truth, load_truth, save_truth, truth_path
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.base.files import disk_errors, json_digest
from tcsae.shared.base.settings import to_dict
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.store.format import (
    SPLITS,
    CorpusRecipe,
    HookRecipe,
    ModelRecipe,
    Recipe,
    SequenceRecipe,
    Shard,
)
from tcsae.shared.store.reader import Store, open_store, read_manifest
from tcsae.shared.store.writer import Rows, StoreWriter, open_writer
from tcsae.synthetic.planting import PlantedConfig, described
from tcsae.synthetic.population import Population, draw_population
from tcsae.synthetic.sampling import Sampled, sample_document

HOOK = "planted"
GENERATOR = 1
"""Raised whenever the same settings give another store."""
NO_TAIL = "the activations are planted: no language model made them"


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Which piece of which document each sequence of a split is."""

    documents: Int[ndarray, " n"]
    starts: Int[ndarray, " n"]
    lengths: Int[ndarray, " n"]
    document_lengths: Int[ndarray, " n_documents"]

    @cached_property
    def first_of(self) -> dict[int, int]:
        """Number of the first sequence of each document."""
        numbers, first = np.unique(self.documents, return_index=True)
        return dict(zip(numbers.tolist(), first.tolist(), strict=True))

    def counts(self, stop: int) -> dict[str, int]:
        """Of the first `stop` sequences, as a manifest has them."""
        n_documents = len(np.unique(self.documents[:stop]))
        return {"sequences": stop, "tokens": int(self.lengths[:stop].sum()), "documents": n_documents}


def plan_sequences(config: PlantedConfig) -> dict[str, SequencePlan]:
    """The sequences of both splits: documents until there are n_tokens, each cut into pieces of sequence_length.

    Raises ConfigError if that is too few documents for both splits.
    """
    longest = 2 * config.sequence_length
    rng = np.random.default_rng([config.seed, 1])
    most = config.n_tokens * 2 // config.sequence_length + config.eval_every
    lengths = rng.integers(config.sequence_length // 2, longest + 1, most)
    n = max(int(np.searchsorted(lengths.cumsum(), config.n_tokens)) + 1, 1)
    lengths = lengths[:n]
    if n < config.eval_every:
        least = config.eval_every * longest
        raise ConfigError(
            f"n_tokens={config.n_tokens} is {n} documents, none of them eval (one in eval_every={config.eval_every} "
            f"is). Ask for {least} tokens or more, or lower eval_every."
        )
    n_pieces = -(-lengths // config.sequence_length)
    document = np.repeat(np.arange(n), n_pieces)
    start = (np.arange(len(document)) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)) * config.sequence_length
    length = np.minimum(lengths[document] - start, config.sequence_length)
    is_eval = document % config.eval_every == config.eval_every - 1
    parts = {"train": ~is_eval, "eval": is_eval}
    return {name: SequencePlan(document[part], start[part], length[part], lengths) for name, part in parts.items()}


def recipe_of(config: PlantedConfig) -> Recipe:
    """What makes the store at hand the one that is asked for."""
    revision = json_digest({"generator": GENERATOR, **to_dict(config)})[:16]
    return Recipe(
        model=ModelRecipe(name=MODEL, revision=f"generator {GENERATOR}", attention="none", batch_size=0),
        corpus=CorpusRecipe(name=MODEL, revision=revision, config=described(config) or "defaults", seed=config.seed),
        sequences=SequenceRecipe(length=config.sequence_length, min_length=1, eval_every=0),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=config.d_model),),
        n_tokens=config.n_tokens,
        libraries={"numpy": np.__version__, "scipy": scipy.__version__},
    )


def write_planted(location: str, config: PlantedConfig) -> Store:
    """Make, or finish, a planted store and its truth, and open it. A sealed one of the same settings is used as it is.

    Raises ConfigError for a location that is no folder on a local disk, or too few tokens; StoreError if another store
    is there. Raises Stopped after a SIGINT or SIGTERM, once the shard at hand is on disk.
    """
    path = truth_path(location)
    if path is None:
        raise ConfigError(f"--store {location}: the truth lies in a file beside the store. Give a folder, copy later.")
    plans, recipe = plan_sequences(config), recipe_of(config)
    with disk_errors(location, StoreError), stop_on_signals() as stop:
        _check_other(location, recipe)
        population = draw_population(config)
        writer = open_writer(location, recipe)
        if writer is not None:
            with writer:
                _write(writer, population, plans, stop.check)
                writer.seal({HOOK: {"none": NO_TAIL}}, [], {})
        store = open_store(location)
        if _lacks_truth(store):
            save_truth(location, eval_truth(population, plans["eval"]), store.content, to_dict(config))
        elif writer is None:
            say(f"{location} holds these planted features already; it is used as it is.")
    return store


def _check_other(location: str, recipe: Recipe) -> None:
    """Raises StoreError, in words of `synthetic`, if the store at hand has other settings."""
    manifest = read_manifest(location)
    if manifest is None or manifest.recipe == recipe:
        return
    theirs, ours = manifest.recipe, recipe
    if theirs.model.name != MODEL:
        differ = f"of {theirs.model.name}"
    elif theirs.corpus == ours.corpus and theirs.model == ours.model:
        return  # the libraries alone: the writer judges
    else:
        differ = f"with {theirs.corpus.config}, seed {theirs.corpus.seed}"
    raise StoreError(f"{location} is there already, {differ}. Give another --store, or start anew: --fresh.")


def _lacks_truth(store: Store) -> bool:
    """Whether the truth is missing, damaged, or of a store that was here before: written anew in any case."""
    try:
        return load_truth(store) is None
    except StoreError as error:
        say(f"{error} It is written anew now.")
        return True


def _write(
    writer: StoreWriter, population: Population, plans: dict[str, SequencePlan], check: Callable[[str], None]
) -> None:
    """Every shard that is missing: its sequences first, then its activations."""
    n = {split: len(plan.lengths) for split, plan in plans.items()}
    per_shard = writer.manifest.layout.sequences_per_shard
    shards = [
        Shard(split, number, start, min(start + per_shard, n[split]))
        for split in SPLITS
        for number, start in enumerate(range(0, n[split], per_shard))
    ]
    done = writer.progress.get("n_sequences", dict.fromkeys(SPLITS, 0))
    total = sum(int(plan.lengths.sum()) for plan in plans.values())
    with progress("planting", total) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, shard in enumerate(shards):
            plan = plans[shard.split]
            if shard.stop <= done[shard.split] and writer.planned and writer.is_written(shard):
                advance(int(plan.lengths[shard.start : shard.stop].sum()))
                continue
            tokens, x = _shard(population, plan, shard, pool)
            if shard.stop > done[shard.split]:
                writer.commit({one: _rows(plans[one], shard, tokens, one == shard.split) for one in SPLITS}, {})
                done[shard.split] = shard.stop
            writer.finish_sequences({split: plans[split].counts(done[split]) for split in SPLITS})
            writer.fit_codec(lambda _, x=x: {HOOK: x})  # type: ignore[misc]
            writer.write_shard(shard, {HOOK: x})
            advance(int(plan.lengths[shard.start : shard.stop].sum()))
            check(f"{i + 1} of {len(shards)} shards are on disk")


def _rows(plan: SequencePlan, shard: Shard, tokens: ndarray, is_asked: bool) -> Rows:
    part = slice(shard.start, shard.stop if is_asked else shard.start)
    return Rows(
        tokens[: shard.stop - shard.start if is_asked else 0],
        plan.lengths[part].astype(np.int32),
        plan.documents[part].astype(np.int64),
        plan.starts[part].astype(np.int32),
    )


def _shard(
    population: Population, plan: SequencePlan, shard: Shard, pool: ThreadPoolExecutor
) -> tuple[Int[ndarray, "n length"], Float[ndarray, "n length d_model"]]:
    """Tokens and activations of a shard's sequences; zero beyond their lengths."""
    config = population.config
    n = shard.stop - shard.start
    tokens = np.zeros((n, config.sequence_length), np.int32)
    x = np.zeros((n, config.sequence_length, config.d_model), np.float32)
    numbers = np.unique(plan.documents[shard.start : shard.stop]).tolist()

    def fill(number: int) -> None:
        drawn = _document(population, plan, number)
        row = plan.first_of[number]
        for start in range(0, len(drawn.x), config.sequence_length):
            if shard.start <= row < shard.stop:
                part = slice(start, start + int(plan.lengths[row]))
                tokens[row - shard.start, : plan.lengths[row]] = drawn.tokens[part]
                x[row - shard.start, : plan.lengths[row]] = drawn.x[part]
            row += 1

    list(pool.map(fill, numbers))
    return tokens, x


def _document(population: Population, plan: SequencePlan, number: int) -> Sampled:
    return sample_document(population, number, int(plan.document_lengths[number]))


def eval_truth(population: Population, plan: SequencePlan) -> Truth:
    """What the features do on the eval split, drawn again."""
    numbers = list(plan.first_of)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(lambda number: _document(population, plan, number).features, numbers))
    counts: list[Any] = [np.diff(one.indptr) for one in drawn]
    amplitudes = [population.config.dense_amplitude, population.config.position_amplitude]
    mean_side = {"slow_dense": amplitudes[0] * (2 / np.pi) ** 0.5, "position": amplitudes[1] / 2}
    sides = [mean_side[kind] for kind in population.kinds[population.config.n_features :]]
    return Truth(
        directions=population.directions,
        kinds=np.array([CLASSES.index(kind) for kind in population.kinds], np.int32),
        durations=population.durations.astype(np.float64),
        amplitudes=np.append(population.means, sides),
        parents=population.parents.astype(np.int32),
        offsets=np.concatenate([[0], np.concatenate(counts).cumsum()]).astype(np.int64),
        features=np.concatenate([one.indices for one in drawn]).astype(np.int32),
        values=np.concatenate([one.data for one in drawn]).astype(np.float32),
    )
