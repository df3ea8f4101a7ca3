"""The harvest: corpus -> sequences -> the language model up to the hooks -> a sealed activation store.

The same call, made again after a kill, goes on from what is on disk and ends with the same bytes.
"""

import contextlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from numpy import ndarray

from tcsae.data.model import EVAL_EVERY
from tcsae.harvest.capture import Capture
from tcsae.harvest.chat import ChatChoice
from tcsae.harvest.cost import Plan, free_bytes, make_plan, no_room
from tcsae.harvest.documents import Corpus, find_corpus
from tcsae.harvest.language_model import EMBEDDED, LanguageModel, controlled, find_model
from tcsae.harvest.phases import write_activations, write_sequences, write_tails, write_tokenizer
from tcsae.harvest.resolve import HarvestConfig, ModelChoice, load, resolve
from tcsae.harvest.sequences import budgets_of, n_tokens
from tcsae.harvest.work_stealing import dealt, join, seal_once, write_beside
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import Ranks, ranks
from tcsae.shared.base.errors import ConfigError, DataError, ModelError, StoreError
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.settings import differences
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.store.extend import can_extend, extend
from tcsae.shared.store.format import FORMAT, SEALED, SPLITS, Recipe, Shard
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

    One of several processes (RANK of WORLD_SIZE) makes the same store beside the others: see `work_stealing`.

    `fresh` deletes an activation store that is there. `exact` refuses a corpus with less text than `n_tokens`, before
    the activations are computed; otherwise the store then holds fewer tokens, and says so. `force` begins even if the
    disk has not the room, and in an object store breaks the lock of a writer that may be dead.
    Raises ConfigError, ModelError, DataError or StoreError. Wrong names and settings are refused before anything is
    written; what a later failure leaves behind, the same call goes on from. Raises Stopped after a SIGINT or SIGTERM,
    once the shard at hand is on disk.
    """
    processes, start = ranks(), time.monotonic()
    if processes.parallel and fresh:
        raise ConfigError(
            f"--fresh in {processes.world} processes: each would delete what the others write. Delete {location} "
            "first, then start all without --fresh."
        )
    with disk_errors(location, StoreError):
        job = _prepare(location, config, fresh, force)
        with stop_on_signals() as stop:
            writer = _open(location, job, processes, stop, exact, force)
            if writer is None:
                _say_used(location, job.recipe)
                return open_store(location)
            with writer:
                shards, write = _share(writer, processes)
                n_read, seconds = write_activations(writer, job.load(), shards, write, stop, processes.world)
                seal = partial(_seal, writer, job, _times(start, n_read, seconds, processes), stop)
                if processes.parallel:
                    seal_once(location, seal, stop)
                else:
                    seal()
            stop.check("the store is sealed, nothing is left to do in it")
        return open_store(location)


def plan_harvest(location: str, config: HarvestConfig, *, fresh: bool = False, exact: bool = False) -> Plan:
    """What `harvest` would write and how long it would take: text becomes sequences, then a batch is timed.

    Leaves nothing behind: sequences go into a scratch folder beside `location`, or are those of an unfinished store.
    `fresh` plans as if no store were there. Raises what `harvest` raises; StoreError for a sealed store, which would
    have to be opened for writing.
    """
    if (processes := ranks()).parallel:
        raise ConfigError(f"--dry-run in {processes.world} processes: one is enough. Start it without torchrun.")
    with disk_errors(location, StoreError), _scratch(location) as scratch, stop_on_signals() as stop:
        manifest = None if fresh else read_manifest(location)
        if manifest is not None and manifest.state == SEALED:
            raise StoreError(f"{location} is sealed, there is nothing to plan. Give another --store, or --fresh.")
        job = _prepare(scratch if fresh else location, config, fresh=False)
        if manifest is not None:
            with _unfinished(location, job.recipe) as writer:
                if writer.planned:
                    return make_plan(writer, job.load())
        with _unfinished(scratch, job.recipe) as writer:
            _make_sequences(writer, job, stop, exact)
            return replace(make_plan(writer, job.load()), location=location)


def _unfinished(location: str, recipe: Recipe) -> StoreWriter:
    writer = open_writer(location, recipe)
    assert writer is not None, "sealed stores were refused"
    return writer


@contextlib.contextmanager
def _scratch(location: str) -> Iterator[str]:
    """A store's location on the same disk, in a temporary folder that is gone afterwards; killed, it goes at the next
    start, as what `remove_store` leaves does. Of an object store: on the local disk.
    """
    objects = objects_at(location)
    if not isinstance(objects, LocalObjects):
        with tempfile.TemporaryDirectory() as folder:
            yield f"{folder}/plan.zarr"
        return
    root = objects.root.absolute()
    has_parent = root.parent.exists()
    scratch = root.with_name(f"{root.name}.{uuid.uuid4().hex}{DELETED}")
    try:
        yield str(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not has_parent:
            with contextlib.suppress(OSError):  # something else has come to lie there
                root.parent.rmdir()


@dataclass
class _Job:
    """What a config names; the model, once it is loaded."""

    model: LanguageModel
    corpus: Corpus
    recipe: Recipe
    capture: Capture | None
    chat: ChatChoice | None = None

    def load(self) -> Capture:
        if self.capture is None:
            hooks = tuple(hook.requested for hook in self.recipe.hooks)
            self.capture = load(self.model, hooks, self.recipe.model)
        if self.capture.attention != self.recipe.model.attention:
            raise ModelError(
                f"The store was begun with {self.recipe.model.attention} attention, this program runs "
                f"{self.model.name} with {self.capture.attention}. Use --fresh to start anew, or another --store."
            )
        return self.capture

    def load_float32(self) -> Capture:
        """For tails: the model that is loaded already, its weights brought to float32 in place."""
        capture = self.load()
        if capture.dtype != "float32":
            capture.widen()
        return capture


def _prepare(location: str, config: HarvestConfig, fresh: bool, force: bool = False) -> _Job:
    """Names to what they name, exactly; nothing is written but for `fresh`, which deletes."""
    if fresh:
        remove_store(location, force=force)
    _clear_deleted(location)
    manifest = read_manifest(location)
    stored = manifest.recipe if manifest else None
    choice = config.model
    model = find_model(choice.name, choice.revision, stored.model if stored else None, choice.trust_remote_code)
    model = controlled(model, config.control)
    corpus = find_corpus(config.corpus, stored.corpus if stored else None)
    return _Job(model, corpus, *resolve(config, model, corpus, stored), config.chat)


def _open(
    location: str, job: _Job, processes: Ranks, stop: StopRequest, exact: bool, force: bool
) -> StoreWriter | None:
    """A writer of the store, ready for its first shard; None if the store is sealed."""
    begin = partial(_begin, job=job, stop=stop, exact=exact, force=force)
    if processes.parallel:
        if processes.rank == 0:
            with contextlib.suppress(LockedError):  # other processes are at work
                _extend(location, job.recipe, force)
        return join(location, job.recipe, processes, begin, stop, force)
    _extend(location, job.recipe, force)
    writer = open_writer(location, job.recipe, force=force)
    if writer is not None:
        try:
            begin(writer)
        except BaseException:
            writer.close()
            raise
    return writer


def _begin(writer: StoreWriter, job: _Job, stop: StopRequest, exact: bool, force: bool) -> None:
    """What comes before the first shard: phase 1, a plan of phase 2, and the codec's parameters."""
    _say_trained_on(writer, job.model)
    _make_sequences(writer, job, stop, exact)
    capture = job.load()
    where = job.recipe.model
    say(f"{job.model.name} runs in {where.dtype} on {where.device}, with {capture.attention} attention.")
    if writer.missing_shards():
        plan = make_plan(writer, capture)
        say(plan.line())
        plan.check_room(force)
    if not capture.causal:
        say(f"{job.model.name} looks at later tokens: each batch holds sequences of one length, without padding.")
    writer.fit_codec(lambda shard: capture.run(writer.tokens(shard), writer.lengths(shard)))


def _make_sequences(writer: StoreWriter, job: _Job, stop: StopRequest, exact: bool) -> None:
    """Phase 1."""
    write_sequences(writer, job.corpus, job.model, stop, job.chat)
    _check_counts(writer, exact)


def _share(
    writer: StoreWriter, processes: Ranks
) -> tuple[Iterable[Shard], Callable[[Shard, dict[str, ndarray]], None]]:
    """The shards that are this process's to write, and how it writes one."""
    if processes.parallel:
        return dealt(writer, processes), partial(write_beside, writer)
    return writer.missing_shards(), writer.write_shard


def _seal(writer: StoreWriter, job: _Job, times: dict[str, Any], stop: StopRequest) -> None:
    tails, files = write_tails(writer, job.load_float32())
    files += write_tokenizer(writer, job.model)
    stop.check("all shards are on disk")
    writer.seal(tails, files, times)


def _extend(location: str, recipe: Recipe, force: bool) -> None:
    """Begin an extension if the store at `location` calls for one."""
    stored = read_manifest(location)
    if stored is None or not can_extend(stored, recipe):
        return
    room = free_bytes(objects_at(location))
    per_token = sum(open_store(location).n_bytes().values()) / max(1, n_tokens(stored.counts))
    needed = int(per_token * (recipe.n_tokens - stored.recipe.n_tokens))
    if room is not None and needed > room and not force:  # before the sealed store is touched
        raise no_room(location, needed, room)
    say(f"Extending {location} from {stored.recipe.n_tokens:,} to {recipe.n_tokens:,} tokens.")
    extend(location, recipe, force=force)


def _say_used(location: str, recipe: Recipe) -> None:
    stored = read_manifest(location)
    assert stored is not None
    others = differences(stored.recipe.libraries, recipe.libraries)
    versions = f" It was written with other versions ({'; '.join(others)})." if others else ""
    say(f"{location} holds this harvest already; it is used as it is (--fresh makes it anew).{versions}")


def _say_trained_on(writer: StoreWriter, model: LanguageModel) -> None:
    """Say, where a store is begun, that the embedded model has read some of its eval split."""
    every = writer.manifest.recipe.sequences.eval_every
    trained = model.name == EMBEDDED and model.weights_seed is None
    if trained and every != EVAL_EVERY and not writer.progress:
        say(
            f"With --eval-every {every} the embedded model was trained on part of the eval split, and figures on it "
            f"will flatter. It has not seen the eval split of --eval-every {EVAL_EVERY}."
        )


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


def _clear_deleted(location: str) -> None:
    """Go on with deletions of `remove_store` that were killed: folders under the names that it gives, no others."""
    if isinstance(objects := objects_at(location), LocalObjects):
        root = objects.root.absolute()
        given = re.compile(rf"{re.escape(root.name)}\.[0-9a-f]{{32}}{re.escape(DELETED)}")
        for leftover in root.parent.glob(f"*{DELETED}"):
            if given.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)


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
        budget, unit = budgets_of(recipe)
        parts = ", ".join(f"{split} {counts[split][unit]:,} of {budget[split]:,}" for split in SPLITS)
        held = sum(counts[split][unit] for split in SPLITS)
        short = f"{name} is at its end with {held:,} of {sum(budget.values()):,} {unit} ({parts})."
        if exact:
            raise DataError(f"{short} Ask for fewer, or leave --exact out.")
        say(f"{short} The store will hold these.")


def _times(start: float, n_read: int, seconds: float, processes: Ranks) -> dict[str, Any]:
    return {
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "tokens_per_s": round(n_read / seconds) if n_read else None,
        **({"ranks": processes.world} if processes.parallel else {}),
    }
