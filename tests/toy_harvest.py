"""What the tests of the harvest share: many shards, deaths at a chosen write, and all of a store's bytes."""

import dataclasses
import hashlib
import json
import os
import pathlib

from tcsae.harvest import phases
from tcsae.harvest.run import harvest
from tcsae.shared.base.files import PARTIAL
from tcsae.shared.store.format import Layout
from tcsae.shared.store.journal import FOLDER, LOCK

RESIDUAL, MLP, HEADS = "blocks.2.hook_resid_post", "blocks.4.hook_mlp_out", "blocks.1.attn.hook_z"


def small_steps(patch, n_sequences: int, n_chunks: int = 1) -> None:
    """So many sequences and chunks a shard, and 16 documents a commit."""
    batches = phases.Corpus.batches
    small = Layout(sequences_per_chunk=n_sequences // n_chunks, chunks_per_shard=n_chunks)
    patch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: small)  # noqa: ARG005
    patch.setattr(phases, "COMMIT_DOCUMENTS", 16)
    patch.setattr("tcsae.harvest.documents.Corpus.batches", lambda self, start=0, size=16: batches(self, start, size))


def one_hook(config, **changes):
    return dataclasses.replace(config, hooks=(RESIDUAL,), **changes)


def files(location) -> dict[str, str]:
    """Digest of every file of a store; of the manifest, of all but the times and the history."""
    root = pathlib.Path(location)
    result = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path != root / "zarr.json"
    }
    manifest = json.loads((root / "zarr.json").read_text())["attributes"]["tcsae"]
    blank = {"times": None, "history": None, "digest": None}
    return result | {"manifest": json.dumps({**manifest, **blank}, sort_keys=True)}


def traces(root: pathlib.Path) -> list[str]:
    """What only an unfinished store has."""
    return [p.name for p in root.rglob("*") if p.name in (FOLDER, LOCK) or p.name.endswith(PARTIAL)]


def records(root: pathlib.Path) -> set[str]:
    """Names of the journal's records."""
    return {path.stem for path in (root / FOLDER).glob("*.json")}


def at_write(number: int, key: str, before_rename: bool, act) -> None:
    """Patch this process: `act` at the n-th durable write of a file whose path holds `key`, before or after it."""
    n_writes = 0
    rename = pathlib.Path.replace

    def replace(self, target):
        nonlocal n_writes
        n_writes += key in str(target)
        if n_writes == number and key in str(target) and before_rename:
            act()
        rename(self, target)
        if n_writes == number and key in str(target) and not before_rename:
            act()

    pathlib.Path.replace = replace


def harvest_in_child(location, config, number: int, key: str = "", before_rename: bool = False) -> int:
    """Exit code of a forked harvest that dies, as by kill -9, at a write (9), or ends (0)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            at_write(number, key, before_rename, lambda: os._exit(9))
            harvest(str(location), config)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
