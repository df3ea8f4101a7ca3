"""Promise: `tcsae verify` finds any damage to a store, wherever it lies, and names the object."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_store as toy
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tcsae.shared.commands.group import cli
from tcsae.shared.store.format import SPLITS
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults

HOOK, LENGTH, WIDTH, CONFIG, WEIGHTS, make = toy.HOOK, toy.LENGTH, toy.WIDTH, toy.CONFIG, toy.WEIGHTS, toy.make
KINDS = [
    "zarr.json",
    "train/zarr.json",
    "train/tokens/zarr.json",
    "train/tokens/c/1/0",
    "eval/lengths/c/0",
    "eval/documents/c/0",
    "train/starts/c/0",
    f"train/activations/{HOOK}/zarr.json",
    f"train/activations/{HOOK}/c/2/0/0",
    f"eval/activations/{HOOK}/c/0/0/0",
    f"statistics/{HOOK}/variance/c/0",
    f"codec/{HOOK}/zarr.json",
    f"codec/{HOOK}/basis/c/0/0",
    "checksums/zarr.json",
    "checksums/c/0/0",
    CONFIG,
    WEIGHTS,
    "tokenizer/tokenizer.json",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("verify") / "a.zarr")


@pytest.fixture
def store(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a.zarr"))


def faults(path: Path) -> list[str]:
    return list(find_faults(str(path), lambda _: None))


def run_verify(path: Path):
    return CliRunner().invoke(cli, ["--store", str(path), "verify"])


@pytest.mark.parametrize("codec", ["float16", "float32", "bfloat16", "int8", "compact"])
def test_a_whole_store_is_whole(tmp_path, codec):
    done = run_verify(make(tmp_path / "a.zarr", codec))
    assert done.exit_code == 0, done.output
    n_files = sum(path.is_file() for path in (tmp_path / "a.zarr").rglob("*"))
    assert f"is whole: {n_files} objects" in done.output
    assert "31 tokens\n" in done.output


def test_every_byte_is_read(original):
    n_read = []
    assert not list(find_faults(str(original), n_read.append))
    n_bytes = sum(path.stat().st_size for path in original.rglob("*") if path.is_file())
    assert sum(n_read) == n_bytes


def test_the_kinds_of_files_are_all_kinds(original):
    assert all((original / key).is_file() for key in KINDS)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_anywhere_is_found(original, data):
    files = sorted(path for path in original.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        result = faults(original)
    finally:
        path.write_bytes(whole)
    assert [fault.split(":")[0] for fault in result] == [path.relative_to(original).as_posix()]


@pytest.mark.parametrize("key", KINDS)
def test_missing_truncated_empty_and_foreign_objects(store, key):
    path = store / key
    whole = path.read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(part)
        assert [fault.split(":")[0] for fault in faults(store)] == [key]
    path.write_bytes(whole)
    foreign = path.with_name(f"{path.name}.abc.partial")
    foreign.write_bytes(whole)
    assert faults(store) == [f"{key}.abc.partial: it does not belong to the store"]
    foreign.unlink()
    assert not faults(store)
    path.unlink()
    done = run_verify(store)
    assert done.exit_code == 1
    assert key == "zarr.json" or f"{key}: it " in done.output


def test_swapped_objects(store):
    first, second = (store / f"train/activations/{HOOK}/c/{i}/0/0" for i in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert [fault.split(":")[0] for fault in faults(store)] == [f"train/activations/{HOOK}/c/{i}/0/0" for i in (0, 1)]
    done = run_verify(store)
    assert done.exit_code == 1
    assert "is damaged: 2 faults, named above" in done.output


COUNTS = {
    "train": {"sequences": 5, "tokens": 19, "documents": 4},
    "eval": {"sequences": 3, "tokens": 12, "documents": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoilt, message",
    [
        ({"rows": {"lengths": np.array([5, 0, 5], np.int32)}}, "eval/lengths: a length is not in 1 to 5"),
        ({"rows": {"lengths": np.array([5, 1, 5], np.int32)}}, "eval/lengths: they come to 11 tokens, the manifest"),
        ({"rows": {"tokens": np.full((3, LENGTH), 9, np.int32)}}, "eval/tokens: an id is negative, or not the pad"),
        ({"rows": {"documents": np.array([20, 20, 12])}}, "eval/documents: the numbers are negative or fall"),
        ({"rows": {"documents": np.array([12, 12, 20])}}, "eval/documents: document 12 lies in train, too"),
        ({"rows": {"starts": np.array([5, 5, 0], np.int32)}}, "eval/starts: a start is negative, or not after"),
        ({"counts": COUNTS | {"eval": COUNTS["eval"] | {"documents": 3}}}, "eval/documents: 2, the manifest says 3"),
        ({"files": {CONFIG: b"{"}}, f"{CONFIG}: it cannot be loaded"),
        ({"files": {WEIGHTS: b"\x08\0\0\0\0\0\0\0{}"}}, f"{WEIGHTS}: it cannot be loaded"),
        ({"files": {WEIGHTS: save({"w": np.zeros(2, np.float16)})}}, f"{WEIGHTS}: it cannot be loaded"),
        ({"unnamed": (CONFIG,)}, f"{CONFIG}: it does not belong to the store"),
        ({"tails": {}}, "zarr.json: the manifest does not say whether"),
    ],
)
def test_a_store_that_was_written_wrongly(tmp_path, spoilt, message):
    assert any(fault.startswith(message) for fault in faults(make(tmp_path / "a.zarr", **spoilt)))


@pytest.mark.parametrize(
    "codec, place, value, message",
    [
        ("float16", (1, 0, 0), np.inf, "it holds NaN or infinity"),
        ("bfloat16", (1, 1, 2), 0x7F80, "it holds NaN or infinity"),
        ("int8", (1, 0, slice(WIDTH, None)), np.frombuffer(np.float32(np.nan), np.int8), "it holds NaN or infinity"),
        ("compact", (1, 4, 0), 1, "it is not zero beyond a sequence's length"),
    ],
)
def test_values_that_cannot_be(tmp_path, monkeypatch, codec, place, value, message):
    """As a writer without its checks would have stored them: the digests fit."""
    real = zarr.Array.__setitem__

    def spoiling(array, where, block) -> None:
        if array.path == f"train/activations/{HOOK}" and where.start == 0:
            block[place] = value
        real(array, where, block)

    monkeypatch.setattr(zarr.Array, "__setitem__", spoiling)
    assert faults(make(tmp_path / "a.zarr", codec)) == [f"train/activations/{HOOK}/c/0/0/0: {message}"]


def test_no_store_and_an_unfinished_one(store, tmp_path):
    done = run_verify(tmp_path / "none.zarr")
    assert (done.exit_code, "No activation store at" in done.output) == (1, True)
    manifest = open_store(store).manifest
    (store / "zarr.json").write_bytes(replace(manifest, state="harvesting").root_metadata())
    done = run_verify(store)
    assert (done.exit_code, "is unfinished" in done.output) == (1, True)
    assert set(SPLITS) < {path.name for path in store.iterdir()}
