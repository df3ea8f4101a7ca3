"""Verification of a sealed store: every byte against what was written, and what the bytes say."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tcsae.shared.base.errors import DeniedError, RemoteError, StoreError, TcsaeError
from tcsae.shared.store.codecs import SCALE_BYTES, parameter_shapes
from tcsae.shared.store.format import SEALED, SPLITS, Manifest, is_intact
from tcsae.shared.store.integrity import CHECKSUMS, CHECKSUMS_METADATA, DIGEST_BYTES, ROOT, DamagedError, checksum_rows
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.reader import Split, Store, check_manifest, is_lock, object_sizes, open_store, read_attributes


def stored_bytes(location: str) -> int:
    """Bytes of all objects of a store: what `find_faults` reads."""
    objects = objects_at(location)
    if objects.listable:
        with contextlib.suppress(DeniedError):
            return sum(objects.listed().values())
    values = read_attributes(objects)
    return sum(object_sizes(objects, check_manifest(location, values)).values()) if values else 0


def find_faults(location: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Everything that is wrong with the store at `location`, one "object: reason" each; `advance` is told bytes read.

    First the bytes of every object against the digest from when it was written; if these are whole, what they say:
    shapes, lengths, ids, finite values, the splits' documents, the tails.
    Raises StoreError if there is no sealed store.
    """
    objects = objects_at(location)
    try:
        values = read_attributes(objects)
    except StoreError:
        if not objects.has(ROOT) or not objects.has("train/zarr.json"):
            raise
        yield f"{ROOT}: it is no JSON of a Zarr group with attributes"
        return
    if values is None:
        open_store(location)  # says that there is none
        return
    if not is_intact(values):
        yield f"{ROOT}: the manifest does not fit its own digest"
        return
    manifest = check_manifest(location, values)
    if manifest.state != SEALED:
        open_store(location)  # says how to finish it
    advance(objects.size(ROOT) or 0)
    whole = True
    for fault in _damaged(objects, manifest, values, advance):
        whole = False
        yield fault
    if whole:
        try:
            store = open_store(location)
            yield from _nonsense(store)
        except TcsaeError as error:
            yield str(error)


def _damaged(objects: Objects, manifest: Manifest, values: Any, advance: Callable[[int], None]) -> Iterator[str]:
    """Objects whose bytes are not those that were written; objects that nobody wrote."""
    written = {"zarr_format": 3, "node_type": "group", "attributes": {"tcsae": values}}
    if objects.get(ROOT) != (json.dumps(written, indent=2) + "\n").encode():
        yield f"{ROOT}: its bytes are not those that were written"
    try:
        rows = checksum_rows(objects, manifest)
    except DamagedError as error:
        yield f"{error.key}: it {error.reason}"
        return
    keys = manifest.objects()
    known = {*keys, ROOT, CHECKSUMS, CHECKSUMS_METADATA}
    for key in sorted(set(object_sizes(objects, manifest)) - known):
        if not is_lock(key):  # that of a writer that was killed right after the seal damages nothing
            yield f"{key}: it does not belong to the store"
    advance(objects.size(CHECKSUMS) or 0)
    digests = [rows[i : i + DIGEST_BYTES] for i in range(0, len(rows), DIGEST_BYTES)]
    expected = dict(zip(keys, digests, strict=True))
    if manifest.checksums_metadata:  # not in version 1
        expected[CHECKSUMS_METADATA] = bytes.fromhex(manifest.checksums_metadata)
    stored = objects.each(lambda key: _digest(objects, key), expected)
    for key, (digest, n_bytes, reason) in zip(expected, stored, strict=True):
        advance(n_bytes)
        if reason:
            yield f"{key}: {reason}"
        elif not n_bytes:
            yield f"{key}: it is empty"
        elif digest != expected[key]:
            yield f"{key}: its {n_bytes:,} bytes are not those that were written"


def _digest(objects: Objects, key: str) -> tuple[bytes, int, str]:
    """sha256 and size of an object, or why it cannot be read."""
    try:
        digest, n_bytes = objects.read_digest(key)
    except FileNotFoundError:
        return b"", 0, "it is missing"
    except RemoteError:
        raise
    except StoreError as error:
        return b"", 0, f"it cannot be read ({error})"
    return bytes.fromhex(digest), n_bytes, ""


def _nonsense(store: Store) -> Iterator[str]:
    """What whole objects say that cannot be: they were written wrongly."""
    for path in store.manifest.arrays():
        store.array(path)  # raises if its shape or dtype is not the manifest's
    for name in SPLITS:
        yield from _split(store.split(name))
    both = np.intersect1d(store.train.documents, store.eval.documents)
    if len(both):
        yield f"eval/documents: document {both[0]} lies in train, too"
    for hook in store.hooks:
        yield from _hook(store, hook)


def _split(split: Split) -> Iterator[str]:
    where, length, pad = split.name, split.store.sequence_length, split.store.manifest.recipe.sequences.pad_id
    lengths, documents = split.lengths, split.documents
    valid = np.arange(length) < lengths[:, None]
    if ((lengths < 1) | (lengths > length)).any():
        yield f"{where}/lengths: a length is not in 1 to {length}"
    elif lengths.sum() != split.n_tokens:
        yield f"{where}/lengths: they come to {lengths.sum():,} tokens, the manifest says {split.n_tokens:,}"
    if (split.tokens < 0).any() or (split.tokens[~valid] != pad).any():
        yield f"{where}/tokens: an id is negative, or not the pad id {pad} beyond a length"
    same = documents[1:] == documents[:-1]
    if (documents < 0).any() or (np.diff(documents) < 0).any():
        yield f"{where}/documents: the numbers are negative or fall"
    elif len(np.unique(documents)) != split.n_documents:
        yield f"{where}/documents: {len(np.unique(documents)):,}, the manifest says {split.n_documents:,}"
    if (split.starts < 0).any() or (np.diff(split.starts)[same] <= 0).any():
        yield f"{where}/starts: a start is negative, or not after the one before it in its document"
    names = split.store.manifest.recipe.roles
    if names and ((split.roles > len(names)).any() or split.roles[~valid].any()):
        yield f"{where}/roles: a number is above {len(names)}, or not 0 beyond a length"
    for hook in split.store.hooks:
        yield from _activations(split, hook, valid)


def _activations(split: Split, hook: str, valid: np.ndarray) -> Iterator[str]:
    """Chunks that hold NaN or infinity, or anything beyond a length."""
    per_chunk, codec = split.store.sequences_per_chunk, split.codec(hook)
    for number, start in enumerate(range(0, split.n_sequences, per_chunk)):
        stop = min(start + per_chunk, split.n_sequences)
        key = f"{split.name}/activations/{hook}/c/{number}/0/0"
        rows = split.read_stored(hook, start, stop)
        if rows[~valid[start:stop]].any():
            yield f"{key}: it is not zero beyond a sequence's length"
        if codec == "bfloat16":
            finite = ((rows & 0x7F80) != 0x7F80).all()
        elif codec == "int8":
            finite = np.isfinite(np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view("<f4")).all()
        else:
            finite = codec == "compact" or np.isfinite(rows).all()
        if not finite:
            yield f"{key}: it holds NaN or infinity"


def _hook(store: Store, hook: str) -> Iterator[str]:
    """Statistics, codec parameters and tail."""
    statistics = {name: store.values(f"statistics/{hook}/{name}") for name in ("mean", "variance")}
    for name, values in statistics.items():
        if not np.isfinite(values).all() or (name == "variance" and (values < 0).any()):
            yield f"statistics/{hook}/{name}: it holds NaN, infinity or a negative variance"
    counted = int(store.values(f"statistics/{hook}/norm_histogram").sum())
    if counted != store.train.n_tokens:
        yield f"statistics/{hook}/norm_histogram: {counted:,} tokens, the train split has {store.train.n_tokens:,}"
    for name in parameter_shapes(store.manifest.recipe.codec, store.d_model(hook)):
        values = store.values(f"codec/{hook}/{name}")
        if not np.isfinite(values).all() or (name in ("scale", "step") and (values <= 0).any()):
            yield f"codec/{hook}/{name}: it holds NaN, infinity, or a step that is not above 0"
    tail = store.manifest.tails.get(hook)
    if tail is None:
        yield f"{ROOT}: the manifest does not say whether {hook} has a tail"
    elif "none" not in tail:
        yield from _tail(store, hook)


def _tail(store: Store, hook: str) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    for key in (f"tail/{hook}/config.json", f"tail/{hook}/model.safetensors"):
        if key not in store.manifest.files:
            yield f"{key}: the tail lacks it"
            continue
        try:
            if key.endswith(".json"):
                json.loads(store.objects.get(key))["model_type"]
            else:
                with safe_open(store.tail_path(hook) / "model.safetensors", "np") as weights:
                    assert all(weights.get_slice(name).get_dtype() == "F32" for name in weights.keys())  # noqa: SIM118
        except (ValueError, KeyError, TypeError, SafetensorError, AssertionError, StoreError) as error:
            yield f"{key}: it cannot be loaded ({error or 'not float32'})"
