"""Where the text comes from: the embedded corpus, local files and folders, datasets of the Hugging Face Hub.

All of them are read through `datasets`, streaming, so that memory stays bounded and any document can be skipped to.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.shared.base.console import progress
from tcsae.shared.base.errors import ConfigError, DataError, unknown
from tcsae.shared.base.files import file_digest
from tcsae.shared.store.format import CorpusRecipe

# What names a model or a corpus exactly: a digest of local files, or a commit on the Hugging Face Hub.

TIMEOUT_S = 10.0


class HubError(Exception):
    """Why the Hub gave no answer, to stand in a message: "is not on the Hugging Face Hub"."""


def not_found(kind: str, asked: str, name: str, known: Iterable[str], error: HubError) -> str:
    """One line on a model or dataset that is nowhere: what was asked, and why the Hub has no `name` for us.

    A name that can only be the Hub's is not called unknown, nor compared with others.
    """
    if asked != name or "/" in asked:
        called = asked if asked == name else f"{asked} ({name})"
        return f"The {kind} {called} is no file or folder here, and {name} {error}. There is also: {', '.join(known)}."
    return f"{unknown(kind, asked, known)} No file or folder has this name here, and {name} {error}."


def digest_files(files: Iterable[Path], root: Path) -> str:
    """ "sha256:..." over the files' names (relative to `root`) and bytes."""
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.relative_to(root).as_posix()}\0{file_digest(file)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def hub_commit(kind: str, name: str, revision: str | None) -> str:
    """The commit that `revision` (None: the main branch) of a "model" or "dataset" names now.

    Asks the Hub once, without retries; a model that is in the local cache needs no answer. Raises HubError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        return str(ask(name, revision=revision, timeout=TIMEOUT_S).sha)
    except HFValidationError as error:
        raise HubError("can be no name on the Hugging Face Hub") from error
    except GatedRepoError as error:
        raise HubError(
            "asks for its licence to be accepted on the Hugging Face Hub; then log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"has no revision {revision!r} on the Hugging Face Hub") from error
    except RepositoryNotFoundError as error:
        raise HubError("is not on the Hugging Face Hub (if it is private, log in: hf auth login)") from error
    except (
        Exception
    ) as error:  # no route, offline mode, server faults: the HTTP library's errors change with its versions
        if kind == "model" and (commit := _cached_commit(name, revision)):
            return commit
        raise HubError(f"could not be looked up on the Hugging Face Hub ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to stand in a message of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cached_commit(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


EMBEDDED = "pydocs"
ALIASES = {"openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet")}
"""Short name -> dataset and revision; `datasets` refuses the loading script that OpenWebText's main branch has."""
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MARKUP = (".md", ".rst")
"""Read as text where there is nothing else: beside data they only describe it."""
LOCAL_READERS = {"text", *READERS.values()}
PACKED = (".gz", ".zst")
SHUFFLE_BUFFER = 10_000
Document = str | list[int]
"""Text, or token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusChoice:
    """The text that is asked for."""

    name: str = EMBEDDED
    """"pydocs", "openwebtext", a file, a folder, or a Hub id."""
    revision: str | None = None
    """Of a Hub dataset; None: its main branch."""
    config: str | None = None
    split: str = "train"
    field: str = "text"
    """The column that holds the text, or with `tokenized` the token ids."""
    tokenized: bool = False
    seed: int = 0
    """0: the corpus's own order. Otherwise documents are shuffled in a buffer of 10,000 with this seed."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. Use `find_corpus`; nothing is read before `check` or `batches`."""

    recipe: CorpusRecipe
    reader: str
    """A reader of `datasets` ("json", "text", "parquet"), or a Hub id."""
    arguments: Callable[[], dict[str, Any]]
    """What else the reader needs. Called when text is read: the embedded corpus may have to be made first."""

    def check(self) -> None:
        """Read one document. Raises DataError if there is none, or if the text's column is missing."""
        for first in self._guarded(iter(self._load().take(1)), 0, 1):
            if self.recipe.field not in first:
                ids = sorted(name for name, value in first.items() if _are_ids(value))
                hint = f" Token ids, as {ids[0]!r} has, are read by --tokens-field {ids[0]}." if ids else ""
                raise DataError(
                    f"{self.recipe.name} has no column {self.recipe.field!r}. It has: {', '.join(sorted(first))}. "
                    f"Give one of these: --text-field NAME.{hint}"
                )
            return
        raise DataError(f"{self.recipe.name} holds no document. Give another --dataset.")

    def batches(self, start: int = 0, size: int = 256) -> Iterator[list[Document]]:
        """Documents `start`, `start + 1`, ..., up to `size` at a time; "" or no ids for an empty one.

        Raises DataError, naming the document, where one cannot be read.
        """
        dataset = self._load().select_columns([self.recipe.field])
        if self.recipe.seed:
            dataset = dataset.shuffle(seed=self.recipe.seed, buffer_size=SHUFFLE_BUFFER)
        number, ids = start, self.recipe.tokenized
        for batch in self._guarded(dataset.skip(start).iter(batch_size=size), start, size):
            documents = [("", [])[ids] if one is None else one for one in batch[self.recipe.field]]
            for i, one in enumerate(documents):
                if not (one == [] or _are_ids(one)) if ids else not isinstance(one, str):
                    wanted, option = ("token ids", "--tokens-field") if ids else ("text", "--text-field")
                    raise DataError(
                        f"{self.recipe.name}: document {number + i} has {type(one).__name__} in column "
                        f"{self.recipe.field!r}, not {wanted}. Give another column: {option} NAME."
                    )
            number += len(documents)
            yield documents

    def _load(self) -> Any:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors come as one line of ours
        arguments = self.arguments()
        try:
            return datasets.load_dataset(self.reader, split=self.recipe.split, streaming=True, **arguments)
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
        except Exception as error:  # as in `_load`
            raise DataError(
                f"{self.recipe.name} cannot be read on from document {n} or soon after ({first_line(error)}). "
                f"{self._cure()}"
            ) from error

    def _cure(self) -> str:
        if self.reader in LOCAL_READERS:
            return "Repair the file, or give another --dataset."
        return "If this was the network, start the same harvest again: it goes on where it stopped."


def find_corpus(choice: CorpusChoice) -> Corpus:
    """Find a corpus and name its revision: a digest of local files, or a commit of the Hub. Its text is not parsed.

    Raises DataError: unknown, unreachable, or of no kind that can be read; ConfigError: options of the Hub for what is
    local.
    """
    path = Path(choice.name).expanduser()
    if choice.name == EMBEDDED or (choice.name not in ALIASES and path.exists()):
        _check_local(choice)
    if choice.name == EMBEDDED:
        from tcsae.data.pydocs import pydocs_revision

        recipe = _recipe(choice, EMBEDDED, pydocs_revision())
        return Corpus(recipe, "json", lambda: {"data_files": {choice.split: [str(_embedded_file())]}})
    if choice.name not in ALIASES and path.exists():
        reader, files = _local_files(path)
        root = path if path.is_dir() else path.parent
        arguments: dict[str, Any] = {"data_files": {choice.split: [str(file) for file in files]}}
        arguments |= {"sample_by": "document"} if reader == "text" else {}
        return Corpus(_recipe(choice, path.resolve().name, digest_files(files, root)), reader, lambda: arguments)
    name, revision = ALIASES.get(choice.name, (choice.name, None))
    revision = choice.revision or revision
    try:
        commit = hub_commit("dataset", name, revision)
    except HubError as error:
        known = [EMBEDDED, *ALIASES, "a file or folder of .txt, .jsonl, .json or .parquet", "a Hub id"]
        raise DataError(not_found("dataset", choice.name, name, known, error)) from error
    return Corpus(_recipe(choice, name, commit), name, lambda: {"name": choice.config, "revision": commit})


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
    candidates = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    seen = [file for file in candidates if not file.name.startswith(".")]
    files = [file for file in seen if _ending(file) in READERS] or [file for file in seen if _ending(file) in MARKUP]
    kinds = sorted({READERS.get(_ending(file), "text") for file in files})
    if len(kinds) != 1:
        found = f"files for {' and '.join(kinds)}, which are read differently" if kinds else "nothing that can be read"
        raise DataError(
            f"{path} holds {found}. Give a file, or a folder with one kind of files: .txt, .md or .rst (a "
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
