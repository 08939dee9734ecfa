"""Everything about token ids: rules of one tokenizer, spans of prompt and response, padded batches with their targets.

BOS, chat markers, padding and the border between prompt and response are decided here and nowhere else;
``token_rules(model).describe()`` shows the decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from grains_tl._util.errors import numbered
from grains_tl.records.loading import preference_pairs
from grains_tl.records.messages import as_text
from grains_tl.records.pairs import PairLike, PreferencePair, require_text
from grains_tl.records.pictures import load_images
from grains_tl.tokens.chat import Chat
from grains_tl.tokens.images import ImageInputs, process_images, refuse_lost_image, template_owner, with_placeholders
from grains_tl.tokens.rules import TokenRules, token_rules
from grains_tl.tokens.text import TokenTexts, common_prefix, decode_after, encode
from grains_tl.types import HookedModel, Text


@dataclass(frozen=True)
class TokenizedPair:
    """A preference record as token ids.

    Attributes:
        prompt: ids up to the border.
        chosen: ids of the preferred response after the border.
        rejected: ids of the other response.
        content: for every prompt token, whether it carries the user's words (not BOS, special, or chat template).
        strings: the prompt's tokens as text.
        starts_word: for every prompt token, whether a word begins there (word pieces go on with the word before).
        moved_border: how many prompt tokens were given to the responses because a token merges across the border
            (0 almost always). Both responses then begin with those characters, so their comparison stays right.
        images: the images of the prompt as the model takes them; ``None`` without.
        responses: chosen and rejected after the border as text, without special tokens; for people to read.

    Examples:
        >>> t = tokenize_pairs(model, pairs)[0]     # doctest: +SKIP
        >>> len(t.prompt) == len(t.strings)         # doctest: +SKIP
        True
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    content: tuple[bool, ...]
    strings: tuple[str, ...]
    moved_border: int = 0
    images: ImageInputs | None = None
    starts_word: tuple[bool, ...] = ()
    responses: tuple[str | None, str | None] = (None, None)

    @property
    def is_image(self) -> tuple[bool, ...]:
        """For every prompt token, whether it is an image feature."""
        return (False,) * len(self.prompt) if self.images is None else self.images.is_image

    @property
    def wordless(self) -> tuple[bool, ...]:
        """For every prompt token, whether it is part of no word: special tokens, those of a chat template, patches."""
        return tuple(i or not c for c, i in zip(self.content, self.is_image, strict=True))

    @property
    def n_content(self) -> int:
        """Number of content tokens in the prompt, image patches included."""
        return sum(self.content)

    @property
    def n_patches(self) -> int:
        """Number of content tokens that show a part of an image."""
        return sum(c and i for c, i in zip(self.content, self.is_image, strict=True))

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """Input rows that score both responses: one, if an input is the beginning of the other, else two.

        The last token of a response is never an input.
        """
        rows = (self.prompt + self.chosen[:-1], self.prompt + self.rejected[:-1])
        short, long = sorted(rows, key=len)
        return (long,) if long[: len(short)] == short else rows

    @property
    def longest(self) -> int:
        """Length of the longest input row."""
        return max(len(row) for row in self.inputs)


def tokenize_pairs(model: HookedModel, pairs: Iterable[PairLike]) -> list[TokenizedPair]:
    """Tokenize records and check them against the model, all before anything runs.

    Spans come from tokenizing prompt and prompt + response: the prompt is what both tokenizations share. A conversational
    response is all that the template renders after the prompt (thoughts, channel, words, tool calls) up to the end-of-turn
    marker, which is not scored. A prompt that ends with the assistant's words is continued by the responses.

    Args:
        model: gives the tokenizer, and the processor for records with images.
        pairs: the records.

    Returns:
        One ``TokenizedPair`` per record, in their order.

    Raises:
        RecordError: a record that is too long for the context, a response without tokens, a conversation for a tokenizer
            without chat template or that the template refuses, rewrites or shows only in part, an image for a model without
            a processor; the message names the record (from 1).
        ValueError: no records.

    Examples:
        >>> toks = tokenize_pairs(model, load_bundled("sentiment", "choose"))  # doctest: +SKIP
        >>> toks[0].chosen, toks[0].moved_border                              # doctest: +SKIP
    """
    rules = token_rules(model)
    records = preference_pairs(pairs)
    if not records:
        raise ValueError("no records; expected at least one preference pair")
    tokenized, texts = [], TokenTexts(model.tokenizer)
    for number, pair in enumerate(records, start=1):
        with numbered("record", number):
            tokenized.append(_tokenize(model, rules, texts, pair))
    return tokenized


#: What functions take that measure records: as they were loaded, or as ``tokenize_pairs`` made them.
Records = Sequence[TokenizedPair] | Sequence[PairLike]


def as_tokenized(model: HookedModel, records: Any) -> list[TokenizedPair]:
    """The records tokenized, whether they were or not.

    Args:
        model: as for ``tokenize_pairs``.
        records: a list of ``PreferencePair``, or of ``TokenizedPair``, which stays as it is.

    Raises:
        ValueError: one record alone, both kinds in one list, or something else; also as ``tokenize_pairs``.

    Examples:
        >>> as_tokenized(model, pairs) == tokenize_pairs(model, pairs)     # doctest: +SKIP
        True
    """
    wanted = "a list of PreferencePair (load_pairs) or of TokenizedPair (tokenize_pairs) is needed"
    if isinstance(records, (str, Mapping)) or not hasattr(records, "__iter__"):
        raise ValueError(f"records are a {type(records).__name__}; {wanted}: [record] for one")
    given = list(records)
    tokenized = [r for r in given if isinstance(r, TokenizedPair)]
    if len(tokenized) == len(given):
        return tokenized
    if tokenized:
        number, other = next((i, r) for i, r in enumerate(given, start=1) if not isinstance(r, TokenizedPair))
        raise ValueError(f"record {number} is a {type(other).__name__} among TokenizedPair; {wanted}, all of one kind")
    return tokenize_pairs(model, given)


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
    start = _prompt(model, rules, with_placeholders(model, prompt, len(pictures)))
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
    start = _prompt(model, rules, with_placeholders(model, prompt, 0))
    border, full = _continued(model, rules, start, named)
    refuse_lost_image(model, start.text, start.ids)
    _require_context(rules, border, {name: ids[border:] for name, ids in zip(named, full, strict=True)})
    return tuple(start.ids[:border]), tuple(tuple(ids[border:]) for ids in full)


def text_ids(model: HookedModel, text: str) -> list[int]:
    """Ids of a plain text of any length, with whatever ``token_rules`` puts in front."""
    return encode(model.tokenizer, token_rules(model), text)[0]


@dataclass(frozen=True)
class _Prompt:
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


def _prompt(model: HookedModel, rules: TokenRules, prompt: Text, tools: Sequence[Any] | None = None) -> _Prompt:
    if isinstance(prompt, str):
        return _Prompt(prompt, *encode(model.tokenizer, rules, prompt), rules.front, None)
    if not rules.has_chat_template:
        raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give plain text")
    chat = Chat(template_owner(model), tuple(prompt), tuple(tools) if tools else None)
    text = chat.prompt()
    return _Prompt(text, *encode(model.tokenizer, rules, text, rendered=True), (), chat)


def _continued(
    model: HookedModel, rules: TokenRules, prompt: _Prompt, responses: Mapping[str, Text]
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


def _content(rules: TokenRules, prompt: _Prompt) -> list[bool]:
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


def _require_context(rules: TokenRules, border: int, responses: Mapping[str, Sequence[int]]) -> None:
    for name, response in responses.items():
        if border + len(response) > rules.n_ctx:
            raise ValueError(
                f"prompt + {name} is {border + len(response)} tokens, and the model's context holds "
                f"{rules.n_ctx}; shorten the prompt"
            )


def _tokenize(model: HookedModel, rules: TokenRules, texts: TokenTexts, pair: PreferencePair) -> TokenizedPair:
    pictures = () if pair.image is None else load_images(pair.image)
    start = _prompt(model, rules, with_placeholders(model, pair.prompt, len(pictures)), pair.tools)
    border, full = _continued(model, rules, start, {"chosen": pair.chosen, "rejected": pair.rejected})
    if full[0] == full[1]:
        raise ValueError("chosen and rejected give the same tokens; drop the record")
    ids, content = start.ids, _content(rules, start)
    moved, chosen, rejected = len(ids) - border, full[0][border:], full[1][border:]
    images = None
    if pictures:
        given_away = ids[border:]
        expanded, images = process_images(model, start.text, pictures, front=start.front)
        content = _expand_content(ids, content, expanded, images)
        border, ids = len(expanded) - moved, expanded
        if ids[border:] != given_away or any(images.is_image[border:]):
            raise ValueError(
                "a token crosses the border between prompt and response next to an image; put text between them"
            )
        images = _until(images, border)
    else:
        refuse_lost_image(model, start.text, ids)
    _require_context(rules, border, {"chosen": chosen, "rejected": rejected})
    end = ids[:border][-8:]  # what decoding needs to see of the prompt
    return TokenizedPair(
        prompt=tuple(ids[:border]),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        content=tuple(content[:border]),
        strings=texts.strings(ids[:border]),
        moved_border=moved,
        images=images,
        starts_word=texts.word_starts(ids[:border]),
        responses=(decode_after(model.tokenizer, end, chosen), decode_after(model.tokenizer, end, rejected)),
    )


def _expand_content(
    short: Sequence[int], content: Sequence[bool], prompt: Sequence[int], images: ImageInputs
) -> list[bool]:
    """Content flags of a prompt, carried over to the same prompt with its images expanded; patches are content."""
    out = [False] * len(prompt)
    for block in SequenceMatcher(None, list(short), list(prompt), autojunk=False).get_matching_blocks():
        out[block.b : block.b + block.size] = content[block.a : block.a + block.size]
    patches = images.patches
    return [p in patches if is_image else out[p] for p, is_image in enumerate(images.is_image)]


def _until(images: ImageInputs, border: int) -> ImageInputs:
    tokens = {key: values[:border] for key, values in images.token_inputs.items()}
    return replace(images, token_inputs=tokens, is_image=images.is_image[:border])
