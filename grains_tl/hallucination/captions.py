"""Objects in captions that are not in the picture (CHAIR, arXiv 1809.02156)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from grains_tl._util.stats import standard_error


@dataclass(frozen=True)
class CaptionScores:
    """How far captions name what is not there, and whether they still name what is.

    Attributes:
        n: number of captions.
        hallucinating: share of captions with at least one absent object (CHAIRs).
        hallucinating_se: its standard error.
        absent_mentions: share of the objects named that are absent (CHAIRi).
        coverage: share of a picture's objects that its caption names, mean over captions.
        coverage_se: its standard error.
        f1: 2 tp / (2 tp + fp + fn) over all objects.
        per_caption: for each caption, whether it names an absent object (for paired comparisons).

    Examples:
        >>> scores = caption_hallucination(["a cat", "a dog"], [{"cat"}, {"cat"}], lambda text: text.split()[1:])
        >>> scores.hallucinating, scores.per_caption
        (0.5, (False, True))
    """

    n: int
    hallucinating: float
    hallucinating_se: float
    absent_mentions: float
    coverage: float
    coverage_se: float
    f1: float
    per_caption: tuple[bool, ...] = field(repr=False)


def caption_hallucination(
    captions: Sequence[str],
    present: Sequence[Iterable[Hashable]],
    objects: Callable[[str], Iterable[Hashable]],
) -> CaptionScores:
    """Score captions against the objects that are in their pictures.

    Each object counts once per caption, as in CHAIR. Without coverage a low share of absent objects means little: a
    caption that says nothing has none.

    Args:
        captions: the texts.
        present: for each picture, its objects.
        objects: finds the objects a caption names (this is where synonyms belong); for the bundled scenes
            ``grains_tl.models.tiny_vlm.mentioned``.

    Returns:
        ``CaptionScores``: shares between 0 and 1 and their standard errors over captions.

    Raises:
        ValueError: no captions, or not one set of objects per caption.

    Examples:
        >>> s = caption_hallucination(["a cat on a mat", "a cat"], [{"cat"}, {"cat", "dog"}],
        ...                           lambda text: {"cat", "dog", "mat"} & set(text.split()))
        >>> s.hallucinating, round(s.absent_mentions, 3), s.coverage
        (0.5, 0.333, 0.75)
    """
    if not captions or len(captions) != len(present):
        raise ValueError(f"{len(captions)} captions and {len(present)} sets of objects; expected one each")
    absent, covered, right, wrong, missed = [], [], 0, 0, 0
    for text, there in zip(captions, present, strict=True):
        named, real = set(objects(text)), set(there)
        absent.append(bool(named - real))
        right, wrong, missed = right + len(named & real), wrong + len(named - real), missed + len(real - named)
        if real:
            covered.append(len(named & real) / len(real))
    counted = 2 * right + wrong + missed
    return CaptionScores(
        n=len(captions),
        hallucinating=float(np.mean(absent)),
        hallucinating_se=standard_error(np.asarray(absent, dtype=float)),
        absent_mentions=wrong / (right + wrong) if right + wrong else 0.0,
        coverage=float(np.mean(covered)) if covered else math.nan,
        coverage_se=standard_error(covered),
        f1=2 * right / counted if counted else math.nan,
        per_caption=tuple(absent),
    )
