"""Promise: a sealed store grows to a larger --tokens, and is then what one harvest of that many writes."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_harvest as toy

from tcsae.harvest.run import harvest, plan_harvest
from tcsae.harvest.sequences import budgets
from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.extend import n_retained
from tcsae.shared.store.format import Manifest
from tcsae.shared.store.reader import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    toy.small_steps(monkeypatch, 4, 2)


@pytest.fixture(scope="module")
def short(tiny_config):
    return toy.one_hook(tiny_config)


def made(location: Path, config, **changes) -> Path:
    harvest(str(location), dataclasses.replace(config, **changes))
    return location


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """A store of 3000 tokens, made at once."""
    with pytest.MonkeyPatch.context() as patch:
        toy.small_steps(patch, 4, 2)
        return made(tmp_path_factory.mktemp("whole") / "store.zarr", short)


def test_no_budget_shrinks_as_more_is_asked_for():
    for every in (2, 3, 20, 1000):
        result = [budgets(n, every, 50) for n in range(10, 3000)]
        for split in ("train", "eval"):
            values = [one[split] for one in result]
            assert values == sorted(values)


@pytest.mark.parametrize(
    "n_tokens", [320, pytest.param(1111, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.slow), 2950]
)
def test_an_extended_store_is_the_one_made_at_once(short, whole, tmp_path, monkeypatch, n_tokens, capfd):
    location = made(tmp_path / "store.zarr", short, n_tokens=n_tokens)
    before = open_store(location)
    ran = []
    from tcsae.harvest.capture import Capture

    run = Capture.run
    monkeypatch.setattr(
        Capture, "run", lambda self, tokens, lengths: (ran.append(len(lengths)), run(self, tokens, lengths))[1]
    )
    made(location, short)
    assert f"Extending {location} from {n_tokens:,} to 3,000 tokens." in capfd.readouterr().err
    assert toy.files(location) == toy.files(whole)
    assert toy.traces(location) == []
    after = open_store(location)
    n_full = sum(before.split(split).n_sequences // 4 for split in ("train", "eval"))
    n_shards = sum(-(-after.split(split).n_sequences // 4) for split in ("train", "eval"))
    assert len(ran) - 2 == n_shards - n_full, "new shards only, and the two runs of the probe"
    (entry,) = after.manifest.history
    assert entry["content"] == before.content and entry["n_tokens"] == n_tokens
    assert after.content == open_store(whole).content != before.content


def test_it_can_be_extended_again_and_again(short, whole, tmp_path):
    location = tmp_path / "store.zarr"
    contents = [open_store(made(location, short, n_tokens=n)).content for n in (400, 401, 1500, 3000)]
    assert toy.files(location) == toy.files(whole)
    assert [entry["content"] for entry in open_store(location).manifest.history] == contents[:-1]


def test_sequences_in_place_of_tokens(short, tmp_path):
    at_once = made(tmp_path / "at-once.zarr", short, n_sequences=90)
    store = open_store(at_once)
    assert store.train.n_sequences + store.eval.n_sequences == 90
    assert store.manifest.recipe.n_sequences == 90 and store.manifest.recipe.n_tokens == 90 * 32
    location = made(tmp_path / "store.zarr", short, n_sequences=31)
    made(location, short, n_sequences=90)
    assert toy.files(location) == toy.files(at_once)
    with pytest.raises(StoreError, match="n_sequences: 90, not None"):
        harvest(str(location), dataclasses.replace(short, n_tokens=10_000))


DEATHS = [
    ("journal/kept", 1, True),
    ("journal/sequences", 1, False),
    ("store.zarr/zarr.json", 1, True),
    ("store.zarr/zarr.json", 1, False),
    ("/tokens/", 1, False),
    ("journal/plan", 1, False),
    ("/train/activations", 1, False),
    ("journal/train-", 2, False),
    ("journal/eval-", 1, True),
    ("/tail/", 1, False),
    ("/statistics/", 4, False),
    ("/checksums/", 1, False),
    ("store.zarr/zarr.json", 1, True),
]


def test_killed_while_it_grows(short, whole, tmp_path):
    location = made(tmp_path / "store.zarr", short, n_tokens=1111)
    before = toy.files(location)
    for i, (key, number, early) in enumerate(DEATHS):
        assert toy.harvest_in_child(location, short, number, key, early) == 9, (key, number)
        if i < 3:
            # Not begun yet as far as readers can see: the old store is whole.
            assert {name: digest for name, digest in toy.files(location).items() if name in before} == before
            assert open_store(location).manifest.recipe.n_tokens == 1111
        else:
            with pytest.raises(StoreError, match="is unfinished. Start the same harvest again"):
                open_store(location)
            with pytest.raises(StoreError, match="n_tokens: 3000, not 1111"):
                made(location, short, n_tokens=1111)
    made(location, short)
    assert toy.files(location) == toy.files(whole)
    assert toy.traces(location) == []
    assert len(open_store(location).manifest.history) == 1


def test_killed_after_new_shards_an_extension_that_kept_none_goes_on(short, tmp_path, monkeypatch):
    """What is cleared away is the time before; a start after the first new shard clears nothing."""
    toy.small_steps(monkeypatch, 32, 8)
    whole = made(tmp_path / "whole.zarr", short)
    location = made(tmp_path / "store.zarr", short, n_tokens=400)
    assert not any(n_retained(open_store(location).manifest).values())
    assert toy.harvest_in_child(location, short, 2, "journal/train-") == 9
    first = location / "train/activations" / toy.RESIDUAL / "c/0/0/0"
    written = first.stat().st_mtime_ns
    made(location, short)
    assert first.stat().st_mtime_ns == written
    assert toy.files(location) == toy.files(whole)


def test_an_extension_that_was_killed_early_is_forgotten_by_the_old_recipe(short, tmp_path):
    location = made(tmp_path / "store.zarr", short, n_tokens=1111)
    before = toy.files(location)
    assert toy.harvest_in_child(location, short, 1, "journal/sequences") == 9
    made(location, short, n_tokens=1111)
    assert toy.files(location) == before and toy.traces(location) == []


@pytest.mark.parametrize("codec", ["compact", "int8"])
@pytest.mark.parametrize("fit_tokens", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_a_codec_with_parameters(short, tmp_path, monkeypatch, codec, fit_tokens):
    """Fitted to the first tokens: chunks are kept if all of these were there before, else nothing is."""
    for module in ("store.writer", "store.extend"):
        monkeypatch.setattr(f"tcsae.shared.{module}.FIT_TOKENS", fit_tokens)
    at_once = made(tmp_path / "at-once.zarr", short, codec=codec)
    location = made(tmp_path / "store.zarr", short, codec=codec, n_tokens=1111)
    first = location / "train/activations" / toy.RESIDUAL / "c/0/0/0"
    written = first.stat().st_mtime_ns  # not the inode: a file system may give a deleted file's to the next one
    made(location, short, codec=codec)
    assert toy.files(location) == toy.files(at_once)
    assert (first.stat().st_mtime_ns == written) == (fit_tokens == 256)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_tokens": 2999}, "n_tokens: 3000, not 2999"),
        ({"n_tokens": 4000, "codec": "float32"}, "codec: 'float16', not 'float32'"),
        ({"n_tokens": 4000, "hooks": (toy.MLP,)}, "hooks.0.requested"),
    ],
)
def test_less_or_something_else_is_refused(short, whole, change, words):
    before = toy.files(whole)
    with pytest.raises(StoreError, match=words):
        made(whole, short, **change)
    assert toy.files(whole) == before


def test_other_versions_read_a_sealed_store_but_do_not_extend_it(short, whole, tmp_path, monkeypatch, capfd):
    location = tmp_path / "store.zarr"
    shutil.copytree(whole, location)
    before, version = toy.files(location), "importlib.metadata.version"
    monkeypatch.setattr(version, lambda name: "0.1" if name == "datasets" else _VERSIONS[name])
    made(location, short)
    said = " ".join(capfd.readouterr().err.split())
    assert "holds this harvest already" in said
    assert f"written with other versions (datasets: '{_VERSIONS['datasets']}', not '0.1')" in said
    with pytest.raises(StoreError, match=r"libraries.datasets: .*, not '0.1'; n_tokens: 3000, not 4000"):
        made(location, short, n_tokens=4000)
    assert toy.files(location) == before


def test_a_text_at_its_end_adds_nothing(short, tmp_path):
    location = made(tmp_path / "store.zarr", short, n_tokens=50_000)
    before = toy.files(location)
    made(location, short, n_tokens=60_000)
    after = toy.files(location)
    assert {k: v for k, v in before.items() if k != "manifest"} == {k: v for k, v in after.items() if k != "manifest"}
    assert toy.files(made(tmp_path / "at-once.zarr", short, n_tokens=60_000)) == after


def test_without_room_the_sealed_store_stays_sealed(short, tmp_path, monkeypatch):
    location = made(tmp_path / "store.zarr", short, n_tokens=1111)
    before = toy.files(location)
    monkeypatch.setattr("tcsae.harvest.cost.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="more and its disk has 1KB. Make room, ask for fewer --tokens.*--force"):
        made(location, short)
    assert toy.files(location) == before
    with pytest.raises(StoreError, match="is sealed, there is nothing to plan"):
        plan_harvest(str(location), short)
    assert open_store(location).manifest.state == "sealed"


def test_a_store_from_before_this_was_recorded_reads_its_text_anew(short, whole, tmp_path):
    """Its counts do not say where the first split was full: sequences are made from the first document on."""
    from tcsae.shared.store.format import manifest_from_json

    location = made(tmp_path / "store.zarr", short, n_tokens=1111)
    root = json.loads((location / "zarr.json").read_text())
    manifest: Manifest = manifest_from_json(root["attributes"]["tcsae"])
    assert sum(n_retained(manifest).values()) > 5 and not any(
        n_retained(dataclasses.replace(manifest, version=1)).values()
    )
    del manifest.counts["first_full"]
    (location / "zarr.json").write_bytes(manifest.root_metadata())
    made(location, short)
    assert toy.files(location) == toy.files(whole)


def _versions() -> dict[str, str]:
    import importlib.metadata

    from tcsae.harvest.resolve import LIBRARIES

    return {name: importlib.metadata.version(name) for name in LIBRARIES}


_VERSIONS = _versions()
