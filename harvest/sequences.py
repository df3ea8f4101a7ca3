"""Documents to sequences: which split a document belongs to, how its tokens are cut, and when there are enough.

Pure bookkeeping: texts and token ids come in, rows and counts come out, and the counts are all the state there is.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard, cast

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from tcsae.data.model import is_eval
from tcsae.harvest.chat import ChatTemplate, Marked
from tcsae.harvest.documents import Corpus, Document
from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.messages import check_roles
from tcsae.shared.base.console import size
from tcsae.shared.base.errors import ConfigError, DataError, ModelError
from tcsae.shared.store.format import SPLITS, Recipe, SequenceRecipe
from tcsae.shared.store.writer import Rows

# Documents to token ids: by the model's tokenizer, or as they come; checked against the model's embedding.

PIECE_CHARACTERS = 1 << 18
"""Of text that the tokenizer takes at once: it needs some 260 bytes a character (2.6 GB for a document of 10 MB)."""
SEAM_CONTEXT = 48
"""Characters on either side of a seam between two pieces that must give the same tokens as without it."""
SEAM_TRIES = 64
CHECKED_DOCUMENTS = 32
"""Tokenized before anything is written."""


class TokenReader:
    """Token ids of documents. Use it in the order of the corpus: errors name the document.

    `prepended` is the id that begins every sequence, if one does: a document that begins with it loses it.
    """

    def __init__(
        self, model: LanguageModel, corpus: Corpus, prepend_bos: bool, template: ChatTemplate | None = None
    ) -> None:
        self.template = template
        self._name = corpus.recipe.name
        self._model = model
        self._tokenizer = model.tokenizer()
        self._n_vocabulary = model.n_vocabulary()
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.pad_id = next(
            (i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if self._is_known(i)), 0
        )
        """What stands beyond a sequence's length: nothing reads it, but the model has to have it."""
        self.prepended = self.bos_id if prepend_bos else None
        if prepend_bos and not self._is_known(self.bos_id):
            has = "no BOS token" if self.bos_id is None else f"a BOS token ({self.bos_id}) that its embedding lacks"
            raise ModelError(f"The tokenizer of {model.name} has {has}. Leave --prepend-bos out.")

    def check(self, corpus: Corpus) -> None:
        """Tokenize a few documents, before anything is written. Raises ModelError or DataError."""
        if not corpus.recipe.tokenized:
            self._check_vocabulary()
        unshuffled = replace(corpus, recipe=replace(corpus.recipe, seed=0))
        for documents in unshuffled.batches(size=CHECKED_DOCUMENTS):
            if self.template is not None:
                check_roles(self.template.recipe.roles, [one for one in documents if is_chat(one)], self._name)
            self.ids(documents, range(len(documents)))
            return

    def ids(self, documents: Sequence[Document], numbers: Sequence[int]) -> list[Int[ndarray, " n_tokens"]]:
        """int32 token ids of each document; `numbers` are the documents' in the corpus. Raises as `marked` does."""
        return [one.ids for one in self.marked(documents, numbers)]

    def marked(self, documents: Sequence[Document], numbers: Sequence[int]) -> list[Marked]:
        """The same, with whose token each is where that was asked for.

        Raises DataError for ids that the model has not, or a conversation that the template refuses.
        """
        checked = []
        for i, (ids, roles) in enumerate(self._unchecked(documents, numbers)):
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_vocabulary:
                source = "data" if isinstance(documents[i], list) else f"the tokenizer of {self._model.name}"
                raise DataError(
                    f"{self._name}: document {numbers[i]} has token ids from {ids.min()} to {ids.max()} (by {source}); "
                    f"the model has 0 to {self._n_vocabulary - 1}. Give data or a tokenizer that belong to this model, "
                    "or the text: --text-field NAME."
                )
            if self.prepended is not None:
                others = np.flatnonzero(ids != self.prepended)
                first = others[0] if len(others) else len(ids)
                ids, roles = ids[first:], None if roles is None else roles[first:]
            checked.append(Marked(ids.astype(np.int32), roles))
        return checked

    def _unchecked(self, documents: Sequence[Document], numbers: Sequence[int]) -> Iterator[Marked]:
        """Ids of the documents in order."""
        if self.template is None:
            yield from map(Marked, self._texts(documents))
            return
        for number, document in zip(numbers, documents, strict=True):
            try:
                yield self.template.read(cast("list[dict[str, Any]]", document))
            except ValueError as error:
                raise DataError(
                    f"{self._name}: the chat template refuses document {number} ({error}). Leave that conversation "
                    "out, or give another --chat-template."
                ) from error

    def _texts(self, documents: Sequence[Document]) -> Iterator[Int[ndarray, " n_tokens"]]:
        """Ids of the documents in order: short texts go to the tokenizer side by side, long ones in pieces."""
        texts: list[str] = []
        size = 0
        for document in documents:
            if isinstance(document, list):
                yield _array(cast("list[int]", document))
                continue
            if size + len(document) > PIECE_CHARACTERS:
                yield from map(_array, self._tokenize(texts))
                texts, size = [], 0
            if len(document) > PIECE_CHARACTERS:
                yield np.concatenate([_array(self._tokenize([piece])[0]) for piece in self._pieces(document)])
            else:
                texts.append(document)
                size += len(document)
        yield from map(_array, self._tokenize(texts))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        made = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return made["input_ids"]

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text in pieces whose tokens, one after the other, are the text's."""
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            seam = self._seam(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
            if seam is None:  # rather all at once than other tokens
                break
            stop, after = seam
            yield text[start:stop]
            start = after
        yield text[start:]

    def _seam(self, text: str, first: int, last: int) -> tuple[int, int] | None:
        """Where a piece ends and the next begins, if the tokens around it are those without a seam: before a space,
        without a space (SentencePiece puts one before every text), or else between any two characters.
        """
        spaces = [at for at in range(last, first, -1) if text[at] == " " and text[at - 1] > " "][:SEAM_TRIES]
        for at in [*spaces, *range(last, last - SEAM_TRIES, -1)]:
            left, right = text[at - SEAM_CONTEXT : at], text[at : at + SEAM_CONTEXT]
            whole, before, after, stripped = self._tokenize([left + right, left, right, right.removeprefix(" ")])
            if before + after == whole:
                return at, at
            if right.startswith(" ") and before + stripped == whole:
                return at, at + 1
        return None

    def _check_vocabulary(self) -> None:
        """Raises ModelError if ordinary tokens are beyond the embedding; added ones may be, as text lacks them."""
        added = set(self._tokenizer.get_added_vocab())
        largest = max((i for token, i in self._tokenizer.get_vocab().items() if token not in added), default=0)
        if largest >= self._n_vocabulary:
            raise ModelError(
                f"The tokenizer of {self._model.name} makes token ids up to {largest}; the model's embedding has 0 to "
                f"{self._n_vocabulary - 1}. Put the tokenizer that belongs to the model beside its config.json."
            )

    def _is_known(self, token: int | None) -> bool:
        return token is not None and 0 <= token < self._n_vocabulary


def _array(ids: list[int]) -> Int[ndarray, " n_tokens"]:
    """As int64, in which every id that a model may have or lack can be compared."""
    try:
        return np.asarray(ids, np.int64)
    except OverflowError:
        most = np.iinfo(np.int64)
        return np.asarray([min(max(i, most.min), most.max) for i in ids], np.int64)


MIN_EVAL_TOKENS = 100_000
"""Of the eval split, if that is at most a tenth of all tokens: enough for confidence intervals."""
MOST_POSITIONS = 1 << 20
"""In one forward pass. What a shard takes in memory grows with it, so a slip of the finger has to be refused."""
MOST_TOKENS = 10**12
POSITION_BYTES, TOKEN_BYTES = 4 * 4096, 4
"""Of one hook's activations at a width of 4096 in float32; of a token id."""


def is_chat(document: Document) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a document is a conversation."""
    return isinstance(document, list) and bool(document) and isinstance(document[0], dict)


def split_of(document: Document, eval_every: int) -> str:
    """ "eval" for one document in `eval_every`, by the sha256 of its text; else "train".

    Where a document is token ids, its text is their decimal numbers with a space between two; where it is a
    conversation, its messages as JSON with sorted keys.
    """
    if is_chat(document):
        text = json.dumps(document, sort_keys=True, ensure_ascii=False)
    else:
        text = document if isinstance(document, str) else " ".join(map(str, document))
    return "eval" if is_eval(text, eval_every) else "train"


def budgets(n: int, eval_every: int, least_eval: int = MIN_EVAL_TOKENS) -> dict[str, int]:
    """Tokens (or sequences) that each split should get; together `n`. Each grows, or stays, as `n` grows.

    Eval gets its natural share, 1 / eval_every, or more where that would be few.
    """
    n_eval = max(n // eval_every, min(n // 10, least_eval))
    return {"train": n - n_eval, "eval": n_eval}


def budgets_of(recipe: Recipe) -> tuple[dict[str, int], str]:
    """What each split should get, and of what: "tokens" or "sequences"."""
    length, every = recipe.sequences.length, recipe.sequences.eval_every
    if recipe.n_sequences is None:
        return budgets(recipe.n_tokens, every), "tokens"
    return budgets(recipe.n_sequences, every, MIN_EVAL_TOKENS // length), "sequences"


def cut(n_tokens: int, recipe: SequenceRecipe) -> list[tuple[int, int]]:
    """Consecutive pieces (start, stop) of a document's tokens, one a sequence; too short a last one is left out."""
    payload = recipe.length - recipe.prepend_bos
    pieces = [(start, min(start + payload, n_tokens)) for start in range(0, n_tokens, payload)]
    if pieces and pieces[-1][1] - pieces[-1][0] + recipe.prepend_bos < recipe.min_length:
        pieces.pop()
    return pieces


def permuted(ids: Sequence[int] | Int[ndarray, " n"], seed: int, number: int) -> list[int]:
    """The tokens of document `number` in random order: the same one whenever, and by whomever, it is cut.

    The order is that of a bit generator's raw numbers, which NumPy promises to keep from version to version.
    """
    order = np.argsort(np.random.PCG64([seed, number]).random_raw(len(ids)), kind="stable")
    return [int(ids[i]) for i in order]


class Sequencer:
    """Cuts documents into sequences, in corpus order, until both splits have their `budgets` of `unit`.

    A split is full with the sequence that reaches its budget; what is left of that document, and the documents that
    come later, are counted and left out. `counts` holds, per split, sequences, tokens (valid positions) and documents;
    documents read = kept in both splits + empty (not one sequence) + skipped (of a full split); tokens read (of all
    documents but the skipped, without BOS) = kept + dropped_short + beyond_budget. `first_full` is the counts as they
    were just before the document that filled the first split: an extension of the store goes on from there.
    """

    def __init__(
        self,
        recipe: SequenceRecipe,
        budgets: dict[str, int],
        bos_id: int | None = None,
        counts: dict[str, Any] | None = None,
        unit: str = "tokens",
        roles: Sequence[str] = (),
    ) -> None:
        self.recipe = recipe
        self.roles = roles
        """Whose tokens are marked, and counted as tokens_of_ROLE."""
        self.budgets = budgets
        self.unit = unit
        assert not recipe.prepend_bos or bos_id is not None
        self._bos = [bos_id or 0] * recipe.prepend_bos
        self.counts: dict[str, Any] = copy.deepcopy(counts) if counts else _no_counts()
        self._rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}

    @property
    def done(self) -> bool:
        """Whether both splits are full."""
        return all(map(self.is_full, SPLITS))

    def is_full(self, split: str) -> bool:
        return self.counts[split][self.unit] >= self.budgets[split]

    def add(
        self, split: str, ids: Sequence[int] | Int[ndarray, " n"], roles: UInt8[ndarray, " n"] | None = None
    ) -> None:
        """Take the next document of the corpus; `ids` is not looked at if its split is full."""
        counts, of_split = self.counts, self.counts[split]
        before = {name: dict(value) if name in SPLITS else value for name, value in counts.items()}
        number = counts["documents_read"]
        counts["documents_read"] += 1
        if self.is_full(split):
            counts["documents_skipped"] += 1
            return
        tokens = np.asarray(ids, np.int32)
        counts["tokens_read"] += len(tokens)
        pieces = cut(len(tokens), self.recipe)
        n_stored = 0
        for start, stop in pieces:
            if self.is_full(split):
                counts["tokens_beyond_budget"] += len(tokens) - n_stored
                break
            n_stored = self._keep(split, Marked(tokens, roles), number, start, stop)
        else:
            counts["tokens_dropped_short"] += len(tokens) - n_stored
            counts["pieces_dropped_short"] += len(tokens) > n_stored
        of_split["documents"] += bool(pieces)
        counts["documents_empty"] += not pieces
        if counts["first_full"] is None and self.is_full(split):
            counts["first_full"] = before

    def take_rows(self) -> dict[str, Rows]:
        """The sequences since the last call, per split."""
        taken = {split: self._stack(rows) for split, rows in self._rows.items()}
        self._rows = {split: [] for split in SPLITS}
        return taken

    def _keep(self, split: str, tokens: Marked, number: int, start: int, stop: int) -> int:
        length = len(self._bos) + stop - start
        row = np.full(self.recipe.length, self.recipe.pad_id, np.int32)
        row[: len(self._bos)] = self._bos
        row[len(self._bos) : length] = tokens.ids[start:stop]
        whose = np.zeros(self.recipe.length, np.uint8)
        if tokens.roles is not None:
            whose[len(self._bos) : length] = tokens.roles[start:stop]
        for i, role in enumerate(self.roles, 1):
            name = f"tokens_of_{role}"
            self.counts[split][name] = self.counts[split].get(name, 0) + int((whose == i).sum())
        self._rows[split].append(_Row(row, length, number, start, whose))
        self.counts[split]["sequences"] += 1
        self.counts[split]["tokens"] += length
        return stop

    def _stack(self, rows: "list[_Row]") -> Rows:
        tokens, lengths, documents, starts, whose = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return Rows(
            np.array(tokens, np.int32).reshape(-1, self.recipe.length),
            np.array(lengths, np.int32),
            np.array(documents, np.int64),
            np.array(starts, np.int32),
            np.array(whose, np.uint8).reshape(-1, self.recipe.length) if self.roles else None,
        )


class _Row(NamedTuple):
    """One sequence."""

    tokens: Int[ndarray, " length"]
    length: int
    document: int
    start: int
    roles: UInt8[ndarray, " length"]


def check_sequences(recipe: SequenceRecipe, n_tokens: int, batch_size: int = 1) -> None:
    """Raises ConfigError for settings under which no sequence, or no train split, could come about, or whose memory no
    machine has.
    """
    problems = []
    most = MOST_POSITIONS // max(1, min(recipe.length, MOST_POSITIONS))
    if recipe.length < 2:
        problems.append(f"--sequence-length {recipe.length}: at least 2 positions.")
    elif recipe.length > MOST_POSITIONS:
        problems.append(
            f"--sequence-length {recipe.length}: at most {MOST_POSITIONS} positions; at a width of 4096 one sequence "
            f"of a hook would take {size(recipe.length * POSITION_BYTES)}."
        )
    elif batch_size > most:
        problems.append(
            f"--batch-size {batch_size}: at most {most} sequences of {recipe.length} in one forward pass; at a width "
            f"of 4096 one batch of a hook would take {size(batch_size * recipe.length * POSITION_BYTES)}."
        )
    if not 1 <= recipe.min_length <= recipe.length:
        problems.append(f"--min-length {recipe.min_length}: from 1 to the sequence length, {recipe.length}.")
    if recipe.eval_every < 2:
        problems.append(f"--eval-every {recipe.eval_every}: at least 2, or nothing is left to train on.")
    if n_tokens < 10 * recipe.length:
        problems.append(f"--tokens {n_tokens}: at least ten sequences, {10 * recipe.length}.")
    elif n_tokens > MOST_TOKENS:
        problems.append(
            f"{n_tokens} tokens: at most {MOST_TOKENS}; their ids alone would take {size(n_tokens * TOKEN_BYTES)}. "
            "Give fewer --tokens or --sequences."
        )
    if problems:
        raise ConfigError(" ".join(problems))


def n_tokens(counts: Mapping[str, Any]) -> int:
    """Valid tokens of both splits."""
    return sum(counts[split]["tokens"] for split in SPLITS)


def _no_counts() -> dict[str, Any]:
    return {
        **{split: {"sequences": 0, "tokens": 0, "documents": 0} for split in SPLITS},
        "documents_read": 0,
        "documents_empty": 0,
        "documents_skipped": 0,
        "tokens_read": 0,
        "tokens_dropped_short": 0,
        "pieces_dropped_short": 0,
        "tokens_beyond_budget": 0,
        "first_full": None,
    }
