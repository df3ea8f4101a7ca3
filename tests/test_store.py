"""Promise: a store gives back what was put in, whole or not at all, and says what is wrong with it."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.shared.base.errors import DataError, StoreError
from tcsae.shared.store.format import (
    N_NORM_BINS,
    SPLITS,
    CorpusRecipe,
    HookRecipe,
    Layout,
    ModelRecipe,
    Recipe,
    SequenceRecipe,
    content_digest,
    is_intact,
    partial_sums,
)
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.writer import Rows, StoreWriter, open_writer

HOOK, LENGTH, WIDTH = "blocks.4.hook_resid_post", 6, 5
GOLDEN = Path(__file__).parent / "golden" / "store-v1.zarr"
LAYOUT = Layout(sequences_per_chunk=2, sequences_per_token_chunk=4)


def recipe(**changes) -> Recipe:
    return Recipe(
        **{
            "model": ModelRecipe(name="toy", revision="1"),
            "corpus": CorpusRecipe(name="numbers", revision="1"),
            "sequences": SequenceRecipe(length=LENGTH),
            "hooks": (HookRecipe(requested=HOOK, canonical="blocks.4.hook_out", d_model=WIDTH),),
            "n_tokens": 100,
        }
        | changes
    )


def rows(n: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, n).astype(np.int32)
    tokens = np.where(np.arange(LENGTH) < lengths[:, None], rng.integers(1, 50, (n, LENGTH)), 0).astype(np.int32)
    return Rows(tokens, lengths, np.arange(n, dtype=np.int64) + seed, np.zeros(n, np.int32))


def activations(shard) -> np.ndarray:
    """What a model would give: a function of the place alone."""
    place = np.arange(shard.start, shard.stop)[:, None, None] * 1000 + np.arange(LENGTH * WIDTH).reshape(LENGTH, WIDTH)
    return np.sin(place + (shard.split == "eval")).astype(np.float32)


def counts(writer: StoreWriter) -> dict:
    return {s: {"sequences": writer.progress["n_sequences"][s], "tokens": 0, "documents": 0} for s in SPLITS}


def write(path: Path, n: dict[str, int], **changes) -> StoreWriter:
    writer = open_writer(str(path), recipe(**changes), LAYOUT)
    writer.commit({split: rows(n[split], 7) for split in SPLITS}, {})
    writer.finish_sequences(counts(writer))
    for shard in writer.missing_shards():
        writer.write_shard(shard, {HOOK: activations(shard)})
    return writer


def sealed(path: Path, n: dict[str, int] | None = None, **changes) -> Path:
    writer = write(path, n or {"train": 5, "eval": 3}, **changes)
    writer.seal({HOOK: {"none": "toy"}}, [], {})
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_rows_come_back_however_they_were_committed(tmp_path_factory, commits):
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    writer = open_writer(str(path), recipe(), LAYOUT)
    put: dict[str, list[Rows]] = {"train": [], "eval": []}
    for number, n in enumerate(commits):
        for split, count in zip(SPLITS, n, strict=True):
            put[split].append(rows(count, number))
        writer.commit({split: put[split][-1] for split in SPLITS}, {"commits": number})
    writer.finish_sequences(counts(writer))
    for shard in writer.missing_shards():
        writer.write_shard(shard, {HOOK: activations(shard)})
    writer.seal({}, [], {})
    store = open_store(path)
    for split in SPLITS:
        got = store.split(split)
        for name in ("tokens", "lengths", "documents", "starts"):
            expected = np.concatenate([getattr(one, name) for one in put[split]])
            np.testing.assert_array_equal(getattr(got, name), expected)
            assert getattr(got, name).dtype == expected.dtype
        if got.n_sequences:
            values = got.read(HOOK, 0, got.n_sequences)
            assert values.dtype == np.float32
            assert got.read_stored(HOOK, 0, 1).dtype == np.float16
            valid = np.arange(LENGTH) < got.lengths[:, None]
            assert not values[~valid].any()
            assert np.isfinite(values).all()


def test_activations_and_statistics(tmp_path):
    store = open_store(sealed(tmp_path / "a.zarr"))
    assert store.hooks == (HOOK,)
    assert store.d_model(HOOK) == WIDTH
    writer_like = [type("S", (), {"start": 0, "stop": 5, "split": "train"})]
    values = np.concatenate([activations(shard) for shard in writer_like])
    valid = np.arange(LENGTH) < store.train.lengths[:, None]
    np.testing.assert_array_equal(store.train.read(HOOK, 1, 4), np.where(valid[..., None], values, 0)[1:4].astype("f2"))
    x = values[valid].astype(np.float64)
    np.testing.assert_allclose(store.array(f"statistics/{HOOK}/mean")[:], x.mean(0), atol=1e-12)
    np.testing.assert_allclose(store.array(f"statistics/{HOOK}/variance")[:], x.var(0), atol=1e-12)
    histogram = store.array(f"statistics/{HOOK}/norm_histogram")[:]
    edges = np.concatenate([[0], 2.0 ** (np.arange(N_NORM_BINS - 1) / 8 - 20), [np.inf]])
    np.testing.assert_array_equal(histogram, np.histogram(np.linalg.norm(x, axis=1), edges)[0])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_partial_sums_add_up(sizes, seed):
    x = np.random.default_rng(seed).normal(size=(sum(sizes), 3)).astype(np.float32)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    np.testing.assert_allclose(sum(map(partial_sums, parts)), partial_sums(x), rtol=1e-12)


def test_manifest_lists_and_digests_every_object(tmp_path):
    path = sealed(tmp_path / "a.zarr")
    store = open_store(path)
    files = set(contents(path)) - {"zarr.json"}
    assert {name for name in files if not name.startswith("checksums/")} == set(store.manifest.objects())
    checksums = store.array("checksums")[:]
    assert store.content == content_digest(checksums.tobytes())
    import hashlib

    for key, digest in zip(store.manifest.objects(), checksums, strict=True):
        assert hashlib.sha256((path / key).read_bytes()).digest() == digest.tobytes(), key
    assert is_intact(json.loads((path / "zarr.json").read_text())["attributes"]["tcsae"])


def test_plain_zarr_reads_it(tmp_path):
    group = zarr.open_group(sealed(tmp_path / "a.zarr"), mode="r")
    assert group["train/tokens"].shape == (5, LENGTH)
    assert group[f"eval/activations/{HOOK}"][:].shape == (3, LENGTH, WIDTH)


class KilledError(BaseException):
    pass


@pytest.mark.slow
def test_killed_before_any_write_and_started_again_it_is_the_same_store(tmp_path, monkeypatch):
    """Stop before the i-th durable write of each life, for all i, and go on: every byte as if never stopped."""
    import tcsae.shared.base.files as files

    n = {"train": 5, "eval": 2}
    whole = contents(sealed(tmp_path / "whole.zarr", n))
    real, left = files.write_atomic, [0]

    def mortal(path, data):
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        real(path, data)

    for module in ("base.files", "store.places.local"):
        monkeypatch.setattr(f"tcsae.shared.{module}.write_atomic", mortal)

    def live(path: Path) -> bool:
        writer = open_writer(str(path), recipe(), LAYOUT)
        if writer is None:
            return True
        try:
            if not writer.planned:
                if not writer.progress:
                    writer.commit({split: rows(n[split], 7) for split in SPLITS}, {})
                writer.finish_sequences(counts(writer))
            for shard in writer.missing_shards():
                writer.write_shard(shard, {HOOK: activations(shard)})
            writer.seal({HOOK: {"none": "toy"}}, [], {})
        except KilledError:
            writer._journal.release()  # as the end of a process does
            return False
        return True

    for step in (1, 2, 5, 11):
        path, lives = tmp_path / f"{step}.zarr", 0
        done = False
        while not done:
            # Each life gets a bit further than the last: a commit of many objects has to be survivable at last.
            left[0], lives = step + lives, lives + 1
            with contextlib.suppress(KilledError):
                done = live(path)
            assert lives < 200
        assert lives > 2
        assert contents(path) == whole


def test_leftovers_are_swept(tmp_path):
    path = tmp_path / "a.zarr"
    writer = write(path, {"train": 2, "eval": 2})
    (path / "train" / "tokens" / "zarr.json.abc.partial").write_text("torn")
    writer._journal.release()
    open_writer(str(path), recipe()).seal({}, [], {})
    names = set(contents(path))
    assert not any("partial" in name or "journal" in name or name == "harvest.lock" for name in names), names


@pytest.mark.slow
def test_a_second_writer_is_refused(tmp_path):
    location = str(tmp_path / "a.zarr")
    writer = open_writer(location, recipe())
    program = (
        f"import tcsae.shared.store.journal as j, tcsae.shared.store.places as o; j.Journal(o.objects_at({location!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert f"LockedError: Another process harvests into {location}" in done.stderr
    writer.close()


def test_another_recipe_is_refused_by_name(tmp_path):
    path = sealed(tmp_path / "a.zarr")
    assert open_writer(str(path), recipe()) is None
    with pytest.raises(StoreError, match=r"n_tokens: 100, not 200"):
        open_writer(str(path), recipe(n_tokens=200))
    with pytest.raises(StoreError, match=r"sequences.length: 6, not 9"):
        open_writer(str(path), recipe(sequences=SequenceRecipe(length=9)))


def test_values_that_cannot_be_stored(tmp_path):
    writer = open_writer(str(tmp_path / "a.zarr"), recipe(), LAYOUT)
    full = Rows(np.ones((3, LENGTH), np.int32), np.full(3, LENGTH, np.int32), np.arange(3), np.zeros(3, np.int32))
    writer.commit({"train": full, "eval": full}, {})
    writer.finish_sequences(counts(writer))
    shard = writer.missing_shards()[1]
    values = activations(shard)
    values[0, 4, 1] = np.nan
    with pytest.raises(DataError, match=rf"{HOOK} is NaN or infinite at train sequence 2, position 4"):
        writer.write_shard(shard, {HOOK: values})
    values[0, 4, 1] = 1e5
    with pytest.raises(DataError, match=r"1e\+05 exceeds float16's 6.55e\+04. Harvest with --codec float32"):
        writer.write_shard(shard, {HOOK: values})
    assert len(writer.missing_shards()) == 4
    writer.close()


def test_garbage_beyond_a_length_is_not_stored(tmp_path):
    writer = open_writer(str(tmp_path / "a.zarr"), recipe(), LAYOUT)
    short = Rows(np.ones((1, LENGTH), np.int32), np.full(1, 2, np.int32), np.zeros(1, np.int64), np.zeros(1, np.int32))
    writer.commit({"train": short, "eval": short}, {})
    writer.finish_sequences(counts(writer))
    for shard in writer.missing_shards():
        values = activations(shard)
        values[:, 2:] = np.nan
        writer.write_shard(shard, {HOOK: values})
    writer.seal({}, [], {})
    assert not open_store(tmp_path / "a.zarr").train.read(HOOK, 0, 1)[0, 2:].any()


def test_seal_names_a_missing_shard(tmp_path):
    writer = open_writer(str(tmp_path / "a.zarr"), recipe(), LAYOUT)
    writer.commit({split: rows(3, 1) for split in SPLITS}, {})
    writer.finish_sequences(counts(writer))
    with pytest.raises(StoreError, match="lacks 4 shards, first train-00000000"):
        writer.seal({}, [], {})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda a: a.update(format="other"), "has format 'other'; this program reads 'tcsae-activations'"),
        (lambda a: a.update(version=99), "has version 99; this program reads up to 3. Update tcsae"),
        (lambda a: a["counts"]["train"].update(tokens=1), "manifest in zarr.json is damaged"),
        (lambda a: a.clear(), "has format None"),
    ],
)
def test_foreign_newer_and_damaged_manifests(tmp_path, spoil, message):
    path = sealed(tmp_path / "a.zarr")
    root = json.loads((path / "zarr.json").read_text())
    spoil(root["attributes"]["tcsae"])
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match=message):
        open_store(path)


def test_missing_unfinished_and_foreign_folders(tmp_path):
    with pytest.raises(StoreError, match=r"No activation store at .*Make one"):
        open_store(tmp_path / "none.zarr")
    write(tmp_path / "half.zarr", {"train": 1, "eval": 1}).close()
    with pytest.raises(StoreError, match=r"is unfinished. Start the same harvest again"):
        open_store(tmp_path / "half.zarr")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is not an activation store"):
        open_store(tmp_path / "other")
    with pytest.raises(StoreError, match=r"'s3://' names no bucket. Write s3://NAME/PATH"):
        open_store("s3://")
    with pytest.raises(StoreError, match=r"Unknown hook 'blocks.4.hook_resid_pos'. Did you mean 'blocks.4.hook_resid"):
        open_store(sealed(tmp_path / "a.zarr")).hook("blocks.4.hook_resid_pos")


def test_damaged_and_missing_chunks_are_refused(tmp_path):
    path = sealed(tmp_path / "a.zarr")
    chunk = path / "train" / "activations" / HOOK / "c" / "1" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    store = open_store(path)
    store.train.read(HOOK, 0, 2)
    with pytest.raises(StoreError, match=rf"train/activations/{HOOK}/c/1/0/0 is damaged: its checksum does not fit"):
        store.train.read(HOOK, 2, 4)
    with pytest.raises(StoreError, match=rf"train/activations/{HOOK}, sequences 1..2: damaged"):
        store.train.read(HOOK, 1, 3)  # not along chunks: through Zarr
    chunk.write_bytes(data[:-9])
    with pytest.raises(StoreError, match=r"/c/1/0/0 is damaged: it is not 124 bytes long"):
        store.train.read(HOOK, 2, 4)
    chunk.unlink()
    with pytest.raises(StoreError, match=r"/c/1/0/0 cannot be read \(No such file"):
        store.train.read(HOOK, 2, 4)
    with pytest.raises(StoreError, match=r"sequences 1..2: a chunk is missing"):
        store.train.read(HOOK, 1, 3)
    shutil.rmtree(path / "eval" / "tokens")
    with pytest.raises(StoreError, match="has no eval/tokens: it is damaged"):
        _ = store.eval.tokens


@given(st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_both_reading_paths_agree(golden, start, n):
    stop = min(start + n, 5)
    array = golden.array(f"train/activations/{HOOK}")
    np.testing.assert_array_equal(golden.train.read_stored(HOOK, start, stop), array[start:stop])
    out = np.full((max(stop - start, 0), LENGTH, WIDTH), 7, np.float16)
    assert golden.train.read_stored(HOOK, start, stop, out) is out
    np.testing.assert_array_equal(out, array[start:stop])


@pytest.fixture(scope="module")
def golden():
    return open_store(GOLDEN)


def test_golden_store_of_version_1():
    """Written once by version 1 of the format; every later version has to read it. Never made again."""
    store = open_store(GOLDEN)
    assert store.content == "e99492f0bc288ff390a3eade45b3b3befebc50b4934596436e0928da647b8b5c"
    assert (store.train.n_sequences, store.eval.n_sequences, store.sequence_length) == (5, 3, LENGTH)
    expected = rows(5, 7)
    np.testing.assert_array_equal(store.train.tokens, expected.tokens)
    np.testing.assert_array_equal(store.train.documents, expected.documents)
    for split, n in (("train", 5), ("eval", 3)):
        shard = type("S", (), {"start": 0, "stop": n, "split": split})
        valid = np.arange(LENGTH) < store.split(split).lengths[:, None]
        np.testing.assert_allclose(
            store.split(split).read(HOOK, 0, n)[valid].astype("f4"), activations(shard)[valid], atol=5e-4
        )
