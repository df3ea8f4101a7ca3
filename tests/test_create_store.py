"""Promise: anybody's own activations become a store that is read, trained on and evaluated like any other."""

import itertools
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import tcsae
from tcsae.shared.base.errors import ConfigError, DataError, StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.store.format import Layout
from tcsae.shared.store.verify import find_faults
from tcsae.shared.store.writer import StoreWriter

LENGTH, WIDTHS = 4, {"layer1": 3, "layer2": 6}


def given_activations(rng, n: int) -> dict[str, np.ndarray]:
    return {hook: rng.normal(size=(n, LENGTH, width)).astype(np.float32) for hook, width in WIDTHS.items()}


@pytest.mark.slow
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_what_is_appended_comes_back_in_order(tmp_path_factory, codec, parts, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    expected: dict[str, list] = {"train": [], "eval": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.shared.store.format.CHUNK_BYTES", 2 * LENGTH * 6 * 4)  # two sequences a chunk
        with tcsae.create_store(path, hooks=WIDTHS, sequence_length=LENGTH, codec=codec) as creation:
            for is_train, n in [(True, 1), *parts]:
                x, lengths = given_activations(rng, n), rng.integers(1, LENGTH + 1, n)
                creation.append("train" if is_train else "eval", x, lengths=lengths)
                expected["train" if is_train else "eval"].append((x, lengths))
    store = tcsae.open_store(path)
    for split, put in expected.items():
        got = store.split(split)
        assert got.n_sequences == sum(len(lengths) for _, lengths in put)
        if not got.n_sequences:
            continue
        lengths = np.concatenate([lengths for _, lengths in put])
        np.testing.assert_array_equal(got.lengths, lengths)
        assert got.n_tokens == lengths.sum()
        valid = np.arange(LENGTH) < lengths[:, None]
        for hook in WIDTHS:
            values = np.where(valid[..., None], np.concatenate([x[hook] for x, _ in put]), 0)
            np.testing.assert_allclose(
                got.read(hook, 0, got.n_sequences), values, rtol=4e-3 if codec != "float32" else 0
            )
    documents = [*store.train.documents, *store.eval.documents]
    assert len(set(documents)) == len(documents)


def test_documents_of_several_sequences(tmp_path):
    x = {"a": torch.randn(5, LENGTH, 2, dtype=torch.bfloat16)}
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"a": 2}, sequence_length=LENGTH) as creation:
        creation.append("train", x, lengths=[4, 4, 2, 4, 1], documents=[0, 0, 0, 5, 5])
        creation.append("train", x, documents=[5, 6, 7, 8, 9])
        creation.append("eval", x, documents=[1, 1, 1, 1, 1], tokens=np.arange(5 * LENGTH).reshape(5, LENGTH))
    store = tcsae.open_store(tmp_path / "a.zarr")
    assert store.train.starts.tolist() == [0, 4, 8, 0, 4, 5, 0, 0, 0, 0]
    assert (store.train.n_documents, store.eval.n_documents) == (6, 1)
    assert store.eval.tokens[2].tolist() == [8, 9, 10, 11]
    np.testing.assert_array_equal(store.eval.read("a", 0, 5), x["a"].to(torch.float16).float())
    with pytest.raises(StoreError, match="no tail for a: the activations were given"):
        store.tail_path("a")


@pytest.mark.parametrize(
    "split, changes, message",
    [
        ("test", {}, "Unknown split 'test'"),
        (
            "train",
            {"activations": {"b": np.zeros((2, LENGTH, 2))}},
            r"Activations of \['b'\] were given",
        ),
        ("train", {"activations": {"a": np.zeros((2, 3, 2))}}, r"a has shape \[2, 3, 2\]; the store takes \[2, 4, 2\]"),
        ("train", {"lengths": [0, 4]}, "A length of 0 or 4: give 1 to 4"),
        ("train", {"lengths": [1, 2, 3]}, r"lengths has shape \[3\]"),
        ("train", {"documents": [3, 2]}, "Documents of train fall"),
        ("train", {"tokens": -np.ones((2, LENGTH))}, "negative"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, split, changes, message):
    creation = tcsae.create_store(tmp_path / "a.zarr", hooks={"a": 2}, sequence_length=LENGTH)
    arguments = {"activations": {"a": np.zeros((2, LENGTH, 2))}} | changes
    with pytest.raises((ConfigError, DataError), match=message):
        creation.append(split, **arguments)
    creation.discard()
    assert not (tmp_path / "a.zarr").exists()


def test_no_store_is_left_or_overwritten(tmp_path):
    path = tmp_path / "a.zarr"
    x = {"a": np.ones((2, LENGTH, 2))}
    with (
        pytest.raises(DataError, match="Document 1 is in train and in eval"),
        tcsae.create_store(path, hooks={"a": 2}, sequence_length=LENGTH) as creation,
    ):
        creation.append("train", x, documents=[1, 1])
        creation.append("eval", x, documents=[0, 1])
    assert not path.exists()
    with (
        pytest.raises(DataError, match="has no train sequence"),
        tcsae.create_store(path, hooks={"a": 2}, sequence_length=LENGTH) as creation,
    ):
        creation.append("eval", x)
    path.mkdir(exist_ok=True)
    (path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is there already"):
        tcsae.create_store(path, hooks={"a": 2}, sequence_length=LENGTH)
    with pytest.raises(ConfigError, match="Unknown codec 'float61'. Did you mean 'float16'"):
        tcsae.create_store(tmp_path / "b.zarr", hooks={"a": 2}, sequence_length=LENGTH, codec="float61")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "compact"])
def test_train_and_eval_take_it(tmp_path, codec):
    from click.testing import CliRunner

    from tcsae.shared.commands.group import cli

    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 8))
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"a": 8}, sequence_length=LENGTH, codec=codec) as creation:
        for split, n in (("train", 300), ("eval", 40)):
            codes = rng.exponential(size=(n, LENGTH, 24)) * (rng.random((n, LENGTH, 24)) < 0.1)
            creation.append(split, {"a": codes @ features}, documents=np.arange(n) + (split == "eval") * 1000)
    place = ["--store", str(tmp_path / "a.zarr"), "--runs", str(tmp_path / "runs")]
    settings = ["sae.d_sae=24", "sae.k=3", "data.n_segments=64", "data.segment_length=4", "steps=20"]
    arguments = list(itertools.chain(*(["--set", one] for one in settings)))
    done = CliRunner().invoke(cli, [*place, "train", "--preset", "topk", *arguments, "eval"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads(next((tmp_path / "runs").rglob("eval*.json")).read_text())["metrics"]
    assert figures["explained_variance"] > 0.1
    assert not any("ce_loss" in name and figures[name] is not None for name in figures)


def test_a_buffer_can_be_used_again(tmp_path):
    """Of every argument: what is appended is what was given then, not what the buffer holds later."""
    n, length = 3, 4
    x, lengths, tokens = np.empty((n, length, 2), np.float32), np.empty(n, np.int32), np.empty((n, length), np.int32)
    documents, tensor = np.empty(n, np.int64), torch.empty(n, length, 2)
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"array": 2, "tensor": 2}, sequence_length=length) as store:
        for i in range(4):
            x[:], lengths[:], tokens[:], documents[:], tensor[:] = i + 1, i + 1, i + 10, i + 20, i + 30
            for split, more in (("train", 0), ("eval", 100)):
                documents += more
                store.append(split, {"array": x, "tensor": tensor}, lengths=lengths, tokens=tokens, documents=documents)
        for buffer in (x, lengths, tokens, documents, tensor):
            buffer[:] = 99
    opened = tcsae.open_store(tmp_path / "a.zarr")
    for split, more in ((opened.train, 0), (opened.eval, 100)):
        each = np.repeat(np.arange(4), n)
        np.testing.assert_array_equal(split.read("array", 0, 12)[:, 0, 0], each + 1)
        np.testing.assert_array_equal(split.read("tensor", 0, 12)[:, 0, 0], each + 30)
        np.testing.assert_array_equal(split.lengths, each + 1)
        np.testing.assert_array_equal(split.tokens[:, 0], each + 10)
        np.testing.assert_array_equal(split.documents, each + 20 + more)


@pytest.mark.slow
def test_appending_is_linear(tmp_path, monkeypatch):
    """What is read back for each shard does not grow with the store."""
    layout = Layout(sequences_per_chunk=2, sequences_per_token_chunk=8)
    monkeypatch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: layout)  # noqa: ARG005
    read, real = [], StoreWriter._stored

    def counted(self, split, name, start, stop):
        read.append(stop - start)
        return real(self, split, name, start, stop)

    monkeypatch.setattr(StoreWriter, "_stored", counted)
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"h": 2}, sequence_length=1) as store:
        for _ in range(40):
            store.append("train", {"h": np.ones((2, 1, 2))})
        store.append("eval", {"h": np.ones((2, 1, 2))})
    assert len(read) <= 42
    assert max(read) <= 8


def small(path, **options):
    return tcsae.create_store(path, hooks={"a": 2}, sequence_length=LENGTH, **options)


def test_labels_are_shown_as_text(tmp_path):
    tokens = np.array([[0, 1, 2, 1]])
    with small(tmp_path / "a.zarr", labels=["sky", "wet grass", "road"]) as creation:
        for split in ("train", "eval"):
            creation.append(split, {"a": np.ones((1, LENGTH, 2))}, tokens=tokens)
    store = tcsae.open_store(tmp_path / "a.zarr")
    texts = TokenTexts(store)
    assert [texts[i] for i in (0, 1, 2)] == ["sky", "wet grass", "road"]
    shown = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), "inspect"])
    assert "sky wet grass road wet grass" in shown.stdout
    assert list(find_faults(str(tmp_path / "a.zarr"), lambda _: None)) == []


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_tokenizer_goes_into_the_store(tiny_lm, tmp_path, as_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    with small(tmp_path / "a.zarr", tokenizer=folder if as_folder else tokenizer) as creation:
        creation.append(
            "train", {"a": np.ones((1, LENGTH, 2))}, tokens=[tokenizer("the model reads one")["input_ids"][:4]]
        )
        creation.append("eval", {"a": np.ones((1, LENGTH, 2))})
    store = tcsae.open_store(tmp_path / "a.zarr")
    (first, *_) = store.train.tokens[0].tolist()
    assert TokenTexts(store)[first] == tokenizer.decode([first])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": "nowhere"}, "tokenizer 'nowhere' is no folder with a tokenizer.json"),
        ({"tokenizer": 3}, "tokenizer is a int. Give a Hugging Face tokenizer or its folder"),
        ({"labels": ["a", "b", "a"]}, "the label 'a' is given twice"),
        ({"tokenizer": "nowhere", "labels": ["a"]}, "a tokenizer and labels are given. Give one of them"),
    ],
)
def test_what_cannot_name_tokens(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        small(tmp_path / "a.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_a_token_without_a_label_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match="A token of 2: the store has 2 labels"),
        small(tmp_path / "a.zarr", labels="ab") as one,
    ):
        one.append("train", {"a": np.ones((1, LENGTH, 2))}, tokens=[[0, 1, 2, 0]])


def test_a_store_without_an_eval_split_says_so(tmp_path, capsys):
    with small(tmp_path / "a.zarr") as creation:
        creation.append("train", {"a": np.ones((1, LENGTH, 2))})
    assert "a.zarr has no eval split, so tcsae train can use it and tcsae eval cannot." in capsys.readouterr().err
    with small(tmp_path / "b.zarr") as creation:
        for split in ("train", "eval"):
            creation.append(split, {"a": np.ones((1, LENGTH, 2))})
    assert "eval split" not in capsys.readouterr().err
