"""A guard against degenerate generations: repetition, variety and length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_uppercase

import pandas as pd

from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Setting
from grains_tl.evaluate.store import Checkpoint
from grains_tl.records.choices import MultipleChoice, letters
from grains_tl.types import HookedModel
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering


def retention(
    model: HookedModel,
    items: Iterable[MultipleChoice],
    settings: Sequence[Setting | Steering | CombinedSteering],
    *,
    checkpoint: str | Path | Checkpoint | None = None,
) -> pd.DataFrame:
    """Does the model still know what it knew: questions answered by the likeliest letter, before and after.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        items: questions; they are asked with ``letters`` unless their choices are letters already.
        settings: what to measure (see ``record_effects``).
        checkpoint: a ``.jsonl`` file; an interrupted call resumes from it (see ``record_effects``).

    Returns:
        As ``record_effects``; ``base_correct`` and ``correct`` (0 or 1; their means are shares) are what to look at,
        and ``summarize`` gives the paired change of the accuracy with its standard error.

    Examples:
        >>> frame = retention(model, questions, grid({"ours": vectors}, [12], [0.2]))            # doctest: +SKIP
        >>> summarize(frame)[["base_accuracy", "accuracy", "accuracy_se"]]                       # doctest: +SKIP
    """
    asked = [item if all(c.strip() in set(ascii_uppercase) for c in item.choices) else letters(item) for item in items]
    return record_effects(model, asked, settings, checkpoint=checkpoint)


def text_quality(texts: Sequence[str], *, max_repetition: float = 0.5, min_words: int = 3, n: int = 3) -> pd.DataFrame:
    """Signs of degenerate text, without a model.

    Args:
        texts: generations.
        max_repetition: ``repetition`` above this counts as degenerate.
        min_words: fewer words count as degenerate.
        n: length of the runs of words in ``repetition``.

    Returns:
        One row per text: ``words``, ``repetition`` (share of runs of ``n`` words that occurred before; of single
        words in texts shorter than that), ``distinct_1`` and ``distinct_2`` (share of words, of pairs of words, that
        are different; arXiv 1510.03055), ``degenerate``.

    Examples:
        >>> text_quality(["a good film with a good end", "no no no no no no"])["degenerate"].tolist()
        [False, True]
    """
    rows = []
    for text in texts:
        words = text.lower().split()
        runs = _runs(words, n) or _runs(words, 1)
        repetition = 1 - _distinct(runs)
        rows.append(
            {
                "words": len(words),
                "repetition": repetition,
                "distinct_1": _distinct(_runs(words, 1)),
                "distinct_2": _distinct(_runs(words, 2)),
                "degenerate": len(words) < min_words or repetition > max_repetition,
            }
        )
    return pd.DataFrame(rows, columns=["words", "repetition", "distinct_1", "distinct_2", "degenerate"])


def quality_table(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> pd.DataFrame:
    """What texts without and with steering are like, side by side; ``generation_quality`` has more columns."""
    texts = pd.DataFrame({"prompt": prompts, "base_text": before, "text": after})
    return pd.concat([texts, text_quality(before).add_prefix("base_"), text_quality(after)], axis=1)


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _distinct(runs: Sequence[tuple[str, ...]]) -> float:
    return len(set(runs)) / len(runs) if runs else 1.0
