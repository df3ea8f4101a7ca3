"""Promise: several processes make the store that one makes, whoever of them dies or comes late; no document is lost."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import toy_harvest as toy
from click.testing import CliRunner

from tcsae.harvest import work_stealing as several
from tcsae.harvest.run import harvest
from tcsae.shared.base.distributed import Ranks, ranks
from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.base.files import remove_folder, write_atomic
from tcsae.shared.commands.group import cli
from tcsae.shared.store.arrays import CodecRecord, StoreArrays
from tcsae.shared.store.format import Recipe, Shard
from tcsae.shared.store.journal import Journal
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.writer import StoreWriter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tiny_config):
    """Shards of 2 sequences, some 60 of them, one hook."""
    with pytest.MonkeyPatch.context() as patch:
        toy.small_steps(patch, 2)
        patch.setattr(several, "POLL_S", 0.05)
        yield toy.one_hook(tiny_config)


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    location = tmp_path_factory.mktemp("alone") / "a.zarr"
    harvest(str(location), small)
    return toy.files(location)


def start(location, config, rank: int, world: int, die_at: int = 0, key: str = "activations") -> int:
    """A forked rank, which dies as by kill -9 at its n-th write of an object whose path holds `key`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
            if die_at:
                toy.at_write(die_at, key, True, lambda: os._exit(9))
            harvest(str(location), config)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return pid


def ends(*pids: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_store_as_of_one_process(small, alone, tmp_path, world):
    location = tmp_path / "a.zarr"
    assert ends(*(start(location, small, rank, world) for rank in reversed(range(world)))) == [0] * world
    assert toy.files(location) == alone
    assert toy.traces(location) == []


@pytest.mark.parametrize(
    "key, number", [("activations/", 9), ("sequences.json", 2), ("statistics", 1), ("zarr.json", 3)]
)
def test_a_rank_is_killed_and_started_again(small, alone, tmp_path, key, number):
    location = tmp_path / "a.zarr"
    first, second = start(location, small, 0, 2, number, key), start(location, small, 1, 2)
    (code,) = ends(first)
    assert code in (0, 9)
    if code == 9:
        first = start(location, small, 0, 2)
        assert ends(first, second) == [0, 0]
    assert toy.files(location) == alone
    assert toy.traces(location) == []


def test_those_alive_take_over_what_a_dead_one_left(small, alone, tmp_path):
    location = tmp_path / "a.zarr"
    pids = [start(location, small, 0, 3), start(location, small, 1, 3, 7), start(location, small, 2, 3)]
    assert ends(*pids) == [0, 9, 0]
    assert toy.files(location) == alone


def test_all_die_and_one_process_finishes(small, alone, tmp_path):
    location = tmp_path / "a.zarr"
    assert ends(start(location, small, 0, 2, 12), start(location, small, 1, 2, 9)) == [9, 9]
    assert ends(start(location, small, 0, 1)) == [0]
    assert toy.files(location) == alone


def test_an_extension_by_several(small, alone, tmp_path):
    location = tmp_path / "a.zarr"
    assert ends(start(location, dataclasses.replace(small, n_tokens=1500), 0, 1)) == [0]
    assert ends(start(location, small, 1, 2), start(location, small, 0, 2)) == [0, 0]
    assert toy.files(location) == alone


class Shards(StoreWriter):
    """A store of 60 shards as `dealt` sees it, and how often all of them were looked up."""

    location = "nowhere"

    def __init__(self) -> None:
        self.all = [Shard("train", i, i, i + 1) for i in range(60)]
        self.done: set[str] = set()
        self.n_listed = 0

    def shards(self) -> list[Shard]:
        return self.all

    def missing_shards(self) -> list[Shard]:
        self.n_listed += 1
        return [shard for shard in self.all if shard.name not in self.done]

    def is_written(self, shard: Shard) -> bool:
        return shard.name in self.done


def test_the_rest_is_shared_by_all_who_are_done_without_a_list_a_shard(monkeypatch):
    """Of four ranks one died, and one is slow: the two others meet each other and the slow one at a shard or so."""
    monkeypatch.setattr(several, "_sealed", lambda location: False)  # noqa: ARG005
    store = Shards()
    streams = {rank: several.dealt(store, Ranks(rank, 4, 0)) for rank in (0, 1, 2)}
    written, at = [], 0
    while streams:
        at += 1
        for rank in list(streams) if at % 3 == 0 else [rank for rank in streams if rank != 1]:
            shard = next(streams[rank], None)
            if shard is None:
                del streams[rank]
            else:
                written.append(shard.name)
        store.done.update(written)
    assert set(written) == {shard.name for shard in store.all}
    assert len(written) <= 60 + 4
    assert store.n_listed <= 9


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_shard_that_others_wrote_before_they_sealed_the_store_is_let_go(monkeypatch, tmp_path, split, sealed):
    """Its codec's parameters are cleared away with the journal, which only the one who is late needs."""
    monkeypatch.setattr(several, "_sealed", lambda location: sealed)  # noqa: ARG005
    recipe, journal = Mock(spec=Recipe, codec="compact"), Mock(spec=Journal)
    journal.has.return_value, journal.read.return_value = False, None
    codec = CodecRecord(recipe, LocalObjects(str(tmp_path)), Mock(spec=StoreArrays), journal)
    writer = Mock(spec=StoreWriter, location=str(tmp_path))
    writer.is_written.return_value = False
    writer.write_shard = lambda shard, x: codec.encode(shard.split, "h", x["h"])
    with contextlib.nullcontext() if sealed else pytest.raises(StoreError, match="another process sealed or cleared"):
        several.write_beside(writer, Shard(split, 0, 0, 1), {"h": np.zeros((1, 4), np.float32)})


def test_a_folder_can_be_listed_and_swept_while_others_write(tmp_path):
    """A rank's files come, are renamed and go while another looks."""
    end = threading.Event()

    def write() -> None:
        i = 0
        while not end.is_set():
            i = (i + 1) % 20
            with contextlib.suppress(FileNotFoundError):  # its folder went before it was there
                write_atomic(tmp_path / "journal" / str(i % 3) / f"{i}.json", b"1")
            if i == 0:
                remove_folder(tmp_path / "journal")

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(write)
        for _ in range(300):
            LocalObjects(str(tmp_path)).listed("journal")
            remove_folder(tmp_path / "journal" / "1")
        end.set()
        pending.result()


def test_another_process_is_kept_out_while_several_write(small, tmp_path):
    location = tmp_path / "a.zarr"
    pid = start(location, small, 0, 2)
    deadline = time.monotonic() + 60
    while not list((location / "journal").glob("train-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match="Another process harvests into"):
            harvest(str(location), small)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ends(pid) == [0]


def test_ranks_from_the_environment(monkeypatch):
    assert ranks() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="RANK=3 with WORLD_SIZE=None and LOCAL_RANK=None: set the first two"):
        ranks()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="RANK=3: of WORLD_SIZE=3, it must be 0 to 2"):
        ranks()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks() == Ranks(3, 4, None), "nothing says which of its machine's it is"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["harvest", "train"],
            "harvest train: processes that WORLD_SIZE counts cannot wait .* on its own, or start them with torchrun",
        ),
        (["train", "eval", "report"], "train eval report: processes that WORLD_SIZE counts"),
        (["harvest", "--fresh"], "--fresh in 2 processes: each would delete what the others write"),
        (["harvest", "--dry-run"], "--dry-run in 2 processes: one is enough"),
    ],
)
def test_what_several_cannot_do(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), *arguments])
    assert done.exit_code == 1
    assert re.search(message, done.output), done.output


def test_the_real_torchrun(tiny_lm, tiny_corpus, tmp_path):
    options = ["harvest", "--model", str(tiny_lm), "--dataset", str(tiny_corpus), "--tokens", "3000"]
    options += ["--sequence-length", "32", "--eval-every", "4", "--hook", "blocks.2.hook_resid_post"]
    options += ["train", "--preset=topk", "--preset=relu-l1", "--set=sae.d_sae=32", "--set=sae.k=4", "--steps=5"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tcsae"]
    for launcher, name in (([sys.executable, "-m", "tcsae"], "one"), (run, "two")):
        command = [*launcher, "--store", str(tmp_path / name), "--runs", str(tmp_path / f"{name}-runs"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert toy.files(tmp_path / "one") == toy.files(tmp_path / "two")
    made = [sorted(path.parent.name for path in tmp_path.glob(f"{n}-runs/*/tcsae.json")) for n in ("one", "two")]
    assert made[0] == made[1]
    assert len(made[0]) == 2
