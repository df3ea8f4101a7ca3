"""Conversations to token ids, by a chat template, and whose token each is.

A role's tokens are, for the assistant, what the template marks as generated ({% generation %}); for others, and where
it marks nothing, those of a message's own text, without the marks that the template puts around it.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.messages import ASSISTANT, Message, texts_of, with_texts
from tcsae.shared.base.errors import ConfigError, ModelError
from tcsae.shared.store.format import MAX_ROLES, ChatRecipe

OWN = "own"
"""In place of a template's file: the template that the tokenizer comes with."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACE = re.compile("\ufdd0(\\d+),(\\d+)\ufdd1")
"""Stands in a message's text while its place is looked for. Unicode keeps these two out of all texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatChoice:
    """How conversations become text, as it is asked for."""

    template: str = OWN
    """A file with a Jinja template, or "own": that of the tokenizer."""
    roles: tuple[str, ...] = ()
    """Roles whose tokens are marked in the store."""

    def __post_init__(self) -> None:
        if len(set(self.roles)) < len(self.roles) or not all(self.roles) or len(self.roles) > MAX_ROLES:
            raise ConfigError(
                f"--roles {','.join(self.roles)}: give each role once, with commas between, {MAX_ROLES} at most."
            )


class Marked(NamedTuple):
    """A document's tokens."""

    ids: Int[ndarray, " n"]
    roles: UInt8[ndarray, " n"] | None = None
    """1 for tokens of the first role asked for, 2 for the second, ...; None where none was asked for."""


class ChatTemplate:
    """A template with the tokenizer that it goes with. Use `chat_template`."""

    def __init__(self, tokenizer: Any, text: str, roles: tuple[str, ...]) -> None:
        self._tokenizer, self._text = tokenizer, text
        marks = bool(GENERATION.search(text))
        spans = tuple("generation" if marks and role == ASSISTANT else "content" for role in roles)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.recipe = ChatRecipe(template=f"sha256:{digest}", roles=roles, spans=spans)
        self.n_unmarked = 0
        """Messages of marked roles whose text the template did not render as it stands."""

    def read(self, messages: Sequence[Message]) -> Marked:
        """Tokens of one conversation. Raises ValueError, saying why, for one that the template refuses."""
        if not messages:
            return Marked(np.zeros(0, np.int64), np.zeros(0, np.uint8) if self.recipe.roles else None)
        try:
            made = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._text,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask="generation" in self.recipe.spans,
                tokenizer_kwargs={"return_offsets_mapping": bool(self.recipe.roles)},
            )
            text = self._rendered(messages) if self.recipe.roles else ""
        except Exception as error:  # a template may raise whatever it likes, and so may what it is given
            raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
        ids = np.asarray(made["input_ids"], np.int64).reshape(-1)
        return Marked(ids, self._roles(messages, text, made) if self.recipe.roles else None)

    def _rendered(self, messages: Sequence[Message]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, chat_template=self._text, tokenize=False)
        return text

    def _roles(self, messages: Sequence[Message], text: str, made: Mapping[str, Any]) -> UInt8[ndarray, " n"]:
        starts, stops = np.asarray(made["offset_mapping"], np.int64).reshape(-1, 2).T
        role_of_token = np.zeros(len(starts), np.uint8)
        for role, start, stop in self._contents(messages, text):
            overlaps = (starts < stop) & (stops > start)
            role_of_token[overlaps] = 1 + self.recipe.roles.index(role)
        if "generation" in self.recipe.spans:
            mask = np.asarray(made["assistant_masks"], bool).reshape(-1)
            role_of_token[mask] = 1 + self.recipe.roles.index(ASSISTANT)
        return role_of_token

    def _contents(self, messages: Sequence[Message], text: str) -> Iterator[tuple[str, int, int]]:
        """Where in the rendered text the messages' own texts stand, of the roles that are marked by them."""
        spans = dict(zip(self.recipe.roles, self.recipe.spans, strict=True))
        wanted = [
            number
            for number, message in enumerate(messages)
            if spans.get(message["role"]) == "content" and "".join(texts_of(message)).strip()
        ]
        places = self._places(messages, wanted, text)
        if places is None:  # for one that the template looks into, the others are not given up
            places = [place for one in wanted for place in self._places(messages, [one], text) or ()]
        self.n_unmarked += len(set(wanted) - {number for number, _, _ in places})
        for number, start, stop in places:
            yield messages[number]["role"], start, stop

    def _places(
        self, messages: Sequence[Message], which: Collection[int], text: str
    ) -> list[tuple[int, int, int]] | None:
        """(message, start, stop) of some messages' own texts; None where the template cannot be asked.

        A search would take a short text for the template's own words. So the conversation is rendered again, with a
        mark inside each text: in its middle, as templates trim its ends and look at how it begins.
        """
        marked = [
            with_texts(message, [_with_mark(one, number, part) for part, one in enumerate(texts_of(message))])
            if number in which
            else message
            for number, message in enumerate(messages)
        ]
        try:
            rendered = self._rendered(marked) if which else text
        except Exception:  # as in `read`; without marks it did not
            return None
        if PLACE.sub("", rendered) != text:
            return None
        places, n_before = [], 0
        for mark in PLACE.finditer(rendered):
            number, part = int(mark[1]), int(mark[2])
            own = texts_of(messages[number])[part].strip()
            start = mark.start() - n_before - len(own) // 2
            n_before += len(mark[0])
            if start >= 0 and text.startswith(own, start):
                places.append((number, start, start + len(own)))
        return places


def _with_mark(text: str, number: int, part: int) -> str:
    own = text.strip()
    at = text.find(own) + len(own) // 2
    return f"{text[:at]}\ufdd0{number},{part}\ufdd1{text[at:]}" if own else text


def chat_template(choice: ChatChoice, model: LanguageModel) -> ChatTemplate:
    """The template asked for, with the model's tokenizer. Raises ModelError or ConfigError, with the cure."""
    tokenizer = model.tokenizer()
    if choice.roles and not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {model.name} does not say where its tokens stand in the text (it is no fast one), so "
            "roles cannot be marked. Leave --roles out."
        )
    if choice.template == OWN:
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"The tokenizer of {model.name} has no chat template. Give a file with one: --chat-template FILE."
            ) from error
    else:
        try:
            text = Path(choice.template).read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(
                f"--chat-template {choice.template} cannot be read ({reason}). Give a file with a Jinja template, or "
                f"{OWN}: the tokenizer's."
            ) from error
    return ChatTemplate(tokenizer, text, choice.roles)
