"""Promise: text of local files is what stands there, whatever it looks like; what cannot be read is named with its
place.
"""

import gzip
import json
import os
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tcsae.harvest.documents import CorpusChoice, Document, find_corpus
from tcsae.shared.base.errors import DataError


def read(path: str, **choice: Any) -> list[Document]:
    return [one for batch in find_corpus(CorpusChoice(name=path, **choice)).batches() for one in batch]


@pytest.fixture
def write(tmp_path):
    def written(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return written


LOOKS = {
    "a date": "2024-01-31",
    "a time": "2024-01-31T12:00:00",
    "a time with a zone": "2024-01-31 12:00:00Z",
    "a number": "1.50",
    "a truth": "true",
    "null": "null",
    "nan": "NaN",
    "an array": "[1, 2]",
    "space": "  x ",
    "line ends": "a\r\nb\rc\n\u2028d",
    "nul": "a\0b",
    "a mark inside": "a\ufeffb",
    "far characters": "\U0001f600 é",
}


@pytest.mark.parametrize("form", ["a.jsonl", "a.jsonl.gz", "array.json", "objects.json", "columns.json", "texts.json"])
def test_text_stays_text_whatever_it_looks_like(write, form):
    texts = [*LOOKS.values()]
    rows = [{"text": text} for text in texts]
    data = {
        "array.json": json.dumps(rows, indent=1),
        "objects.json": "\n".join(json.dumps(row, indent=2) for row in rows),
        "columns.json": json.dumps({"text": texts, "n": list(range(len(texts)))}),
        "texts.json": json.dumps(texts),
    }.get(form, "".join(json.dumps(row) + "\n" for row in rows))
    raw = data.encode()
    assert read(write(form, gzip.compress(raw) if form.endswith("gz") else raw)) == texts


def test_half_a_surrogate_pair_is_a_replacement_character(write):
    path = write("a.jsonl", rb'{"text": "a\ud800b"}' + b"\n" + rb'{"text": "\ud83d\ude00"}' + b"\n")
    assert read(path) == ["a\ufffdb", "\U0001f600"]


def test_columns_may_begin_late_and_hold_whatever_they_like(write):
    rows = [{"id": 1}, {"id": "x", "text": "one"}, {"text": None, "more": [1, {"a": "b"}]}, {"id": {}, "text": "two"}]
    path = write("a.jsonl", "\n\n".join(map(json.dumps, rows)).encode())
    assert read(path) == ["", "one", "", "two"]


def test_a_mask_that_begins_late_is_heeded(write):
    rows = [{"ids": [5, 6]}, {"ids": [7, 0, 0], "attention_mask": [1, 0, 0]}]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert read(path, field="ids", tokenized=True) == [[5, 6], [7]]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_json_that_comes_in_small_blocks_is_the_same(write, monkeypatch, size):
    monkeypatch.setattr("tcsae.harvest.local_rows.BLOCK_CHARACTERS", size)
    texts = ['a"b\\', "é" * 50, "", "[{,", "\u2028"]
    assert read(write("a.json", json.dumps([{"text": text, "n": [1.5e3, None]} for text in texts]).encode())) == texts


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a.jsonl, line 3: a JSON list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl: 'utf-8' codec can't decode"),
        ("a.json", b'[{"text": "x"}, 7]', r"a.json, value 2: a JSON int, not an object"),
        ("a.json", b'[{"text": "x"}, {"text": x}]', r"a.json: no JSON \(Expecting value: 'x}]'\)"),
        ("a.json", b'[{"text": "x"}', r"a.json: no JSON \(Expecting value: 'the end of the file'\)"),
        ("a.json", b'{"text": "x', r"a.json: no JSON \(Unterminated string"),
        ("a.txt", b"x" * 40, r"a.txt is one document of more than 32 characters; split it"),
        ("a.jsonl", json.dumps({"text": "x" * 40}).encode(), r"a.jsonl, line 1 has more than 32 characters"),
        ("a.json", json.dumps([{"text": "x" * 40}]).encode(), r"document 0 has 40 characters, 32 are allowed"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(write, monkeypatch, name, data, says):
    for module in ("local_rows", "documents"):
        monkeypatch.setattr(f"tcsae.harvest.{module}.DOCUMENT_CHARACTERS", 32)
    with pytest.raises(DataError, match=says):
        read(write(name, data))


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device"):
        find_corpus(CorpusChoice(name=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("n", [0, 2])
def test_parquet_files_without_a_row_are_passed_over(tmp_path, n):
    (tmp_path / "c").mkdir()
    for name, texts in (("a", []), ("b", ["x"] * n), ("c", [])):
        parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "c" / f"{name}.parquet")
    if n:
        assert read(str(tmp_path / "c")) == ["x"] * n
    else:
        with pytest.raises(DataError, match="hold no document"):
            read(str(tmp_path / "c"))
