"""Promise: files, folders and names become documents in a fixed order, from any one on; or one line says why not."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tcsae.harvest.documents import CorpusChoice, find_corpus
from tcsae.shared.base.errors import ConfigError, DataError

TEXTS = [f"document number {i}, with a word or two" for i in range(25)]


def texts(choice: CorpusChoice, start: int = 0, size: int = 4) -> list[str]:
    return [text for batch in find_corpus(choice).batches(start, size) for text in batch]


def lines(some: list[str], name: str = "text") -> bytes:
    return "".join(json.dumps({name: text, "source": "here"}) + "\n" for text in some).encode()


@pytest.fixture
def write(tmp_path):
    def written(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return written


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), sink, row_group_size=6)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", lines(TEXTS)),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))),
        ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        ("a.parquet", parquet()),
    ],
)
@pytest.mark.parametrize("start", [0, 1, 7, 24, 25, 30])
def test_documents_of_a_file_from_any_on(write, name, data, start):
    assert texts(CorpusChoice(name=write(name, data)), start) == TEXTS[start:]


def test_a_text_file_is_one_document_and_a_folder_is_read_in_the_order_of_names(write, tmp_path):
    write("corpus/b.txt", b"second\n\nwith a gap")
    write("corpus/a/z.txt", b"first")
    write("corpus/c.txt.gz", gzip.compress(b"third"))
    write("corpus/README.md", b"not a document")
    write("corpus/.hidden.txt", b"not a document")
    assert texts(CorpusChoice(name=str(tmp_path / "corpus"))) == ["first", "second\n\nwith a gap", "third"]


def test_markup_is_read_as_text_unless_it_describes_data(write, tmp_path):
    write("docs/a.md", b"# first")
    write("docs/b/c.rst", b"second")
    write("docs/conf.py", b"not a document")
    assert texts(CorpusChoice(name=str(tmp_path / "docs"))) == ["# first", "second"]
    assert texts(CorpusChoice(name=str(tmp_path / "docs/a.md"))) == ["# first"]


@pytest.mark.parametrize("name", ["a.jsonl", "pydocs"])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"revision": "main"}, "--dataset-revision main: .* is no dataset of the Hub and has none"),
        ({"config": "en"}, "--dataset-config en: "),
        ({"split": "test"}, "--split test: "),
    ],
)
def test_what_only_the_hub_has_is_not_ignored(write, name, change, words):
    path = write("a.jsonl", lines(TEXTS)) if name == "a.jsonl" else name
    with pytest.raises(ConfigError, match=words):
        find_corpus(CorpusChoice(name=path, **change))


def test_a_null_is_an_empty_document(write):
    path = write("a.jsonl", b'{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    assert texts(CorpusChoice(name=path)) == ["one", "", "three"]


def test_a_seed_shuffles_and_skips_in_the_shuffled_order(write):
    path = write("a.jsonl", lines(TEXTS))
    shuffled = texts(CorpusChoice(name=path, seed=3))
    assert sorted(shuffled) == sorted(TEXTS)
    assert shuffled != TEXTS
    assert shuffled != texts(CorpusChoice(name=path, seed=4))
    assert texts(CorpusChoice(name=path, seed=3), 9) == shuffled[9:]


def test_the_revision_follows_names_and_bytes(write, tmp_path):
    def revision() -> str:
        return find_corpus(CorpusChoice(name=str(tmp_path / "c"))).recipe.revision

    file = tmp_path / "c" / "a.jsonl"
    write("c/a.jsonl", lines(TEXTS))
    first = revision()
    write("c/b.jsonl", lines(["more"]))
    assert first.startswith("sha256:")
    assert revision() != first
    (tmp_path / "c" / "b.jsonl").unlink()
    assert revision() == first
    file.rename(file.with_name("z.jsonl"))
    assert revision() != first


def test_the_recipe_names_no_folder_of_this_machine(write):
    assert find_corpus(CorpusChoice(name=write("some/where/a.jsonl", lines(TEXTS)))).recipe.name == "a.jsonl"


@pytest.mark.parametrize(
    "name, words",
    [
        ("pydoc", "Unknown dataset 'pydoc'. Did you mean 'pydocs'?.*a file or folder.*a Hub id.*offline mode"),
        (
            "openwebtext",
            r"^The dataset openwebtext \(Skylion007/openwebtext\) is no file.* could not be looked up",
        ),
        (
            "no/such-data",
            "^The dataset no/such-data is no file or folder here, and .* could not be .*offline mode",
        ),
        ("no/such/file.txt", "can be no name on the Hugging Face Hub"),
    ],
)
def test_an_unknown_dataset_is_one_line_with_what_there_is(name, words):
    with pytest.raises(DataError, match=words) as caught:
        find_corpus(CorpusChoice(name=name))
    assert "\n" not in str(caught.value)


def test_a_slice_of_a_split_is_refused_before_anything_is_asked():
    with pytest.raises(
        ConfigError, match=r"--split train\[:1%\]: datasets are streamed.* how much of it with --tokens"
    ):
        find_corpus(CorpusChoice(name="some/data", split="train[:1%]"))


@pytest.mark.parametrize(
    "choice, asked",
    [
        (CorpusChoice(name="openwebtext"), ("Skylion007/openwebtext", "refs/convert/parquet")),
        (CorpusChoice(name="openwebtext", revision="main"), ("Skylion007/openwebtext", "main")),
        (CorpusChoice(name="own/er", config="en", split="test", field="body"), ("own/er", None)),
    ],
)
def test_a_dataset_of_the_hub_is_streamed_at_the_commit_that_is_recorded(monkeypatch, choice, asked):
    looked_up, loaded = [], []

    def commit(kind, name, revision):
        looked_up.append((kind, name, revision))
        return "0123abc"

    def load(reader, **options):
        loaded.append((reader, options))
        return datasets.Dataset.from_list([{choice.field: text} for text in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr("tcsae.harvest.revisions.hub_commit", commit)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert texts(choice, 3) == TEXTS[3:]
    assert looked_up == [("dataset", *asked)]
    options = {"split": choice.split, "streaming": True, "name": choice.config, "revision": "0123abc"}
    assert loaded == [(asked[0], options)]
    recipe = find_corpus(choice).recipe
    assert (recipe.name, recipe.revision, recipe.config) == (asked[0], "0123abc", choice.config)
    assert (recipe.split, recipe.field) == (choice.split, choice.field)


def test_a_missing_column_names_those_that_are_there(write):
    path = write("a.jsonl", lines(TEXTS, "body"))
    with pytest.raises(DataError, match=r"a.jsonl has no column 'text'. It has: body, source.*--text-field"):
        find_corpus(CorpusChoice(name=path)).check()
    find_corpus(CorpusChoice(name=path, field="body")).check()


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_an_empty_file_is_refused(write, data):
    with pytest.raises(DataError, match="holds no document"):
        find_corpus(CorpusChoice(name=write("a.jsonl", data))).check()


def test_other_files_and_mixed_folders_are_refused(write, tmp_path):
    with pytest.raises(DataError, match=r"holds nothing that can be read.*\.parquet"):
        find_corpus(CorpusChoice(name=write("c/a.csv", b"text\nhello")))
    write("c/a.txt", b"one")
    write("c/b.jsonl", lines(TEXTS))
    with pytest.raises(DataError, match="files for json and text, which are read differently"):
        find_corpus(CorpusChoice(name=str(tmp_path / "c")))


def test_token_ids_are_documents_too(write):
    rows = [{"input_ids": list(range(i, i + i % 4)), "n": i} for i in range(10)]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    choice = CorpusChoice(name=path, field="input_ids", tokenized=True)
    corpus = find_corpus(choice)
    corpus.check()
    assert [ids for batch in corpus.batches(3, 4) for ids in batch] == [row["input_ids"] for row in rows[3:]]
    assert corpus.recipe.tokenized


def test_a_column_of_token_ids_is_offered_where_there_is_no_text(write):
    path = write("a.jsonl", b'{"id": "a", "input_ids": [5, 6]}\n')
    with pytest.raises(DataError, match=r"no column 'text'. It has: id, input_ids.*--tokens-field input_ids"):
        find_corpus(CorpusChoice(name=path)).check()


@pytest.mark.parametrize("field, found", [("text", "str"), ("words", "list")])
def test_a_column_that_is_no_token_ids_is_refused(write, field, found):
    path = write("a.jsonl", b'{"text": "a", "words": ["a"]}\n')
    with pytest.raises(DataError, match=f"document 0 has {found} in column '{field}', not token ids.*--tokens-field"):
        texts(CorpusChoice(name=path, field=field, tokenized=True))


def test_zstd_files_are_read(write):
    zstandard = pytest.importorskip("zstandard")
    path = write("a.jsonl.zst", zstandard.ZstdCompressor().compress(lines(TEXTS)))
    assert texts(CorpusChoice(name=path), 7) == TEXTS[7:]


def test_zstd_names_the_package_that_it_needs(write, monkeypatch):
    path = write("a.jsonl.zst", b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install zstandard"):
        find_corpus(CorpusChoice(name=path))


def test_a_column_that_is_no_text_is_refused_where_it_stands(write):
    path = write("a.jsonl", b'{"text": [1, 2]}\n{"text": [3]}\n')
    with pytest.raises(DataError, match="document 0 has list in column 'text'"):
        texts(CorpusChoice(name=path))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": broken\n'),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS * 500))[:-40]),
        ("a.txt", bytes(range(256))),
        ("a.parquet", b"no parquet"),
        ("a.jsonl.zst", b"no zstd"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(write, name, data):
    with pytest.raises(DataError, match=f"{name} (cannot be read on from document|cannot be opened)") as caught:
        texts(CorpusChoice(name=write(name, data)))
    assert "\n" not in str(caught.value) and "Repair the file" in str(caught.value)


# Data as they come


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md", "a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("where", ["file", "document"])
def test_byte_order_marks_are_left_out(write, name, where):
    text = "\ufeffone" if where == "document" else "one"
    if name.startswith("a.json"):
        data = json.dumps([{"text": text}] if name == "a.json" else {"text": text}).encode()
    else:
        data = text.encode()
    data = b"\xef\xbb\xbf" + data if where == "file" else data
    path = write(name, gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(CorpusChoice(name=path)) == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_file_is_read_in_the_encoding_that_its_mark_names(write, encoding):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    assert texts(CorpusChoice(name=write("a.txt", mark + "naïve\r\ntext".encode(encoding)))) == ["naïve\ntext"]


@pytest.mark.parametrize("n", [1, 40])
def test_text_files_are_read_and_shuffled_as_datasets_reads_them(write, tmp_path, n):
    files = [write(f"c/{i:02d}.txt", f"document {i}\r\nof {n}\r".encode()) for i in range(n)]
    for seed in (0, 3):
        rows = datasets.load_dataset(
            "text", split="train", streaming=True, data_files={"train": files}, sample_by="document"
        )
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if seed else rows
        for start in (0, 1, 7):
            expected = [row["text"] for row in rows.skip(start)]
            assert texts(CorpusChoice(name=str(tmp_path / "c"), seed=seed), start) == expected


@pytest.mark.parametrize("splits", [(), ("train", "test")])
def test_a_folder_of_save_to_disk_is_a_dataset(tmp_path, splits):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    saved = datasets.DatasetDict({split: dataset.select(range(i, 25)) for i, split in enumerate(splits)}) or dataset
    saved.save_to_disk(str(tmp_path / "saved"))
    corpus = find_corpus(CorpusChoice(name=str(tmp_path / "saved")))
    corpus.check()
    assert corpus.recipe.revision.startswith("sha256:")
    for start in (0, 7, 25):
        assert texts(CorpusChoice(name=str(tmp_path / "saved")), start) == TEXTS[start:]
    if splits:
        assert texts(CorpusChoice(name=str(tmp_path / "saved"), split="test")) == TEXTS[1:]
        with pytest.raises(DataError, match=r"Unknown split 'tset'. Did you mean 'test'\?"):
            find_corpus(CorpusChoice(name=str(tmp_path / "saved"), split="tset"))
    else:
        with pytest.raises(ConfigError, match="--split test: .* is no dataset of the Hub"):
            find_corpus(CorpusChoice(name=str(tmp_path / "saved"), split="test"))
    with pytest.raises(DataError, match="has no column 'body'. It has: n, text"):
        find_corpus(CorpusChoice(name=str(tmp_path / "saved"), field="body")).check()


OTHERS = {
    "type": {"n": [float(i) for i in range(25)]},
    "missing": {},
    "more": {"n": list(range(25)), "z": ["q"] * 25},
    "nested": {"n": [{"a": i} for i in range(25)]},
}


@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_columns_that_are_not_read_may_differ_from_file_to_file(tmp_path, difference, field):
    values = TEXTS if field == "text" else [[i, 0] for i in range(25)]
    mask = {} if field == "text" else {"attention_mask": [[1, 0]] * 25}
    tables = ({field: values, "n": list(range(25))} | mask, OTHERS[difference] | mask | {field: values})
    for name, table in zip("ab", tables, strict=True):
        pa.parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    choice = CorpusChoice(name=str(tmp_path), field=field, tokenized=field != "text")
    find_corpus(choice).check()
    assert texts(choice) == (TEXTS * 2 if field == "text" else [[i] for i in range(25)] * 2)


def test_a_file_without_the_column_that_is_read_is_named(tmp_path):
    for name, field in (("a", "text"), ("b", "body")):
        pa.parquet.write_table(pa.table({field: TEXTS}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="b.parquet has no column 'text', which a.parquet has. It has: body"):
        find_corpus(CorpusChoice(name=str(tmp_path))).check()
