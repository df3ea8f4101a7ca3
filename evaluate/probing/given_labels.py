"""Labels from files: the corpus's own fields, and a table that the user gives."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tcsae.shared.base.errors import DataError
from tcsae.shared.base.files import cache_path
from tcsae.shared.store.reader import Store

DOCUMENT, GIVEN = "document", "given"
"""Kinds: of whole documents, from the corpus; of the user's file."""
MOST_CATEGORIES = 20
UNKNOWN = -1


def corpus_fields(store: Store, documents: Sequence[int]) -> list[dict[str, Any]] | None:
    """The corpus's record of each document but its text; None if the corpus is no file at hand."""
    recipe = store.manifest.recipe.corpus
    path = cache_path() / f"pydocs-{recipe.revision}.jsonl" if recipe.name == "pydocs" else Path(recipe.name)
    if path.suffix not in (".jsonl", ".json") or not path.is_file() or recipe.seed:
        return None
    asked, columns_of = set(documents), {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number in asked:
                    record = json.loads(line)
                    columns_of[number] = {key: value for key, value in record.items() if key != recipe.field}
    except (OSError, ValueError, AttributeError):
        return None  # not the corpus that it was, or not JSON Lines
    return [columns_of.get(number, {}) for number in documents]


def field_labels(records: Sequence[Mapping[str, Any]]) -> dict[str, Int[ndarray, " n_documents"]]:
    """A label for each frequent value of a field; of a `source` like pkg:path/file.py, for the package before it."""
    columns: dict[str, list[str | None]] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [str(record[key]) if record.get(key) is not None else None for record in records]
        if key == "source" and any(one and ":" in one for one in values):
            key, values = "package", [one.partition(":")[0] if one else None for one in values]
        columns[key] = values
    labels = {}
    for key, values in columns.items():
        counts = Counter(one for one in values if one is not None)
        if 1 < len(counts) <= 4 * MOST_CATEGORIES:
            for value, _ in counts.most_common(MOST_CATEGORIES):
                labels[f"{key}_{value}"] = _is_value(values, value)
    return labels


def _is_value(values: Sequence[str | None], value: str) -> Int[ndarray, " n"]:
    return np.array([UNKNOWN if one is None else int(one == value) for one in values], np.int8)


def held_out_groups(records: Sequence[Mapping[str, Any]] | None, documents: Sequence[int]) -> list[str]:
    """What must not be on both sides of a probe: a module (its `source`), or else a document."""
    if records is None:
        return [str(one) for one in documents]
    return [str(record.get("source", number)) for record, number in zip(records, documents, strict=True)]


def read_labels(path: Path, lengths: Int[ndarray, " n_sequences"], documents: Int[ndarray, " n_sequences"]) -> dict:
    """{label: for each valid token of the eval split 0, 1 or -1 (not known)} of a CSV or parquet file.

    A column per label, of 0 / 1, true / false, or up to MOST_CATEGORIES names (a label each); empty cells are not
    known. A row is a token, a sequence or a document of the eval split, in order, whichever there are as many of; or
    with a column `document`, the document of that number in the corpus. Raises DataError for anything else.
    """
    columns = _columns(path)
    numbers = np.unique(documents)
    n_rows = {"tokens": int(lengths.sum()), "sequences": len(lengths), "documents": len(numbers)}
    token_sequence = np.repeat(np.arange(len(lengths)), lengths)
    token_document = np.searchsorted(numbers, documents)[token_sequence]
    n = len(next(iter(columns.values()), []))
    if DOCUMENT in columns:
        rows = _rows_of_documents(path, columns.pop(DOCUMENT), numbers)
        place = rows[token_document]
    elif n in n_rows.values():
        unit = next(unit for unit, count in n_rows.items() if count == n)
        place = {"tokens": np.arange(n_rows["tokens"]), "sequences": token_sequence, "documents": token_document}[unit]
    else:
        has = ", ".join(f"{count:,} {unit}" for unit, count in n_rows.items())
        raise DataError(f"{path} has {n:,} rows; the eval split has {has}. Give a row for each, or a column document.")
    labels = {}
    for name, values in columns.items():
        for label, one in _labels(path, name, values).items():
            labels[label] = np.where(place >= 0, one[place], UNKNOWN).astype(np.int8)
    if not labels:
        raise DataError(f"{path} has no column of labels. Give one of 0 and 1, or of names.")
    return labels


def _columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    if path.suffix not in (".csv", ".parquet"):
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}: labels come as .csv or .parquet.")
    try:
        table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}). Give another file.") from error
    return {name: table[name].to_pylist() for name in table.column_names}


def _rows_of_documents(path: Path, given: Sequence[Any], numbers: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Row of each document of the split; -1 where the file has none."""
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        raise DataError(f"{path}: the column document must hold whole numbers, of documents in the corpus.")
    if len(set(given)) < len(given):
        raise DataError(f"{path}: document {Counter(given).most_common(1)[0][0]} has several rows. Keep one of each.")
    row_of = {number: row for row, number in enumerate(given)}
    rows = np.array([row_of.get(int(number), UNKNOWN) for number in numbers])
    if (rows < 0).all():
        raise DataError(
            f"{path}: none of its {len(given):,} documents is in the eval split. Look at `documents` there."
        )
    return rows


def _labels(path: Path, name: str, values: Sequence[Any]) -> dict[str, Int[ndarray, " n"]]:
    known = {one for one in values if one is not None and one != ""}
    words = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    if known and all(str(one).lower() in words for one in known):
        return {name: np.array([words.get(str(one).lower(), UNKNOWN) for one in values], np.int8)}
    if known and all(isinstance(one, str) for one in known) and len(known) <= MOST_CATEGORIES:
        named = [one or None for one in values]
        return {f"{name}_{value}": _is_value(named, value) for value in sorted(known)}
    example = next(iter(known), None)
    raise DataError(
        f"{path}: column {name} has {len(known)} different values, such as {str(example)!r:.40}. Give 0 and 1, "
        f"or up to {MOST_CATEGORIES} names."
    )
