"""Scores of words, sentences and phrases, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util import html
from grains_tl.attribution.display import Piece, Template, kind_of, prompt_html
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection
from grains_tl.attribution.words import GroupBy, groups_of, spaced


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
        return self.as_html()

    def as_html(self, template: Template = "fold") -> str:
        """The prompt as text with one tint for each group; ``template`` as in ``show_tokens``."""
        a = self.attribution
        pieces = []
        for text, score, own in zip(self.texts, self.scores.tolist(), self.positions, strict=True):
            positions = list(own)
            kind = kind_of(bool(a.content[positions].any()), bool(a.is_image[positions].any()))
            pieces.append(Piece(text, score, kind))
        return prompt_html(a.shown(pieces, f", {html.count(len(pieces), 'group')}"), template)


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
        raise ValueError(f"top_k={top_k}; expected at least 1 group")
    order = [i for i in grouped.scores.argsort(descending=True, stable=True).tolist() if grouped.content[i]]
    up = [i for i in order if grouped.scores[i] > 0][:top_k]
    down = [i for i in reversed(order) if grouped.scores[i] < 0][:top_k]
    content = grouped.attribution.content

    def tokens(groups: Sequence[int]) -> tuple[int, ...]:
        return tuple(p for g in groups for p in grouped.positions[g] if content[p])

    return Selection(tokens(up), tokens(down))
