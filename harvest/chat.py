"""Conversations to token ids, by a chat template, and whose token each is.

A role's tokens are, for the assistant, what the template marks as generated ({% generation %}); for others, and where
it marks nothing, those of a message's own text, without the marks that the template puts around it.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.messages import ASSISTANT, Message, text_of
from tcsae.shared.base.errors import ConfigError, ModelError
from tcsae.shared.store.format import MAX_ROLES, ChatRecipe

OWN = "own"
"""In place of a template's file: the template that the tokenizer comes with."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        options = {"chat_template": self._text}
        try:
            made = self._tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask="generation" in self.recipe.spans,
                tokenizer_kwargs={"return_offsets_mapping": bool(self.recipe.roles)},
                **options,
            )
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise whatever it likes, and so may what it is given
            raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
        ids = np.asarray(made["input_ids"], np.int64).reshape(-1)
        return Marked(ids, self._roles(messages, text, made) if self.recipe.roles else None)

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
        at = 0
        for message in messages:
            content = text_of(message).strip()
            start = text.find(content, at) if content else -1
            role = message["role"]
            marked = role in self.recipe.roles and self.recipe.spans[self.recipe.roles.index(role)] == "content"
            if start >= 0:
                at = start + len(content)
                if marked:
                    yield role, start, at
            elif content and marked:
                self.n_unmarked += 1


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
