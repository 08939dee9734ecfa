"""The figures of one preference set as plain numbers and lists, for the demo's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.result import Attribution
from grains_tl.evaluate.controls import Comparison
from grains_tl.inference.generation import generate
from grains_tl.records.pairs import PreferencePair
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors


def base(compared: Comparison) -> dict[str, float]:
    """The unsteered model on the test split."""
    mean, se = mean_and_se(compared.base)
    return {
        "margin": mean.item(),
        "margin_se": se.item(),
        "accuracy": (compared.base > 0).float().mean().item(),
    }


def attribution_figures(
    attributions: dict[str, list[Attribution]], seconds: dict[str, float], build: Sequence[PreferencePair]
) -> dict[str, Any]:
    """Two records as examples, and how well each method did."""
    return {
        "tokens": [_token_row(attributions[m][i], build[i]) for i in range(min(2, len(build))) for m in attributions],
        "attribution": [
            {"method": m, "median_relative_gap": _median_gap(found), "seconds": seconds[m], "n": len(found)}
            for m, found in attributions.items()
        ],
    }


def _token_row(a: Attribution, pair: PreferencePair) -> dict[str, Any]:
    return {
        "method": a.method,
        "tokens": a.tokens,
        "scores": a.scores.nan_to_num(0.0).tolist(),
        "content": a.content.tolist(),
        "objective": a.objective,
        "baseline_objective": a.baseline_objective,
        "gap": a.gap,
        "chosen": str(pair.chosen),
        "rejected": str(pair.rejected),
    }


def _median_gap(attributions: Sequence[Attribution]) -> float | None:
    gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
    return float(np.median(gaps)) if gaps else None


def continuations(
    model: HookedModel, prompts: Sequence[str], vectors: SteeringVectors, layer: int, alpha: float
) -> list[dict[str, Any]]:
    """How the model goes on after some prompts at -alpha, 0 and +alpha."""
    rows = []
    for a in (-alpha, 0.0, alpha):
        texts = generate(model, prompts, vectors.hooks(a, [layer]), max_new_tokens=20)
        rows += [{"prompt": p, "alpha": a, "text": t} for p, t in zip(prompts, texts, strict=True)]
    return sorted(rows, key=lambda r: (prompts.index(r["prompt"]), r["alpha"]))


def table_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table; missing numbers as ``None``, because NaN is no JSON."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
