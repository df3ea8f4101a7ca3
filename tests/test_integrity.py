"""Promise: no byte of a store is used before it is checked, and only in the place it was written for."""

import base64
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_store as toy

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store import integrity
from tcsae.shared.store.copy import copy_store
from tcsae.shared.store.format import HARVESTING, SPLITS
from tcsae.shared.store.integrity import CHECKSUMS, CHECKSUMS_METADATA
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import Store, open_store
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

GOLDEN = Path(__file__).parent / "golden" / "store-v1.zarr"


def without_trailers(path: Path) -> Path:
    """As a store that was sealed before the crc32c were recorded: the attribute is not there."""
    file = path / CHECKSUMS_METADATA
    file.write_text(file.read_text().replace(json.loads(file.read_text())["attributes"]["crc32c"], ""))
    metadata = json.loads(file.read_text())
    metadata["attributes"] = {}
    file.write_text(json.dumps(metadata))
    manifest = open_store(path).manifest
    digest = LocalObjects(str(path)).read_digest(CHECKSUMS_METADATA)[0]
    (path / "zarr.json").write_bytes(replace(manifest, checksums_metadata=digest).root_metadata())
    return path


@pytest.fixture(scope="module", params=["float16", "compact", "without crc32c"])
def original(request, tmp_path_factory) -> Path:
    codec = request.param if request.param != "without crc32c" else "float16"
    path = toy.make(tmp_path_factory.mktemp("integrity") / "a.zarr", codec)
    return without_trailers(path) if request.param == "without crc32c" else path


def use_everything(store: Store) -> None:
    """Every way in which bytes of a store are used."""
    for path in store.manifest.arrays():
        store.values(path)
    for name in SPLITS:
        split = store.split(name)
        split.read(toy.HOOK, 0, split.n_sequences)
        split.read(toy.HOOK, 1, 2)
        for values in (split.tokens, split.lengths, split.documents, split.starts):
            assert len(values) == split.n_sequences
        split.decoder(toy.HOOK)
    store.tail_path(toy.HOOK)
    assert store.tokenizer_path


def damaged(fault: str, path: Path, key: str) -> bytes | None:
    """The bytes of an object with a fault; None: it is missing."""
    data = (path / key).read_bytes()
    if fault == "a flipped bit":
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    if fault == "another object's":  # of the same kind, whole in itself
        kind = Path(key).suffix
        others = (one for one in sorted(path.rglob("*")) if one.is_file() and one.suffix == kind)
        return next(other for one in others if (other := one.read_bytes()) != data) if kind != ".safetensors" else b"x"
    return {"cut": data[:-1], "longer": data + b"\0", "empty": b"", "missing": None}[fault]


FAULTS = ("a flipped bit", "cut", "longer", "empty", "another object's", "missing")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_object_is_at_fault_is_named_in_place_of_being_used(original, fault):
    use_everything(open_store(original))
    groups = {f"{group}/zarr.json" for group in open_store(original).manifest.groups()}  # which hold nothing
    keys = [*open_store(original).manifest.objects(), CHECKSUMS, CHECKSUMS_METADATA]
    for key in keys:
        if key in groups:
            continue
        data = (original / key).read_bytes()
        faulty = damaged(fault, original, key)
        (original / key).unlink()
        if faulty is not None:
            (original / key).write_bytes(faulty)
        try:
            with pytest.raises(StoreError) as caught:
                use_everything(open_store(original))
        finally:
            (original / key).write_bytes(data)
        assert str(original) in str(caught.value)
        assert key.removesuffix("/zarr.json").split("/c/")[0] in str(caught.value), (key, caught.value)
    use_everything(open_store(original))


def swap(path: Path, first: str, second: str) -> None:
    one, other = (path / key for key in (first, second))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("split, hook", [("train", toy.HOOK), ("eval", toy.HOOK)])
def test_two_chunks_that_were_swapped_are_refused_by_the_loader(original, tmp_path, split, hook):
    path = Path(shutil.copytree(original, tmp_path / "a.zarr"))
    swap(path, *(f"{split}/activations/{hook}/c/{i}/0/0" for i in (0, 1)))
    with pytest.raises(StoreError, match=r"c/[01]/0/0 is damaged: it is not what was written under this name"):
        open_store(path).split(split).read(hook, 0, 4)
    if split == "train":
        with pytest.raises(StoreError, match="is not what was written under this name"):
            next(iter(SegmentLoader(open_store(path), DataConfig(n_segments=4, segment_length=2, skip_first=0))))


def test_swapped_chunks_of_version_1(tmp_path):
    path = Path(shutil.copytree(GOLDEN, tmp_path / "a.zarr"))
    hook = open_store(path).hooks[0]
    swap(path, *(f"train/activations/{hook}/c/{i}/0/0" for i in (0, 1)))
    with pytest.raises(StoreError, match="c/0/0/0 is damaged: it is not what was written under this name"):
        open_store(path).train.read(hook, 0, 2)


def test_the_recorded_crc32c_are_those_of_the_chunks(tmp_path):
    path = toy.make(tmp_path / "a.zarr", "float16")
    manifest = open_store(path).manifest
    recorded = json.loads((path / CHECKSUMS_METADATA).read_text())["attributes"]["crc32c"]
    trailers = np.frombuffer(base64.b64decode(recorded), "<u4")
    for key, trailer in zip(manifest.objects(), trailers, strict=True):
        is_chunk = "/c/" in key
        assert trailer == (int.from_bytes((path / key).read_bytes()[-4:], "little") if is_chunk else 0), key


def test_a_chunk_without_a_recorded_crc32c_is_hashed_once_in_a_process(tmp_path, monkeypatch):
    store = open_store(without_trailers(toy.make(tmp_path / "a.zarr", "float16")))
    store.digests  # noqa: B018
    n_hashed, real = [0], integrity.hashlib.sha256

    def counted(*data):
        n_hashed[0] += 1
        return real(*data)

    monkeypatch.setattr(integrity.hashlib, "sha256", counted)
    store.train.read(toy.HOOK, 0, 4)
    first = n_hashed[0]
    store.train.read(toy.HOOK, 0, 4)
    assert (first > 0, n_hashed[0]) == (True, first)


def test_reading_while_the_store_is_extended_says_so(tmp_path):
    path = toy.make(tmp_path / "a.zarr", "float16")
    store = open_store(path)
    store.train.read(toy.HOOK, 0, 2)
    (path / f"train/activations/{toy.HOOK}/c/2/0/0").unlink()
    (path / "zarr.json").write_bytes(replace(store.manifest, state=HARVESTING).root_metadata())
    with pytest.raises(StoreError, match="is being extended or made anew since it was opened"):
        store.train.read(toy.HOOK, 4, 5)
    history = ({"n_tokens": 40},)
    recipe = replace(store.manifest.recipe, n_tokens=90)
    grown = replace(store.manifest, state=HARVESTING, history=history, recipe=recipe)
    (path / "zarr.json").write_bytes(grown.root_metadata())
    with pytest.raises(StoreError, match="is being extended from 40 to 90 tokens and is unfinished"):
        open_store(path)


@pytest.fixture
def zipped(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    copy_store(str(toy.make(tmp_path / "a.zarr", "float16")), str(tmp_path / "a.zip"), lambda n: None)  # noqa: ARG005
    return tmp_path / "a.zip"


@pytest.mark.parametrize("poison", [b"poison", b"", None])
@pytest.mark.parametrize("key", [toy.WEIGHTS, toy.CONFIG, "tokenizer/tokenizer.json"])
def test_what_lies_in_the_cache_is_checked_and_replaced(zipped, tmp_path, key, poison):
    def folder() -> Path:
        store = open_store(zipped)
        return store.tail_path(toy.HOOK) if key.startswith("tail") else store.tokenizer_path

    file = folder() / Path(key).name
    data = file.read_bytes()
    assert (tmp_path / "cache") in file.parents
    if poison is None:
        file.unlink()
    else:
        file.write_bytes(poison)
    assert (folder() / file.name).read_bytes() == data == (tmp_path / "a.zarr" / key).read_bytes()


@pytest.mark.parametrize("place", ["local", "cache"])
def test_a_file_that_is_none_of_the_store_s_is_not_loaded_with_it(zipped, tmp_path, place):
    """transformers would read it: more weights, or code."""
    location = zipped if place == "cache" else tmp_path / "a.zarr"
    (open_store(location).tail_path(toy.HOOK) / "generation_config.json").write_text("{}")
    with pytest.raises(StoreError, match="generation_config.json does not belong to the store. Move it away"):
        open_store(location).tail_path(toy.HOOK)


def test_processes_that_fill_a_cache_together_neither_race_nor_delete_it(zipped):
    n = 8
    barrier, outcomes = threading.Barrier(n), []

    def rank() -> None:
        try:
            store = open_store(zipped)
            barrier.wait()
            folder = store.tail_path(toy.HOOK)
            inodes = [folder.stat().st_ino for _ in range(20) if (folder / "config.json").read_bytes()]
            outcomes.append(len(set(inodes)))
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=rank) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [1] * n
