"""The strings inside a conversation's messages: where each stands, and the message with another one in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grains_tl.types import Message

#: What different model families call a message's thoughts.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")


@dataclass(frozen=True)
class MessageString:
    """One string of a conversation: which message it is in, and the keys that lead to it."""

    message: int
    path: tuple[str | int, ...]
    text: str
    optional: bool = False

    def put(self, message: Message, text: str) -> Message:
        """The message with another string in this place."""
        return dict(_put(message, self.path, text))


def message_strings(messages: Sequence[Message]) -> Iterator[MessageString]:
    """Every string of a conversation that a template may render: thoughts, words and arguments of tool calls."""
    for i, message in enumerate(messages):
        for field in THOUGHTS:
            if isinstance(message.get(field), str) and message[field].strip():
                yield MessageString(i, (field,), message[field], optional=True)
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            yield MessageString(i, ("content",), content)
        for j, part in enumerate(content) if isinstance(content, (list, tuple)) else ():
            if part.get("type") == "text" and str(part.get("text", "")).strip():
                yield MessageString(i, ("content", j, "text"), part["text"])
        for path, text in _strings(message.get("tool_calls") or [], ("tool_calls",)):
            if path[-1] not in ("id", "type"):
                yield MessageString(i, path, text, optional=True)


def _strings(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str) and value.strip():
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _strings(item, (*path, i))


def _put(value: Any, path: Sequence[str | int], text: str) -> Any:
    if not path:
        return text
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: _put(value[key], rest, text)}
    return [_put(item, rest, text) if i == key else item for i, item in enumerate(value)]


def joined(first: Any, second: Any) -> Any:
    """Two contents as one: texts joined, parts put together with the text of the last and the first one joined."""
    first, second = first or "", second or ""
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    parts, more = list(_as_list(first)), list(_as_list(second))
    if parts and more and parts[-1].get("type") == more[0].get("type") == "text":
        parts[-1] = {**parts[-1], "text": parts[-1]["text"] + more.pop(0)["text"]}
    return [*parts, *more]


def _as_list(content: Any) -> Sequence[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def words_of(message: Message) -> str:
    """The text of a message, parts put together."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(str(part.get("text", "")) for part in content)
