"""Conversations as chat templates take them: a list of messages with role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from mergekit_bayes.checkpoint.files import brief
from mergekit_bayes.data.files import Place
from mergekit_bayes.errors import DataError

Message: TypeAlias = Mapping[str, object]

# `from` and `value`, with these speakers, are the other spelling in use (ShareGPT)
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def conversation(value: object, place: Place, column: str) -> list[Message]:
    """The messages in a column, without the keys that hold nothing.

    Args:
        value: what the column holds; nothing is an empty conversation.
        place: of the row, for messages.
        column: its name, for messages.

    Raises:
        DataError: it is no list of messages.
    """
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        kind = type(value).__name__
        raise DataError(
            f"{place}: `{column}` is {brief(value)} ({kind}); expected a list of messages {{role, content}}"
        )
    return [_message(entry, place, f"{column}[{index}]") for index, entry in enumerate(value)]


def canonical(messages: Sequence[Message]) -> str:
    """One text for equal conversations only."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)


def _message(entry: object, place: Place, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{place}: `{where}` is {brief(entry)}; expected a message {{role, content}}")
    # columnar files give every message all keys that any has
    message = {key: value for key, value in entry.items() if value is not None}
    if "role" not in message and isinstance(speaker := message.pop("from", None), str):
        message = {"role": _SPEAKERS.get(speaker, speaker), "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise DataError(f"{place}: `{where}` has the keys {sorted(map(str, entry))}; expected `role` and `content`")
    if not isinstance(content, str | Sequence) and set(message) <= {"role", "content"}:
        raise DataError(f"{place}: the content of `{where}` is {brief(content)}; expected text")
    return message
