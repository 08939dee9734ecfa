"""Random directions that cost as much KL as a given step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.evaluate.equal_kl import at_kl, kl_of
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
    own = kl_of(model, [steering], neutral)
    controls, spent = at_kl(model, controls, float(own[0]), neutral)
    return [steering, *controls], np.concatenate([own, spent])


def _as_share(steering: Steering) -> float:
    """The step's size in residual norms, whatever its unit."""
    if steering.scale == "residual":
        return float(steering.alpha)
    row = steering.vectors.layers.index(steering.layers[0])
    return float(steering.alpha) * float(steering.vectors.magnitudes[row] / steering.vectors.resid_norms[row])
