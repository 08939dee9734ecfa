"""Words, sentences and phrases: groups of neighbouring prompt tokens, their scores, and the choice among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection

#: ``"word"``, ``"sentence"``, or spans: ``(begin, end)`` positions of the prompt (end not included), or texts to find in it.
GroupBy = Literal["word", "sentence"] | Sequence[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Grouped:
    """Scores of groups of tokens.

    Attributes:
        texts: the groups' text, in order.
        scores: ``[group]`` nats, the sum over the group's tokens (tokens without a score, NaN, count as nothing).
        positions: the tokens of each group.
        content: ``[group]``, True where the group has a content token.
        attribution: what was grouped.

    Examples:
        >>> a = Attribution(torch.tensor([0.5, -1.0]), [" good", " bad"], torch.tensor([True] * 2),
        ...                 torch.tensor([False] * 2), None, 1.5, None, "leave_one_out")
        >>> g = group(a)
        >>> g.texts, g.scores.tolist()
        ([' good', ' bad'], [0.5, -1.0])
    """

    texts: list[str]
    scores: Float[Tensor, "group"]
    positions: list[tuple[int, ...]]
    content: Tensor
    attribution: Attribution

    def __str__(self) -> str:
        order = self.scores.abs().argsort(descending=True)[:5].tolist()
        top = ", ".join(f"{self.texts[i].strip()[:60]!r} {self.scores[i]:+.2f}" for i in order)
        return f"{self.attribution.method}, {len(self.texts)} groups; largest: {top}"

    def __repr__(self) -> str:
        return f"Grouped({self})"

    def _repr_html_(self) -> str:
        from grains_tl.attribution.display import grouped_html  # which imports this module

        return grouped_html(self)


def group(attribution: Attribution, *, by: GroupBy = "word") -> Grouped:
    """Sum the scores of word pieces into words, sentences or given spans; the total stays the same.

    Args:
        attribution: from ``attribute``.
        by: ``"word"`` (punctuation marks stand alone), ``"sentence"``, or a list of spans: ``(begin, end)`` token positions
            or texts such as ``"the waiter"`` (first place where the text stands). Tokens outside the spans stay alone.

    Returns:
        ``Grouped``: ``texts`` and ``scores`` (nats), one per group, in the order of the prompt.

    Raises:
        ValueError: an unknown grouping, a span outside the prompt, overlapping spans, or a text that is not there.

    Examples:
        >>> a = Attribution(torch.tensor([.5, 1., 2.]), [" bad", " ser", "vice"], torch.tensor([True] * 3),
        ...                 torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> group(a).texts, group(a).scores.tolist()
        ([' bad', ' service'], [0.5, 3.0])
    """
    starts = () if attribution.starts_word is None else tuple(attribution.starts_word.tolist())
    positions = groups_of(attribution.tokens, starts, by, (~attribution.content | attribution.is_image).tolist())
    pieces = spaced(attribution.tokens, starts)
    scores = attribution.scores.nan_to_num(0.0)
    return Grouped(
        texts=["".join(pieces[p] for p in own) for own in positions],
        scores=torch.stack([scores[list(own)].sum() for own in positions]),
        positions=positions,
        content=torch.stack([attribution.content[list(own)].any() for own in positions]),
        attribution=attribution,
    )


def select_groups(grouped: Grouped, top_k: int) -> Selection:
    """The content tokens of the ``top_k`` groups with the largest positive score, and of those with the most negative.

    Args:
        grouped: from ``group``.
        top_k: groups on each side.

    Returns:
        ``Selection`` of token positions, strongest group first.

    Raises:
        ValueError: ``top_k`` is not positive.

    Examples:
        >>> a = Attribution(torch.tensor([-.5, 1., 2.]), [" bad", " ser", "vice"], torch.tensor([True] * 3),
        ...                 torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> select_groups(group(a), top_k=1)
        Selection(toward_chosen=(1, 2), toward_rejected=(0,))
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; at least one group must be chosen")
    order = [i for i in grouped.scores.argsort(descending=True, stable=True).tolist() if grouped.content[i]]
    up = [i for i in order if grouped.scores[i] > 0][:top_k]
    down = [i for i in reversed(order) if grouped.scores[i] < 0][:top_k]
    content = grouped.attribution.content

    def tokens(groups: Sequence[int]) -> tuple[int, ...]:
        return tuple(p for g in groups for p in grouped.positions[g] if content[p])

    return Selection(tokens(up), tokens(down))


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
        raise ValueError(f"grouping {by!r}; it is 'word', 'sentence' or a list of spans")
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
            raise ValueError(f"the text {span!r} does not stand in the prompt {text!r}")
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()
        first = next(i for i, end in enumerate(ends) if end > at)
        last = next(i for i, end in enumerate(ends) if end >= at + len(span))
        return first, last + 1
    begin, end = span
    if not 0 <= begin < end <= len(tokens):
        raise ValueError(
            f"span {(begin, end)}; the prompt has positions 0 to {len(tokens) - 1}, the end is not included"
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
