"""Documents to token ids: by the model's tokenizer, or as they come; checked against the model's embedding."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tcsae.harvest.documents import Corpus, Document
from tcsae.harvest.language_model import LanguageModel
from tcsae.shared.base.errors import DataError, ModelError

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

    def __init__(self, model: LanguageModel, corpus: Corpus, prepend_bos: bool) -> None:
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
            self.ids(documents, range(len(documents)))
            return

    def ids(self, documents: Sequence[Document], numbers: Sequence[int]) -> list[Int[ndarray, " n_tokens"]]:
        """int32 token ids of each document; `numbers` are the documents' in the corpus.

        Raises DataError for ids that the model has not.
        """
        checked = []
        for i, ids in enumerate(self._unchecked(documents)):
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_vocabulary:
                source = "data" if isinstance(documents[i], list) else f"the tokenizer of {self._model.name}"
                raise DataError(
                    f"{self._name}: document {numbers[i]} has token ids from {ids.min()} to {ids.max()} (by {source}); "
                    f"the model has 0 to {self._n_vocabulary - 1}. Give data or a tokenizer that belong to this model, "
                    "or the text: --text-field NAME."
                )
            if self.prepended is not None:
                others = np.flatnonzero(ids != self.prepended)
                ids = ids[others[0] if len(others) else len(ids) :]
            checked.append(ids.astype(np.int32))
        return checked

    def _unchecked(self, documents: Sequence[Document]) -> Iterator[Int[ndarray, " n_tokens"]]:
        """Ids of the documents in order: short texts go to the tokenizer side by side, long ones in pieces."""
        texts: list[str] = []
        size = 0
        for document in documents:
            if isinstance(document, list):
                yield _array(document)
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
