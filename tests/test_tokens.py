"""Promise: token ids are those of the whole document, each is one that the model has, and none is there twice or as
padding; what does not fit is refused before anything is written.
"""

import dataclasses
import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tcsae.data.model import embedded_model_path
from tcsae.harvest import sequences as tokens
from tcsae.harvest.assumptions import without_padding
from tcsae.harvest.documents import CorpusChoice, find_corpus
from tcsae.harvest.language_model import find_model
from tcsae.harvest.run import harvest
from tcsae.harvest.sequences import TokenReader
from tcsae.shared.base.errors import DataError, ModelError

RESIDUAL = "blocks.2.hook_resid_post"


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reader(folder, tmp_path, bos=False) -> TokenReader:
    corpus = find_corpus(CorpusChoice(name=jsonl(tmp_path / "a.jsonl", [{"text": "a"}])))
    return TokenReader(find_model(str(folder)), corpus, bos)


@pytest.fixture
def changed(tiny_lm, tmp_path):
    """changed(added): a copy of the tiny model whose tokenizer has more tokens."""

    def change(tokens=(), **special) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_lm, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(tokens))
        tokenizer.add_special_tokens(special)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return change


# Ids that the model has not


def larger_tokenizer(tiny_lm, tmp_path) -> str:
    """The tiny model of 300 embeddings with the embedded model's tokenizer of 4096 tokens."""
    folder = tmp_path / "larger"
    shutil.copytree(tiny_lm, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model_path() / name, folder / name)
    return str(folder)


@pytest.mark.parametrize("path", ["tokenizer", "added token", "ids", "negative ids", "huge ids"])
def test_ids_beyond_the_embedding_are_refused_before_anything_is_written(tiny_config, tiny_lm, changed, tmp_path, path):
    model, corpus = str(tiny_lm), tiny_config.corpus
    rows = [[1, 2, 3, 4]] * 20
    error, words = DataError, "document 3 has token ids .* the model has 0 to 299"
    if path == "tokenizer":
        model, error, words = larger_tokenizer(tiny_lm, tmp_path), ModelError, "token ids up to 4095; .* 0 to 299"
    elif path == "added token":
        model = changed(["<extra>"])
        texts = [{"text": "a model reads" + (" <extra>" if i == 3 else "")} for i in range(20)]
        corpus = CorpusChoice(name=jsonl(tmp_path / "t.jsonl", texts))
    else:
        rows[3] = {"ids": [1, 2, 300], "negative ids": [-1, 2, 3], "huge ids": [1, 2, 2**62]}[path]
        name = jsonl(tmp_path / "i.jsonl", [{"input_ids": row} for row in rows])
        corpus = CorpusChoice(name=name, field="input_ids", tokenized=True)
    config = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(tiny_config.model, name=model),
        corpus=corpus,
        hooks=(RESIDUAL,),
    )
    with pytest.raises(error, match=words):
        harvest(str(tmp_path / "store.zarr"), config)
    assert not (tmp_path / "store.zarr").exists()


def test_a_pad_token_beyond_the_embedding_is_not_used(changed, tmp_path):
    folder = changed(pad_token="<pad>")
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 300
    assert reader(folder, tmp_path).pad_id == 0


def test_a_bos_token_beyond_the_embedding_is_refused(changed, tmp_path):
    with pytest.raises(ModelError, match=r"a BOS token \(300\) that its embedding lacks. Leave --prepend-bos out"):
        reader(changed(bos_token="<bos>"), tmp_path, bos=True)


# BOS once


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_bos_is_prepended_to_what_has_none(tiny_lm, tmp_path, kind, n):
    document = "<|endoftext|>" * n + "a model" if kind == "text" else [0] * n + [5, 6, 0, 7]
    plain = "a model" if kind == "text" else [5, 6, 0, 7]
    with_bos, without = reader(tiny_lm, tmp_path, True), reader(tiny_lm, tmp_path)
    assert with_bos.ids([document], [0])[0].tolist() == without.ids([plain], [0])[0].tolist()
    assert without.ids([document], [0])[0].tolist()[:n] == [0] * n, "what is there stays, where none is prepended"


# Padding that the data name


@pytest.mark.parametrize(
    "ids, mask, labels, left",
    [
        ([5, 6, 0, 0], [1, 1, 0, 0], None, [5, 6]),
        ([0, 0, 5, 6], [0, 0, 1, 1], None, [5, 6]),
        ([0, 5, 0, 0], [False, True, True, False], None, [5, 0]),
        ([0, 0], [0, 0], None, []),
        ([5, 6], None, None, [5, 6]),
        ([5, 6, 0, 0], [1, 1, 0, 0], [5, 6, -100, -100], [5, 6]),
        ([5, 6, 9, 9], None, [5, 6, -100, -100], [5, 6]),
        ([5, 6, 9], None, [5, 6, -100], [5, 6]),
        ([9, 9, 5, 6], None, [-100, -100, 5, 6], [5, 6]),
        ([0, 5, 6], None, [-100, 5, 6], [5, 6]),
        ([1, 7, 8, 5, 6], None, [-100, -100, -100, 5, 6], [1, 7, 8, 5, 6]),  # a prompt
        ([5, 6, 7], None, [6, 7, -100], [5, 6, 7]),  # shifted by one
        ([5, 6, 7], None, 1, [5, 6, 7]),  # the class of the document
        ([5, 6, 7], None, [-100], [5, 6, 7]),  # an encoder-decoder's
    ],
)
@pytest.mark.parametrize("field", ["input_ids", "chosen_input_ids", "tokens"])
def test_padding_is_left_out(tmp_path, ids, mask, labels, left, field):
    assert without_padding(ids, mask, labels, 0) == left
    names = [
        field.replace("input_ids", name) if "input_ids" in field else name for name in ("attention_mask", "labels")
    ]
    row = {field: ids} | {name: value for name, value in zip(names, (mask, labels), strict=True) if value is not None}
    corpus = find_corpus(CorpusChoice(name=jsonl(tmp_path / "a.jsonl", [row] * 3), field=field, tokenized=True))
    corpus = dataclasses.replace(corpus, pad_id=0)
    assert [one for batch in corpus.batches(1) for one in batch] == [left] * 2


@pytest.mark.parametrize(
    "mask, words", [([1, 1], "2 values for 3"), ([1, 2, 2], "it holds 2"), ([1, 0, 1], "a 0 between two 1")]
)
def test_a_mask_that_is_none_is_refused(tmp_path, mask, words):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": mask}]
    corpus = find_corpus(CorpusChoice(name=jsonl(tmp_path / "a.jsonl", rows), field="input_ids", tokenized=True))
    with pytest.raises(DataError, match=rf"document 0 has an attention mask that is none .*{words}"):
        list(corpus.batches())


# Long documents


def sentencepiece_like(folder):
    """A tokenizer that puts a space before every text and splits nothing beforehand, as Llama's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    words = ["the", "a", "model", "stream", "reads", "writes", "each", "token", "of", "one", "sequence"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(random.Random(i).choices(words, k=50)) for i in range(20)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("tokenizer", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("text", ["words", "lines", "no spaces", "one letter"])
def test_a_long_document_has_the_tokens_of_the_whole(tiny_lm, tmp_path, monkeypatch, tokenizer, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm, folder)
    if tokenizer == "sentencepiece":
        sentencepiece_like(folder)
    rng = random.Random(3)
    words = rng.choices(["the", "model", "stream", "reads,", "tokens", "of  one", "sequence."], k=3000)
    document = {"words": " ", "lines": "\n", "no spaces": "", "one letter": ""}[text].join(words)
    document = "a" * 20_000 if text == "one letter" else document
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 1000)
    reads = reader(folder, tmp_path)
    pieces = list(reads._pieces(document))
    assert len(pieces) > 10 or text == "one letter"
    expected = AutoTokenizer.from_pretrained(folder)(document, add_special_tokens=False)["input_ids"]
    (ids,) = reads.ids([document], [0])
    assert ids.dtype == np.int32
    assert ids.tolist() == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tiny_lm, tmp_path, monkeypatch):
    """What the tokenizer holds at once is that of a piece (its native memory is not seen from here)."""
    reads, sizes = reader(tiny_lm, tmp_path), []
    tokenize = reads._tokenize

    def measured(texts):
        sizes.append(sum(map(len, texts)))
        return tokenize(texts)

    monkeypatch.setattr(reads, "_tokenize", measured)
    document = "a model reads " * 100_000
    tracemalloc.start()
    reads.ids([document, "a", document[:200_000], document[:200_000]], range(4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(sizes) <= tokens.PIECE_CHARACTERS
    assert peak < 40 * len(document)
