"""The messages of a conversation, as the usual datasets have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tcsae.shared.base.errors import DataError, unknown

ASSISTANT = "assistant"
USUAL_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
OTHER_NAMES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Roles by the names of data with "from" and "value" (ShareGPT), and what a template calls them."""
Message = dict[str, Any]


def as_messages(value: Any) -> list[Message]:
    """A row's messages as templates read them: "role" and "content", and what else they hold that is not null.

    Raises ValueError, saying why, for what is no list of messages.
    """
    if not isinstance(value, list):
        raise ValueError(f"{type(value).__name__}, not a list of messages")
    messages = []
    for one in value:
        if not isinstance(one, Mapping):
            raise ValueError(f"a list of {type(one).__name__}, not of messages")
        message = {name: what for name, what in one.items() if what is not None}
        if "role" not in message and {"from", "value"} <= message.keys():
            message["role"], message["content"] = message.pop("from"), message.pop("value")
            message["role"] = OTHER_NAMES.get(message["role"], message["role"])
        if not isinstance(message.get("role"), str):
            raise ValueError(f"a message with {', '.join(sorted(message)) or 'nothing'} in it, without a role")
        messages.append(message)
    return messages


def texts_of(message: Message) -> list[str]:
    """A message's own texts: its content, or those of its parts."""
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if _is_text(part)] if isinstance(content, list) else []


def with_texts(message: Message, texts: Sequence[str]) -> Message:
    """A copy with others in place of `texts_of` the message, as many."""
    content, left = message.get("content", ""), iter(texts)
    if isinstance(content, list):
        return message | {"content": [{**one, "text": next(left)} if _is_text(one) else one for one in content]}
    return message | {"content": next(left, content)}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def check_roles(roles: Sequence[str], conversations: Sequence[Sequence[Message]], name: str) -> None:
    """Raises DataError for a role that is not usual, and that no message of the first conversations has."""
    seen = {message["role"] for messages in conversations for message in messages}
    for role in roles:
        if role not in seen and role not in USUAL_ROLES:
            raise DataError(f"{name}: {unknown('role', role, sorted(seen))}")
