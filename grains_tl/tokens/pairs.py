"""Preference records as token ids, with what is content in the prompt and where each response begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from grains_tl._util.errors import numbered
from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PairLike, PreferencePair
from grains_tl.records.pictures import load_images
from grains_tl.tokens.images import ImageInputs, process_images, refuse_lost_image, with_placeholders
from grains_tl.tokens.prompts import content_flags, continued, require_context, tokenize_prompt
from grains_tl.tokens.rules import TokenRules, token_rules
from grains_tl.tokens.text import TokenTexts, decode_after
from grains_tl.types import HookedModel


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
    wanted = "expected a list of PreferencePair (load_pairs) or of TokenizedPair (tokenize_pairs)"
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


def _tokenize(model: HookedModel, rules: TokenRules, texts: TokenTexts, pair: PreferencePair) -> TokenizedPair:
    pictures = () if pair.image is None else load_images(pair.image)
    start = tokenize_prompt(model, rules, with_placeholders(model, pair.prompt, len(pictures)), pair.tools)
    border, full = continued(model, rules, start, {"chosen": pair.chosen, "rejected": pair.rejected})
    if full[0] == full[1]:
        raise ValueError("chosen and rejected give the same tokens; drop the record")
    ids, content = start.ids, content_flags(rules, start)
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
    require_context(rules, border, {"chosen": chosen, "rejected": rejected})
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
