"""Intervals over building samples, random draws and test records together, and the effects read from the raw lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 4000

#: Effects ``[sample, draw, record]``, nats; one draw for whatever is not drawn at random.
Effects = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: over samples, draws and records, nats.
        low: lower end.
        high: upper end.
        per_sample: means of the building samples.
    """

    mean: float
    low: float
    high: float
    per_sample: tuple[float, ...]

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return "not reached"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def resampled(effects: Effects, per_question: int, seed: int = 0, n: int = N_RESAMPLES) -> NDArray[np.float64]:
    """Means of ``n`` resamples: building samples, draws inside each of them, and questions, each with replacement.

    The same seed resamples samples and questions of every recipe of a cell alike, so that differences are paired. With few
    samples a resample varies too little, by (S - 1) / S in the variance; the deviations are stretched to make up for it.

    Args:
        effects: ``[sample, draw, record]``.
        per_question: how many records in a row are one question and are drawn together.
        seed: of the resampling.
        n: resamples.
    """
    n_samples, n_draws, n_records = effects.shape
    n_questions = n_records // per_question
    shared, own = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    samples = shared.integers(0, n_samples, (n, n_samples))
    questions = shared.integers(0, n_questions, (n, n_questions))
    by_question = effects[:, :, : n_questions * per_question].reshape(n_samples, n_draws, n_questions, -1).mean(-1)
    weight = np.stack([np.bincount(q, minlength=n_questions) for q in questions]) / n_questions
    per_draw = np.einsum("sdq,nq->nsd", by_question, weight)
    draws = own.integers(0, n_draws, (n, n_samples, n_draws))
    picked = np.take_along_axis(np.take_along_axis(per_draw, samples[:, :, None], 1), draws, 2).mean((1, 2))
    stretch = (n_samples / (n_samples - 1)) ** 0.5 if n_samples > 1 else 1.0
    return effects.mean() + (picked - picked.mean()) * stretch


def estimate(
    effects: Effects, per_question: int, minus: Effects | None = None, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean effect, or mean paired difference to other effects on the same samples and records, with its interval."""
    own = effects if minus is None else effects.mean(1, keepdims=True) - minus.mean(1, keepdims=True)
    if np.isnan(own).any():
        return Estimate(np.nan, np.nan, np.nan, ())
    means = resampled(effects, per_question, seed)
    if minus is not None:
        means = means - resampled(minus, per_question, seed)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(own.mean()), float(low), float(high), tuple(own.mean((1, 2)).tolist()))


def read_cells(folder: Path) -> Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What is known of every finished model and set, and its lines."""
    for file in sorted(folder.glob("*/*.json")):
        about = json.loads(file.read_text(encoding="utf-8"))
        lines = file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        yield about, [json.loads(line) for line in lines]


def effects_of(
    rows: Iterable[dict[str, Any]], recipe: str, kl: float, *, stage: str = "test", name: str | None = None
) -> Effects | None:
    """``[sample, draw, record]`` of one recipe at one budget; NaN where it is not reached, ``None`` if not measured.

    Draws that some of the samples lack are left out.
    """
    own = [r for r in rows if r["stage"] == stage and r["recipe"] == recipe]
    found: dict[tuple[int, int], list[float] | None] = {}
    for row in own:
        for point in row["effects"].get(name or stage, []):
            if point["kl"] == kl:
                found[row["sample"], row["draw"]] = point["change"] or None
    if not found:
        return None
    samples = sorted({s for s, _ in found})
    draws = [d for d in sorted({d for _, d in found}) if all((s, d) in found for s in samples)]
    n_records = max(len(change or []) for change in found.values())
    nothing = [np.nan] * max(n_records, 1)
    return np.array([[found.get((s, d)) or nothing for d in draws] for s in samples], dtype=float)
