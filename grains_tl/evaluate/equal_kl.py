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
        The steps, and ``[step]`` what they do cost: within a few percent of ``kl`` unless the model breaks first.
    """
    steps = list(steps)
    spent = kl_of(model, steps, texts, checkpoint)
    for _ in range(2):  # the KL of a step grows about with its square
        factors = np.clip(np.sqrt(kl / np.maximum(np.nan_to_num(spent, nan=np.inf), 1e-12)), 0.2, 5.0)
        steps = [one.scaled(float(factor)) for one, factor in zip(steps, factors, strict=True)]
        spent = kl_of(model, steps, texts, checkpoint)
    return steps, spent


def kl_of(
    model: HookedModel,
    steps: Sequence[AnySteering],
    texts: Sequence[str],
    checkpoint: str | Path | Checkpoint | None = None,
) -> NDArray[np.float64]:
    """``[step]`` KL on some texts, nats per token."""
    return kl_per_token(text_costs(model, steps, texts, checkpoint=checkpoint), len(steps))
