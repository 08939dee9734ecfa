"""Preference records: a prompt with a chosen and a rejected response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from grains_tl._util.checks import listed
from grains_tl.types import Message, Text


@dataclass(frozen=True)
class PreferencePair:
    """One preference record in the TRL format.

    Attributes:
        prompt: text, or a list of ``{"role", "content"}`` messages (rendered with the model's chat template).
        chosen: the preferred response; text continues a text prompt directly (mind the leading space), messages
            (or plain text) answer a conversational prompt.
        rejected: the dispreferred response, likewise.
        image: for vision-language models: a PIL image, a path, an array ``[height, width, 3]``, or a list of these. The
            prompt may say where it stands (the processor's placeholder, or an image part of a message); it comes first
            otherwise.
        meta: any further columns of the source row (domain, split, ...).

    Raises:
        ValueError: a field is empty, or ``chosen`` equals ``rejected``.

    Examples:
        >>> pair = PreferencePair(prompt="The soup was cold. Dinner was", chosen=" great", rejected=" awful")
        >>> pair.chosen
        ' great'
    """

    prompt: Text
    chosen: Text
    rejected: Text
    image: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            require_text(name, value)
            if plain_text(value).strip() == "":
                raise ValueError(f"{name} is empty ({value!r}); a preference record needs some text in it")
        if self.chosen == self.rejected:
            raise ValueError(
                f"chosen equals rejected ({plain_text(self.chosen)!r}); there is nothing to prefer, drop the record"
            )
        if isinstance(self.prompt, str) and not (isinstance(self.chosen, str) and isinstance(self.rejected, str)):
            raise ValueError(
                "a text prompt needs text responses; write the prompt as messages too if the responses are messages"
            )


def preference_pairs(pairs: Iterable[Any]) -> list[PreferencePair]:
    """The records as a list.

    Raises:
        ValueError: something else than records, such as one record alone, a path or rows that were not read.
    """
    if isinstance(pairs, (PreferencePair, str, PathLike, Mapping)) or not hasattr(pairs, "__iter__"):
        raise ValueError(
            f"records are a {type(pairs).__name__}; a list of PreferencePair is needed: load_pairs(...), or [pair] for one"
        )
    records = list(pairs)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, PreferencePair):
            raise ValueError(
                f"record {number} is a {type(record).__name__}; a PreferencePair is needed: load_pairs reads mappings"
            )
    return records


def prompt_list(prompts: Any) -> list[Text]:
    """Prompts as a list; one text or one conversation alone becomes a list of one.

    Args:
        prompts: texts and conversations in a list, array or any other iterable, or one of them.

    Raises:
        ValueError: something else.

    Examples:
        >>> prompt_list("The film was")
        ['The film was']
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise ValueError(f"prompts is the mapping {prompts!r}; a text, a list of texts or a list of messages is needed")
    given = listed("prompts", prompts)
    return [given] if given and all(isinstance(item, Mapping) for item in given) else given


def require_text(name: str, value: Any) -> None:
    """Refuse what is neither text nor a conversation (ValueError)."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; text or a list of messages is needed")
    wanted = 'a list of messages {"role": ..., "content": text or a list of parts} is needed'
    for message in () if isinstance(value, str) else value:
        content = message.get("content", "") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
            raise ValueError(f"{name} has {message!r} in it; {wanted}")


def plain_text(text: Text) -> str:
    """The words of a text or conversation, without template markers."""
    if isinstance(text, str):
        return text
    return "\n".join(words for message in text for words in message_texts(message))


def message_texts(message: Message) -> list[str]:
    """The texts of a message, one per text part."""
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        return [str(part.get("text", "")) for part in content if part.get("type") == "text"]
    return [str(content)]
