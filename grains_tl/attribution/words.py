"""Words, sentences and given spans as groups of neighbouring tokens: text alone, no scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch

#: ``"word"``, ``"sentence"``, or spans: ``(begin, end)`` positions of the prompt (end not included), or texts to find in it.
GroupBy = Literal["word", "sentence"] | Sequence[Any]


def groups_of(
    tokens: Sequence[str], starts_word: Sequence[bool], by: GroupBy, alone: Sequence[bool] = ()
) -> list[tuple[int, ...]]:
    """Groups of positions that together hold every token once, in order.

    Args:
        tokens: the prompt's tokens as text.
        starts_word: for every token, whether a word begins there; empty: where the text begins with a space.
        by: as in ``group``.
        alone: for every token, whether it belongs to no word: special tokens, those of a chat template, patches.
    """
    begins = list(starts_word) or [t[:1].isspace() for t in tokens]
    apart = list(alone) or [False] * len(tokens)
    if by == "word":
        return _words(tokens, begins, apart)
    if by == "sentence":
        return _sentences(tokens, begins, apart)
    if isinstance(by, str):
        raise ValueError(f"grouping {by!r}; expected 'word', 'sentence' or a list of spans")
    pieces = spaced(tokens, starts_word)
    return _with_spans(len(tokens), [_span(pieces, one) for one in by])


def spaced(tokens: Sequence[str], starts_word: Sequence[bool]) -> list[str]:
    """Tokens with the space that decoding puts in front of them, where their own text does not have it.

    Word-level and SentencePiece tokenizers (those of many vision models) drop it from a token decoded alone.

    Examples:
        >>> spaced(["what", "is", "it", "?"], [True, True, True, False])
        ['what', ' is', ' it', '?']
    """
    if not starts_word:
        return list(tokens)
    texts = list(tokens[:1])
    for before, token, begins in zip(tokens, tokens[1:], starts_word[1:], strict=False):
        missing = begins and not token[:1].isspace() and not before[-1:].isspace()
        texts.append(" " + token if missing else token)
    return texts


def _words(tokens: Sequence[str], begins: Sequence[bool], alone: Sequence[bool]) -> list[tuple[int, ...]]:
    found: list[list[int]] = []
    for i, token in enumerate(tokens):
        joins = i > 0 and not begins[i] and not tokens[i - 1][-1:].isspace() and not (alone[i] or alone[i - 1])
        if joins and _is_word(token) and _is_word(tokens[i - 1]):
            found[-1].append(i)
        else:
            found.append([i])
    return [tuple(own) for own in found]


def _is_word(token: str) -> bool:
    """Has a letter or digit: punctuation, line breaks and markers stand alone."""
    return any(c.isalnum() for c in token)


def _sentences(tokens: Sequence[str], begins: Sequence[bool], alone: Sequence[bool]) -> list[tuple[int, ...]]:
    """Up to a full stop, question or exclamation mark before a new word, a line break, or where the template begins."""
    found: list[list[int]] = [[]]
    for i, token in enumerate(tokens):
        if i and alone[i] != alone[i - 1]:
            found.append([])
        found[-1].append(i)
        next_word = i + 1 == len(tokens) or begins[i + 1] or tokens[i + 1][:1].isspace()
        if "\n" in token or (token.strip()[-1:] in (".", "!", "?") and next_word):
            found.append([])
    return [tuple(own) for own in found if own]


def _span(tokens: Sequence[str], span: Any) -> tuple[int, int]:
    if isinstance(span, str):
        text = "".join(tokens)
        at = text.find(span)
        if not span or at < 0:
            raise ValueError(f"the text {span!r} is not in the prompt {text!r}")
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()
        first = next(i for i, end in enumerate(ends) if end > at)
        last = next(i for i, end in enumerate(ends) if end >= at + len(span))
        return first, last + 1
    begin, end = span
    if not 0 <= begin < end <= len(tokens):
        raise ValueError(
            f"the span {(begin, end)} lies outside the prompt, which has positions 0 to {len(tokens) - 1}; the "
            "end of a span is not "
            "included"
        )
    return int(begin), int(end)


def _with_spans(n: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    ordered = sorted(spans)
    for (_, end), (begin, _) in itertools.pairwise(ordered):
        if begin < end:
            raise ValueError(f"the spans {ordered} overlap; a token can be in one group only")
    inside = {p for begin, end in ordered for p in range(begin, end)}
    found = [tuple(range(begin, end)) for begin, end in ordered] + [(p,) for p in range(n) if p not in inside]
    return sorted(found)
