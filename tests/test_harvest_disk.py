"""Promise: whatever a disk refuses, wherever in a harvest, is one line with the path and the cure; a rerun goes on."""

import errno
import os
import pathlib

import pytest
import toy_harvest as toy
from click.testing import CliRunner

from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import DataError, StoreError, TcsaeError
from tcsae.shared.base.files import disk_errors
from tcsae.shared.commands.group import cli

FAULTS = {
    errno.ENOSPC: "The disk is full: make room",
    errno.EDQUOT: "The quota is used up: make room",
    errno.EROFS: "The disk is read-only: give another place",
    errno.EACCES: "Ask for the permission, or give another place",
    errno.EPERM: "Ask for the permission, or give another place",
    errno.ENAMETOOLONG: "The name is too long: give a shorter one",
    errno.EIO: "Look at the disk and whether it is mounted",
    errno.ESTALE: "Look at the disk and whether it is mounted",
    errno.ENOENT: "It is gone, or was never written: look at the path",
    errno.EMFILE: "ulimit -n",
}
PLACES = ("journal/sequences", "/tokens/c", "journal/plan", "/train/activations", "/tail/", "/statistics/")


@pytest.fixture(scope="module")
def short(tiny_config):
    return toy.one_hook(tiny_config)


@pytest.fixture(scope="module")
def uninterrupted(short, tmp_path_factory):
    location = tmp_path_factory.mktemp("whole") / "store.zarr"
    harvest(str(location), short)
    return toy.files(location)


# Each fault and each place, not each pair of them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "number, place", [(number, PLACES[i % len(PLACES)]) for i, number in enumerate(FAULTS)], ids=str
)
def test_a_fault_is_one_line_and_the_same_harvest_goes_on(short, uninterrupted, tmp_path, monkeypatch, number, place):
    location = tmp_path / "store.zarr"

    def fault():
        raise OSError(number, os.strerror(number), str(location / "some" / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", pathlib.Path.replace)
        toy.at_write(1, place, True, fault)
        with pytest.raises(StoreError) as caught:
            harvest(str(location), short)
    message = str(caught.value)
    assert str(location) in message and "\n" not in message
    assert FAULTS[number] in message
    harvest(str(location), short)
    assert toy.files(location) == uninterrupted


class LibraryError(Exception):
    """What a library makes of an operating system's error."""


@pytest.mark.parametrize(
    "error, kind",
    [
        (LibraryError("Error while serializing: I/O error: No space left on device (os error 28)"), StoreError),
        (LibraryError("IoError(Os { code: 30, kind: ReadOnlyFilesystem })"), StoreError),
        (OSError(errno.ENOSPC, "No space left", "/elsewhere/cache"), StoreError),
        (LibraryError("something else"), LibraryError),
        (DataError("says it already (os error 28)"), DataError),
        (KeyError("os"), KeyError),
    ],
)
def test_whichever_library_met_it(error, kind):
    with pytest.raises(kind) as caught, disk_errors("s.zarr", StoreError):
        raise error
    assert type(caught.value) is kind
    if getattr(error, "filename", None):
        assert "/elsewhere/cache" in str(caught.value), "the path that is full, not the store's"


@pytest.mark.parametrize("where", ["store", "dataset", "model"])
def test_names_too_long_for_a_disk(tiny_lm, tiny_corpus, tmp_path, where):
    given = {"store": str(tmp_path / "a.zarr"), "dataset": str(tiny_corpus), "model": str(tiny_lm)}
    given[where] = str(tmp_path / ("x" * 300))
    arguments = ["--store", given["store"], "harvest", "--dataset", given["dataset"], "--model", given["model"]]
    done = CliRunner().invoke(cli, [*arguments, "--sequence-length", "32", "--tokens", "2K"])
    assert done.exit_code == 1 and not isinstance(done.exception, OSError | TcsaeError), done.exception
    assert done.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may do everything")
def test_without_permission(short, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        harvest(str(tmp_path / "a.zarr"), short)
