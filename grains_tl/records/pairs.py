"""Preference records: a prompt with a chosen and a rejected response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        tools: functions (JSON schemas, or Python functions) that the chat template lists for the model.

    Raises:
        ValueError: a field is empty, ``chosen`` equals ``rejected``, both begin with the prompt, or tools for a text prompt.

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
    tools: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            require_text(name, getattr(self, name))
        if self.chosen == self.rejected:
            raise ValueError(
                f"chosen equals rejected ({plain_text(self.chosen)!r}); there is nothing to prefer, drop the record"
            )
        if isinstance(self.prompt, str) and not (isinstance(self.chosen, str) and isinstance(self.rejected, str)):
            raise ValueError(
                "a text prompt needs text responses; write the prompt as messages too if the responses are messages"
            )
        if isinstance(self.prompt, str) and self.tools:
            raise ValueError(
                "tools are given with a text prompt; the chat template shows them, so write the prompt as messages"
            )
        if repeats(self.prompt, self.chosen) and repeats(self.prompt, self.rejected):
            raise ValueError(
                "chosen and rejected begin with the whole prompt; leave it out of them (load_pairs does that)"
            )


#: What functions take as a record: one that was read, or a mapping with prompt, chosen and rejected.
PairLike = PreferencePair | Mapping[str, Any]


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
        raise ValueError(f"prompts is the mapping {prompts!r}; expected a text, a list of texts or a list of messages")
    given = listed("prompts", prompts)
    return [given] if given and all(isinstance(item, Mapping) for item in given) else given


def require_text(name: str, value: Any) -> None:
    """Refuse what is neither text nor a conversation, what has no words, and characters that are none.

    Args:
        name: what the message calls it.
        value: to be checked.

    Raises:
        ValueError: the value is something of this kind.
    """
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; text or a list of messages is needed")
    for message in () if isinstance(value, str) else value:
        _require_message(name, message)
    text = plain_text(value)
    if not text.strip() and not (not isinstance(value, str) and any(m.get("tool_calls") for m in value)):
        raise ValueError(f"{name} is empty ({value!r}); expected some text")
    text = "\n".join(all_strings(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise ValueError(
            f"{name} contains half a character ({text[error.start]!r} after {before!r}), as of an emoji cut in two; repair "
            "the text, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def all_strings(value: Any) -> Iterator[str]:
    """Every string of a text or conversation, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from all_strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_strings(item)


def _require_message(name: str, message: Any) -> None:
    wanted = 'a list of messages {"role": ..., "content": text or a list of parts} is needed'
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        turns = " (load_pairs reads ShareGPT's turns)" if isinstance(message, Mapping) and "from" in message else ""
        raise ValueError(f"{name} has {message!r} in it; {wanted}{turns}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"{name} has {message!r} in it; {wanted}")


def repeats(prompt: Text, response: Text) -> bool:
    """Whether a response begins with the whole prompt: with its messages, or with its text if that is some words long."""
    if isinstance(prompt, str) and isinstance(response, str):
        words = prompt.strip()
        return (" " in words or len(words) > 8) and response.lstrip().startswith(words)
    if isinstance(prompt, str) or isinstance(response, str):
        return False
    return list(response[: len(prompt)]) == list(prompt)


def plain_text(text: Text) -> str:
    """The words of a text or conversation, without template markers."""
    if isinstance(text, str):
        return text
    return "\n".join(words for message in text for words in message_texts(message))


def message_texts(message: Message) -> list[str]:
    """The texts of a message, one per text part."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, (list, tuple)):
        return [str(part.get("text", "")) for part in content if part.get("type") == "text"]
    return [str(content)]
