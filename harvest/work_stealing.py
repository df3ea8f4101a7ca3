"""Work stealing over shards, by processes that meet on the store alone: torchrun's, or a scheduler's array.

Rank 0 does phase 1 and the codec's parameters under the exclusive lock, then lets the others in. Shards are dealt out
by number. A process that has finished its part goes on with the unfinished shards of others, from the last down. Two
that meet on one shard write the same bytes. The first that sees every shard written seals the store.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy import ndarray

from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import Ranks
from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.settings import differences
from tcsae.shared.base.signals import StopRequest
from tcsae.shared.store.extend import can_extend
from tcsae.shared.store.format import SEALED, Recipe, Shard
from tcsae.shared.store.journal import LOCK, OPEN, LockedError, record_key, remove_traces
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.reader import check_manifest, read_attributes, read_manifest
from tcsae.shared.store.writer import StoreWriter, open_writer

POLL_S = 1.0
SAY_EVERY_S = 60.0
SEAL_LOCK = f"{LOCK}.seal"


def join(
    location: str,
    recipe: Recipe,
    processes: Ranks,
    begin: Callable[[StoreWriter], None],
    stop: StopRequest,
    force: bool = False,
) -> StoreWriter | None:
    """A writer of the store beside other processes', once shards can be written; None if it is sealed.

    Rank 0 runs `begin`, unless that is done: what comes before the first shard. Raises StoreError for a store of
    another recipe.
    """
    waited = 0.0
    while True:
        stop.check("nothing is lost")
        if processes.rank == 0:
            try:
                writer = open_writer(location, recipe, force=force)
                if writer is None:
                    return None
                try:
                    begin(writer)
                    writer.share()
                except BaseException:
                    writer.close()
                    raise
                return writer
            except LockedError:
                pass  # other processes are at work: join them
        elif _is_finished(location, recipe):
            return None
        writer = _join_writer(location, recipe)
        if writer is not None:
            return writer
        if waited % SAY_EVERY_S == 0:
            who = "the other processes" if processes.rank == 0 else "rank 0 to make the sequences"
            say(f"{location}: rank {processes.rank} waits for {who}.")
        time.sleep(POLL_S)
        waited += POLL_S


def _is_finished(location: str, recipe: Recipe) -> bool:
    """Whether the store is sealed with this recipe. Raises StoreError if rank 0 will not make it that."""
    manifest = read_manifest(location)
    if manifest is None or can_extend(manifest, recipe):
        return False
    sealed = manifest.state == SEALED
    differing = [one for one in differences(manifest.recipe, recipe) if not (sealed and one.startswith("libraries."))]
    if differing:
        raise StoreError(f"{location} was harvested otherwise ({'; '.join(differing)}). Give another --store.")
    return sealed


def dealt(writer: StoreWriter, processes: Ranks) -> Iterator[Shard]:
    """The missing shards of this process's part, then those of others that are still missing by then."""
    part = {shard.name for shard in writer.shards()[processes.rank :: processes.world]}
    given: set[str] = set()

    def still_missing(shards: list[Shard]) -> Iterator[Shard]:
        for shard in shards:
            if not _is_written(writer, shard):
                given.add(shard.name)
                yield shard

    yield from still_missing([shard for shard in _missing(writer) if shard.name in part])
    while left := [shard for shard in reversed(_missing(writer)) if shard.name not in given]:
        # Each process down from another place, while the shards' owner comes up: they meet at one shard only.
        at = processes.rank * len(left) // processes.world
        yield from still_missing(left[at:] + left[:at])


def write_beside(writer: StoreWriter, shard: Shard, activations: Mapping[str, ndarray]) -> None:
    """Write a shard that another process may write too, and then seal the store and clear the journal."""
    try:
        writer.write_shard(shard, activations)
    except (OSError, StoreError):
        if not _is_written(writer, shard):
            raise


def _missing(writer: StoreWriter) -> list[Shard]:
    """The shards without a record; none once the store is sealed, when there is no journal."""
    missing = writer.missing_shards()
    return [] if _sealed(writer.location) else missing


def _is_written(writer: StoreWriter, shard: Shard) -> bool:
    """Whether a shard is not missing any more; cheaper than all of them."""
    return writer.is_written(shard) or _sealed(writer.location)


def seal_once(location: str, seal: Callable[[], Any], stop: StopRequest) -> None:
    """Seal the store, unless another rank does; return when it is sealed. One that dies at it is replaced."""
    objects = objects_at(location)
    while not _sealed(location):
        stop.check("all shards are on disk")
        lock = objects.lock(SEAL_LOCK)
        if lock is None:
            time.sleep(POLL_S)
            continue
        try:
            if not _sealed(location):
                seal()
        finally:
            lock.release()
    # On leaving: records of shards that two processes wrote, partial files of those that were killed.
    objects.sweep()
    remove_traces(objects)
    objects.delete([SEAL_LOCK])


def _sealed(location: str) -> bool:
    manifest = read_manifest(location)
    return manifest is not None and manifest.state == SEALED


def _join_writer(location: str, recipe: Recipe) -> StoreWriter | None:
    """A writer of shards beside others, of a store that `StoreWriter.share` has opened; None if that is not done yet,
    or the store is being sealed or prepared anew.
    """
    objects = objects_at(location)
    values = read_attributes(objects)
    manifest = None if values is None else check_manifest(location, values)
    if manifest is None or manifest.state == SEALED or differences(manifest.recipe, recipe):
        return None
    if not objects.has(record_key(OPEN)):
        return None
    try:
        writer = StoreWriter(objects, manifest, shared=True)
    except LockedError:
        return None
    if not writer.planned:  # sealed in between
        writer.close()
        return None
    return writer
