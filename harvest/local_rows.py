"""Rows of local text and JSON files, one after the other, packed or not: a file is never in memory as a whole.

JSON is read here and not by `datasets`, whose reader (PyArrow's) makes timestamps of text that looks like a date, and
guesses the columns from the first 10 MB.
"""

import codecs
import gzip
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENCODINGS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""What a text file's first two bytes say; else it is UTF-8."""
DOCUMENT_CHARACTERS = 1 << 28
"""Of one document, at most: text and token ids of it lie in memory as a whole, some 10 bytes a character."""
BLOCK_CHARACTERS = 1 << 20
LOOK_AHEAD = 1000
"""Rows that are looked at for the field, so that columns can be named where there is none."""
Row = dict[str, Any]


class RowError(ValueError):
    """What is wrong with a file, and where."""


def text_rows(files: Sequence[str]) -> Iterator[Row]:
    """The whole text of each file, without its byte order mark; line ends as in Python's text files."""
    for file in files:
        with _opened(file, None) as opened:
            text = opened.read(DOCUMENT_CHARACTERS + 1)
        if len(text) > DOCUMENT_CHARACTERS:
            raise RowError(
                f"{Path(file).name} is one document of more than {DOCUMENT_CHARACTERS:,} characters; split it, or make "
                "a .jsonl of it, a document a line"
            )
        yield {"text": text}


def json_rows(files: Sequence[str], fields: Sequence[str]) -> Iterator[Row]:
    """The objects of JSON files, every value as it stands there; of `fields`, None for what an object lacks.

    .jsonl: an object a line. .json: objects one after the other, an array of objects (or of texts, as column "text"),
    or one object of columns. Where the first of `fields` is nowhere in the first rows they come without, so that the
    caller can name the columns that there are. Raises RowError, naming file and place.
    """
    rows = itertools.chain.from_iterable(map(_rows_of, files))
    ahead: list[Row] = []
    for row in rows:
        ahead.append(row)
        if fields[0] in row:
            empty = dict.fromkeys(fields)
            yield from ({**empty, **one} for one in itertools.chain(ahead, rows))
            return
        if len(ahead) == LOOK_AHEAD:
            break
    yield from itertools.chain(ahead, rows)


def _rows_of(file: str) -> Iterator[Row]:
    name = Path(file).name
    with _opened(file, "\n") as opened:
        if name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
            yield from _lines(name, opened)
            return
        for number, value in enumerate(_values(name, opened), 1):
            yield {"text": value} if isinstance(value, str) else _row(value, f"{name}, value {number}")


def _lines(name: str, opened: io.TextIOBase) -> Iterator[Row]:
    for number in itertools.count(1):
        line = opened.readline(DOCUMENT_CHARACTERS + 1)
        if not line:
            return
        if len(line) > DOCUMENT_CHARACTERS:
            raise RowError(f"{name}, line {number} has more than {DOCUMENT_CHARACTERS:,} characters")
        if not line.isspace():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise RowError(f"{name}, line {number}: no JSON ({error.msg} at character {error.pos})") from error
            yield _row(value, f"{name}, line {number}")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise RowError(f"{where}: a JSON {type(value).__name__}, not an object")
    return value


def _values(name: str, opened: io.TextIOBase) -> Iterator[Any]:
    """The values of a .json file: those of its array, those of its columns side by side, or one after the other."""
    reader = _Values(name, opened)
    if reader.next_is("["):
        while not reader.next_is("]"):
            reader.next_is(",")
            yield reader.value()
        return
    if not reader.peek():
        return
    first = reader.value()
    columns = [] if reader.peek() else _columns(first)
    yield from columns or [first]
    while reader.peek():
        yield reader.value()


def _columns(value: Any) -> list[Row]:
    """The rows of one object of columns; none if it is a row itself."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(one, list) and len(one) == len(columns[0]) for one in columns):
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


class _Values:
    """JSON values, parsed as the text comes in."""

    def __init__(self, name: str, opened: io.TextIOBase) -> None:
        self._name, self._opened = name, opened
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._read_on():
                return ""

    def next_is(self, character: str) -> bool:
        """Whether that is `character`, which is then left behind."""
        is_next = self.peek() == character
        self._at += is_next
        return is_next

    def value(self) -> Any:
        """The next value. Raises RowError."""
        self.peek()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                excerpt = self._text[error.pos :][:20] or "the end of the file"
                is_cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if is_cut and len(self._text) - self._at <= DOCUMENT_CHARACTERS and self._read_on():
                    continue
                raise RowError(f"{self._name}: no JSON ({error.msg}: {excerpt!r})") from error
            return value

    def _read_on(self) -> bool:
        """As much again as one value has taken so far, so that a long one is not parsed too often."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        block = self._opened.read(max(BLOCK_CHARACTERS, len(self._text)))
        self._ended = not block
        self._text += block
        return not self._ended


@contextmanager
def _opened(file: str, newline: str | None) -> Iterator[io.TextIOBase]:
    """A file's text, unpacked. Raises RowError, naming the file, where it cannot be read."""
    try:
        with _unpacked(file) as packed:
            encoding = ENCODINGS.get(packed.peek(2)[:2], "utf-8-sig")
            yield io.TextIOWrapper(packed, encoding=encoding, newline=newline)
    except RowError:
        raise
    except Exception as error:  # below lie compressions and encodings, each with its own errors
        raise RowError(f"{Path(file).name}: {error}") from error


def _unpacked(file: str) -> Any:
    """A file's bytes, as a buffered reader."""
    if file.lower().endswith(".gz"):
        return gzip.open(file, "rb")
    if file.lower().endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(file, "rb"))
    return Path(file).open("rb")
