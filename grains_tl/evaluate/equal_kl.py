"""Steps that cost a given KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from grains_tl.evaluate.costs import kl_per_token, text_costs
from grains_tl.evaluate.store import Checkpoint
from grains_tl.types import HookedModel
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering

#: How many times a step is scaled at most, how many of them are for all steps, and how near to the KL the others must come.
ROUNDS, FIRST, NEAR = 8, 2, 0.05

#: A step that is this near is left alone even in the first rounds.
EXACT = 0.01

#: One steering, or several at once.
AnySteering = TypeVar("AnySteering", Steering, CombinedSteering, Steering | CombinedSteering)


def at_kl(
    model: HookedModel,
    steps: Sequence[AnySteering],
    kl: float,
    texts: Sequence[str],
    *,
    checkpoint: str | Path | Checkpoint | None = None,
) -> tuple[list[AnySteering], NDArray[np.float64]]:
    """The steps with the alpha at which each costs a given KL; of several at once all alphas are scaled alike.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steps: with an alpha to begin from.
        kl: nats per token.
        texts: neutral texts to measure it on.
        checkpoint: receives every text's result.

    Returns:
        The steps, and ``[step]`` what they do cost: within 5 % of ``kl`` unless the model breaks first or a gate keeps shut.
    """
    steps = list(steps)
    spent = kl_of(model, steps, texts, checkpoint)
    power = np.full(len(steps), 2.0)  # the KL of a small step grows about with its square
    for number in range(ROUNDS):
        off = np.abs(np.nan_to_num(spent, nan=np.inf) / kl - 1)
        again = [i for i in range(len(steps)) if off[i] > (EXACT if number < FIRST else NEAR)]
        if number >= FIRST:
            again = [i for i in again if spent[i] > 0]  # a gate that stays shut costs nothing at any alpha
        if not again:
            break
        before = spent.copy()
        known = np.maximum(np.nan_to_num(before[again], nan=np.inf), 1e-12)
        factors = np.clip((kl / known) ** (1 / power[again]), 0.2, 5.0)
        for i, factor in zip(again, factors, strict=True):
            steps[i] = steps[i].scaled(float(factor))
        spent[again] = kl_of(model, [steps[i] for i in again], texts, checkpoint)
        if number >= FIRST - 1:  # from here on with the power that the last two measurements show
            power[again] = _power(before[again], spent[again], factors)
    return steps, spent


def _power(
    before: NDArray[np.float64], after: NDArray[np.float64], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """By which power of a factor the KL grew, where that can be read off; 2 elsewhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.log(after / before) / np.log(factors)
    return np.where(np.isfinite(power) & (power > 0.3) & (power < 8), power, 2.0)


def kl_of(
    model: HookedModel,
    steps: Sequence[AnySteering],
    texts: Sequence[str],
    checkpoint: str | Path | Checkpoint | None = None,
) -> NDArray[np.float64]:
    """``[step]`` KL on some texts, nats per token."""
    return kl_per_token(text_costs(model, steps, texts, checkpoint=checkpoint), len(steps))
