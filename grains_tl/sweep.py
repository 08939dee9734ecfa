"""Layer x alpha grids as one tidy table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from grains_tl.batches import Batch
from grains_tl.evaluate import Setting, margins, mean_and_se, measure
from grains_tl.models import require_layers
from grains_tl.objectives import Objective
from grains_tl.scoring import MAX_TOKENS, HooksForBatch
from grains_tl.steering import Operator, Positions
from grains_tl.tokens import tokenize_pairs
from grains_tl.types import FwdHooks, HookedModel, PreferencePair
from grains_tl.vectors import SteeringVectors


def sweep(
    model: HookedModel,
    vectors: SteeringVectors,
    pairs: Iterable[PreferencePair],
    *,
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = (-0.2, 0.2),
    operator: Operator = "add_renorm",
    positions: Positions = "all",
    objective: Objective = "sum",
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> pd.DataFrame:
    """Steer at one layer at a time and see what happens to the margin.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: from ``build_vectors``.
        pairs: records to measure on; choose layer and alpha on others than you report on.
        layers: default all stored.
        alphas: steps, fractions of the layer's typical residual norm.
        operator, positions: as in ``SteeringVectors.hooks``.
        objective: how response tokens are combined.
        max_tokens: token budget of one pass.
        progress: show a bar.

    Returns:
        One row per layer and alpha: ``layer``, ``alpha``, ``margin`` (mean log p(chosen) - log p(rejected), nats),
        ``effect`` (its mean paired change from the unsteered run), ``effect_se`` (over records), ``wrong_way`` (share of
        records whose margin moved against alpha's sign), ``accuracy`` (share with a positive margin), ``base_margin``,
        ``n``.

    Raises:
        ValueError: bad records, a layer that is not stored, vectors of another model; before anything runs.

    Example:
        >>> frame = sweep(model, vectors, pairs, layers=[6, 12, 18], alphas=[-0.2, 0.2])   # doctest: +SKIP
        >>> frame.pivot(index="layer", columns="alpha", values="effect")                  # doctest: +SKIP
    """
    tokenized = tokenize_pairs(model, pairs)
    vectors.require_match(model)
    layers = require_layers(model, vectors.layers if layers is None else layers)
    grid = [(layer, float(alpha)) for layer in layers for alpha in alphas]
    if not grid:
        raise ValueError("no alphas given; for example alphas=[-0.2, 0.2]")
    settings = [
        Setting(layer, hooks_for_batch(vectors, alpha, layer, operator=operator, positions=positions))
        for layer, alpha in grid
    ]
    base, steered = measure(model, tokenized, settings, objective=objective, max_tokens=max_tokens, progress=progress)
    rows = []
    for (layer, alpha), logprobs in zip(grid, steered, strict=True):
        change = margins(logprobs) - margins(base)
        effect, se = mean_and_se(change)
        rows.append(
            {
                "layer": layer,
                "alpha": alpha,
                "margin": margins(logprobs).mean().item(),
                "effect": effect.item(),
                "effect_se": se.item(),
                "wrong_way": (change * alpha < 0).float().mean().item(),
                "accuracy": (margins(logprobs) > 0).float().mean().item(),
                "base_margin": margins(base).mean().item(),
                "n": len(tokenized),
            }
        )
    return pd.DataFrame(rows)


def hooks_for_batch(
    vectors: SteeringVectors,
    alpha: float,
    layer: int,
    *,
    operator: Operator = "add_renorm",
    positions: Positions = "all",
) -> HooksForBatch:
    """Steering hooks that know where each row's prompt ends, for scopes other than ``"all"``."""
    if positions == "all":
        return vectors.hooks(alpha, [layer], operator=operator)
    vectors.hooks(alpha, [layer], operator=operator, positions=positions)  # refuses bad options before anything runs

    def make(batch: Batch) -> FwdHooks:
        return vectors.hooks(alpha, [layer], operator=operator, positions=positions, prompt_len=batch.prompt_len)

    return make
