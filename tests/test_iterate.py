"""Promise: a store's batches hold every position once an epoch, in an order of the seed, and go on from any state."""

import importlib.util
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tcsae
from tcsae.shared.base.errors import ConfigError, StoreError

LENGTH, WIDTH = 12, 3


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def store(request, tmp_path_factory) -> tcsae.Store:
    """Every vector says where it is from: (sequence, position, 1); 40 sequences of 1 to 12 positions."""
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        layout = importlib.import_module("tcsae.shared.store.format").Layout(sequences_per_chunk=4)
        patch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: layout)  # noqa: ARG005
        with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH, codec=request.param) as creation:
            for split, n in (("train", 40), ("eval", 6)):
                x = np.ones((n, LENGTH, WIDTH), np.float32)
                x[..., 0], x[..., 1] = np.arange(n)[:, None], np.arange(LENGTH)
                tokens = np.arange(n)[:, None] * LENGTH + np.arange(LENGTH)
                lengths = rng.integers(1, LENGTH + 1, n)
                creation.append(
                    split,
                    {"h": x},
                    lengths=lengths,
                    tokens=tokens,
                    documents=np.arange(n) // 2 + 100 * (split == "eval"),
                )
    return tcsae.open_store(path)


def places(batches) -> list[tuple[int, int]]:
    """(sequence, position) of every valid vector, in order, as the vectors themselves say."""
    result = []
    for batch in batches:
        assert (batch.x[~batch.valid] == 0).all()
        result += [(round(float(s)), round(float(p))) for s, p, _ in batch.x[batch.valid]]
    return result


def expected(store, split: str, skip_first: int) -> set[tuple[int, int]]:
    return {(i, p) for i, n in enumerate(store.split(split).lengths) for p in range(skip_first, n)}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("segment_length", [1, 5, None])
@pytest.mark.parametrize("options", [{}, {"skip_first": 0, "shuffle": False}, {"buffer_sequences": 8, "seed": 3}])
def test_each_position_comes_once_an_epoch(store, split, segment_length, options):
    batches = store.iterate(split, segment_length, batch_tokens=24, **options)
    result = places(batches)
    assert len(result) == len(set(result))
    assert set(result) == expected(store, split, options.get("skip_first", 1))
    assert len(list(batches)) == len(batches)
    if "shuffle" in options:
        assert result == sorted(result)
    for batch in batches:
        at = batch.sequences[:, None] * LENGTH + batch.starts[:, None] + torch.arange(batch.x.shape[1])
        assert torch.equal(batch.tokens, torch.where(batch.valid, at, 0))
        assert torch.equal(batch.documents, batch.sequences // 2 + 100 * (split == "eval"))


def test_the_order_is_the_seeds_and_the_epochs(store):
    def order(**options):
        return places(store.iterate(batch_tokens=32, **options))

    first = order()
    assert first == order() != order(seed=1)
    two = order(epochs=2)
    assert two[: len(first)] == first != two[len(first) :]
    assert sorted(first) == sorted(two[len(first) :])


def test_no_end(store):
    batches = store.iterate(batch_tokens=64, epochs=None)
    n = len(store.iterate(batch_tokens=64))
    assert len(list(itertools.islice(batches, 3 * n))) == 3 * n
    with pytest.raises(TypeError, match="never ends"):
        len(batches)


@pytest.mark.parametrize("n_done", [0, 1, 5, "all"])
def test_a_state_goes_on_where_it_was(store, n_done):
    options = {"batch_tokens": 24, "epochs": 2, "buffer_sequences": 8}
    whole = places(store.iterate(**options))
    batches = store.iterate(**options)
    iterator = iter(batches)
    before = places(itertools.islice(iterator, len(batches) if n_done == "all" else n_done))
    state = pickle.loads(pickle.dumps(batches.state_dict()))
    resumed = store.iterate(**options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert before + places(resumed) == whole
    assert places(resumed) == whole, "a state is used once"


@pytest.mark.parametrize("option", [{"seed": 1}, {"segment_length": 3}, {"split": "eval"}])
def test_the_state_of_other_batches_is_refused(store, option):
    other = store.iterate(**option).state_dict()
    with pytest.raises(ConfigError, match=f"state is of other batches .{next(iter(option))}"):
        store.iterate().load_state_dict(other)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_give_the_same_batches(store, n_workers):
    batches = store.iterate(batch_tokens=48, epochs=2)
    loader = DataLoader(batches, batch_size=None, num_workers=n_workers)
    assert len(loader) == len(batches)
    assert places(loader) == places(batches)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="torchdata is not installed")
@pytest.mark.parametrize("n_workers", [0, 2])
def test_torchdatas_stateful_loader_goes_on(store, n_workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(store.iterate(batch_tokens=24), batch_size=None, num_workers=n_workers)

    whole = places(loader())
    one = loader()
    iterator = iter(one)
    before = places(itertools.islice(iterator, 4))
    state = one.state_dict()
    del iterator
    other = loader()
    other.load_state_dict(state)
    assert before + places(other) == whole


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"split": "test"}, StoreError, "Unknown split 'test'"),
        ({"hook": "g"}, StoreError, "Unknown hook 'g'"),
        ({"segment_length": 0}, ConfigError, "segment_length=0: must be at least 1"),
        ({"batch_tokens": 8}, ConfigError, "batch_tokens=8 holds no segment of segment_length=16"),
        ({"epochs": 0}, ConfigError, "epochs=0: must be at least 1, or None"),
        ({"sed": 1}, ConfigError, "Unknown setting 'sed'. Did you mean 'seed'"),
        ({"skip_first": LENGTH}, StoreError, "has more than skip_first=12 positions. Lower it"),
    ],
)
def test_what_cannot_be_is_refused(store, options, error, message):
    with pytest.raises(error, match=message):
        store.iterate(**options)


def test_sequences_one_by_one(store):
    split = store.split("train")
    assert len(split) == 40
    for i in (0, 7, -1):
        one = split[i]
        number = i % 40
        assert len(one.tokens) == split.lengths[number] == len(one.activations["h"])
        assert one.activations["h"][:, 0] == pytest.approx(number, abs=0.05)
        assert (one.document, one.start) == (number // 2, split.starts[number])
    for a, b in zip(split, (split[i] for i in range(40)), strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.activations["h"], b.activations["h"])
    for beyond in (40, -41):
        with pytest.raises(IndexError, match=f"Sequence {beyond} of split 'train': it has 40"):
            split[beyond]


def test_a_pickled_store_is_its_location(store):
    other = pickle.loads(pickle.dumps(store))
    assert (other.location, other.content) == (store.location, store.content)


@pytest.mark.parametrize("streaming", [False, True])
def test_as_a_hugging_face_dataset(store, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = list(store.to_dataset("eval", streaming=streaming))
    assert len(rows) == 6
    for row, one in zip(rows, store.split("eval"), strict=True):
        assert row["tokens"] == one.tokens.tolist()
        assert np.array_equal(np.array(row["activations"], np.float32), one.activations["h"])
        assert (row["document"], row["start"]) == (one.document, one.start)
    with pytest.raises(StoreError, match="Unknown split"):
        store.to_dataset("test")


@pytest.mark.slow
def test_text_of_a_sequence(store, tiny_store):
    assert store.tokens_text(0)[:3] == "⟨0⟩"  # without a tokenizer
    real = tcsae.open_store(tiny_store)
    assert " the" in "".join(real.tokens_text(i) for i in range(5))
    with pytest.raises(IndexError, match="it has 6"):
        store.tokens_text(6, "eval")
    assert Path(real.location).exists()
