"""The corpus pydocs: what is read, in which order, and that the cache holds whole files only."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.data import model, pydocs
from tcsae.shared.base.errors import DataError, ModelError

WORDS = [f"{a}{b}" for a in "kmnprstvz" for b in ("ab", "eg", "il", "on", "ur", "ash", "elt", "ond")]


def prose(seed: int, n_words: int = 60) -> str:
    """More than 200 characters that share no run of 8 words with any other seed's."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def package(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf8")
    return root


def quoted(text: str) -> str:
    return f'"""{text}"""'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return package(
        tmp_path / "toy",
        {
            "__init__.py": quoted(prose(0)),
            "one.py": f"""
class Kind:
    {quoted(prose(1))}
    def method(self):
        {quoted(prose(2))}
        def inner():
            {quoted(prose(3))}
try:
    import nothing
except ImportError:
    async def coroutine():
        {quoted(prose(4))}
match 1:
    case 1:
        def matched():
            {quoted(prose(5))}
def short():
    "Too short to be a document."
function = lambda: {quoted(prose(6))}
text = {quoted(prose(7))}
""",
            "sub/again.py": quoted(prose(0)),
            "sub/test_sub.py": quoted(prose(8)),
            "tests/helper.py": quoted(prose(9)),
            "site-packages/other.py": quoted(prose(10)),
            "broken.py": "def (:\n",
            "latin.py": "# coding: latin-1\n",
            "notes.txt": prose(11),
        },
    )


def test_docstrings_of_every_kind_of_definition_are_read_and_nothing_else(toy: Path):
    reading = pydocs.read_documents({"toy": toy})

    assert {document.text for document in reading.documents} == {prose(seed) for seed in range(6)}
    assert reading.documents[0] == (prose(0), "toy:toy/__init__.py")
    assert {document.source for document in reading.documents} == {"toy:toy/__init__.py", "toy:toy/one.py"}
    assert (reading.n_files, reading.n_short, reading.n_repeated) == (5, 1, 1)
    assert reading.unparsed == ["toy:toy/broken.py"]


def test_documents_have_at_least_200_characters(tmp_path: Path):
    texts = {n: prose(n, 100)[:n].replace(" ", "-") for n in (199, 200)}
    root = package(tmp_path / "toy", {f"m{n}.py": quoted(text) for n, text in texts.items()})

    reading = pydocs.read_documents({"toy": root})

    assert [document.text for document in reading.documents] == [texts[200]]
    assert reading.n_short == 1


def test_what_does_not_parse_is_counted_and_warnings_are_silenced(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    files = {"escape.py": f'"\\d {prose(1)}"', "null.py": "x = 1\0", "surrogate.py": f'"\\ud800 {prose(2)}"'}
    root = package(tmp_path / "toy", files)
    (root / "bytes.py").write_bytes(b'"\xff"')

    reading = pydocs.read_documents({"toy": root})

    assert reading.unparsed == ["toy:toy/bytes.py", "toy:toy/null.py"]
    assert [document.text for document in reading.documents] == [f"\\d {prose(1)}", f"? {prose(2)}"]
    assert not recwarn.list


def test_progress_counts_files_and_keeps_the_last_step_for_the_filter(toy: Path):
    seen: list[tuple[int, int]] = []
    pydocs.read_documents({"toy": toy}, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 6)]


def test_the_order_is_by_sha256_and_does_not_depend_on_the_order_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = package(tmp_path / "toy", {f"m{seed}.py": quoted(prose(seed)) for seed in range(20)})
    first, _ = pydocs.corpus(pydocs.read_documents({"toy": root}).documents)
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listing(path, pattern))))
    again, _ = pydocs.corpus(pydocs.read_documents({"toy": root}).documents)
    shuffled, _ = pydocs.corpus(random.Random(1).sample(first, len(first)))

    assert [sha256(document.text) for document in first] == sorted(sha256(prose(seed)) for seed in range(20))
    assert first == again == shuffled


@pytest.fixture
def cache(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy package as the whole installation, an empty cache, one set of versions."""
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pydocs, "installed_versions", lambda: {"python": "3.11", "toy": "1"})
    monkeypatch.setattr(pydocs, "read_installed", lambda on: pydocs.read_documents({"toy": toy}, on))
    return tmp_path / "cache"


def test_the_corpus_is_parsed_once_for_each_set_of_versions(cache: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    path = pydocs.pydocs_file(lambda done, total: seen.append((done, total)))
    assert path == cache / f"pydocs-{pydocs.pydocs_revision()}.jsonl"
    assert seen[-1] == (6, 6)
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    assert [sha256(row["text"]) for row in rows] == sorted(sha256(prose(seed)) for seed in range(6))
    assert all(set(row) == {"text", "source"} for row in rows)

    parsed = len(seen)
    assert pydocs.pydocs_file(lambda done, total: seen.append((done, total))) == path
    assert len(seen) == parsed

    monkeypatch.setattr(pydocs, "installed_versions", lambda: {"python": "3.11", "toy": "2"})
    assert pydocs.pydocs_file() != path
    assert len(list(cache.glob("*.jsonl"))) == 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_cached_corpus_that_is_not_what_was_written_is_parsed_anew(damage: str):
    path = pydocs.pydocs_file()
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(
        {"flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "cut": data[:at], "empty": b""}[damage]
    )
    assert pydocs.pydocs_file().read_bytes() == data
    pydocs.digest_path(path).unlink()  # as a kill between the two leaves it
    assert pydocs.pydocs_file().read_bytes() == data
    assert pydocs.digest_path(path).is_file()


def test_a_parse_that_was_stopped_leaves_nothing_that_a_second_start_would_use(cache: Path):
    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:  # noqa: ARG001
        raise StoppedError

    with pytest.raises(StoppedError):
        pydocs.pydocs_file(stop)
    assert not cache.exists()

    # What a kill within the writing leaves: half a line under a temporary name.
    cache.mkdir()
    torn = cache / f"pydocs-{pydocs.pydocs_revision()}.jsonl.0123.partial"
    torn.write_text('{"text": "hal')
    rows = [json.loads(line) for line in pydocs.pydocs_file().read_text(encoding="utf8").splitlines()]
    assert len(rows) == 6


def test_a_cache_that_cannot_be_written_is_an_error_with_its_cure(cache: Path):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"Cannot write the corpus to .*: .*; set TCSAE_CACHE to another folder\."):
        pydocs.pydocs_file()


def test_datasets_reads_the_file_back_as_it_is(cache: Path, toy: Path, tmp_path: Path):
    from datasets import load_dataset

    odd = f"line\u2028separator \x85 emoji \U0001f600 null \\x00 tab\t {prose(30)}"
    package(toy, {"odd.py": quoted(odd)})
    path = pydocs.pydocs_file()

    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))

    expected = {prose(seed) for seed in range(6)} | {odd.replace("\\x00", "\0").expandtabs()}
    assert cache in path.parents
    assert set(rows["text"]) == expected
    assert rows.column_names == ["text", "source"]


def test_the_revision_changes_with_versions_and_with_the_reader(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.13.0", "numpy": "2.4.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise pydocs.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(pydocs.importlib.metadata, "version", version)
    assert pydocs.installed_versions()["pandas"] == "absent"
    revisions = [pydocs.pydocs_revision(), pydocs.pydocs_revision()]
    assert re.fullmatch("[0-9a-f]{12}", revisions[0])
    assert revisions[0] == revisions[1]
    versions["numpy"] = "2.4.7"
    revisions.append(pydocs.pydocs_revision())
    versions["pandas"] = "3.1"
    revisions.append(pydocs.pydocs_revision())
    monkeypatch.setattr(pydocs, "READER_VERSION", pydocs.READER_VERSION + 1)
    revisions.append(pydocs.pydocs_revision())
    assert len(set(revisions)) == 4


def test_an_absent_package_is_skipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pydocs, "installed_versions", lambda: {"python": "3.11", "torch": "absent", "click": "8"})
    assert list(pydocs._installed_roots()) == ["python", "click"]


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path))
    assert pydocs.cache_path() == tmp_path
    monkeypatch.delenv("TCSAE_CACHE")
    assert pydocs.cache_path().name == "tcsae"


@settings(deadline=None)
@given(st.text(), st.integers(1, 50))
def test_the_split_rule_reads_the_digest_as_one_big_endian_number(text: str, every: int):
    assert model.is_eval(text, every) == (int(sha256(text), 16) % every == 0)


def test_a_missing_embedded_model_is_an_error_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert (model.embedded_model_path() / "model.safetensors").is_file()
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    with pytest.raises(ModelError, match=r"embedded model is gone .*Install tcsae again, or name another --model"):
        model.embedded_model_path()
    folder = tmp_path / "embedded"
    folder.mkdir()
    for name in set(model.FILES) - {"tokenizer.json"}:
        (folder / name).touch()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        model.embedded_model_path()
