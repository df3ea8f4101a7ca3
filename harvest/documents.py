"""Documents, in a fixed order: of the embedded corpus, of local files and folders, of datasets of the Hub.

All of them are read through `datasets`, streaming, so that memory stays bounded and any document can be skipped to.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tcsae.harvest.assumptions import companion_columns, without_padding
from tcsae.harvest.local_rows import DOCUMENT_CHARACTERS, Row, json_rows, text_rows
from tcsae.harvest.messages import as_messages
from tcsae.harvest.revisions import LOCAL, HubError, digest_files, first_line, not_found, pinned_commit
from tcsae.shared.base.console import progress
from tcsae.shared.base.errors import ConfigError, DataError, unknown
from tcsae.shared.store.format import CorpusRecipe

PYDOCS = "pydocs"
ALIASES = {"openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet")}
"""Short name -> dataset and revision; `datasets` refuses the loading script that OpenWebText's main branch has."""
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MARKUP = (".md", ".rst")
"""Read as text where there is nothing else: beside data they only describe it."""
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
"""Files of a folder that `save_to_disk` wrote: of one dataset, and of a dictionary of them."""
PACKED = (".gz", ".zst")
BOM = "\ufeff"
SHUFFLE_BUFFER = 10_000
BATCH_DOCUMENTS = 32
"""Read at a time: 256 would be 2.6 GB of documents of 10 MB."""
Document = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or the messages of a conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusChoice:
    """The text that is asked for."""

    name: str = PYDOCS
    """"pydocs", "openwebtext", a file, a folder, or a Hub id."""
    revision: str | None = None
    """Of a Hub dataset; None: its main branch."""
    config: str | None = None
    split: str = "train"
    field: str = "text"
    """The column that holds the text, with `tokenized` the token ids, with `chat` the messages."""
    tokenized: bool = False
    chat: bool = False
    """The field holds conversations: lists of messages."""
    seed: int = 0
    """0: the corpus's own order. Otherwise documents are shuffled in a buffer of 10,000 with this seed."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. Use `find_corpus`; nothing is read before `check` or `batches`."""

    recipe: CorpusRecipe
    load: Callable[[], Any]
    """The rows, a `datasets.IterableDataset`. Called when text is read: the embedded corpus may have to be made first.
    """
    is_local: bool = True
    pad_id: int | None = None
    """Of the tokenizer, where token ids may be padded and only labels say so."""
    chat: bool = False
    """The documents are conversations."""

    def check(self) -> None:
        """Read one document. Raises DataError if there is none, or if the text's column is missing."""
        for first in self._guarded(iter(self._rows().take(1)), 0, 1):
            if self.recipe.field not in first:
                ids = sorted(name for name, value in first.items() if _are_ids(value))
                hint = f" Token ids, as {ids[0]!r} has, are read by --tokens-field {ids[0]}." if ids else ""
                option = "--messages-field" if self.chat else "--text-field"
                raise DataError(
                    f"{self.recipe.name} has no column {self.recipe.field!r}. It has: "
                    f"{', '.join(sorted(first)) or 'none'}. Give one of these: {option} NAME.{hint}"
                )
            return
        raise DataError(f"{self.recipe.name} holds no document. Give another --dataset.")

    def batches(self, start: int = 0, size: int = BATCH_DOCUMENTS) -> Iterator[list[Document]]:
        """Documents `start`, `start + 1`, ..., up to `size` at a time; "" or no ids for an empty one.

        Text is without a byte order mark. Token ids are without the padding that an attention mask or labels beside
        them name. Raises DataError, naming the document, where one cannot be read.
        """
        rows = self._rows()
        companions = self._companions(rows)
        rows = rows.select_columns([self.recipe.field, *companions])
        if self.recipe.seed:
            rows = rows.shuffle(seed=self.recipe.seed, buffer_size=SHUFFLE_BUFFER)
        number = start
        for batch in self._guarded(rows.skip(start).iter(batch_size=size), start, size):
            values = batch[self.recipe.field]
            masks, labels = (batch.get(name, [None] * len(values)) for name in companion_columns(self.recipe.field))
            yield [self._document(number + i, *row) for i, row in enumerate(zip(values, masks, labels, strict=True))]
            number += len(values)

    def _document(self, number: int, value: Any, mask: Any, labels: Any) -> Document:
        ids = self.recipe.tokenized
        if value is None:
            return [] if ids or self.chat else ""
        if self.chat:
            return self._conversation(number, value)
        if not (value == [] or _are_ids(value)) if ids else not isinstance(value, str):
            kind, option = ("token ids", "--tokens-field") if ids else ("text", "--text-field")
            raise DataError(
                f"{self.recipe.name}: document {number} has {type(value).__name__} in column "
                f"{self.recipe.field!r}, not {kind}. Give another column: {option} NAME."
            )
        if not ids:
            return self._text(number, value)
        try:
            return without_padding(value, mask, labels, self.pad_id)
        except ValueError as error:
            raise DataError(
                f"{self.recipe.name}: document {number} has an attention mask that is none of its token ids ({error}). "
                "Repair the data, or leave that column out."
            ) from error

    def _conversation(self, number: int, value: Any) -> list[dict[str, Any]]:
        try:
            return as_messages(value)
        except ValueError as error:
            raise DataError(
                f"{self.recipe.name}: document {number} has {error} in column {self.recipe.field!r}. Give another "
                "column: --messages-field NAME."
            ) from error

    def _text(self, number: int, value: str) -> str:
        """A text as UTF-8 holds it: without a byte order mark, and U+FFFD in place of half a surrogate pair, which the
        escapes of JSON can write.
        """
        if len(value) > DOCUMENT_CHARACTERS:
            raise DataError(
                f"{self.recipe.name}: document {number} has {len(value):,} characters, {DOCUMENT_CHARACTERS:,} are "
                "allowed. Split it."
            )
        value = value.removeprefix(BOM)
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value

    def _companions(self, rows: Any) -> list[str]:
        """Columns beside the token ids that say which of them are padding."""
        if not self.recipe.tokenized:
            return []
        known = rows.column_names
        if known is None:
            known = next(self._guarded(iter(rows.take(1)), 0, 1), {})
        return [name for name in companion_columns(self.recipe.field) if name in known]

    def _rows(self) -> Any:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors come as one line of ours
        try:
            return self.load()
        except DataError:
            raise
        except StopIteration as error:  # it looks at the first record, and there is none
            raise DataError(f"{self.recipe.name} holds no document. Give another --dataset.") from error
        except Exception as error:  # below lie a dozen formats, compressions and protocols, each with its own errors
            raise DataError(f"{self.recipe.name} cannot be opened ({first_line(error)}). {self._cure()}") from error

    def _guarded(self, items: Iterator[Any], start: int, step: int) -> Iterator[Any]:
        n = start
        try:
            for item in items:
                yield item
                n += step
        except Exception as error:  # as in `_rows`
            raise DataError(
                f"{self.recipe.name} cannot be read on from document {n} or soon after ({first_line(error)}). "
                f"{self._cure()}"
            ) from error

    def _cure(self) -> str:
        if self.is_local:
            return "Repair the file, or give another --dataset."
        return "If this was the network, start the same harvest again: it goes on where it stopped."


def find_corpus(choice: CorpusChoice, stored: CorpusRecipe | None = None) -> Corpus:
    """Find a corpus and name its revision: a digest of local files, or a commit of the Hub. Its text is not parsed.

    `stored` is the corpus of the store that is there: its commit stands where the same dataset is asked for.
    Raises DataError: unknown, unreachable, or of no kind that can be read; ConfigError: options of the Hub for what is
    local.
    """
    return replace(_find_corpus(choice, stored), chat=choice.chat)


def _find_corpus(choice: CorpusChoice, stored: CorpusRecipe | None) -> Corpus:
    path = Path(choice.name).expanduser()
    if choice.name == PYDOCS:
        from tcsae.data.pydocs import pydocs_revision

        _check_local(choice)
        recipe = _recipe(choice, PYDOCS, pydocs_revision())
        return Corpus(recipe, lambda: _load_files("json", [_embedded_file()], choice))
    if choice.name not in ALIASES and path.exists():
        if path.is_dir() and (saved := _saved_folder(path, choice)):
            digest = digest_files([file for file in saved.rglob("*") if file.is_file()], saved)
            return Corpus(_recipe(choice, path.resolve().name, digest), lambda: _load_saved(saved))
        _check_local(choice)
        reader, files = _local_files(path)
        recipe = _recipe(choice, path.resolve().name, digest_files(files, path if path.is_dir() else path.parent))
        return Corpus(recipe, lambda: _load_files(reader, files, choice))
    if "[" in choice.split:
        raise ConfigError(
            f"--split {choice.split}: datasets are streamed, and a part of a split cannot be. Give the split's name, "
            "and how much of it with --tokens."
        )
    name, revision = ALIASES.get(choice.name, (choice.name, None))
    pinned = stored.revision if stored is not None and stored.name == name else LOCAL
    known_commit = None if pinned.startswith(LOCAL) else pinned
    try:
        # The revision of an alias is looked up once a store, as the main branch of others is.
        asked = choice.revision or (None if known_commit else revision)
        commit = pinned_commit("dataset", name, asked, known_commit)
    except HubError as error:
        known = [PYDOCS, *ALIASES, "a file or folder of .txt, .jsonl, .json or .parquet", "a Hub id"]
        raise DataError(not_found("dataset", choice.name, name, known, error)) from error
    load = partial(_load, name, choice.split, name=choice.config, revision=commit)
    return Corpus(_recipe(choice, name, commit), load, is_local=False)


def _load(reader: str, split: str, **options: Any) -> Any:
    """`reader`: one of `datasets` ("json", "parquet"), or a Hub id."""
    import datasets

    return datasets.load_dataset(reader, split=split, streaming=True, **options)


def _load_saved(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder)).to_iterable_dataset()


def _load_files(reader: str, files: list[Path], choice: CorpusChoice) -> Any:
    """The rows of local files, in order."""
    names, companions = [str(file) for file in files], companion_columns(choice.field) if choice.tokenized else ()
    if reader == "text":
        return _rows_from(text_rows, files=names)
    if reader == "json":
        return _rows_from(json_rows, files=names, fields=(choice.field, *companions))
    files = _with_rows(files)
    options: dict[str, Any] = {"data_files": {choice.split: [str(file) for file in files]}}
    if columns := _shared_columns(files, choice):
        options["columns"] = columns
    return _load(reader, choice.split, **options)


def _rows_from(rows: Callable[..., Iterator[Row]], **arguments: Any) -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments)


def _with_rows(files: list[Path]) -> list[Path]:
    """Parquet files but those without a row, which `datasets` cannot read. Raises DataError if none is left."""
    from pyarrow import parquet

    files = [file for file in files if parquet.read_metadata(file).num_rows]
    if not files:
        raise DataError("The Parquet files hold no document. Give another --dataset.")
    return files


def _shared_columns(files: list[Path], choice: CorpusChoice) -> list[str]:
    """The columns of Parquet files that are read: what else there is may differ from file to file.

    Empty where the first file lacks the field; `Corpus.check` then says what there is. Raises DataError where another
    one lacks it.
    """
    from pyarrow import parquet

    names = [set(parquet.read_schema(file).names) for file in files]
    if choice.field not in names[0]:
        return []
    for file, columns in zip(files, names, strict=True):
        if choice.field not in columns:
            raise DataError(
                f"{file.name} has no column {choice.field!r}, which {files[0].name} has. It has: "
                f"{', '.join(sorted(columns))}. Leave that file out."
            )
    shared = set.intersection(*names)
    return [choice.field, *(name for name in companion_columns(choice.field) if choice.tokenized and name in shared)]


def _saved_folder(path: Path, choice: CorpusChoice) -> Path | None:
    """The folder of the dataset that `save_to_disk` wrote to `path`, or of its split `choice.split`; None if it wrote
    none.

    Raises DataError for a split that is not there; ConfigError for options of the Hub.
    """
    if all((path / name).is_file() for name in SAVED):
        _check_local(choice)
        return path
    if not (path / SAVED_SPLITS).is_file():
        return None
    _check_local(replace(choice, split="train"))
    splits = sorted(folder.name for folder in path.iterdir() if (folder / SAVED[0]).is_file())
    if choice.split not in splits:
        raise DataError(f"{choice.name}: {unknown('split', choice.split, splits)} Give one of these: --split NAME.")
    return path / choice.split


def _check_local(choice: CorpusChoice) -> None:
    """Raises ConfigError for what only a dataset of the Hub has."""
    for option, value, usual in (
        ("--dataset-revision", choice.revision, None),
        ("--dataset-config", choice.config, None),
        ("--split", choice.split, "train"),
    ):
        if value != usual:
            raise ConfigError(f"{option} {value}: {choice.name} is no dataset of the Hub and has none. Leave it out.")


def _recipe(choice: CorpusChoice, name: str, revision: str) -> CorpusRecipe:
    return CorpusRecipe(
        name=name,
        revision=revision,
        config=choice.config,
        split=choice.split,
        field=choice.field,
        tokenized=choice.tokenized,
        seed=choice.seed,
    )


def _local_files(path: Path) -> tuple[str, list[Path]]:
    """The reader for a file, or for a folder's readable files, and those files, sorted."""
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is a pipe or a device, which can be read once. Put its text into a file.")
    candidates = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    seen = [file for file in candidates if not file.name.startswith(".")]
    files = [file for file in seen if _ending(file) in READERS] or [file for file in seen if _ending(file) in MARKUP]
    kinds = sorted({READERS.get(_ending(file), "text") for file in files})
    if len(kinds) != 1:
        differ = f"files for {' and '.join(kinds)}, which are read differently"
        content = differ if kinds else "nothing that can be read"
        raise DataError(
            f"{path} holds {content}. Give a file, or a folder with one kind of files: .txt, .md or .rst (a "
            "document each), .jsonl, .json (both also .gz or .zst) or .parquet."
        )
    if any(file.suffix == ".zst" for file in files) and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path} is packed with zstd, which needs a package: pip install zstandard.")
    return kinds[0], files


def _embedded_file() -> Path:
    """The file of the embedded corpus, with a progress bar the first time, when it is parsed."""
    from tcsae.data.pydocs import pydocs_file

    with ExitStack() as stack:
        bar: list[Callable[..., None]] = []
        before = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal before
            if not bar:
                bar.append(stack.enter_context(progress("Reading the installed documentation, once", total, "files")))
            bar[0](done - before)
            before = done

        return pydocs_file(on_progress)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int) and not isinstance(value[0], bool)


def _ending(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
