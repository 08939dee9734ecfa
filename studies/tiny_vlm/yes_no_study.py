"""TODO doc of studies/tiny_vlm/yes_no_study.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.demo.scene_questions import question_margins
from grains_tl.demo.scene_yes_no import ALPHAS, _adversarial, yes_no_vectors
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.types import HookedModel


def yes_no_study(
    model: HookedModel,
    *,
    seeds: Iterable[int] = (0,),
    n_build: int = 50,
    n_choose: int = 200,
    n_test: int = 600,
    n_random: int = 2,
    layers: tuple[int, ...] = (0, 1, 2, 3),
) -> pd.DataFrame:
    """Adversarial questions under each vector, layer and alpha chosen by balanced accuracy on other scenes.

    The rival ``"constant bias"`` adds one number to every margin; it is the best threshold on the choosing scenes.

    Returns:
        One row per vector: ``seed``, ``vector``, ``layer``, ``alpha`` (the bias: nats), balanced accuracy, false yes,
        recall, AUC, ``n``.
    """
    choose, test = _adversarial("choose", n_choose, 0), _adversarial("test", n_test, 0)
    base_choose, base_test = (question_margins(model, q).numpy() for q in (choose, test))
    bias = _best_bias(choose, base_choose)
    rows = [
        _row(-1, "unsteered", test, base_test),
        {**_row(-1, "constant bias", test, base_test + bias), "alpha": bias},
    ]
    for seed in seeds:
        vectors = yes_no_vectors(model, n_build, layers=list(layers), seed=100 + seed)
        draws = random_direction_vectors(vectors["CAA"], n_draws=n_random, seed=seed)
        vectors |= {f"random direction {i}": v for i, v in enumerate(draws, start=1)}
        for name, vector in vectors.items():
            tried = [
                (_scores(choose, question_margins(model, choose, vector.hooks(alpha, [layer])).numpy()), layer, alpha)
                for layer in layers
                for alpha in ALPHAS
            ]
            _, layer, alpha = max(tried)
            found = question_margins(model, test, vector.hooks(alpha, [layer])).numpy()
            rows.append({**_row(seed, name, test, found), "layer": layer, "alpha": alpha})
    return pd.DataFrame(rows)


def _scores(questions: list[YesNoQuestion], margins: Any) -> float:
    return yes_no_scores([q.answer for q in questions], margins=margins.tolist()).balanced_accuracy


def _best_bias(questions: list[YesNoQuestion], margins: Any) -> float:
    ordered = np.sort(margins)
    borders = -(ordered[1:] + ordered[:-1]) / 2
    return float(borders[int(np.argmax([_scores(questions, margins + b) for b in borders]))])


def _row(seed: int, name: str, questions: list[YesNoQuestion], margins: Any) -> dict[str, Any]:
    s = yes_no_scores([q.answer for q in questions], margins=torch.as_tensor(margins).tolist())
    return {
        "seed": seed,
        "vector": name,
        "layer": None,
        "alpha": None,
        "balanced_accuracy": s.balanced_accuracy,
        "balanced_accuracy_se": s.balanced_accuracy_se,
        "false_yes": s.false_yes,
        "recall": s.recall,
        "auc": s.auc,
        "n": s.n,
    }
