"""A sealed store to another place, or in another codec. Interrupted, the same call goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.codecs import check_codec
from tcsae.shared.store.format import SPLITS, Shard, content_digest
from tcsae.shared.store.journal import LOCK
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects, is_temporary
from tcsae.shared.store.places.zip import SUFFIX, write_zip
from tcsae.shared.store.reader import CHECKSUMS, CHECKSUMS_METADATA, ROOT, Store, open_store
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

    With a `codec` other than the store's, its activations are decoded and stored anew (`error`: of compact); the
    content is then another, and the manifest's history names the one that it was made from. A target that ends in .zip
    becomes one file. `advance` is told bytes read (of a copy), or tokens.
    Raises StoreError if an object is damaged, something else is at the target, or somebody writes there.
    """
    store = open_store(source)
    if codec is not None and (codec, check_codec(codec, error)) != _codec(store):
        if target.endswith(SUFFIX):
            raise StoreError(f"{target}: --codec into a zip takes two steps. Copy to a folder first, then to the zip.")
        _encode_anew(store, target, codec, error, advance)
    elif target.endswith(SUFFIX):
        if Path(target).exists():
            raise StoreError(f"{target} is there already. Give another --to, or delete it first.")
        write_zip(Path(target), _verified(store, _digests(store), advance))
    else:
        _copy_objects(store, objects_at(target), advance)
    return open_store(target)


def copy_bytes(store: Store) -> int:
    """Bytes of all objects of a store: what `advance` will be told."""
    return sum(store.n_bytes().values())


def _codec(store: Store) -> tuple[str, float | None]:
    return store.manifest.recipe.codec, store.manifest.recipe.codec_error


def _digests(store: Store) -> dict[str, str]:
    """Every object but the root in the order of the manifest, with its sha256."""
    rows = np.asarray(store.array("checksums")[:])
    if content_digest(rows.tobytes()) != store.content:
        raise StoreError(f"{store.location}: its checksums are damaged. Nothing was copied from it.")
    found = {key: row.tobytes().hex() for key, row in zip(store.manifest.objects(), rows, strict=True)}
    # Of version 1 the checksums' own metadata has no digest.
    return found | {CHECKSUMS_METADATA: store.manifest.checksums_metadata, CHECKSUMS: ""}


def _verified(store: Store, digests: dict[str, str], advance: Advance) -> Iterator[tuple[str, bytes]]:
    """Objects and their bytes, each checked; the root, which makes them a store, last."""
    for key, digest in digests.items():
        yield key, _read(store, key, digest)
        advance(store.objects.size(key) or 0)
    yield ROOT, store.objects.get(ROOT)


def _read(store: Store, key: str, digest: str) -> bytes:
    import hashlib

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
        there = {key: n for key, n in target.listed().items() if not key.startswith(LOCK) and not is_temporary(key)}
        if not _goes_on(store, target, there):
            target.put(MARKER, json.dumps({"content": store.content}).encode())
        digests = _digests(store)

        def copy(key: str) -> int:
            if key in there:  # written whole or not at all, and checked before
                return there[key]
            data = _read(store, key, digests[key])
            lock.check()
            target.put(key, data)
            return len(data)

        n = max(store.objects.n_readers, target.n_readers)
        for n_bytes in target.each(copy, digests, n):
            advance(n_bytes)
        target.put(ROOT, store.objects.get(ROOT))
        target.delete([MARKER])
    finally:
        lock.release()
    target.delete([LOCK])


def _goes_on(store: Store, target: Objects, there: dict[str, int]) -> bool:
    """Whether a copy of this very store was begun at the target. Raises StoreError if something else is there."""
    if not there:
        return False
    if MARKER in there and json.loads(target.get(MARKER)).get("content") == store.content:
        return True
    what = "a copy of another store" if MARKER in there else f"{next(iter(there))!r}"
    raise StoreError(f"{target.location} is not empty: {what} is there. Give another --to, or delete it first.")


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
            writer.add_file(key, store.objects.get(key))
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
            arrays = [store.array(f"{split}/{name}")[part] for name in ("tokens", "lengths", "documents", "starts")]
            rows[split] = Rows(*(np.asarray(one) for one in arrays))
        writer.commit(rows, {})
        at = writer.progress["n_sequences"]
    writer.finish_sequences(store.manifest.counts)
