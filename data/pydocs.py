"""The corpus `pydocs`: documentation that every installation has, so that no network is needed.

Documents are the docstrings and pydoc topics of the standard library and of the packages this project depends on, at
least 200 characters each, without duplicates and near-duplicates. They are parsed once and kept in the user's cache
directory (or in TCSAE_CACHE), one file for each set of installed versions.

    python -m tcsae.data.pydocs

parses anew and prints what was read, what was dropped and why, and what is left of train in eval.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import pydoc_data.topics
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tcsae.data.near_duplicates import Filtered, drop_near_duplicates
from tcsae.shared.base.errors import DataError
from tcsae.shared.base.files import cache_path, file_digest, json_digest, remove_dead_partials, write_atomic

READER_VERSION = 1
"""Part of the revision: raise it whenever the same installation would give other documents."""

MIN_CHARACTERS = 200

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "datasets",
    "zarr",
    "numcodecs",
    "transformer_lens",
    "click",
    "rich",
)
"""Packages read after the standard library, where they are installed: those that the embedded model was trained on."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages"}
# All that may hold statements, hence definitions. Expressions, most of a syntax tree, are never looked at.
_STATEMENT_FIELDS = ("body", "orelse", "handlers", "finalbody", "cases")

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""on_progress(done, total), in files; the last one stands for the filter and the writing."""


class Document(NamedTuple):
    """One documentation text and where it stands, e.g. "torch:torch/nn/functional.py" or "topic:LAMBDA"."""

    text: str
    source: str


@dataclass(slots=True)
class Reading:
    """The raw stage: every document of at least 200 characters, each text once, in reading order."""

    documents: list[Document] = field(default_factory=list)
    n_files: int = 0
    unparsed: list[str] = field(default_factory=list)
    """Sources of files that are no Python of this version."""
    n_short: int = 0
    n_repeated: int = 0
    _seen: set[str] = field(default_factory=set, repr=False)

    def add(self, text: str, source: str) -> None:
        """Take a document, unless it is short or was there before."""
        text = text.encode(errors="replace").decode()  # a docstring may hold lone surrogates; UTF-8 may not
        if len(text) < MIN_CHARACTERS:
            self.n_short += 1
        elif text in self._seen:
            self.n_repeated += 1
        else:
            self._seen.add(text)
            self.documents.append(Document(text, source))


def pydocs_revision() -> str:
    """12 hexadecimal digits that name this installation's corpus, without parsing anything: a few milliseconds.

    A digest of the reader's version, Python's version, and the version of every package (or that it is absent).
    """
    return json_digest({"reader": READER_VERSION, **installed_versions()})[:12]


def installed_versions() -> dict[str, str]:
    """Version of Python and of each package of the corpus, "absent" where it is not installed."""
    versions = {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def pydocs_file(on_progress: Progress | None = None) -> Path:
    """The corpus as JSON Lines with the keys text and source: from the cache, or parsed now (some 20 s).

    The file appears whole or not at all, so a start after a kill parses again; one that its digest beside it does not
    fit is parsed again, too. Its order is that of `corpus`.

    Raises DataError if the cache cannot be written.
    """
    path = cache_path() / f"pydocs-{pydocs_revision()}.jsonl"
    if _is_intact(path):
        return path
    reading = read_installed(on_progress)
    documents, filtered = corpus(reading.documents)
    log.info("pydocs: %s; kept %d documents", describe(reading, filtered), len(documents))
    lines = (json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    try:
        data = "".join(lines).encode()
        remove_dead_partials(path)
        digest_path(path).unlink(missing_ok=True)
        write_atomic(path, data)
        write_atomic(digest_path(path), hashlib.sha256(data).hexdigest().encode())
    except OSError as error:
        raise DataError(
            f"Cannot write the corpus to {path}: {error.strerror}. It needs 20 MB; set TCSAE_CACHE to another folder."
        ) from error
    if on_progress:
        on_progress(reading.n_files + 1, reading.n_files + 1)
    return path


def digest_path(path: Path) -> Path:
    """Where the sha256 of a cached corpus stands."""
    return path.with_name(f"{path.name}.sha256")


def _is_intact(path: Path) -> bool:
    """Whether the corpus is there, and is what was written; without a digest, as a kill may leave it, it is."""
    if not path.is_file():
        return False
    digest = file_digest(path)
    if not digest_path(path).is_file():
        with contextlib.suppress(OSError):  # a cache that can be read only
            write_atomic(digest_path(path), digest.encode())
        return True
    return digest_path(path).read_bytes() == digest.encode()


def read_installed(on_progress: Progress | None = None) -> Reading:
    """The raw stage over this installation: pydoc's topics, the standard library, then the packages in order."""
    reading = Reading()
    for name, text in sorted(pydoc_data.topics.topics.items()):
        reading.add(text, f"topic:{name}")
    return read_documents(_installed_roots(), on_progress, reading)


def read_documents(
    roots: Mapping[str, Path], on_progress: Progress | None = None, reading: Reading | None = None
) -> Reading:
    """Read the docstrings of all Python files under `roots` (name -> package folder) into `reading`, or a new one.

    Modules, classes, functions and coroutines count, wherever they are defined. Folders and files whose name starts
    with "test" are skipped, as are other packages that lie inside. Files that do not parse are counted.
    """
    reading = reading or Reading()
    files = [(name, root, path) for name, root in roots.items() for path in _python_files(root)]
    with _undisturbed():
        for done, (name, root, path) in enumerate(files, start=1):
            source = f"{name}:{path.relative_to(root.parent).as_posix()}"
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, RecursionError, OSError):
                reading.unparsed.append(source)
            else:
                for text in _docstrings(tree):
                    reading.add(text, source)
            if on_progress:
                on_progress(done, len(files) + 1)
    reading.n_files += len(files)
    if reading.unparsed:
        log.warning("pydocs: %d files did not parse, such as %s", len(reading.unparsed), reading.unparsed[0])
    return reading


def corpus(documents: list[Document]) -> tuple[list[Document], Filtered]:
    """Documents without near-duplicates, sorted by the sha256 of their text, and what the filter dropped.

    The order is a shuffle that everybody can repeat: any prefix samples all sources.
    """
    filtered = drop_near_duplicates([document.text for document in documents])
    documents = [documents[i] for i in filtered.kept]
    return sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest()), filtered


def describe(reading: Reading, filtered: Filtered) -> str:
    """What was read and what was dropped, in one line."""
    return (
        f"{reading.n_files} files ({len(reading.unparsed)} did not parse), {len(reading.documents)} documents; dropped "
        f"{reading.n_short} short, {reading.n_repeated} repeated, {filtered.n_same_opening} with another's opening, "
        f"{filtered.n_overlapping} with half of their text in others"
    )


def _installed_roots() -> dict[str, Path]:
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name, version in installed_versions().items():
        spec = importlib.util.find_spec(name) if name in PACKAGES and version != "absent" else None
        if spec and spec.origin:
            roots[name] = Path(spec.origin).parent
    return roots


def _python_files(root: Path) -> list[Path]:
    def is_source(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return not any(part.startswith("test") or part in _SKIPPED_FOLDERS for part in parts)

    return sorted(path for path in root.rglob("*.py") if is_source(path))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    queue: deque[ast.AST] = deque([tree])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for name in _STATEMENT_FIELDS:
            inner = getattr(node, name, None)
            if isinstance(inner, list):  # the body of a lambda or conditional expression is a single node
                queue.extend(inner)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No warnings about other people's code, and no garbage collection: syntax trees are many objects, no cycles.

    In a process that has loaded torch, each full collection walks a million objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            gc.enable()


def main() -> None:
    """Parse anew and print the account of the corpus, leakage between train and eval included."""
    from tcsae.data.model import EVAL_EVERY, is_eval
    from tcsae.data.near_duplicates import n_contained

    reading = read_installed()
    documents, filtered = corpus(reading.documents)
    raw = [document.text for document in reading.documents]
    texts = [document.text for document in documents]
    held_out = [text for text in texts if is_eval(text)]
    in_train = n_contained(held_out, [text for text in texts if not is_eval(text)])
    in_raw = n_contained(held_out, [text for text in raw if not is_eval(text)])
    before = n_contained([text for text in raw if is_eval(text)], [text for text in raw if not is_eval(text)])
    print(f"revision {pydocs_revision()}: {', '.join(f'{k} {v}' for k, v in installed_versions().items())}")
    print(describe(reading, filtered))
    print(f"kept {len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes")
    print(f"eval (one in {EVAL_EVERY}): {len(held_out)} documents")
    print(f"of these, with half of their text in train: {in_train}; in train before the filter: {in_raw}")
    print(f"without the filter: {before} of {sum(map(is_eval, raw))}")


if __name__ == "__main__":
    main()
