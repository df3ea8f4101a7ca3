"""Extension of a sealed store: it becomes an unfinished one of a larger recipe, and retains what that leaves as it is.

Sequences only ever follow those that are there, so shards that are full stay. The last shard of each split, if it is
not full, is computed anew, statistics go on from the sums over the full ones. An extended store is, byte for byte, what
one harvest of the larger recipe writes; only its history tells them apart.
"""

import base64
from dataclasses import replace
from typing import Any

from tcsae.shared.base.settings import differences
from tcsae.shared.store.codecs import EXACT, FIT_TOKENS, parameter_shapes
from tcsae.shared.store.format import HARVESTING, SEALED, SPLITS, Manifest, Recipe, chunk_key, chunks_of, shards_of
from tcsae.shared.store.journal import CODEC, FOLDER, RETAINED, SEQUENCES, Journal
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.reader import Store, check_manifest, read_attributes


def can_extend(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether `recipe` asks for more of what a sealed store holds, and for nothing else."""
    ours = manifest.recipe
    same_unit = (ours.n_sequences is None) == (recipe.n_sequences is None)
    if manifest.state != SEALED or not same_unit or recipe.n_tokens <= ours.n_tokens:
        return False
    return not differences(ours, replace(recipe, n_tokens=ours.n_tokens, n_sequences=ours.n_sequences))


def extend(location: str, recipe: Recipe, *, force: bool = False) -> Manifest | None:
    """Make the sealed store at `location` an unfinished one of `recipe`; None if it cannot be extended to that.

    From then on it cannot be read until it is sealed again, and `open_writer` goes on with it. Killed before the last
    write, it is the sealed store that it was. Returns the manifest that it had. Raises StoreError if another process
    writes it (`force`: and is not dead).
    """
    objects = objects_at(location)
    if _extendable(objects, recipe) is None:
        return None
    journal = Journal(objects, force=force)
    try:
        manifest = _extendable(objects, recipe)  # again, as another process may have extended it before the lock
        if manifest is None:
            return None
        objects.delete_below(FOLDER)  # of an extension that was killed before its last write
        for name, record in _records(Store(objects, manifest)).items():
            journal.write(name, record)
        entry = {"content": manifest.content, "counts": manifest.counts, "sealed": manifest.times.get("sealed")}
        entry |= {"n_tokens": manifest.recipe.n_tokens, "n_sequences": manifest.recipe.n_sequences}
        history = (*manifest.history, entry)
        unfinished = Manifest(state=HARVESTING, recipe=recipe, layout=manifest.layout, history=history)
        objects.put("zarr.json", unfinished.root_metadata())
    finally:
        journal.release()
    return manifest


def _extendable(objects: Objects, recipe: Recipe) -> Manifest | None:
    """The manifest of the sealed store that can be extended to `recipe`; None if there is none."""
    values = read_attributes(objects)
    manifest = None if values is None else check_manifest(objects.location, values)
    return manifest if manifest is not None and can_extend(manifest, recipe) else None


def n_retained(manifest: Manifest) -> dict[str, int]:
    """How many shards of each split an extension retains: the full ones.

    None where the codec's parameters would become others: they are fitted to the first FIT_TOKENS positions. None of a
    store of version 1, which lacks the sums.
    """
    per_shard = manifest.layout.sequences_per_shard
    full = {split: manifest.counts[split]["sequences"] // per_shard for split in SPLITS}
    n_positions = full["train"] * per_shard * manifest.recipe.sequences.length
    fits = manifest.recipe.codec in EXACT or n_positions >= FIT_TOKENS
    return full if fits and manifest.version > 1 else dict.fromkeys(SPLITS, 0)


def _records(store: Store) -> dict[str, dict[str, Any]]:
    """The journal of a store of which all is known that an extension retains."""
    manifest = store.manifest
    hooks = [hook.requested for hook in manifest.recipe.hooks]
    retained = n_retained(manifest)
    shards: dict[str, dict[str, str]] = {}
    for shard in shards_of(manifest):
        if shard.number < retained[shard.split]:
            numbers = [chunk.number for chunk in chunks_of(shard, manifest.layout)]
            keys = [chunk_key(shard.split, hook, number) for hook in hooks for number in numbers]
            shards[shard.name] = {key: store.digests.digest(key) for key in keys}
    trailers = {key: trailer for keys in shards.values() for key in keys if (trailer := store.digests.trailer(key))}
    sums = {hook: store.values(f"statistics/{hook}/sums").tobytes() for hook in hooks * bool(retained["train"])}
    encoded = {hook: base64.b64encode(data).decode() for hook, data in sums.items()}
    records: dict[str, dict[str, Any]] = {RETAINED: {"shards": shards, "sums": encoded, "trailers": trailers}}
    if manifest.recipe.codec not in EXACT and retained["train"]:
        objects = {
            key: store.digests.digest(key)
            for hook in manifest.recipe.hooks
            for name, shape in parameter_shapes(manifest.recipe.codec, hook.d_model).items()
            for key in [f"codec/{hook.requested}/{name}/c/{'/'.join('0' * len(shape))}"]
        }
        records[CODEC] = {"eval": {hook: store.eval.codec(hook) for hook in hooks}, "objects": objects}
    if "first_full" in manifest.counts:  # otherwise phase 1 starts anew
        counts = counts_to_go_on_from(manifest.counts)
        n_sequences = {split: counts[split]["sequences"] for split in SPLITS}
        records[SEQUENCES] = {"counts": counts, "n_sequences": n_sequences}
    return records


def counts_to_go_on_from(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts of phase 1 before anything was left out for want of room: just before the first split was full."""
    if counts["first_full"] is not None:
        return counts["first_full"]
    return {name: value for name, value in counts.items() if name != "corpus_exhausted"}
