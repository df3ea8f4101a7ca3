"""Promise: a store has one writer, who is named to the next one, and a lock that nobody holds stops nobody."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy_store as toy

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store import extend as extension
from tcsae.shared.store import writer as writing
from tcsae.shared.store.extend import extend
from tcsae.shared.store.format import SEALED
from tcsae.shared.store.journal import LOCK, Journal, LockedError
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import open_store, read_attributes, read_manifest
from tcsae.shared.store.verify import find_faults
from tcsae.shared.store.writer import open_writer


@pytest.fixture
def store(tmp_path) -> Path:
    return toy.make(tmp_path / "a.zarr", "float16")


def recipe_of(path: Path):
    return open_store(path).manifest.recipe


def test_the_second_is_told_who_holds_it(tmp_path):
    objects = objects_at(str(tmp_path / "a.zarr"))
    held = Journal(objects)
    with pytest.raises(LockedError, match=rf"Another process harvests into .* \(process {os.getpid()} on .+\)\. Wait"):
        Journal(objects)
    held.release()
    Journal(objects).release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": "x"}', b"x" * 10_000])
def test_a_lock_s_file_that_says_nothing_stops_nobody(tmp_path, content):
    objects = objects_at(str(tmp_path))
    (tmp_path / LOCK).write_bytes(content)
    Journal(objects).release()
    held = objects.lock(LOCK)
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(LockedError, match="Wait for it"):
        Journal(objects)
    held.release()


def test_a_lock_that_cannot_be_read_is_said_so_and_force_takes_it(tmp_path):
    objects = objects_at(str(tmp_path))
    (tmp_path / LOCK / "x").mkdir(parents=True)
    with pytest.raises(StoreError, match="the lock cannot be read .* If nobody writes there: --force deletes it"):
        Journal(objects)
    Journal(objects, force=True).release()


def test_of_two_on_a_deleted_lock_s_file_one_holds_it(tmp_path, monkeypatch):
    """Its holder deletes the file at the end: who waited with it open would hold a lock that nobody else can see."""
    objects, opened = objects_at(str(tmp_path)), os.open
    first = objects.lock(LOCK)

    def deleted_in_between(path, *given):
        descriptor = opened(path, *given)
        monkeypatch.setattr(os, "open", opened)
        (tmp_path / LOCK).unlink()
        first.release()
        return descriptor

    monkeypatch.setattr(os, "open", deleted_in_between)
    second = objects.lock(LOCK)
    assert second is not None
    assert objects.lock(LOCK) is None
    second.release()


@pytest.mark.parametrize("name", [LOCK, f"{LOCK}s/0123", f"{LOCK}.seal"])
def test_a_sealed_store_with_a_lock_left_behind_verifies(store, name):
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text("{}")
    assert list(find_faults(str(store), lambda n: None)) == []  # noqa: ARG005
    assert open_writer(str(store), recipe_of(store)) is None
    assert not (store / LOCK).exists()


def test_a_store_that_was_sealed_before_the_lock_is_not_written(tmp_path, monkeypatch):
    """B reads the manifest; A seals and lets go; B takes the lock."""
    path = tmp_path / "a.zarr"
    sealed = toy.make(tmp_path / "sealed.zarr", "float16")
    recipe = recipe_of(sealed)
    first = open_writer(str(path), recipe)

    def late(objects):
        values = read_attributes(objects)
        monkeypatch.setattr(writing, "read_attributes", read_attributes)
        first.close()
        shutil.rmtree(path)
        shutil.copytree(sealed, path)
        return values

    monkeypatch.setattr(writing, "read_attributes", late)
    assert open_writer(str(path), recipe) is None
    assert read_manifest(str(path)).state == SEALED
    assert list(find_faults(str(path), lambda n: None)) == []  # noqa: ARG005


def test_a_store_that_another_process_begins_while_this_one_looks_is_a_store(tmp_path, monkeypatch):
    """B sees no zarr.json; A begins the store, zarr.json first; B sees that the folder is not empty."""
    path = tmp_path / "a.zarr"
    recipe = recipe_of(toy.make(tmp_path / "sealed.zarr", "float16"))
    is_empty = LocalObjects.is_empty

    def late(objects, is_leftover):
        monkeypatch.setattr(LocalObjects, "is_empty", is_empty)
        open_writer(str(path), recipe).close()
        return is_empty(objects, is_leftover)

    monkeypatch.setattr(LocalObjects, "is_empty", late)
    assert read_manifest(str(path)).state != SEALED


def test_a_store_that_was_extended_before_the_lock_is_not_extended_again(store, monkeypatch):
    recipe = recipe_of(store)
    larger = replace(recipe, n_tokens=80)
    real = extension.read_attributes

    def late(objects):
        values = real(objects)
        monkeypatch.setattr(extension, "read_attributes", real)
        assert extend(str(store), larger) is not None  # another process, in between
        return values

    monkeypatch.setattr(extension, "read_attributes", late)
    assert extend(str(store), larger) is None
    assert len(read_manifest(str(store)).history) == 1


BLOCKED = """
import sys
sys.modules["fcntl"] = None
import tcsae
from tcsae.shared.commands.group import cli
try:
    cli(["--help"])
except SystemExit as end:
    assert not end.code
store = tcsae.open_store(sys.argv[1])
assert len(store.train.tokens) == store.train.n_sequences
import numpy as np
with tcsae.create_store(sys.argv[2], hooks={"h": 4}, sequence_length=2) as made:
    for split in ("train", "eval"):
        made.append(split, {"h": np.ones((3, 2, 4))})
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.base.errors import StoreError
objects = objects_at(sys.argv[2])
held = objects.lock("x.lock")
assert objects.lock("x.lock") is None
try:
    objects.lock("y.lock", shared=True)
except StoreError as error:
    assert "only where the system has flock" in str(error)
held.release()
objects.lock("x.lock").release()
assert "fcntl" not in {name for name, module in sys.modules.items() if module is not None}
print("done")
"""


@pytest.mark.slow
def test_all_but_several_processes_works_where_fcntl_cannot_be_imported(store, tmp_path):
    call = [sys.executable, "-W", "ignore", "-c", BLOCKED, str(store), str(tmp_path / "b.zarr")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("done\n"), done.stderr


def test_damaged_records_of_an_unfinished_store_are_named(tmp_path):
    whole = toy.make(tmp_path / "sealed.zarr", "float16")
    recipe = recipe_of(whole)
    for name in ("sequences", "plan", "kept", "codec"):
        for content in (b"", b"{", b"[]", b"{}", b'{"n_sequences": 5, "counts": 1, "shards": [], "eval": 2}'):
            path = tmp_path / "a.zarr"
            shutil.rmtree(path, ignore_errors=True)
            open_writer(str(path), recipe).close()
            (path / "journal").mkdir()
            (path / "journal" / f"{name}.json").write_bytes(content)
            with pytest.raises(StoreError, match=rf"journal/{name}.json is damaged .* Start anew: --fresh"):
                read_records(path, recipe)


def read_records(path: Path, recipe) -> None:
    with open_writer(str(path), recipe) as writer:
        _ = writer.progress
        writer.codec.objects()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("call", ["sweep", "has", "put", "get", "listed"])
def test_a_writer_that_fails_at_the_start_holds_no_lock(tmp_path, store, monkeypatch, call, shared):
    """Whatever of its first steps the disk refuses."""
    manifest = replace(open_store(store).manifest, state="harvesting", counts={})
    objects = objects_at(str(tmp_path / "new.zarr"))

    def refuse(*_):
        raise StoreError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(objects), call, refuse)
        try:
            failed = writing.StoreWriter(objects, manifest, shared=shared)
        except StoreError as error:
            failed = error  # a caller's traceback holds what it holds
        else:
            failed.close()
    again = objects.lock(LOCK)
    assert again is not None, failed
    again.release()


def test_a_writer_that_cannot_remove_its_traces_holds_no_lock(tmp_path, store, monkeypatch):
    manifest = open_store(store).manifest
    objects = objects_at(str(tmp_path / "new.zarr"))
    writer = writing.StoreWriter(objects, replace(manifest, state="harvesting", counts={}))
    writer.manifest = manifest

    def refuse(*_):
        raise StoreError("Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="Read-only"):
        patch.setattr(type(objects), "delete_below", refuse)
        writer.close()
    again = objects.lock(LOCK)
    assert again is not None
    again.release()


def test_a_digit_of_a_journal_that_changed_is_damage(tmp_path):
    objects = objects_at(str(tmp_path))
    journal = Journal(objects)
    journal.write("sequences", {"n_sequences": {"train": 120, "eval": 4}})
    record = journal.read("sequences")
    assert record == {"n_sequences": {"train": 120, "eval": 4}}
    journal.write("sequences", record | {"documents_read": 7})
    file = tmp_path / "journal" / "sequences.json"
    data = file.read_bytes()
    for before, after in ((b"120", b"130"), (b": 7", b": 6"), (b"train", b"trbin")):
        file.write_bytes(data.replace(before, after))
        with pytest.raises(
            StoreError, match=r"journal/sequences.json is damaged \(ValueError: its digest does not fit\)"
        ):
            journal.read("sequences")
    file.write_bytes(json.dumps({"n_sequences": {"train": 1}}).encode())  # as older versions wrote it
    assert journal.read("sequences") == {"n_sequences": {"train": 1}}
    journal.release()
