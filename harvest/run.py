"""The harvest: corpus -> sequences -> the language model up to the hooks -> a sealed activation store.

The same call, made again after a kill, goes on from what is on disk and ends with the same bytes.
"""

import contextlib
import gc
import shutil
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from tcsae.data.model import EVAL_EVERY
from tcsae.harvest.capture import Capture
from tcsae.harvest.cost import Plan, clear_when_full, free_bytes, make_plan, no_room
from tcsae.harvest.documents import Corpus, find_corpus
from tcsae.harvest.language_model import EMBEDDED, LanguageModel, find_model
from tcsae.harvest.phases import sample, write_activations, write_sequences, write_tails, write_tokenizer
from tcsae.harvest.resolve import HarvestConfig, ModelChoice, load, resolve
from tcsae.harvest.sequences import budgets_of, n_tokens
from tcsae.harvest.work_stealing import join, seal_once
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import Ranks, ranks
from tcsae.shared.base.errors import ConfigError, DataError, ModelError, StoreError
from tcsae.shared.base.settings import differences
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.store.extend import can_extend, extend
from tcsae.shared.store.format import FORMAT, RANDOM_WEIGHTS, SEALED, SPLITS, Manifest, Recipe
from tcsae.shared.store.journal import FOLDER, Journal, LockedError
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import ROOT, Store, is_leftover, open_store, read_attributes, read_manifest
from tcsae.shared.store.writer import StoreWriter, open_writer

__all__ = ["HarvestConfig", "ModelChoice", "harvest", "plan_harvest", "remove_store"]

DELETED = ".deleted"
"""Ending of a store that is being deleted: renamed at once, then taken apart."""


def harvest(
    location: str, config: HarvestConfig, *, fresh: bool = False, exact: bool = False, force: bool = False
) -> Store:
    """Make, or finish, the store at `location`, and open it. A sealed store of the same recipe is used as it is, one of
    fewer tokens and else the same recipe is extended.

    `fresh` deletes an activation store that is there. `exact` refuses a corpus with less text than `n_tokens`, before
    the activations are computed; otherwise the store then holds fewer tokens, and says so. `force` begins even if the
    disk has not the room, and in an object store breaks the lock of a writer that may be dead.
    Raises ConfigError, ModelError, DataError or StoreError. Wrong names and settings are found before anything is
    written; what a later failure leaves behind, the same call goes on from. Raises Stopped after a SIGINT or SIGTERM,
    once the shard at hand is on disk.
    """
    ours = ranks()
    if ours.several:
        return _harvest_together(location, config, ours, fresh=fresh, exact=exact, force=force)
    start = time.monotonic()
    found = _prepare(location, config, fresh, force)
    before = _extend(location, found.recipe, force)
    writer = open_writer(location, found.recipe, force=force)
    if writer is None:
        _say_used(location, found.recipe)
        return open_store(location)
    trained = config.model.name == EMBEDDED and found.model.weights_seed is None
    if before is None and trained and config.sequences.eval_every != EVAL_EVERY:
        say(
            f"With --eval-every {config.sequences.eval_every} the embedded model was trained on part of the eval "
            f"split, and figures on it will flatter. It has not seen the eval split of --eval-every {EVAL_EVERY}."
        )
    with writer, clear_when_full(location), stop_on_signals() as stop:
        capture = _begin(writer, found, stop, exact, force)
        n_read, seconds = write_activations(writer, capture, stop)
        del capture
        _seal(writer, found, _times(start, n_read, seconds), stop)
        stop.check("the store is sealed, nothing is left to do in it")
    return open_store(location)


def _harvest_together(
    location: str, config: HarvestConfig, ours: Ranks, *, fresh: bool, exact: bool, force: bool
) -> Store:
    """`harvest` by one of several processes; see `several`."""
    if fresh:
        raise ConfigError(
            f"--fresh in {ours.world} processes: each would delete what the others write. Start anew with one process, "
            "harvest --fresh --dry-run, then start all without --fresh."
        )
    start = time.monotonic()
    found = _prepare(location, config, fresh)
    if ours.rank == 0:
        with contextlib.suppress(LockedError):  # the others are at work
            _extend(location, found.recipe, force)

    def begin(writer: StoreWriter) -> Capture:
        capture = _begin(writer, found, stop, exact, force)
        writer.fit_codec(lambda shard: capture.run(writer.tokens(shard), writer.lengths(shard)))
        return capture

    with clear_when_full(location), stop_on_signals() as stop:
        joined = join(location, found.recipe, ours, begin, stop, force)
        if joined is None:
            _say_used(location, found.recipe)
            return open_store(location)
        writer, capture = joined
        with writer:
            capture = capture or found.load()
            n_read, seconds = write_activations(writer, capture, stop, ours)
            del capture
            times = _times(start, n_read, seconds) | {"ranks": ours.world}
            seal_once(location, lambda: _seal(writer, found, times, stop), stop)
        stop.check("the store is sealed, nothing is left to do in it")
    return open_store(location)


def _begin(writer: StoreWriter, found: "_Found", stop: StopRequest, exact: bool, force: bool) -> Capture:
    """Phase 1, and a plan of phase 2; the model that will do it."""
    write_sequences(writer, found.corpus, found.model, stop)
    _check_counts(writer, exact)
    capture = found.load()
    if writer.missing_shards():
        plan = make_plan(writer, capture)
        say(plan.line())
        plan.check_room(force)
    return capture


def _seal(writer: StoreWriter, found: "_Found", times: dict[str, Any], stop: StopRequest) -> None:
    few = sample(writer, found.load())
    found.capture = None  # a large model need not be in memory twice
    gc.collect()
    tails, files = write_tails(writer, found.model, few)
    files += write_tokenizer(writer, found.model)
    stop.check("all shards are on disk")
    writer.seal(tails, files, times)


def plan_harvest(location: str, config: HarvestConfig, *, fresh: bool = False, exact: bool = False) -> Plan:
    """What `harvest` would write and how long it would take: text becomes sequences, then a batch is timed.

    Leaves an unfinished store, from which `harvest` goes on. Raises what `harvest` raises; StoreError for a sealed
    store, which would have to be opened for writing.
    """
    if (ours := ranks()).several:
        raise ConfigError(f"--dry-run in {ours.world} processes: one is enough. Start it without torchrun.")
    found = _prepare(location, config, fresh)
    manifest = read_manifest(location)
    if manifest is not None and manifest.state == SEALED:
        raise StoreError(f"{location} is sealed, there is nothing to plan. Give another --store, or --fresh.")
    writer = open_writer(location, found.recipe)
    assert writer is not None
    with writer, clear_when_full(location), stop_on_signals() as stop:
        write_sequences(writer, found.corpus, found.model, stop)
        _check_counts(writer, exact)
        return make_plan(writer, found.load())


@dataclass
class _Found:
    """What a config names."""

    model: LanguageModel
    corpus: Corpus
    recipe: Recipe
    capture: Capture | None

    def load(self) -> Capture:
        capture = self.capture or load(
            self.model, tuple(hook.requested for hook in self.recipe.hooks), self.recipe.model
        )
        if capture.attention != self.recipe.model.attention:
            raise ModelError(
                f"The store was begun with {self.recipe.model.attention} attention, this program runs "
                f"{self.model.name} with {capture.attention}. Use --fresh to start anew, or another --store."
            )
        self.capture = capture
        return capture


def _prepare(location: str, config: HarvestConfig, fresh: bool, force: bool = False) -> _Found:
    if fresh:
        remove_store(location, force=force)
    if isinstance(objects := objects_at(location), LocalObjects):
        for leftover in objects.root.absolute().parent.glob(f"{objects.root.name}.*{DELETED}"):
            shutil.rmtree(leftover, ignore_errors=True)
    model = find_model(config.model.name, config.model.revision)
    if config.control is not None and config.control.kind == RANDOM_WEIGHTS:
        model = replace(model, weights_seed=config.control.seed)
    corpus = find_corpus(config.corpus)
    stored = read_manifest(location)
    return _Found(model, corpus, *resolve(config, model, corpus, stored.recipe if stored else None))


def _extend(location: str, recipe: Recipe, force: bool) -> Manifest | None:
    """Begin an extension if the store at `location` calls for one; returns the manifest that it had then."""
    stored = read_manifest(location)
    if stored is None or not can_extend(stored, recipe):
        return None
    room = free_bytes(objects_at(location))
    per_token = sum(open_store(location).n_bytes().values()) / max(1, n_tokens(stored.counts))
    needed = int(per_token * (recipe.n_tokens - stored.recipe.n_tokens))
    if room is not None and needed > room and not force:  # found out here, the sealed store stays as it is
        raise no_room(location, needed, room)
    say(f"Extending {location} from {stored.recipe.n_tokens:,} to {recipe.n_tokens:,} tokens.")
    return extend(location, recipe, force=force)


def _say_used(location: str, recipe: Recipe) -> None:
    stored = read_manifest(location)
    assert stored is not None
    others = differences(stored.recipe.libraries, recipe.libraries)
    versions = f" It was written with other versions ({'; '.join(others)})." if others else ""
    say(f"{location} holds this harvest already; it is used as it is (--fresh makes it anew).{versions}")


def remove_store(location: str, *, force: bool = False) -> None:
    """Delete the activation store at `location`, if there is one; on a disk at once as far as a second start can see.

    In an object store the journal goes first and the root last: killed in between, the same call goes on.

    Raises StoreError if something else is there, or if another process harvests into it.
    """
    objects = objects_at(location)
    values = read_attributes(objects)
    if values is None:
        return
    if values.get("format") != FORMAT:
        raise StoreError(
            f"{location} is a Zarr group of another kind; only activation stores are deleted. Move it away."
        )
    journal = Journal(objects, force=force)
    try:
        if isinstance(objects, LocalObjects):
            root = objects.root.resolve()
            doomed = root.with_name(f"{root.name}.{uuid.uuid4().hex}{DELETED}")
            root.rename(doomed)
            shutil.rmtree(doomed)
        else:
            objects.delete_below(FOLDER)
            objects.delete([key for key in objects.listed() if key != ROOT and not is_leftover(key)])
            objects.delete([ROOT])
    finally:
        journal.release()


def _check_counts(writer: StoreWriter, exact: bool) -> None:
    """Say, or with `exact` refuse, that there is less text than was asked for.

    Raises DataError, and deletes the store, if there is nothing to train on.
    """
    recipe, counts = writer.manifest.recipe, writer.manifest.counts
    name = f"{recipe.corpus.name} ({counts['documents_read']:,} documents)"
    if not counts["train"]["sequences"]:
        writer.close()
        remove_store(writer.location)
        raise DataError(f"{name} has no text for the train split. Give another --dataset, or a lower --min-length.")
    if counts["corpus_exhausted"]:
        wanted, unit = budgets_of(recipe)
        parts = ", ".join(f"{split} {counts[split][unit]:,} of {wanted[split]:,}" for split in SPLITS)
        there = sum(counts[split][unit] for split in SPLITS)
        short = f"{name} is at its end with {there:,} of {sum(wanted.values()):,} {unit} ({parts})."
        if exact:
            raise DataError(f"{short} Ask for fewer, or leave --exact out.")
        say(f"{short} The store will hold these.")


def _times(start: float, n_read: int, seconds: float) -> dict[str, Any]:
    return {
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "tokens_per_s": round(n_read / seconds) if n_read else None,
    }
