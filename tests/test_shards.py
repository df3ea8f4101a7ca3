"""Promise: the model runs in whole batches, however wide its activations are, and the chunks stay about 4 MiB."""

import dataclasses
import json

import numpy as np
import pytest
import toy_harvest as toy
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoXConfig

from tcsae.harvest.capture import Capture
from tcsae.harvest.run import HarvestConfig, harvest
from tcsae.shared.store import format as layout
from tcsae.shared.store.format import (
    CorpusRecipe,
    HookRecipe,
    Layout,
    Manifest,
    ModelRecipe,
    Recipe,
    SequenceRecipe,
    chunks_of,
    layout_for,
    manifest_from_json,
    shards_of,
)
from tcsae.shared.store.reader import open_store

WIDTH, LENGTH, BATCH = 128, 32, 8


def recipe_of(widths: list[int], batch: int, length: int = 128, codec: str = "float16") -> Recipe:
    return Recipe(
        model=ModelRecipe(name="m", revision="r", batch_size=batch),
        corpus=CorpusRecipe(name="c", revision="r"),
        sequences=SequenceRecipe(length=length),
        hooks=tuple(HookRecipe(requested=f"h{i}", canonical=f"h{i}", d_model=d) for i, d in enumerate(widths)),
        codec=codec,
        n_tokens=1,
    )


@pytest.mark.parametrize(
    "widths, batch, per_chunk, chunks",
    [
        ([128], 32, 128, 2),
        ([512], 32, 32, 8),  # Pythia-70m
        ([4096], 32, 4, 16),  # two batches, which are 128 MiB of float32
        ([4096] * 3, 32, 4, 8),
        ([20_000], 32, 1, 32),
        ([512], 0, 32, 1),  # of create_store: no model runs
    ],
)
def test_chunks_follow_the_width_and_shards_the_batch(widths, batch, per_chunk, chunks):
    result = layout_for(recipe_of(widths, batch))
    assert (result.sequences_per_chunk, result.chunks_per_shard) == (per_chunk, chunks)


@given(
    st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
    st.integers(1, 300),
    st.sampled_from([1, 7, 128, 1024]),
    st.sampled_from(["float16", "float32", "int8", "compact"]),
)
def test_a_shard_holds_a_batch_and_memory_is_bounded(widths, batch, length, codec):
    result = layout_for(recipe_of(widths, batch, length, codec))
    n, per_chunk = result.sequences_per_shard, result.sequences_per_chunk
    assert n > batch - per_chunk or result.chunks_per_shard == 1, "a whole batch, but for what no chunk fits into"
    assert n >= min(batch, per_chunk)
    per_sequence = length * sum(widths) * 4
    assert n <= per_chunk or n * per_sequence <= max(layout.SHARD_BYTES, batch * per_sequence)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_shards_and_chunks_cut_the_sequences_once(n_train, n_eval, per_chunk, chunks):
    counts = {"train": {"sequences": n_train}, "eval": {"sequences": n_eval}}
    cut = Layout(sequences_per_chunk=per_chunk, chunks_per_shard=chunks)
    manifest = Manifest(state="harvesting", recipe=recipe_of([4], 2), layout=cut, counts=counts)
    seen: dict[str, list[int]] = {"train": [], "eval": []}
    numbers: dict[str, list[int]] = {"train": [], "eval": []}
    for shard in shards_of(manifest):
        for chunk in chunks_of(shard, cut):
            rows = range(shard.stop - shard.start)[chunk.rows]
            seen[shard.split] += [shard.start + row for row in rows]
            numbers[shard.split].append(chunk.number)
            assert shard.start + rows[0] == chunk.number * per_chunk
    for split, n in (("train", n_train), ("eval", n_eval)):
        assert seen[split] == list(range(n))
        assert numbers[split] == list(range(-(-n // per_chunk)))


@pytest.fixture(scope="module")
def wide(make_lm, tiny_corpus, tmp_path_factory) -> HarvestConfig:
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.run import ModelChoice

    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = make_lm(tmp_path_factory.mktemp("models") / "wide", config)
    return HarvestConfig(
        model=ModelChoice(name=str(folder), batch_size=BATCH),
        corpus=CorpusChoice(name=str(tiny_corpus)),
        sequences=SequenceRecipe(length=LENGTH, eval_every=4),
        hooks=("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"),
        n_tokens=3000,
    )


@pytest.fixture
def narrow_chunks(monkeypatch):
    """Of two sequences, as those of 4 MiB are at width 8192."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2 * LENGTH * WIDTH * 2)
    monkeypatch.setattr(layout, "SHARD_BATCHES", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_chunks")
def test_a_wide_model_runs_in_whole_batches(wide, tmp_path, monkeypatch):
    shapes: list[tuple[int, int]] = []
    batch = Capture._batch
    monkeypatch.setattr(Capture, "_batch", lambda self, ids: (shapes.append(ids.shape), batch(self, ids))[1])
    store = harvest(str(tmp_path / "store.zarr"), wide)
    assert store.manifest.layout == Layout(sequences_per_chunk=2, chunks_per_shard=4 * BATCH // 2)
    shapes = shapes[2:]  # without the two of the probe
    n_full = sum(split.n_sequences // (4 * BATCH) for split in (store.train, store.eval))
    assert n_full >= 2 and sum(n == BATCH for n, _ in shapes) >= 4 * n_full, "all batches of a full shard"
    assert len(shapes) == sum(-(-split.n_sequences // BATCH) for split in (store.train, store.eval)), "as few as can be"
    in_order = 0
    for split in (store.train, store.eval):
        parts = np.split(split.lengths, range(BATCH, split.n_sequences, BATCH))
        in_order += sum(len(part) * int(part.max()) for part in parts)
    n_tokens = store.train.n_tokens + store.eval.n_tokens
    assert n_tokens <= sum(n * longest for n, longest in shapes) < in_order, "short ones together"
    keys = {key for key in store.manifest.objects() if key.startswith("train/activations/blocks.0.hook_resid_post/c/")}
    assert len(keys) == -(-store.train.n_sequences // 2)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_chunks")
@pytest.mark.parametrize("codec", [pytest.param("float16", marks=pytest.mark.slow), "compact"])
def test_killed_between_the_chunks_of_a_shard_and_extended(wide, tmp_path, monkeypatch, codec):
    for module in ("store.writer", "store.extend"):
        monkeypatch.setattr(f"tcsae.shared.{module}.FIT_TOKENS", 512)
    config = dataclasses.replace(wide, codec=codec)
    at_once = tmp_path / "at-once.zarr"
    harvest(str(at_once), config)
    location = tmp_path / "store.zarr"
    some = dataclasses.replace(config, n_tokens=1500)
    # 16 chunks of each hook are a shard: in its first, in the middle, before and after its record.
    deaths = [("/train/activations", 3, False), ("/train/activations", 23, True), ("journal/train-", 1, True)]
    for key, number, early in [*deaths, ("journal/train-", 1, False), ("/eval/activations", 2, False)]:
        assert toy.harvest_in_child(location, some, number, key, early) == 9, (key, number)
    before = harvest(str(location), some)
    per_shard = before.manifest.layout.sequences_per_shard
    assert before.train.n_sequences % per_shard and before.train.n_sequences > per_shard
    first = location / "train/activations/blocks.0.hook_resid_post/c/0/0/0"
    written = first.stat().st_mtime_ns
    harvest(str(location), config)
    assert first.stat().st_mtime_ns == written, "of a full shard: kept"
    assert toy.files(location) == toy.files(at_once)
    assert toy.traces(location) == []


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_chunks")
def test_a_store_that_does_not_say_so_has_one_chunk_a_shard(wide, tmp_path):
    location = tmp_path / "store.zarr"
    harvest(str(location), wide)
    values = json.loads((location / "zarr.json").read_text())["attributes"]["tcsae"]
    del values["layout"]["chunks_per_shard"]
    assert manifest_from_json(values).layout == Layout(sequences_per_chunk=2, chunks_per_shard=1)
    (location / "zarr.json").write_bytes(manifest_from_json(values).root_metadata())
    store = open_store(location)
    assert store.manifest.layout.sequences_per_shard == 2 and store.train.read(wide.hooks[0], 0, 5).any()
