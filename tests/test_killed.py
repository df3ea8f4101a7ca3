"""Promise: killed anywhere, by a signal, a full disk or kill -9, a harvest goes on and ends with the same bytes."""

import errno
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import toy_harvest as toy
from click.testing import CliRunner

from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import Stopped, StoreError
from tcsae.shared.base.files import PARTIAL
from tcsae.shared.commands.group import cli

pytestmark = pytest.mark.slow


PER_SHARD = 2
DEATHS = [
    ("", 1, False),
    ("/eval/tokens", 1, True),
    ("journal/sequences", 1, True),
    ("journal/sequences", 2, False),
    ("/train/tokens/c", 1, False),
    ("journal/plan", 1, True),
    ("journal/plan", 1, False),
    ("/train/activations", 1, True),
    ("journal/train-", 1, False),
    *((key, n, n % 2 == 0) for n in (2, 3, 5) for key in ("journal/train-", "/train/activations")),
    ("journal/eval-", 1, True),
    ("journal/eval-", 4, False),
    ("/tail/", 1, True),
    ("/tail/", 2, False),
    ("/tokenizer/", 2, True),
    ("/statistics/", 3, True),
    ("/statistics/", 5, False),
    ("/checksums/", 1, True),
    ("/checksums/", 2, False),
    ("store.zarr/zarr.json", 1, True),
]
"""In the order of the harvest: each start goes a little further than the one before."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    toy.small_steps(monkeypatch, PER_SHARD, PER_SHARD)


@pytest.fixture(scope="module")
def short(tiny_config):
    return toy.one_hook(tiny_config)


@pytest.fixture(scope="module")
def uninterrupted(short, tmp_path_factory):
    location = tmp_path_factory.mktemp("whole") / "store.zarr"
    with pytest.MonkeyPatch.context() as patch:
        toy.small_steps(patch, PER_SHARD, PER_SHARD)
        manifest = harvest(str(location), short).manifest
    assert sum(-(-manifest.counts[split]["sequences"] // PER_SHARD) for split in ("train", "eval")) >= 30
    return location


def test_killed_in_every_phase_the_bytes_are_the_same(short, uninterrupted, tmp_path, capfd):
    location = tmp_path / "store.zarr"
    kept, result = [], []
    for key, number, before in DEATHS:
        assert toy.harvest_in_child(location, short, number, key, before) == 9, (key, number)
        kept.append(toy.records(location))
        result.append({path.name for path in location.iterdir()})
    said = capfd.readouterr().err
    assert all(before <= after for before, after in itertools.pairwise(kept)), "no record is lost"
    numbers = [int(line.split(" goes on: ")[1].split(" of ")[0]) for line in said.splitlines() if "shards are" in line]
    assert numbers == sorted(numbers) and len(set(numbers)) >= 9, "the log says how many shards were kept"
    died = dict(zip((key for key, _, _ in DEATHS), zip(kept, result, strict=True), strict=False))
    assert "plan" not in died["journal/sequences"][0] and "plan" in died["/train/activations"][0]
    assert "tail" in died["/tokenizer/"][1] and "statistics" not in died["/tokenizer/"][1]
    assert "statistics" in died["/statistics/"][1] and "checksums" not in died["/statistics/"][1]
    with pytest.raises(StoreError, match="unfinished"):
        from tcsae.shared.store.reader import open_store

        open_store(location)
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)
    assert toy.traces(location) == []


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_writes_the_bytes_are_the_same(short, uninterrupted, tmp_path, seed):
    rng, location, n_deaths = random.Random(seed), tmp_path / "store.zarr", 0
    while toy.harvest_in_child(location, short, rng.randint(1, 45), before_rename=rng.random() < 0.5) == 9:
        n_deaths += 1
    assert n_deaths >= 4
    assert toy.files(location) == toy.files(uninterrupted)
    assert toy.traces(location) == []


def test_killed_after_the_seal_nothing_is_left_to_do(short, uninterrupted, tmp_path):
    location = tmp_path / "store.zarr"
    # The root's zarr.json is written twice: when the store is begun, and by the seal.
    assert toy.harvest_in_child(location, short, 2, "store.zarr/zarr.json") == 9
    assert toy.traces(location), "before the cleaning up"
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)
    assert toy.traces(location) == []


# Signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("key, state", [("journal/train-00000004", r"\d+ of \d+ shards"), ("/tokens/c", "documents")])
def test_a_signal_ends_the_harvest_after_the_work_at_hand(
    short, uninterrupted, tmp_path, monkeypatch, number, code, key, state
):
    location, handler = tmp_path / "store.zarr", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", pathlib.Path.replace)
        toy.at_write(1, key, True, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match=rf"Stopped by {number.name}: .*{state}.* goes on from there") as caught:
            harvest(str(location), short)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is handler, "handled as before"
    assert not list(location.rglob(f"*{PARTIAL}")), "nothing is half written"
    kept = toy.records(location)
    assert "train-00000004" in kept or "sequences" in kept
    assert len(kept) < 12, "it did not go on to the end"
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)


def test_a_second_interrupt_ends_it_at_once(short, uninterrupted, tmp_path, monkeypatch):
    location = tmp_path / "store.zarr"
    forward = "tcsae.harvest.capture.Capture.run"
    n_runs = 0

    def interrupt_twice(*_):
        nonlocal n_runs
        n_runs += 1
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still here")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(forward, interrupt_twice)
        harvest(str(location), short)
    assert n_runs == 1
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)


@pytest.mark.parametrize("error, code", [(Stopped("Stopped by SIGTERM: x.", 143), 143), (KeyboardInterrupt(), 130)])
def test_the_command_says_how_to_go_on_and_exits_as_signals_do(monkeypatch, error, code):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("tcsae.harvest.run.harvest", stop)
    done = CliRunner().invoke(cli, ["harvest"])
    assert done.exit_code == code
    assert "Stopped by SIGTERM: x." in done.stderr or "The same command goes on" in done.stderr


# A full disk


@pytest.mark.parametrize("key", ["journal/sequences", "/train/activations", "/tail/", "/checksums/"])
def test_a_full_disk_is_said_and_the_harvest_goes_on_after_room_is_made(
    short, uninterrupted, tmp_path, monkeypatch, key
):
    location = tmp_path / "store.zarr"

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", pathlib.Path.replace)
        toy.at_write(2, key, True, full)
        with pytest.raises(
            StoreError, match=r"store.zarr.*The disk is full: make room, then start the same command again"
        ):
            harvest(str(location), short)
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)
    assert toy.traces(location) == []


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounts a small disk, which takes root")
def test_a_really_full_disk(short, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    location = disk / "store.zarr"
    try:
        with pytest.raises(StoreError, match="needs .* more and its disk has"):
            harvest(str(location), short)
        with pytest.raises(StoreError, match="The disk is full: make room"):
            harvest(str(location), short, force=True)
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        harvest(str(location), short)
        assert toy.files(location) == toy.files(uninterrupted)
        assert toy.traces(location) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Real processes


def command(location, config) -> list[str]:
    """The command line of `config`, in a program that makes small shards."""
    small = (
        "import tcsae.shared.store.writer as w; from tcsae.shared.store.format import Layout; "
        f"w.layout_for = lambda _: Layout(sequences_per_chunk=1, chunks_per_shard={PER_SHARD}); "
        "import tcsae.harvest.phases as p; p.COMMIT_DOCUMENTS = 16; "
        "from tcsae.shared.commands.group import main; main()"
    )
    options = ["--model", config.model.name, "--batch-size", "4", "--dataset", config.corpus.name, "--tokens", "3000"]
    options += ["--sequence-length", "32", "--eval-every", "4", "--hook", toy.RESIDUAL]
    return [sys.executable, "-c", small, "--store", str(location), "harvest", *options]


def killed_after(n_records: int, location, config) -> bool:
    """Start the program, kill -9 it once its journal has so many records; False if it ended before."""
    process = subprocess.Popen(command(location, config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if len(toy.records(location)) >= n_records:
            process.kill()
            break
        time.sleep(0.003)
    return process.wait() == -signal.SIGKILL


def test_killed_processes_the_bytes_are_the_same(short, uninterrupted, tmp_path):
    location, n, n_kills = tmp_path / "store.zarr", 0, 6
    for i in range(n_kills):
        n += killed_after(1 + i * 55 // n_kills, location, short)
    assert n >= n_kills * 2 // 3
    done = subprocess.run(command(location, short), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shards are on disk" in done.stderr
    assert toy.files(location) == toy.files(uninterrupted)
    assert toy.traces(location) == []


def test_a_terminated_process_ends_with_143_and_one_line(short, uninterrupted, tmp_path):
    location = tmp_path / "store.zarr"
    process = subprocess.Popen(command(location, short), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(toy.records(location)) < 6:
        time.sleep(0.001)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert "Stopped by SIGTERM: " in said.splitlines()[-1] and "Traceback" not in said
    assert json.loads((location / "zarr.json").read_text())["attributes"]["tcsae"]["state"] == "harvesting"
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)
