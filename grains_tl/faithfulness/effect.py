"""Does the vector that a choice of tokens yields steer, and what does it cost?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.selection import Selection
from grains_tl.baselines.controls import random_token_differences
from grains_tl.evaluate.measuring import next_token_kl, swings
from grains_tl.faithfulness.judging import Judge
from grains_tl.models.running import require_layers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences, collect_differences
from grains_tl.vectors.reduce import reduce_vectors


def steering_layer(model: HookedModel, layer: int | None) -> int:
    """The layer to steer, by default two thirds of the way up (ValueError: the model has no such layer)."""
    (found,) = require_layers(model, [int(model.cfg.n_layers) * 2 // 3 if layer is None else layer])
    return found


def effect_of_selections(
    judge: Judge, selections: Sequence[Sequence[Selection]], evaluated: Sequence[TokenizedPair]
) -> tuple[Float[Tensor, "selection record"], Float[Tensor, "selection record"]]:
    """Steering by the mean-reduced vector of each selection, on other records.

    Args:
        judge: the building records and the settings. Its random choices of as many tokens as in the first selection
            are appended to the results.
        selections: several choices of tokens, each one per building record.
        evaluated: the records to steer on.

    Returns:
        ``(effect, kl)``, each ``[selection + draw, record]`` in nats: half the change of the margin between +alpha and
        -alpha, and the mean over both signs of KL(steered || base) of the next token.
    """
    model, settings = judge.model, judge.judging
    shared: dict[str, Any] = {"layers": [steering_layer(model, settings.layer)], "mask": judge.mask}
    differences: list[Differences] = [collect_differences(model, judge.tokenized, own, **shared) for own in selections]
    if settings.n_draws:
        differences += random_token_differences(
            model,
            judge.tokenized,
            selections[0],
            resid_norms=differences[0].resid_norms,
            n_draws=settings.n_draws,
            seed=settings.seed,
            **shared,
        )
    vectors = [reduce_vectors(d) for d in differences]
    _, effect = swings(model, evaluated, vectors, settings.alpha, objective=judge.objective)
    kl = [
        torch.stack([next_token_kl(model, evaluated, v.hooks(a)) for a in (settings.alpha, -settings.alpha)])
        for v in progress_bar(vectors, desc="cost", unit="vector")
    ]
    return effect, torch.stack(kl).mean(1)


def effect_columns(
    values: Float[Tensor, "selection record"], n_methods: int, name: str = "effect"
) -> dict[str, list[float]]:
    """One value per method, and one for all random draws together."""
    rows = [*values[:n_methods], *([values[n_methods:].mean(0)] if len(values) > n_methods else [])]
    mean, se = mean_and_se(torch.stack(rows))
    return {name: mean.tolist(), f"{name}_se": se.tolist()}
