"""Promise: whatever the disk refuses is one line that names path and cure; what was there stays whole."""

import errno
import io
import os
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import toy_store as toy
from click.testing import CliRunner

import tcsae
from tcsae.shared.base import files
from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import (
    disk_line,
    remove_dead_partials,
    remove_dead_partials_in,
    whole_file,
    write_atomic,
    write_folder,
)
from tcsae.shared.commands import group
from tcsae.shared.commands.group import cli
from tcsae.shared.store.copy import copy_store
from tcsae.shared.store.places import local, objects_at
from tcsae.shared.store.writer import open_writer

ERRNOS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG]
NAMES = [errno.errorcode[number] for number in ERRNOS]
CURE = r"make room|another place|permission|shorter|mounted"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return toy.make(tmp_path_factory.mktemp("disk") / "a.zarr", "float16")


def refusing(number: int):
    """An `os.fsync` or `open` of a disk that refuses: as with write(2), the error names no file."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
@pytest.mark.parametrize("target", ["b.zarr", "b.zip", "int8.zarr"])
def test_copy_onto_a_disk_that_refuses(store, tmp_path, monkeypatch, number, target):
    monkeypatch.setattr("tcsae.shared.base.files.os.fsync", refusing(number))
    options = ["--codec", "int8"] if target == "int8.zarr" else []
    done = CliRunner().invoke(cli, ["copy", "--from", str(store), "--to", str(tmp_path / target), *options])
    assert done.exit_code == 1, done.exception
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {tmp_path / target}")
    assert os.strerror(number) in line
    assert any(word in line for word in CURE.split("|")), line
    monkeypatch.undo()
    done = CliRunner().invoke(cli, ["copy", "--from", str(store), "--to", str(tmp_path / target), *options])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
def test_create_store_on_a_disk_that_refuses(tmp_path, monkeypatch, number):
    monkeypatch.setattr("tcsae.shared.base.files.os.fsync", refusing(number))
    with pytest.raises(StoreError, match=rf"{tmp_path}/a.zarr.*{os.strerror(number)}.*({CURE})"):
        tcsae.create_store(tmp_path / "a.zarr", hooks={"h": 4}, sequence_length=2)
    monkeypatch.undo()
    creation = tcsae.create_store(tmp_path / "b.zarr", hooks={"h": 4}, sequence_length=2)
    monkeypatch.setattr("tcsae.shared.base.files.os.fsync", refusing(number))
    with pytest.raises(StoreError, match=os.strerror(number)), creation as new:
        new.append("train", {"h": np.ones((3, 2, 4))})
    assert not list((tmp_path / "b.zarr").rglob("*/*")), "what was begun is deleted"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("command", ["inspect", "verify", "copy"])
def test_reading_from_a_disk_that_refuses(store, tmp_path, monkeypatch, command, number):
    """Everything but the manifest, as when a mount vanishes after the start."""
    opened = io.open

    def refuse(file, *given, **more):
        if str(file).startswith(str(store)) and not str(file).endswith("zarr/zarr.json"):
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *given, **more)

    monkeypatch.setattr(io, "open", refuse)
    options = ["--from", str(store), "--to", str(tmp_path / "b.zarr")] if command == "copy" else []
    done = CliRunner().invoke(cli, ["--store", str(store), "--runs", str(tmp_path), command, *options])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert os.strerror(number) in done.output
    assert f"{store}/" in done.output


@pytest.mark.parametrize("make", [
    lambda: OSError(errno.ENOSPC, "No space left on device", "/a/b"),
    lambda: PermissionError(errno.EACCES, "Permission denied", "/a/b"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: TimeoutError("timed out"),
    lambda: ValueError("I/O error: No space left on device (os error 28)"),
    lambda: RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1728 vs 1684"),
    lambda: MemoryError("Unable to allocate 7 TiB"),
])  # fmt: skip
def test_the_last_net_of_the_command_line(monkeypatch, make):
    @click.command()
    def failing() -> None:
        raise make()

    monkeypatch.setattr(group.StageGroup, "get_command", lambda self, ctx, name: failing)  # noqa: ARG005
    done = CliRunner().invoke(cli, ["inspect"])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in done.output


def test_a_bug_of_ours_keeps_its_traceback():
    assert disk_line(ValueError("no such thing")) is None
    assert disk_line(KeyError("x")) is None


def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr("tcsae.shared.base.files.os.fsync", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught, whole_file(tmp_path / "a") as file:
        file.write(b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def folder_of(text: str):
    return lambda folder: [(folder / name).write_text(text) for name in ("a", "b")]


@pytest.mark.slow
def test_a_folder_is_there_at_every_moment_while_it_is_replaced(tmp_path):
    target, over, seen = tmp_path / "tail", threading.Event(), set()
    write_folder(target, folder_of("0"))

    def look() -> None:
        while not over.is_set():
            seen.add(target.is_dir() and (target / "a").is_file())

    looker = threading.Thread(target=look)
    looker.start()
    for i in range(100):
        write_folder(target, folder_of(str(i)))
    over.set()
    looker.join()
    assert seen == {True}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "tail"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "a folder", "an empty folder", "a file"])
def test_a_folder_replaces_what_is_there(tmp_path, monkeypatch, can_exchange, before):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # noqa: ARG005
    target = tmp_path / "x"
    if before == "a file":
        target.write_text("old")
    elif before != "nothing":
        target.mkdir()
        if before == "a folder":
            (target / "old").write_text("old")
    write_folder(target, folder_of("new"))
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert [path for path in tmp_path.iterdir() if path != target and path.is_dir()] == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path, fails):
    write_folder(tmp_path / "x", folder_of("old"))

    def fill(folder: Path) -> None:
        folder_of("new")(folder)
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "c"))

    if fails:
        with pytest.raises(OSError, match="No space") as caught:
            write_folder(tmp_path / "x", fill)
        assert caught.value.filename == str(tmp_path / "x" / "c")
    else:
        write_folder(tmp_path / "x", fill)
    assert (tmp_path / "x" / "a").read_text() == ("old" if fails else "new")
    assert len(list(tmp_path.iterdir())) == 1


WRITERS = {
    "a file": lambda path: write_atomic(path, b"new"),
    "a folder": lambda path: write_folder(path, folder_of("new")),
}


def hold_up(write: Callable[[], None]) -> int:
    """A child that is stopped in the middle of a write, as soon as it is: fsync comes when all is written."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.os, "fsync", lambda _: (os.write(told, b"x"), signal.pause()))
            write()
    os.close(told)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


SWEEPS = {
    "of a name": remove_dead_partials,
    "of a folder": lambda path: remove_dead_partials_in(path.parent),
    "by the next writer": lambda path: write_folder(path, folder_of("new")),
}


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_killed_writer_left_is_deleted_and_never_a_living_one_s(tmp_path, kind, sweep):
    path, write = tmp_path / "x", WRITERS[kind]
    others = {"x.partial", "x.1.partial", "y.partial", f"x.{'g' * 32}.partial", f"x.{'0' * 32}.partial.txt"}
    for name in others:
        (tmp_path / name).touch()
    child = hold_up(lambda: write(path))
    written = {one.name for one in tmp_path.iterdir()} - others
    assert len(written) == 1
    sweep(path)
    assert written <= {one.name for one in tmp_path.iterdir()}, "its writer lives"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    sweep(path)
    assert {one.name for one in tmp_path.iterdir()} - {"x"} == others, "no file of a user is taken for one"


def test_where_nothing_can_be_locked_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "try_lock", lambda *_, **__: None)
    names = [f"x.{str(i) * 32}.partial" for i in range(3)]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[:2]:
        os.utime(tmp_path / name, (0, 0))
    write_folder(tmp_path / "x", folder_of("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", names[2]]


class Grudging(io.FileIO):
    """A file of which one call gives a few bytes only, as Linux gives at most 2 GiB."""

    def readinto(self, view) -> int:
        return super().readinto(memoryview(view)[:7])


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_an_object_that_takes_more_than_one_read(tmp_path, monkeypatch, kind):
    data = bytes(range(100))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("tail/x", data)
    (tmp_path / "a" / "tail").mkdir(parents=True)
    (tmp_path / "a" / "tail" / "x").write_bytes(data)
    objects = objects_at(str(tmp_path / ("a.zip" if kind == "zip" else "a")))
    objects.size("tail/x")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", buffering=-1: opened(self, mode) if buffering else Grudging(self)
    )
    first, second = bytearray(60), bytearray(50)
    assert objects.read_into("tail/x", memoryview(first), memoryview(second)) == 100
    assert bytes(first + second[:40]) == data
    if kind == "zip":
        assert objects.get("tail/x") == b"".join(objects.blocks("tail/x")) == data


def test_a_store_whose_folder_cannot_be_listed_is_not_called_foreign(store, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(store / "zarr.json"))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match=r"zarr.json: Permission denied. Ask for the permission"):
        tcsae.open_store(store)
    assert local.LocalObjects(str(store)).has("zarr.json")


def test_a_writer_on_a_read_only_disk_says_so(store, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tcsae.shared.store.places.local.os.open", refuse)
    recipe = tcsae.open_store(store).manifest.recipe
    with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\). Give another --store"):
        open_writer(str(tmp_path / "b.zarr"), recipe)
    assert open_writer(str(store), recipe) is None, "a sealed store is used as it is"
    with pytest.raises(StoreError, match="Read-only file system"):
        copy_store(str(store), str(tmp_path / "c.zarr"), lambda n: None)  # noqa: ARG005
