"""Promise: a store in an object store is the same store: the same bytes, whatever the network does meanwhile."""

import contextlib
import functools
import http.server
import itertools
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_s3 as s3
from click.testing import CliRunner

import tcsae
from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.copy import copy_store
from tcsae.shared.store.format import Layout
from tcsae.shared.store.places import leases, objects_at, remote
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

pytestmark = pytest.mark.slow

_numbers = itertools.count()


RESIDUAL = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("TCSAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with s3.s3_server() as (address, direct, faults):
            patch.setenv("AWS_ENDPOINT_URL", address)
            yield address, direct, faults


@pytest.fixture
def faults(server):
    faults = server[2]
    faults.__init__()
    yield faults
    faults.__init__()


@pytest.fixture
def place(faults) -> str:  # noqa: ARG001
    return f"s3://bucket/{next(_numbers)}/a.zarr"


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    """The chunks of `tiny_store`."""
    patch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: Layout(sequences_per_chunk=8))  # noqa: ARG005


@pytest.fixture(scope="module")
def remote_store(tiny_config, server):  # noqa: ARG001
    """The store of `tiny_store`, harvested into the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        harvest("s3://bucket/tiny.zarr", tiny_config)
    return "s3://bucket/tiny.zarr"


def contents(location: str) -> dict[str, bytes]:
    objects = objects_at(location)
    return {key: objects.get(key) for key in objects.listed() if key != "zarr.json"}


def test_the_same_bytes_as_on_a_disk(tiny_store, remote_store):
    assert contents(remote_store) == contents(tiny_store)
    assert open_store(remote_store).content == open_store(tiny_store).content
    assert list(find_faults(remote_store, lambda n: None)) == []  # noqa: ARG005


def test_train_and_eval_from_it_as_from_a_disk_and_without_a_list(tiny_store, remote_store, tmp_path, faults):
    options = ["train", "--set=sae.d_sae=32", "--set=sae.k=4", "--steps=20", "eval"]
    for location, runs in ((tiny_store, "local"), (remote_store, "remote")):
        done = CliRunner().invoke(cli, ["--store", location, "--runs", str(tmp_path / runs), *options])
        assert done.exit_code == 0, done.output
    (name,) = (path.parent.name for path in (tmp_path / "local").glob("*/sae_weights.safetensors"))
    weights = [(tmp_path / runs / name / "sae_weights.safetensors").read_bytes() for runs in ("local", "remote")]
    assert weights[0] == weights[1]
    assert faults.lists() == 0
    assert len(faults.requests) > 20


@pytest.mark.parametrize("may_list", [True, False])
def test_inspect_and_verify(remote_store, tmp_path, faults, may_list):
    faults.kind = lambda n, method, path: "403" if s3.is_list(method, path) and not may_list else None  # noqa: ARG005
    for command in ("inspect", "verify"):
        done = CliRunner().invoke(cli, ["--store", remote_store, "--runs", str(tmp_path), command])
        assert done.exit_code == 0, done.output
    assert "is whole" in done.output


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_from_afar_is_the_one_from_a_disk(evaluated, place, tmp_path, faults):
    copy_store(str(evaluated / "a.zarr"), place, lambda n: None)  # noqa: ARG005
    faults.kind = lambda n, method, path: "403" if s3.is_list(method, path) else None  # noqa: ARG005
    with served(evaluated) as address:
        locations = {"local": str(evaluated / "a.zarr"), "s3": place, "http": f"{address}/a.zarr"}
        for name, location in locations.items():
            place_of = ["--store", location, "--runs", str(evaluated / "runs")]
            report = ["report", "--run=logged-run2-d_sae64", "--max-tokens=1K", "--out", str(tmp_path / name)]
            for command in (report, ["feature", "--run=logged-run2-d_sae64", "--id=1", "--max-tokens=1K"]):
                done = CliRunner().invoke(cli, [*place_of, *command])
                assert done.exit_code == 0, done.output
    pages = {name: files_of(tmp_path / name) for name in locations}
    assert len(pages["local"]) > 5
    assert pages["s3"] == pages["http"] == pages["local"]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a plain web server over a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_http_is_read_only_and_needs_no_list(tiny_store):
    with served(Path(tiny_store).parent) as address:
        location = f"{address}/{Path(tiny_store).name}"
        store, local = open_store(location), open_store(tiny_store)
        np.testing.assert_array_equal(store.train.read(RESIDUAL, 0, 16), local.train.read(RESIDUAL, 0, 16))
        assert store.n_bytes() == local.n_bytes()
        assert list(find_faults(location, lambda n: None)) == []  # noqa: ARG005
        with pytest.raises(StoreError, match="can be read only"):
            tcsae.create_store(location + "2", hooks={"h": 4}, sequence_length=2)


def test_the_loader_reads_more_at_once_the_longer_it_waits(remote_store, faults, monkeypatch):
    monkeypatch.setattr("tcsae.train.loader.FIRST_READS", 1)
    faults.latency_s = 0.02
    loader = SegmentLoader(open_store(remote_store), DataConfig(n_segments=8, segment_length=4, buffer_sequences=64))
    faults.most, batches = 0, iter(loader)
    next(batches)
    assert faults.most <= 2  # one at a time, or two if the next block is under way: there was one wait
    for _ in range(2000):  # a busy machine may hide a wait, and each adds one read
        next(batches)
        if faults.most >= 4:
            break
    assert faults.most >= 4


def test_the_chunks_of_a_shard_are_written_at_once(place, tiny_config, faults, monkeypatch):
    layout = Layout(sequences_per_chunk=4, chunks_per_shard=8)
    monkeypatch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: layout)  # noqa: ARG005
    faults.latency_s = 0.02
    puts: list[int] = []
    faults.kind = lambda n, method, path: puts.append(faults.under_way) if method == "PUT" and "/c/" in path else None  # noqa: ARG005
    harvest(place, tiny_config)
    assert max(puts) >= 4
    assert list(find_faults(place, lambda n: None)) == []  # noqa: ARG005


@pytest.mark.parametrize("deaths", [(0, 5), pytest.param((4, 6), marks=pytest.mark.slow)])
def test_ranks_that_die_at_an_object_store(place, tiny_config, tmp_path, monkeypatch, deaths):
    """Two processes, which die at a PUT and leave their leases; the rest is done by who is alive, or by a new start."""
    layout = Layout(sequences_per_chunk=2, chunks_per_shard=2)
    monkeypatch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: layout)  # noqa: ARG005
    harvest(str(tmp_path / "a.zarr"), tiny_config)

    def start(*die_at: int) -> list[int]:
        children = []
        for rank, number in enumerate(die_at):
            told = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            program = [sys.executable, str(Path(__file__).with_name("toy_rank.py"))]
            children.append(subprocess.Popen(program, stdin=subprocess.PIPE, env=told))
            children[-1].stdin.write(pickle.dumps((place, tiny_config, number)))
            children[-1].stdin.close()
        return [child.wait(600) for child in children]

    assert start(*deaths) == [9 * bool(number) for number in deaths]
    if all(deaths):
        assert start(0, 0) == [0, 0]
    assert contents(place) == contents(str(tmp_path / "a.zarr"))


def throttled(seed: int):
    """Every third request or so goes wrong, in every way."""
    rng = random.Random(seed)
    return lambda n, method, path: rng.choice(["503", "drop", "lost", "torn"]) if rng.random() < 0.2 else None  # noqa: ARG005


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_throttled_and_dropped_nothing_is_lost_and_nothing_double(
    place, tiny_config, tiny_store, faults, monkeypatch, seed
):
    small_chunks(monkeypatch)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.002)
    faults.kind = throttled(seed)
    harvest(place, tiny_config)
    assert {"503", "drop", "lost", "torn"} <= set(faults.done)
    loader = SegmentLoader(open_store(place), DataConfig(n_segments=8, segment_length=4))
    ours = [batch.x.clone() for batch in itertools.islice(loader, 30)]
    faults.kind = lambda n, method, path: None  # noqa: ARG005
    assert contents(place) == contents(tiny_store)
    theirs = SegmentLoader(open_store(tiny_store), DataConfig(n_segments=8, segment_length=4))
    for x, batch in zip(ours, theirs, strict=False):
        assert torch.equal(x, batch.x)


def test_a_store_that_throttles_for_ever_is_one_line(remote_store, faults, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_S", 1.0)
    faults.kind = lambda n, method, path: "503"  # noqa: ARG005
    with pytest.raises(StoreError, match=r"refused for 1 s to be asked that often \(503\)"):
        open_store(remote_store)


class DiedError(BaseException):
    pass


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=pytest.mark.slow), 31])
def test_killed_at_any_put_it_goes_on(place, tiny_config, tiny_store, monkeypatch, number):
    """The harvest dies at its n-th PUT without letting go of its lock; --force takes over."""
    small_chunks(monkeypatch)
    real, n_puts = remote.RemoteObjects._put, itertools.count(1)

    def put(self, key, data):
        if next(n_puts) >= number:
            raise DiedError
        real(self, key, data)

    monkeypatch.setattr(remote.RemoteObjects, "_put", put)
    release = leases.Lease.release
    monkeypatch.setattr(leases.Lease, "release", lambda self: self._end.set())
    with pytest.raises(DiedError):
        harvest(place, tiny_config)
    monkeypatch.setattr(remote.RemoteObjects, "_put", real)
    monkeypatch.setattr(leases.Lease, "release", release)
    with pytest.raises(StoreError, match=r"Another process harvests into .* if it is dead: --force"):
        harvest(place, tiny_config)
    harvest(place, tiny_config, force=True)
    assert contents(place) == contents(tiny_store)


def test_a_dead_lease_ends_by_itself(place, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    objects = objects_at(place)
    held = objects.lock("harvest.lock")
    assert objects.lock("harvest.lock") is None
    time.sleep(3.0)
    assert objects.lock("harvest.lock") is None, "it is renewed"
    held._end.set()  # as a death does
    held._thread.join()
    time.sleep(3.5)
    taken = objects.lock("harvest.lock")
    assert taken is not None
    taken.check()
    taken.release()
    assert objects.listed() == {}


def test_a_broken_lock_stops_its_owner(place, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    objects = objects_at(place)
    held = objects.lock("harvest.lock")
    other = objects.lock("harvest.lock", force=True)
    time.sleep(1.5)
    with pytest.raises(StoreError, match="the lock was lost"):
        held.check()
    held.release()
    other.check()
    other.release()
    assert objects.listed() == {}


def test_those_who_share_a_lock_keep_others_out(place):
    objects = objects_at(place)
    first, second = objects.lock("a.lock", shared=True), objects.lock("a.lock", shared=True)
    assert objects.lock("a.lock") is None
    first.release()
    second.release()
    alone = objects.lock("a.lock")
    assert objects.lock("a.lock", shared=True) is None
    alone.share()
    third = objects.lock("a.lock", shared=True)
    alone.release()
    third.release()
    assert objects.listed() == {}


def test_clear_lines(place, monkeypatch):
    with pytest.raises(StoreError, match="No activation store at s3://bucket/.*Make one"):
        open_store(place)
    with pytest.raises(StoreError, match="there is no bucket 'nowhere'"):
        open_store("s3://nowhere/a.zarr")
    monkeypatch.setattr(remote, "RETRY_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="the store does not answer as it should"):
        open_store(place)
    for name in s3.ENVIRONMENT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(StoreError, match="here are no credentials.* Set AWS_ACCESS_KEY_ID"):
        open_store(place)


def test_without_obstore_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError, match=r"object stores take obstore. Install it: pip install 'tcsae\[remote\]'"):
        open_store("s3://bucket/a.zarr")


def test_access_denied_and_missing_chunk(place, tiny_store, faults):
    objects = objects_at(place)
    for key, data in contents(tiny_store).items():
        objects.put(key, data)
    objects.put("zarr.json", objects_at(tiny_store).get("zarr.json"))
    store = open_store(place)
    hook = store.hooks[0]
    key = f"train/activations/{hook}/c/1/0/0"
    objects.delete([key])
    with pytest.raises(StoreError, match=r"c/1/0/0 cannot be read \(it is not there\)"):
        store.train.read(hook, 8, 16)
    assert f"{key}: it is missing" in list(find_faults(place, lambda n: None))  # noqa: ARG005
    objects.put("stray", b"1")
    assert "stray: it does not belong to the store" in list(find_faults(place, lambda n: None))  # noqa: ARG005
    faults.kind = lambda n, method, path: "403"  # noqa: ARG005
    with pytest.raises(StoreError, match="access denied"):
        open_store(place)
    with pytest.raises(StoreError, match="^[^ ]*: access denied"):
        store.train.read(hook, 3, 11)  # not damaged


@pytest.mark.parametrize("command", ["harvest", "train", "eval", "verify", "report", "inspect", "copy"])
def test_a_command_that_is_denied_says_one_line(place, tmp_path, faults, command):
    faults.kind = lambda n, method, path: "403"  # noqa: ARG005
    options = ["--from", place, "--to", str(tmp_path / "b.zarr")] if command == "copy" else []
    done = CliRunner().invoke(cli, ["--store", place, "--runs", str(tmp_path / "runs"), command, *options])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {place}/zarr.json: access denied. Look at the credentials in the environment")


def test_a_put_that_is_denied_says_one_line(place, tiny_lm, tiny_corpus, faults):
    faults.kind = lambda n, method, path: "403" if method == "PUT" else None  # noqa: ARG005
    options = ["harvest", "--model", str(tiny_lm), "--dataset", str(tiny_corpus), "--tokens", "400"]
    done = CliRunner().invoke(cli, ["--store", place, *options, "--hook", RESIDUAL, "--sequence-length", "32"])
    assert done.exit_code == 1
    assert f"Error: {place}/harvest.lock: access denied" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", ["short", "flip", "html", "404"])
@pytest.mark.parametrize(
    "what",
    [
        "/zarr.json",
        "/checksums/c/0/0",
        "/train/tokens/zarr.json",
        "/train/lengths/c/0",
        "/c/0/0/0",
        "/tail/",
        "/tokenizer/",
    ],
)
def test_an_answer_that_is_not_the_object_is_one_line(remote_store, tmp_path, faults, monkeypatch, fault, what):
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_S", 0.5)

    def kind(n: int, method: str, path: str) -> str | None:  # noqa: ARG001
        is_root = path.endswith("tiny.zarr/zarr.json")
        hit = is_root if what == "/zarr.json" else what in path
        return fault if hit and method == "GET" and not s3.is_list(method, path) else None

    def use() -> None:
        store = open_store(remote_store)
        _ = store.train.tokens, store.train.lengths
        store.train.read(RESIDUAL, 0, 8)
        store.tail_path(RESIDUAL)
        _ = store.tokenizer_path

    faults.kind = kind
    start = time.monotonic()
    with pytest.raises(StoreError) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((remote_store, "No activation store at"))
    assert time.monotonic() - start < 20, "retries are bounded"
    faults.kind = lambda n, method, path: None  # noqa: ARG005
    use()
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_lease_is_released_by_its_holder_alone(place, monkeypatch):
    """A holder that slept for longer than its lease wakes in release, when the lock is another's."""
    monkeypatch.setattr(leases, "RENEWALS", 0.1)  # never within this test
    objects = objects_at(place)
    first = objects.lock("harvest.lock")
    second = objects.lock("harvest.lock", force=True)
    first.release()
    assert "harvest.lock" in objects.listed()
    assert objects.lock("harvest.lock") is None
    second.release()
    assert objects.listed() == {}


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"host": 1, "pid": "x", "token": 2}'])
def test_an_unreadable_lock_is_said_so_and_force_takes_it(place, content):
    objects = objects_at(place)
    objects.put("harvest.lock", content)
    assert objects.lock("harvest.lock") is None
    assert "harvest.lock is unreadable" in objects.holder("harvest.lock")
    assert "--force" in objects.holder("harvest.lock")
    objects.lock("harvest.lock", force=True).release()
    assert objects.listed() == {}
