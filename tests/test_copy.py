"""Promise: `tcsae copy` moves a store whole, goes on after any stop, and says what it will not do."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from tcsae.shared.base.errors import StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store import copy as copying
from tcsae.shared.store.copy import copy_store
from tcsae.shared.store.format import Layout
from tcsae.shared.store.places import local, objects_at
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults

GOLDEN = str(Path(__file__).parent / "golden" / "store-v1.zarr")
HOOK = "blocks.2.hook_resid_post"


def nothing(n: int) -> None:
    pass


def contents(location: str) -> dict[str, bytes]:
    result = objects_at(location)
    return {key: result.get(key) for key in result.listed()}


class DiedError(BaseException):
    pass


def dies(monkeypatch, number: int) -> None:
    """This process: its n-th write of an object does not happen."""
    real, left = local.write_atomic, [number]

    def mortal(path, data):
        left[0] -= 1
        if not left[0]:
            raise DiedError
        real(path, data)

    monkeypatch.setattr(local, "write_atomic", mortal)


def test_a_copy_is_the_same_store(tiny_store, tmp_path):
    done = CliRunner().invoke(cli, ["copy", "--from", tiny_store, "--to", str(tmp_path / "b.zarr")])
    assert done.exit_code == 0, done.output
    assert contents(str(tmp_path / "b.zarr")) == contents(tiny_store)
    assert open_store(tiny_store).content[:12] in done.output


@pytest.mark.parametrize("number", [1, 2, 9, 30])
def test_stopped_anywhere_it_goes_on(tiny_store, tmp_path, monkeypatch, number):
    target = str(tmp_path / "b.zarr")
    with monkeypatch.context() as patch:
        dies(patch, number)
        with pytest.raises(DiedError):
            copy_store(tiny_store, target, nothing)
    if number > 1:
        with pytest.raises(StoreError, match="is not an activation store"):
            open_store(target)
    told: list[int] = []
    copy_store(tiny_store, target, told.append)
    assert sum(told) + len(contents(tiny_store)["zarr.json"]) == sum(map(len, contents(tiny_store).values()))
    assert contents(target) == contents(tiny_store)


@pytest.mark.parametrize("name, options", [("b.zarr", []), ("b.zip", []), ("c.zarr", ["--codec", "int8"])])
def test_a_finished_copy_says_so(tiny_store, tmp_path, name, options):
    command = ["copy", "--from", tiny_store, "--to", str(tmp_path / name), *options]
    for _ in range(2):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
    content = open_store(tmp_path / name).content
    assert done.stdout == f"{tmp_path / name} is that copy already, content {content[:12]}: nothing was written.\n"
    other = CliRunner().invoke(cli, ["copy", "--from", GOLDEN, "--to", str(tmp_path / name)])
    assert other.exit_code == 1
    assert "is there already: another store. Give another --to, or delete it first." in other.stderr


def test_what_a_killed_copy_into_a_zip_left_is_swept(tiny_store, tmp_path):
    left = tmp_path / f"b.zip.{'0' * 32}.partial"
    left.write_bytes(b"half")
    other = tmp_path / "bb.zip.partial"
    other.write_bytes(b"another's")
    copy_store(tiny_store, str(tmp_path / "b.zip"), nothing)
    assert {path.name for path in tmp_path.iterdir()} == {"b.zip", other.name}


def test_the_lock_of_a_copy_that_was_killed_after_its_last_byte_goes_and_a_living_ones_stays(tiny_store, tmp_path):
    target, lock = str(tmp_path / "b.zip"), tmp_path / "b.zip.lock"
    copy_store(tiny_store, target, nothing)
    held = local.LocalObjects(str(tmp_path)).lock(lock.name)
    assert held is not None
    for living in (True, False):
        done = CliRunner().invoke(cli, ["copy", "--from", str(tiny_store), "--to", target])
        assert done.exit_code == 0 and "is that copy already" in done.stdout
        assert lock.exists() == living
        held.release()


def test_damage_is_not_copied(tiny_store, tmp_path):
    copy_store(tiny_store, str(tmp_path / "b.zarr"), nothing)
    chunk = tmp_path / "b.zarr" / "train" / "activations" / HOOK / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(StoreError, match="c/0/0/0 is damaged. tcsae verify names all"):
        copy_store(str(tmp_path / "b.zarr"), str(tmp_path / "c.zarr"), nothing)
    chunk.unlink()
    with pytest.raises(StoreError, match="c/0/0/0 is missing"):
        copy_store(str(tmp_path / "b.zarr"), str(tmp_path / "c.zarr"), nothing)


def test_a_taken_place_is_refused(tiny_store, tmp_path):
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is not empty: 'letter.txt' is there"):
        copy_store(tiny_store, str(tmp_path / "b.zarr"), nothing)
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr" / copying.MARKER).write_text(json.dumps({"content": "another"}))
    with pytest.raises(StoreError, match="a copy of another store is there"):
        copy_store(tiny_store, str(tmp_path / "c.zarr"), nothing)


@pytest.mark.slow
def test_a_zip_is_read_as_it_is_by_us_and_by_zarr(tiny_store, tmp_path):
    target = str(tmp_path / "a.zip")
    store, local = copy_store(tiny_store, target, nothing), open_store(tiny_store)
    assert contents(target) == contents(tiny_store)
    assert list(find_faults(target, nothing)) == []
    np.testing.assert_array_equal(store.train.read(HOOK, 3, 21), local.train.read(HOOK, 3, 21))
    np.testing.assert_array_equal(store.train.read(HOOK, 0, 16), local.train.read(HOOK, 0, 16))
    assert (store.tail_path(HOOK) / "config.json").is_file()
    group = zarr.open_group(zarr.storage.ZipStore(target, mode="r"), mode="r")
    np.testing.assert_array_equal(group["train/lengths"][:], local.train.lengths)
    with pytest.raises(StoreError, match="is there already"):
        copy_store(GOLDEN, target, nothing)
    done = CliRunner().invoke(cli, ["--store", str(tmp_path / "b.zip"), "harvest"])
    assert done.exit_code == 1
    assert "can be read only" in done.output
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zarr.json", "{}" * 99)
    with pytest.raises(StoreError, match="zarr.json is compressed"):
        open_store(tmp_path / "c.zip")
    Path(tmp_path / "d.zip").write_text("no")
    with pytest.raises(StoreError, match="is no zip file"):
        open_store(tmp_path / "d.zip")


@pytest.mark.slow
@pytest.mark.parametrize("codec, allowed", [("float32", 0), ("bfloat16", 5e-3), ("int8", 5e-2), ("compact", 0.5)])
def test_another_codec(tiny_store, tmp_path, monkeypatch, codec, allowed):
    target, whole = str(tmp_path / "b.zarr"), str(tmp_path / "whole.zarr")
    monkeypatch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: Layout(sequences_per_chunk=8))  # noqa: ARG005
    with monkeypatch.context() as patch:
        dies(patch, 40)
        with pytest.raises(DiedError):
            copy_store(tiny_store, target, nothing, codec=codec)
    told: list[int] = []
    store, local = copy_store(tiny_store, target, told.append, codec=codec), open_store(tiny_store)
    assert sum(told) == local.train.n_tokens + local.eval.n_tokens
    copy_store(tiny_store, whole, nothing, codec=codec)
    assert contents(target) == contents(whole)
    assert store.manifest.recipe.codec == codec
    assert store.manifest.history[-1]["content"] == local.content
    assert list(find_faults(target, nothing)) == []
    x, y = (one.train.read(HOOK, 0, one.train.n_sequences) for one in (local, store))
    assert np.abs(x - y).max() <= allowed * np.abs(x).max()
    np.testing.assert_array_equal(store.eval.read(HOOK, 0, 4), local.eval.read(HOOK, 0, 4))
