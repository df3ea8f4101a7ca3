"""Copy of a sealed store to another place, or in another codec. Interrupted, the same call goes on where it stopped."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.codecs import check_codec
from tcsae.shared.store.format import SPLITS, Shard
from tcsae.shared.store.integrity import CHECKSUMS, CHECKSUMS_METADATA, ROOT
from tcsae.shared.store.journal import FOLDER, LOCK
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.places.zip import SUFFIX, write_zip
from tcsae.shared.store.reader import Store, is_leftover, open_store
from tcsae.shared.store.writer import Rows, StoreWriter, open_writer

MARKER = "copy.json"
"""In an unfinished copy: the content of the store that it will be."""
ROWS = 1 << 16
"""Sequences of a commit."""
Advance = Callable[[int], None]


def copy_store(
    source: str, target: str, advance: Advance, *, codec: str | None = None, error: float | None = None
) -> Store:
    """Copy the store at `source` to `target`, object by object, each against its digest; open the copy.

    A target that is that copy already is opened as it is.

    With a `codec` other than the store's, its activations are decoded and stored anew (`error`: of compact); the
    content is then another, and the manifest's history names the one that it was made from. A target that ends in .zip
    becomes one file. `advance` is told bytes read (of a copy), or tokens.
    Raises StoreError if an object is damaged, something else is at the target, or somebody writes there.
    """
    store = open_store(source)
    if (done := finished_copy(store, target, codec, error)) is not None:
        return done
    if encodes_anew(store, codec, error):
        assert codec is not None
        if target.endswith(SUFFIX):
            raise StoreError(f"{target}: --codec into a zip takes two steps. Copy to a folder first, then to the zip.")
        _encode_anew(store, target, codec, error, advance)
    elif target.endswith(SUFFIX):
        _copy_into_zip(store, _path(target), advance)
    else:
        _copy_objects(store, objects_at(target), advance)
    return open_store(target)


def copy_bytes(store: Store) -> int:
    """Bytes of all objects of a store: what `advance` adds up to."""
    return sum(store.n_bytes().values())


def encodes_anew(store: Store, codec: str | None, error: float | None) -> bool:
    """Whether a copy takes another codec than the store's. Raises ConfigError for settings that do not fit."""
    recipe = store.manifest.recipe
    return codec is not None and (codec, check_codec(codec, error)) != (recipe.codec, recipe.codec_error)


def finished_copy(store: Store, target: str, codec: str | None = None, error: float | None = None) -> Store | None:
    """The store at `target` if it is the copy that is asked for, and finished; else None.

    The lock of a copy that was killed between a zip's last byte and its own end is deleted.
    Raises StoreError if a different sealed store is there.
    """
    objects = objects_at(target)
    try:
        other = open_store(target)
    except StoreError:
        return None  # nothing, or what copying into it will name
    if encodes_anew(store, codec, error):
        assert codec is not None
        recipe = replace(store.manifest.recipe, codec=codec, codec_error=check_codec(codec, error))
        before = other.manifest.history[-1] if other.manifest.history else {}
        is_copy = other.manifest.recipe == recipe and before.get("content") == store.content
    else:
        is_copy = other.manifest.digest == store.manifest.digest
    if not is_copy:
        raise StoreError(f"{target} is there already: another store. Give another --to, or delete it first.")
    unfinished = objects.writable and (objects.has(MARKER) or bool(objects.listed(FOLDER)))
    if target.endswith(SUFFIX):
        _clear_dead_lock(_path(target))
    return None if unfinished else other


def _digests(store: Store) -> dict[str, str]:
    """Every object but the root in the order of the manifest, with its sha256."""
    known = store.digests
    digests = {key: known.digest(key) for key in store.manifest.objects()}
    # Of version 1 the checksums' own metadata has no digest; their bytes were checked when they were read.
    return digests | {CHECKSUMS_METADATA: store.manifest.checksums_metadata, CHECKSUMS: ""}


def _copy_into_zip(store: Store, path: Path, advance: Advance) -> None:
    """Write a zip file under a lock beside it, so that what a killed copy left can be told from one at work."""
    if path.exists():
        raise StoreError(f"{path} is there already. Give another --to, or delete it first.")
    beside, name = _lock_beside(path)
    lock = beside.lock(name)
    if lock is None:
        raise StoreError(f"Another process writes {path}{beside.holder(name)}. Wait for it.")
    try:
        write_zip(path, _verified(store, _digests(store), advance))
        beside.delete([name])
    finally:
        lock.release()


def _clear_dead_lock(path: Path) -> None:
    beside, name = _lock_beside(path)
    with contextlib.suppress(StoreError):  # where nothing can be written, the copy is as good with it
        if beside.has(name) and (lock := beside.lock(name)) is not None:
            try:
                beside.delete([name])
            finally:
                lock.release()


def _lock_beside(path: Path) -> tuple[LocalObjects, str]:
    return LocalObjects(str(path.parent)), f"{path.name}.lock"


def _path(target: str) -> Path:
    return Path(target.removeprefix("file://"))


def _verified(store: Store, digests: dict[str, str], advance: Advance) -> Iterator[tuple[str, bytes]]:
    """Objects and their bytes, each checked; the root, which makes them a store, last."""
    for key, digest in digests.items():
        yield key, _read(store, key, digest)
        advance(store.objects.size(key) or 0)
    yield ROOT, store.objects.get(ROOT)


def _read(store: Store, key: str, digest: str) -> bytes:
    try:
        data = store.objects.get(key)
    except FileNotFoundError as error:
        raise StoreError(f"{store.location}: {key} is missing. tcsae verify names all that is wrong.") from error
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise StoreError(f"{store.location}: {key} is damaged. tcsae verify names all that is wrong.")
    return data


def _copy_objects(store: Store, target: Objects, advance: Advance) -> None:
    if not target.writable:
        raise StoreError(f"{target.location} can be read only. Give another --to.")
    lock = target.lock(LOCK)
    if lock is None:
        raise StoreError(f"Another process writes {target.location}{target.holder(LOCK)}. Wait for it.")
    try:
        target.sweep()
        present = {key: n for key, n in target.listed().items() if not is_leftover(key)}
        if not _goes_on(store, target, present):
            target.put(MARKER, json.dumps({"content": store.content}).encode())
        digests = _digests(store)

        def copy(key: str) -> int:
            if key in present:  # written whole or not at all, and checked before
                return present[key]
            data = _read(store, key, digests[key])
            lock.check()
            target.put(key, data)
            return len(data)

        n = max(store.objects.n_readers, target.n_readers)
        for n_bytes in target.each(copy, digests, n):
            advance(n_bytes)
        target.put(ROOT, store.objects.get(ROOT))
        target.delete([MARKER, LOCK])
    finally:
        lock.release()


def _goes_on(store: Store, target: Objects, present: dict[str, int]) -> bool:
    """Whether a copy of this very store was begun at the target. Raises StoreError if something else is there."""
    if not present:
        return False
    if MARKER in present and _marked_content(target) == store.content:
        return True
    what = "a copy of another store" if MARKER in present else f"{next(iter(present))!r}"
    raise StoreError(f"{target.location} is not empty: {what} is there. Give another --to, or delete it first.")


def _marked_content(target: Objects) -> object:
    try:
        return json.loads(target.get(MARKER))["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{target.name(MARKER)} is damaged ({error}). Give another --to, or delete it first."
        ) from error


def _encode_anew(store: Store, target: str, codec: str, error: float | None, advance: Advance) -> None:
    recipe = replace(store.manifest.recipe, codec=codec, codec_error=check_codec(codec, error))
    writer = open_writer(target, recipe)
    if writer is None:
        return  # done before
    with writer:
        _copy_sequences(store, writer)

        def run(shard: Shard) -> dict[str, Float[ndarray, "n sequence_length d_model"]]:
            return {hook: store.split(shard.split).read(hook, shard.start, shard.stop) for hook in store.hooks}

        writer.fit_codec(run)
        missing = writer.missing_shards()
        done = sum(store.manifest.counts[split]["tokens"] for split in SPLITS)
        advance(done - sum(int(writer.lengths(shard).sum()) for shard in missing))
        for shard in missing:
            writer.write_shard(shard, run(shard))
            advance(int(writer.lengths(shard).sum()))
        for key in store.manifest.files:
            writer.add_file(key, _read(store, key, store.digests.digest(key)))
        was = {"content": store.content, "codec": recipe.codec, "copied_from": store.manifest.recipe.codec}
        writer.manifest = replace(writer.manifest, history=(*store.manifest.history, was))
        writer.seal(store.manifest.tails, list(store.manifest.files), store.manifest.times)


def _copy_sequences(store: Store, writer: StoreWriter) -> None:
    if writer.planned:
        return
    n = {split: store.split(split).n_sequences for split in SPLITS}
    at = writer.progress.get("n_sequences", dict.fromkeys(SPLITS, 0))
    while at != n:
        rows = {}
        for split in SPLITS:
            part = slice(at[split], min(at[split] + ROWS, n[split]))
            one = store.split(split)
            rows[split] = Rows(**{name: getattr(one, name)[part] for name in store.manifest.recipe.token_arrays})
        writer.commit(rows, {})
        at = writer.progress["n_sequences"]
    writer.finish_sequences(store.manifest.counts)
