"""Activations that another program saved -> a sealed store, with counts that add up."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from tcsae.harvest.imports.array_files import Layout, array_groups, group_tokens, hooks_of, layout_of
from tcsae.harvest.imports.cutting import Cutter, Tokens
from tcsae.harvest.imports.foreign_caches import SaelensCache, VllmStates
from tcsae.harvest.language_model import find_model
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.errors import ConfigError, DataError, unknown
from tcsae.shared.base.files import disk_errors
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.store.create import create_store
from tcsae.shared.store.reader import Store

Form = Literal["saelens", "vllm", "nnsight", "npy", "safetensors"]
FORMS = ("saelens", "vllm", "nnsight", "npy", "safetensors")
DEFAULT_LENGTH = 128
"""Of sequences where a source has whole documents."""


@runtime_checkable
class Source(Protocol):
    """Saved activations."""

    layout: Layout
    widths: dict[str, int]
    """Per hook, as the source names it."""
    n_tokens: int
    """At most: padding is not known before it is read."""

    def tokens(self) -> Iterator[Tokens]: ...


class ArraySource:
    """Array files; see `array_files`."""

    def __init__(self, path: Path, form: str) -> None:
        self._groups = array_groups(path, form)
        layouts = [layout_of(name, group) for name, group in self._groups]
        first = layouts[0]
        self.widths = {name: lazy.shape[-1] for name, lazy in hooks_of(self._groups[0][1]).items()}
        for (name, group), layout in zip(self._groups, layouts, strict=True):
            widths = {one: lazy.shape[-1] for one, lazy in hooks_of(group).items()}
            if (widths, layout[:3]) != (self.widths, first[:3]):
                raise DataError(
                    f"{name} has {_said(widths, layout)}; the first, {self._groups[0][0]}, has "
                    f"{_said(self.widths, first)}. Give parts that are alike."
                )
        self.layout = first._replace(length=max(layout.length for layout in layouts))
        shapes = [next(iter(hooks_of(group).values())).shape[:-1] for _, group in self._groups]
        self.n_tokens = sum(math.prod(shape) for shape in shapes)

    def tokens(self) -> Iterator[Tokens]:
        numbered, run, document = self.layout.has_documents, 0, 0
        for name, group in self._groups:
            first_run, first_document = run, document
            for tokens in group_tokens(group, first_run, first_document):
                if not len(tokens.run):
                    continue
                if numbered and (tokens.document[0] < document or (np.diff(tokens.document) < 0).any()):
                    raise DataError(f"{name}: documents fall, after {document}. Sort the tokens by document.")
                yield tokens
                run, document = int(tokens.run[-1]) + 1, int(tokens.document[-1]) + (not numbered)


def _said(widths: dict[str, int], layout: Layout) -> str:
    hooks = ", ".join(f"{name} of width {n}" for name, n in widths.items())
    ids, documents = ("" if one else "no " for one in (layout.has_ids, layout.has_documents))
    return f"{hooks}, {ids}ids, {documents}documents"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """What is imported, and how it is cut."""

    form: Form
    path: Path
    hooks: tuple[str, ...] = ()
    """Names for the store; of several arrays those that are taken, or one for each in their order."""
    model: str = "unknown"
    """The language model, as it is said of the store."""
    tokenizer: str | None = None
    """A model (folder, Hub id, embedded) whose tokenizer the store is to keep."""
    sequence_length: int | None = None
    min_length: int = 3
    eval_every: int = 20
    start_token: int | None = None
    """Begins a document wherever it stands."""
    codec: str = "float16"
    codec_error: float | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(unknown("form", self.form, FORMS))
        if self.eval_every < 2:
            raise ConfigError(f"--eval-every {self.eval_every}: at least 2, or nothing is left to train on.")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigError(f"--sequence-length {self.sequence_length}: at least 1 position.")


class Imported(NamedTuple):
    """A store, and what became of the source's tokens."""

    store: Store
    counts: dict[str, int]


def import_store(location: str, request: ImportRequest) -> Imported:
    """Make a store of saved activations, read piece by piece.

    Raises DataError for what cannot be read, does not fit, or does not come out as it went in; ConfigError for names
    and settings. What an interrupted import wrote is deleted: it begins anew.
    """
    path = request.path.expanduser()
    if not path.exists():
        raise DataError(f"{path} is not there. Give the file or folder of the activations: --from {request.form} PATH.")
    source = open_source(path, request.form)
    packed = request.start_token is not None and not source.layout.has_sequences
    names = hook_names(list(source.widths), request.hooks)
    length = _length(source.layout, request)
    say(statement(source.layout, request, length))
    if request.start_token is not None and not source.layout.has_ids:
        raise ConfigError(f"--start-token {request.start_token}: {path} has no token ids to find it by. Leave it out.")
    cutter = Cutter(
        length=length,
        min_length=min(request.min_length, length),
        eval_every=request.eval_every,
        start_token=request.start_token,
    )
    tokenizer = None if request.tokenizer is None else find_model(request.tokenizer).tokenizer()
    with (
        disk_errors(location),
        stop_on_signals() as stop,
        create_store(
            location,
            hooks={names[hook]: width for hook, width in source.widths.items() if hook in names},
            sequence_length=length,
            codec=request.codec,
            codec_error=request.codec_error,
            source=f"{request.form}:{path.resolve().name}",
            model=request.model,
            tokenizer=tokenizer,
        ) as store,
        progress(f"{path} to {location}", source.n_tokens) as advance,
    ):

        def append(pieces: Iterator[tuple[str, Any]]) -> None:
            for split, piece in pieces:
                x = {names[hook]: values for hook, values in piece.x.items() if hook in names}
                store.append(split, x, lengths=piece.lengths, tokens=piece.ids, documents=piece.documents)

        for tokens in source.tokens():
            nothing = np.zeros(len(tokens.run), np.int64)
            append(cutter.add(tokens._replace(run=nothing, document=nothing) if packed else tokens))
            advance(len(tokens.run))
            stop.check("an import that is cut off begins anew")
        append(cutter.rest())
        sealed = store.seal()
    return Imported(sealed, check_counts(sealed, cutter.counts))


def open_source(path: Path, form: str) -> Source:
    if form == "saelens":
        return SaelensCache(path)
    return VllmStates(path) if form == "vllm" else ArraySource(path, form)


def hook_names(hooks: Sequence[str], asked: Sequence[str]) -> dict[str, str]:
    """The source's name -> the store's, of those that are taken. Raises ConfigError for names that do not fit."""
    if not asked:
        names = {one: one for one in hooks}
    elif set(asked) <= set(hooks):
        names = {one: one for one in asked}
    elif len(asked) == len(hooks):
        names = dict(zip(hooks, asked, strict=True))
        if len(hooks) > 1:
            say(f"Named: {', '.join(f'{one} is {name}' for one, name in names.items())}.")
    else:
        raise ConfigError(
            f"--hook {' '.join(asked)}: the source has {len(hooks)}, {', '.join(hooks)}. Name some of these, or give "
            "each a name, in this order."
        )
    if bad := [name for name in names.values() if not name or "/" in name]:
        raise ConfigError(f"The name {bad[0]!r} has a / in it. Give each array another: --hook NAME.")
    return names


def statement(layout: Layout, request: ImportRequest, length: int) -> str:
    """What is known of the order of the tokens, in one line."""
    if not layout.has_sequences and request.start_token is None:
        return (
            "No sequence boundaries: the vectors are stored one by one, without windows; a temporal term is refused. "
            "Give arrays of [sequences, positions, width], or documents, where there is an order."
        )
    if layout.has_documents or request.start_token is not None:
        return f"Documents are known: sequences of up to {length} positions, none of which holds two documents."
    return (
        f"No documents: each of the source's sequences (up to {length} positions) counts as one. If documents are "
        "packed in them, windows cross from one into the next; cut at the token that begins each: --start-token ID."
    )


def _length(layout: Layout, request: ImportRequest) -> int:
    if not layout.has_sequences and request.start_token is None:
        if request.sequence_length not in (None, 1):
            raise ConfigError(
                f"--sequence-length {request.sequence_length}: the source has no sequence boundaries. Leave it out; "
                "vectors are then stored one by one."
            )
        return 1
    longest = layout.length if layout.length > 1 else DEFAULT_LENGTH
    return request.sequence_length or longest


def check_counts(store: Store, counts: dict[str, int]) -> dict[str, int]:
    """Raises DataError if a token that was read is neither stored nor counted as left out."""
    stored = {split: int(store.split(split).lengths.sum()) for split in ("train", "eval")}
    n_accounted = counts["train"] + counts["eval"] + counts["tokens_dropped_short"]
    if stored != {split: counts[split] for split in stored} or n_accounted != counts["tokens_read"]:
        raise DataError(
            f"{store.location}: {counts['tokens_read']:,} tokens were read, {stored['train']:,} + {stored['eval']:,} "
            f"are stored and {counts['tokens_dropped_short']:,} left out. This is a fault of the import: report it."
        )
    return counts
