"""Yes/no questions: vectors against the plainest rival, a constant added to the log-odds of yes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.selection import select_tokens
from grains_tl.baselines.controls import caa_differences
from grains_tl.demo.scene_questions import question_margins
from grains_tl.demo.scene_records import yes_no_pairs, yes_no_questions
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.hooks.mask import Mask
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import collect_differences
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors

ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.8)


def yes_no_vectors(
    model: HookedModel, n: int, *, layers: list[int], top_k: int = 5, seed: int = 0
) -> dict[str, SteeringVectors]:
    """Vectors from ``n`` adversarial false yes (chosen: no): leave-one-out by mean and PCA, and CAA.

    Raises:
        ValueError: too few of them among ``8 n`` scenes.
    """
    asked = [q for q in _adversarial("build", 8 * n, seed) if not q.answer]
    wrong = [q for q, m in zip(asked, question_margins(model, asked).tolist(), strict=True) if m > 0][:n]
    if len(wrong) < n:
        raise ValueError(f"{len(asked)} questions gave {len(wrong)} false yes, {n} are wanted")
    tokenized = tokenize_pairs(model, yes_no_pairs(wrong))
    options: dict[str, Any] = {"mask": Mask("zero", "zero")}
    attributions = attribute_all(model, tokenized, content_only=True, **options)
    selections = [select_tokens(a, top_k) for a in attributions]
    differences = collect_differences(model, tokenized, selections, layers=layers, **options)
    caa = caa_differences(model, tokenized, layers=differences.layers, resid_norms=differences.resid_norms)
    return {
        "leave_one_out, mean": reduce_vectors(differences),
        "leave_one_out, pca": reduce_vectors(differences, reduce="pca"),
        "CAA": reduce_vectors(caa),
    }


def _adversarial(part: Any, n: int, seed: int) -> list[YesNoQuestion]:
    return [q for q in yes_no_questions(part, n, seed=seed) if q.split == "adversarial"]


def yes_no_curves(
    model: HookedModel,
    questions: Sequence[YesNoQuestion],
    vectors: Mapping[str, tuple[SteeringVectors, int]],
    *,
    alphas: Sequence[float],
    n_biases: int = 41,
) -> pd.DataFrame:
    """Answers of is-there questions under each vector at several alphas, and under a constant bias of the margin.

    A constant added to log p(yes) - log p(no) walks along the ROC curve of the unsteered model. A vector that does more
    than shift the threshold leaves that curve upwards.

    Args:
        model: the bridge from ``load_model("tiny-vlm")``.
        questions: with answers of both kinds.
        vectors: name -> (vectors, layer).
        alphas: strengths, fractions of the layer's residual norm; alpha 0 is added.
        n_biases: how many biases, evenly spread over the quantiles of the unsteered margins.

    Returns:
        One row per setting: ``vector`` (``"constant bias"`` for the rival), ``layer`` (NaN for it), ``strength`` (alpha;
        of the bias nats), ``false_yes`` and ``recall`` (shares) with ``_se`` over questions, ``balanced_accuracy``, ``auc``.

    Raises:
        ValueError: questions whose answers are all the same.

    Examples:
        >>> frame = yes_no_curves(model, questions, {"CAA": (caa, 2)}, alphas=[0.2, 0.4])     # doctest: +SKIP
    """
    truth = [q.answer for q in questions]
    if len(set(truth)) < 2:
        raise ValueError(f"{len(truth)} questions with one kind of answer; expected both yes and no")
    base = question_margins(model, questions).numpy()
    biases = [0.0, *-np.quantile(base, np.linspace(0.01, 0.99, n_biases))]
    rows = [_row("constant bias", math.nan, float(b), truth, base + b) for b in sorted(biases)]
    for name, (vector, layer) in vectors.items():
        for alpha in sorted({0.0, *alphas}):
            margins = base if alpha == 0 else question_margins(model, questions, vector.hooks(alpha, [layer])).numpy()
            rows.append(_row(name, float(layer), float(alpha), truth, margins))
    return pd.DataFrame(rows)


def _row(name: str, layer: float, strength: float, truth: Sequence[bool], margins: Any) -> dict[str, Any]:
    scores = yes_no_scores(truth, margins=margins.tolist())
    return {
        "vector": name,
        "layer": layer,
        "strength": strength,
        "false_yes": scores.false_yes,
        "false_yes_se": scores.false_yes_se,
        "recall": scores.recall,
        "recall_se": math.sqrt(scores.recall * (1 - scores.recall) / max(sum(truth) - 1, 1)),
        "balanced_accuracy": scores.balanced_accuracy,
        "auc": scores.auc,
    }
