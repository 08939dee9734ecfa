"""Markdown tables of ``words.jsonl``: response words taken out of the vectors, and letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.recipes.intervals import Effects, estimate
from studies.recipes.tables import LABELS, MODELS
from studies.recipes.texts import rows_of

BUILT = {
    "as asked": "questions as asked",
    "letters out": "questions as asked, letters' directions taken out",
    "both orders": "both orders of the answers",
}


def _effects(rows: list[dict[str, Any]], name: str, kl: float) -> Effects | None:
    """``[sample, 1, record]`` of some lines; ``None`` where a budget was not reached."""
    points = [p for row in rows for p in row["effects"].get(name, []) if p["kl"] == kl]
    if not points or not all(p["change"] for p in points):
        return None
    return np.array([p["change"] for p in points])[:, None]


def _shown(effects: Effects | None, per_question: int = 1) -> str:
    if effects is None:
        return "not reached"
    found = estimate(effects, per_question)
    return f"**{found}**" if found.low > 0 else str(found)


def without_words_table(folder: Path, kl: float = 0.05) -> str:
    """Reviews: each vector as built and without the response words' directions, on both wordings."""
    lines = [
        "| model | recipe | length left | as built | words out | other wordings, as built | other wordings, words out |",
        "|---" * 7 + "|",
    ]
    for model in MODELS:
        rows = [row for row in rows_of(folder / model / "words.jsonl") if row["set"] == "reviews"]
        for recipe in dict.fromkeys(row["recipe"] for row in rows):
            own = {
                k: [r for r in rows if r["recipe"] == recipe and r["built"] == k] for k in ("as built", "without words")
            }
            left = np.mean([row["length_left"] for row in own["without words"]])
            shown = [_shown(_effects(own[k], name, kl)) for name in ("test", "wordings") for k in own]
            lines.append(f"| {MODELS[model]} | {LABELS[recipe]} | {left:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def letters_table(folder: Path, kl: float = 0.2) -> str:
    """Survival-instinct: what counterbalancing, or taking the letters out, does to what is measured."""
    lines = [
        "| model | recipe | built from | measured on questions as asked | measured on both orders |",
        "|---" * 5 + "|",
    ]
    for model in MODELS:
        rows = [row for row in rows_of(folder / model / "words.jsonl") if row["set"] != "reviews"]
        for recipe in dict.fromkeys(row["recipe"] for row in rows):
            for built, label in BUILT.items():
                own = [r for r in rows if r["recipe"] == recipe and r["built"] == built]
                asked, both = _effects(own, "as asked", kl), _effects(own, "both orders", kl)
                lines.append(f"| {MODELS[model]} | {LABELS[recipe]} | {label} | {_shown(asked)} | {_shown(both, 2)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
