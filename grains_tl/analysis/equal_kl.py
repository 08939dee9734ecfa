"""Steps of equal cost: random directions that cost as much KL as a given step, and steps of a given KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.evaluate.costs import kl_per_token, text_costs
from grains_tl.evaluate.store import Checkpoint
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


def with_random_directions(
    model: HookedModel, steering: Steering, n_random: int, texts: Sequence[str] | None, seed: int
) -> tuple[list[Steering], NDArray[np.float64]]:
    """The step and random ones that cost as much, and the KL of each on neutral text (NaN without controls).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: the step to match.
        n_random: random directions, at its layers and positions and by its operator.
        texts: neutral texts; default the first bundled ones.
        seed: of the directions.

    Returns:
        The step and the random ones; ``[step]`` KL, nats per token.
    """
    if not n_random:
        return [steering], np.full(1, math.nan)
    neutral = neutral_texts(COST_TEXTS) if texts is None else list(texts)
    like = cast("SteeringVectors", steering.vectors).at(steering.layers)
    alpha = _as_share(steering)
    controls = [
        replace(steering, vectors=vectors, scale="residual", alpha=alpha)
        for vectors in random_direction_vectors(like, n_draws=n_random, seed=seed)
    ]
    own = _kl(model, [steering], neutral)
    controls, spent = at_kl(model, controls, float(own[0]), neutral)
    return [steering, *controls], np.concatenate([own, spent])


def at_kl(
    model: HookedModel,
    steps: Sequence[Steering],
    kl: float,
    texts: Sequence[str],
    *,
    checkpoint: str | Path | Checkpoint | None = None,
) -> tuple[list[Steering], NDArray[np.float64]]:
    """The steps with the alpha at which each costs a given KL.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steps: with an alpha to begin from.
        kl: nats per token.
        texts: neutral texts to measure it on.
        checkpoint: receives every text's result.

    Returns:
        The steps, and ``[step]`` what they do cost: within a few percent of ``kl`` unless the model breaks first.
    """
    steps = list(steps)
    spent = _kl(model, steps, texts, checkpoint)
    for _ in range(2):  # the KL of a step grows about with its square
        factors = np.clip(np.sqrt(kl / np.maximum(np.nan_to_num(spent, nan=np.inf), 1e-12)), 0.2, 5.0)
        # rounded, so that a resumed run asks for the very same steps
        steps = [
            replace(one, alpha=float(f"{one.alpha * factor:.6g}")) for one, factor in zip(steps, factors, strict=True)
        ]
        spent = _kl(model, steps, texts, checkpoint)
    return steps, spent


def _as_share(steering: Steering) -> float:
    """The step's size in residual norms, whatever its unit."""
    if steering.scale == "residual":
        return float(steering.alpha)
    row = steering.vectors.layers.index(steering.layers[0])
    return float(steering.alpha) * float(steering.vectors.magnitudes[row] / steering.vectors.resid_norms[row])


def _kl(
    model: HookedModel,
    steps: Sequence[Steering],
    texts: Sequence[str],
    checkpoint: str | Path | Checkpoint | None = None,
) -> NDArray[np.float64]:
    return kl_per_token(text_costs(model, steps, texts, checkpoint=checkpoint), len(steps))
