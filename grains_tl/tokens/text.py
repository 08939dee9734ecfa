"""Text and chat messages to token ids, and which tokens are content."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from grains_tl.records.pairs import message_texts
from grains_tl.tokens.images import as_parts
from grains_tl.tokens.rules import TokenRules
from grains_tl.types import Message, Text


def _word_starts(tokenizer: Any, ids: Sequence[int]) -> tuple[bool, ...]:
    """Where decoding puts a space before a token: some tokenizers hide it when the token is decoded alone."""
    found = [True]
    for before, this in itertools.pairwise(ids):
        first, both = tokenizer.decode([before]), tokenizer.decode([before, this])
        found.append(both[len(first) : len(first) + 1].isspace())
    return tuple(found[: len(ids)])


def decode_after(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens where they stand: the whole text without that of the tokens before.

    Decoded alone, they would lose their first space with SentencePiece and WordPiece tokenizers.

    Args:
        tokenizer: of the model.
        before: ids in front of them.
        new: ids to decode; special tokens are left out.
    """
    start = tokenizer.decode(list(before), skip_special_tokens=True)
    whole = tokenizer.decode([*before, *new], skip_special_tokens=True)
    if whole.startswith(start):
        return str(whole[len(start) :])
    return str(tokenizer.decode(list(new), skip_special_tokens=True))  # a character is split between the two


def last_tokens(tokenizer: Any, text: str, n: int) -> str:
    """The end of a text that its last ``n`` tokens cover.

    Cut out of the text itself where the tokenizer knows the characters of its tokens: decoding loses spaces and parts of
    characters.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    if fast:
        return text[encoding["offset_mapping"][-n][0] :]
    return str(tokenizer.decode(encoding["input_ids"][-n:]))


def _render(template: Any, rules: TokenRules, prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    if not rules.has_chat_template:
        raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give plain text")
    return template.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)


def _response_text(template: Any, prompt: Text, prompt_text: str, response: Text) -> str:
    if isinstance(prompt, str):
        return str(response)
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if any(not isinstance(message.get("content"), str) for message in prompt):  # a template that takes parts
        response = [as_parts(message) for message in response]
    full = template.apply_chat_template([*prompt, *response], tokenize=False)
    if not full.startswith(prompt_text):
        raise ValueError(
            "the chat template renders prompt + response differently from the prompt alone; use plain text"
        )
    rest = full[len(prompt_text) :]
    end = 0
    for message in response:
        for words in map(str.strip, message_texts(message)):
            at = rest.find(words, end)
            if at < 0:
                raise ValueError(f"the chat template rewrites the response {words!r}; use plain text")
            end = at + len(words)
    return rest[:end]


def _bos(rules: TokenRules, prompt: Text) -> int | None:
    return rules.bos if isinstance(prompt, str) else None


def _encode(
    tokenizer: Any, rules: TokenRules, prompt: Text, text: str
) -> tuple[list[int], list[tuple[int, int]] | None]:
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = list(encoding["input_ids"])
    offsets = list(encoding["offset_mapping"]) if fast else None
    if rules.bos is not None and isinstance(prompt, str) and ids[:1] != [rules.bos]:
        ids = [rules.bos, *ids]
        offsets = None if offsets is None else [(0, 0), *offsets]
    return ids, offsets


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _content_mask(
    template: Any,
    rules: TokenRules,
    prompt: Text,
    text: str,
    ids: Sequence[int],
    offsets: list[tuple[int, int]] | None,
) -> list[bool]:
    """Content: not special and, in a conversation, inside the words of a message."""
    content = [token not in rules.special for token in ids]
    if isinstance(prompt, str):
        return content
    if offsets is None:
        raise ValueError("a conversation needs a fast tokenizer (character offsets) to tell words from template")
    inside = [False] * len(text)
    for begin, end in _message_spans(template, prompt, text):
        inside[begin:end] = [True] * (end - begin)
    return [keep and any(inside[a:b]) for keep, (a, b) in zip(content, offsets, strict=True)]


def _message_spans(template: Any, prompt: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Where each message's words stand in the rendered text.

    The template is rendered again with a marker in place of one message's words: what stands before the marker is the
    same text, so the words begin there (searching for the words could find a role marker that says the same).
    """
    marker = "\u2603marker\u2603"
    spans = []
    for i, message in enumerate(prompt):
        for part, words in enumerate(map(str.strip, message_texts(message))):
            if not words:
                continue
            changed = [_with_text(m, part, marker) if i == j else m for j, m in enumerate(prompt)]
            rendered = template.apply_chat_template(changed, tokenize=False, add_generation_prompt=True)
            begin = rendered.find(marker)
            if begin >= 0 and text[begin : begin + len(words)] == words:
                spans.append((begin, begin + len(words)))
    return spans


def _with_text(message: Message, part: int, text: str) -> Message:
    """The message with its ``part``-th text replaced."""
    if isinstance(message.get("content", ""), str):
        return {**message, "content": text}
    content = list(message["content"])
    at = [i for i, p in enumerate(content) if p.get("type") == "text"][part]
    content[at] = {**content[at], "text": text}
    return {**message, "content": content}
