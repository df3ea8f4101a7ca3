"""Tokens as text that people can read, whatever bytes they are: the terminal and the report show them alike."""

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tcsae.shared.base.console import legible
from tcsae.shared.base.errors import StoreError, broken_library

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes part of a character to."""


class TokenTexts:
    """The text of single tokens, by the tokenizer that a Store keeps (or what else has a `tokenizer_path`).

    A token that is only part of a character shows its bytes, as ⟨E2 80⟩; one that begins with a combining mark shows
    it on a dotted circle; without a tokenizer in the store a token is its number, as ⟨17⟩.
    """

    def __init__(self, store: Any) -> None:
        self.path: Path | str | None = store.tokenizer_path
        self._known: dict[int, str] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenTexts":
        """By a tokenizer that is loaded already."""
        texts = cls.__new__(cls)
        texts.path, texts._known = getattr(tokenizer, "name_or_path", ""), {}
        texts.__dict__["_tokenizer"] = tokenizer
        return texts

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def table(self, tokens: Iterable[int]) -> dict[int, str]:
        """{token: text} of the given tokens, in order of number."""
        return {token: self[token] for token in sorted(set(tokens))}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except ImportError as error:
            raise broken_library(f"The tokenizer at {self.path}", error) from error
        except Exception as error:  # damaged files fail in the tokenizer library's many ways
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise StoreError(
                f"The tokenizer at {self.path} cannot be loaded ({reason}). Harvest the store again."
            ) from error

    def _text(self, token: int) -> str:
        if self.path is None:
            return f"⟨{token}⟩"
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # padding beyond the tokenizer's own entries
            return f"⟨{token}⟩"
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if piece.startswith("▁") and not text.startswith(" "):  # SentencePiece drops the first token's space
            text = f" {text}"
        if REPLACEMENT in text and REPLACEMENT not in piece:
            return _bytes_text(piece)
        shown = legible(text)
        return f"◌{shown}" if shown and unicodedata.combining(shown[0]) else shown


def _bytes_text(piece: str) -> str:
    """The bytes of a token of a byte-level vocabulary, or of SentencePiece's <0xE2>."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return f"⟨{piece[3:-1]}⟩"
    values = [_BYTES.get(one) for one in piece]
    return legible(piece) if None in values else f"⟨{bytes(one for one in values if one is not None).hex(' ').upper()}⟩"


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_alphabet()
