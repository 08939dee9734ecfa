"""One prompt as tokens, the responses that follow it, and the border between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grains_tl.records.messages import as_text
from grains_tl.records.pairs import require_text
from grains_tl.records.pictures import load_images
from grains_tl.tokens.chat import Chat
from grains_tl.tokens.images import ImageInputs, process_images, refuse_lost_image, template_owner, with_placeholders
from grains_tl.tokens.rules import TokenRules, token_rules
from grains_tl.tokens.text import common_prefix, encode
from grains_tl.types import HookedModel, Text


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as text and ids, before images are expanded.

    Attributes:
        text: what is tokenized.
        ids: its tokens, those in front included.
        offsets: the characters of each; ``None`` for a slow tokenizer.
        front: the ids that were put in front.
        chat: the conversation it was rendered from; ``None`` for plain text.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]] | None
    front: tuple[int, ...]
    chat: Chat | None


def tokenize_prompt(
    model: HookedModel, rules: TokenRules, prompt: Text, tools: Sequence[Any] | None = None
) -> TokenizedPrompt:
    """A text or a conversation as tokens, under the model's rules."""
    if isinstance(prompt, str):
        return TokenizedPrompt(prompt, *encode(model.tokenizer, rules, prompt), rules.front, None)
    if not rules.has_chat_template:
        raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give plain text")
    chat = Chat(template_owner(model), tuple(prompt), tuple(tools) if tools else None)
    text = chat.prompt()
    return TokenizedPrompt(text, *encode(model.tokenizer, rules, text, rendered=True), (), chat)


def continued(
    model: HookedModel, rules: TokenRules, prompt: TokenizedPrompt, responses: Mapping[str, Text]
) -> tuple[int, list[list[int]]]:
    """The border that prompt and responses share, and the ids of prompt + response for every response."""
    full = []
    for name, response in responses.items():
        if prompt.chat is not None:
            response = prompt.chat.response(prompt.text, response, name)
        elif not isinstance(response, str):
            raise ValueError(
                f"{name} is a list of messages, and the prompt is text; give both as messages, or both as text"
            )
        full.append(encode(model.tokenizer, rules, prompt.text + response, rendered=prompt.chat is not None)[0])
    border = min(common_prefix(prompt.ids, ids) for ids in full)
    if border == 0:
        raise ValueError(
            "the whole prompt becomes part of a token that belongs to the response too; write a longer prompt"
        )
    for name, ids in zip(responses, full, strict=True):
        if len(ids) == border:
            raise ValueError(f"{name} adds no token to the prompt; write a longer response")
    return border, full


def content_flags(rules: TokenRules, prompt: TokenizedPrompt) -> list[bool]:
    """Content: not special and, in a conversation, inside the words of a message."""
    content = [token not in rules.special for token in prompt.ids]
    if prompt.chat is None:
        return content
    if prompt.offsets is None:
        raise ValueError(
            "conversations need a fast tokenizer, whose character offsets tell the words from the template; give "
            "plain text, or a fast tokenizer"
        )
    inside = [False] * len(prompt.text)
    for begin, end in prompt.chat.spans(prompt.text):
        inside[begin:end] = [True] * (end - begin)
    return [keep and any(inside[a:b]) for keep, (a, b) in zip(content, prompt.offsets, strict=True)]


def require_context(rules: TokenRules, border: int, responses: Mapping[str, Sequence[int]]) -> None:
    """Refuse what the model's context cannot hold (ValueError)."""
    for name, response in responses.items():
        if border + len(response) > rules.n_ctx:
            raise ValueError(
                f"prompt + {name} is {border + len(response)} tokens, and the model's context holds "
                f"{rules.n_ctx}; shorten the prompt"
            )


def prompt_ids(model: HookedModel, prompt: Text) -> list[int]:
    """Ids of one prompt under the model's token rules (for generation).

    Raises:
        ValueError: an empty prompt, or one longer than the context.
    """
    return prompt_inputs(model, prompt)[0]


def prompt_inputs(model: HookedModel, prompt: Text, image: Any = None) -> tuple[list[int], ImageInputs | None]:
    """Ids of one prompt with its image tokens expanded, and its images.

    Raises:
        ValueError: an empty prompt, one longer than the context, one that the chat template refuses, or images the model
            cannot take.
    """
    rules = token_rules(model)
    prompt = as_text(prompt)
    require_text("the prompt", prompt)
    pictures = () if image is None else load_images(image)
    start = tokenize_prompt(model, rules, with_placeholders(model, prompt, len(pictures)))
    ids, images = start.ids, None
    if pictures:
        ids, images = process_images(model, start.text, pictures, front=start.front)
    else:
        refuse_lost_image(model, start.text, ids)
    if len(ids) >= rules.n_ctx:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the model's context holds {rules.n_ctx}; shorten it")
    return ids, images


def tokenize_responses(
    model: HookedModel, prompt: Text, responses: Sequence[Text]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Ids of a prompt and of any number of responses to it, with one border for all of them.

    Raises:
        ValueError: as ``tokenize_pairs``.
    """
    rules = token_rules(model)
    named = {f"response {i}": response for i, response in enumerate(responses, start=1)}
    start = tokenize_prompt(model, rules, with_placeholders(model, prompt, 0))
    border, full = continued(model, rules, start, named)
    refuse_lost_image(model, start.text, start.ids)
    require_context(rules, border, {name: ids[border:] for name, ids in zip(named, full, strict=True)})
    return tuple(start.ids[:border]), tuple(tuple(ids[border:]) for ids in full)


def text_ids(model: HookedModel, text: str) -> list[int]:
    """Ids of a plain text of any length, with whatever ``token_rules`` puts in front."""
    return encode(model.tokenizer, token_rules(model), text)[0]
