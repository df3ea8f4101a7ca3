"""Promise: every valid token once an epoch, in an order that is a function of the seed, resumable at any batch."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tcsae
from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.counted import norm_median
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

HOOK, LENGTH = "blocks.0.hook_resid_post", 7


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """23 sequences of 1 to 7 positions; every vector says (sequence, position)."""
    path = str(tmp_path_factory.mktemp("loader") / "a.zarr")
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=2),),
        n_tokens=1,
    )
    writer = open_writer(path, recipe, Layout(sequences_per_chunk=3))
    lengths = np.random.default_rng(0).integers(1, LENGTH + 1, 23).astype(np.int32)
    rows = Rows(np.zeros((23, LENGTH), np.int32), lengths, np.arange(23), np.zeros(23, np.int32))
    writer.commit({"train": rows, "eval": rows}, {})
    writer.finish_sequences({s: {"sequences": 23, "tokens": int(lengths.sum()), "documents": 23} for s in SPLITS})
    for shard in writer.missing_shards():
        sequence, position = np.mgrid[shard.start : shard.stop, 0:LENGTH]
        writer.write_shard(shard, {HOOK: np.stack([sequence, position], -1).astype(np.float32)})
    writer.seal({}, [], {})
    return open_store(path)


def take(loader: SegmentLoader, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(batch.x.numpy().copy(), batch.lengths.copy()) for batch in itertools.islice(loader, n)]


def segments_of(batches) -> list[list[tuple[int, int]]]:
    parts = [part for x, lengths in batches for part in np.split(x, np.cumsum(lengths)[:-1])]
    return [[tuple(map(int, row)) for row in part] for part in parts]


@pytest.mark.slow
@given(
    n_segments=st.integers(1, 9),
    segment_length=st.integers(1, 8),
    skip_first=st.integers(0, 3),
    buffer_sequences=st.integers(1, 30),
    min_sequence_length=st.integers(1, 6),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_each_epoch_hands_out_every_token_once_in_whole_segments(store, **options):
    config = DataConfig(**options)
    loader = SegmentLoader(store, config)
    n_batches = -(-2 * loader.n_segments // config.n_segments)
    stream = segments_of(take(loader, n_batches))
    kept = [(s, n) for s, n in enumerate(store.train.lengths.tolist()) if n >= config.min_sequence_length]
    expected = {(s, p) for s, n in kept for p in range(config.skip_first, n)}
    assert loader.n_tokens + loader.n_skipped + loader.n_short == store.train.lengths.sum()
    assert loader.n_short == store.train.lengths.sum() - sum(n for _, n in kept)
    for epoch in (0, 1):
        part = stream[epoch * loader.n_segments : (epoch + 1) * loader.n_segments]
        tokens = [token for segment in part for token in segment]
        assert len(tokens) == loader.n_tokens == len(expected)
        assert set(tokens) == expected
    for segment in stream:
        assert len({sequence for sequence, _ in segment}) == 1
        assert [p for _, p in segment] == list(range(segment[0][1], segment[0][1] + len(segment)))
        assert (segment[0][1] - config.skip_first) % config.segment_length == 0


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_resumed_anywhere_the_next_batch_is_the_same(store, n_segments, n_done, buffer_sequences):
    config = DataConfig(n_segments=n_segments, segment_length=3, buffer_sequences=buffer_sequences)
    straight = take(SegmentLoader(store, config), n_done + 2)[n_done:]
    loader = SegmentLoader(store, config, n_batches_done=n_done)
    for (x, lengths), (again, again_lengths) in zip(straight, take(loader, 2), strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(lengths, again_lengths)
    assert loader.n_batches_done == n_done + 2


def test_order_is_shuffled_by_seed_and_epoch(store):
    def order(seed: int, epoch: int) -> list:
        loader = SegmentLoader(store, DataConfig(n_segments=1, segment_length=3, seed=seed))
        stream = segments_of(take(loader, loader.n_segments * (epoch + 1)))
        return stream[epoch * loader.n_segments :]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != sorted(order(0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("n_segments", [8, 11])
@pytest.mark.parametrize(("segment_length", "skip_first"), [(1, 0), (3, 1), (7, 2)])
@pytest.mark.parametrize("max_norm", [1.2, 1.6])
def test_outliers_are_left_out_token_by_token_and_segments_cut_there(
    store, n_segments, segment_length, max_norm, skip_first
):
    plain = DataConfig(n_segments=n_segments, segment_length=segment_length, skip_first=skip_first)
    limit = max_norm * norm_median(store, HOOK)
    cut = SegmentLoader(store, dataclasses.replace(plain, max_norm=max_norm))
    for whole, batch in zip(range(20), cut, strict=False):
        (x, lengths), *_ = take(SegmentLoader(store, plain, n_batches_done=whole), 1)
        parts = []
        for part in np.split(x, np.cumsum(lengths)[:-1]):
            within = np.linalg.norm(part, axis=1) <= limit
            runs = np.split(part, np.flatnonzero(np.diff(within)) + 1)
            parts += [run for run in runs if np.linalg.norm(run[0]) <= limit]
        np.testing.assert_array_equal(batch.x.numpy(), np.concatenate([x[:0], *parts]))
        assert batch.lengths.tolist() == [len(part) for part in parts]
        assert batch.starts.tolist() == [int(part[0, 1]) for part in parts]
        assert batch.n_left_out == len(x) - len(batch.x)
    assert cut.n_skipped == int(np.minimum(store.train.lengths, skip_first).sum())


def test_a_norm_that_leaves_nothing_is_said(store):
    loader = SegmentLoader(store, DataConfig(max_norm=0.001, n_segments=2, segment_length=3))
    batch = next(iter(loader))
    assert (len(batch.x), len(batch.lengths), batch.n_whole) == (0, 0, 0)
    assert batch.n_left_out > 0
    with pytest.raises(
        StoreError, match=r"no train token counts, from 1 on, of a norm up to 0.001 medians. Raise data"
    ):
        loader.sample(10)


def test_sample_does_not_depend_on_progress(store):
    config = DataConfig(segment_length=3)
    sample = SegmentLoader(store, config).sample(20)
    assert 20 <= len(sample) <= 22
    torch.testing.assert_close(SegmentLoader(store, config, n_batches_done=9).sample(20), sample)


def loaders_with_empty_beginnings(store: Store, **settings) -> list[SegmentLoader]:
    """Whose first block, a chunk of three sequences, has no token by the rules, though others have."""
    loaders = [
        SegmentLoader(store, DataConfig(n_segments=2, buffer_sequences=3, seed=seed, **settings)) for seed in range(9)
    ]
    length, limit = settings.get("min_sequence_length", 1), settings.get("max_norm", 1e9) * norm_median(store, HOOK)
    first = [int(loader._chunks(0, 0)[0]) for loader in loaders]
    sequences = [range(3 * chunk, min(3 * chunk + 3, 23)) for chunk in first]
    lengths = store.train.lengths
    empty = [all(lengths[i] < length or np.hypot(i, 1) > limit for i in some) for some in sequences]
    return [loader for loader, none in zip(loaders, empty, strict=True) if none]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_sequence_length": 7},
        {"max_norm": 0.5},
        {"max_norm": 0.5, "min_sequence_length": 5},
        {"min_sequence_length": 7, "document_segments": 2},
    ],
)
def test_a_block_without_a_token_is_passed_over(store, settings):
    loaders = loaders_with_empty_beginnings(store, **settings)
    assert loaders
    for loader in loaders:
        sequence = loader.sample(10).numpy()[:, 0].astype(int)
        assert len(sequence) and (store.train.lengths[sequence] >= settings.get("min_sequence_length", 1)).all()
    assert any(batch.n_whole for batch in itertools.islice(loaders[0], 12)), "and in training"


def test_a_sample_of_windows_passes_over_what_holds_none(store):
    """The first 20 tokens of the only block are all above the norm, or no 3 of them in a row are left."""
    for seed in range(8):
        loader = SegmentLoader(store, DataConfig(segment_length=3, max_norm=0.5, seed=seed))
        sample = loader.sample(4, window=3)
        assert sample.shape[1] == 6 and len(sample)
    with pytest.raises(StoreError, match=r"no 3 train tokens in a row count, from 1 on, of a norm up to 0.001 medians"):
        SegmentLoader(store, DataConfig(segment_length=3, max_norm=0.001)).sample(10, window=3)


def test_no_token_left_is_said(store):
    with pytest.raises(StoreError, match=r"no train sequence has 1 tokens .* more than data.skip_first=7; .* 7"):
        SegmentLoader(store, DataConfig(skip_first=7))
    with pytest.raises(StoreError, match=r"has 8 tokens \(data.min_sequence_length\) .* the longest has 7. Lower"):
        SegmentLoader(store, DataConfig(min_sequence_length=8))


def test_public_iterators(store):
    x, valid = next(tcsae.iterate_segments(store, n_segments=5, segment_length=4, skip_first=0))
    assert x.shape == (5, 4, 2)
    assert x.dtype == torch.float32
    assert valid.dtype == torch.bool
    assert not x[~valid].any()
    for segment, mask in zip(x, valid, strict=True):
        n = int(mask.sum())
        assert mask[:n].all()
        assert segment[:n, 1].diff().eq(1).all()
    tokens = list(itertools.islice(tcsae.iterate_tokens(store, batch_tokens=11, skip_first=2), 3))
    assert [tuple(batch.shape) for batch in tokens] == [(11, 2)] * 3
    assert all((batch[:, 1] >= 2).all() for batch in tokens)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"exclude_tokens": ("9",)}], ids=["whole", "with holes"])
def test_what_the_loader_holds_does_not_grow_with_the_tokens(store, options):
    """Nor does its peak: tables of all segments of 1 are 24 bytes a token, 214 GB at 9G tokens."""
    large = open_store(store.location)
    split, n = large.train, 6_000
    split.n_sequences = n
    split.__dict__ |= {"lengths": np.full(n, LENGTH, np.int32), "tokens": np.zeros((n, LENGTH), np.int32)}
    tracemalloc.start()
    loader = SegmentLoader(
        large, DataConfig(segment_length=1, skip_first=0, min_sequence_length=1, n_segments=4, **options)
    )
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loader.n_segments == loader.n_tokens == n * LENGTH
    assert held < peak < 4 * loader.n_tokens
