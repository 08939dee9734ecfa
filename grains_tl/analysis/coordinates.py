"""Vectors of which a few coordinates are kept: what that leaves of the effect, at the same step and at the same KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.equal_kl import at_kl, kl_of
from grains_tl.evaluate.measuring import measure
from grains_tl.inference.objectives import margins
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Which coordinates are kept: the largest ones, those that add most to the margin to first order (vector times gradient), or
#: some at random.
KeptBy = Literal["size", "gradient", "random"]


def keep_coordinates(
    vectors: SteeringVectors, share: float, *, gradient: SteeringVectors | None = None, random: int | None = None
) -> SteeringVectors:
    """The vectors with some of their coordinates alone, the others 0.

    Args:
        vectors: the directions.
        share: of the coordinates that are kept, above 0 and at most 1, rounded up.
        gradient: vectors of ``recipe="margin_gradient"`` at these layers: keep the coordinates whose product of vector and
            gradient is largest. Default: those that are largest themselves.
        random: a seed: keep coordinates drawn at random, the control.

    Returns:
        ``SteeringVectors``: directions of unit length, magnitudes of what is left, the same unit of ``alpha``.

    Raises:
        ValueError: a share out of range, gradients at other layers or sites, or both ``gradient`` and ``random``.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[0.6, -0.8]]), (4,), torch.ones(1), torch.ones(1))
        >>> keep_coordinates(v, 0.5).directions.abs().tolist()
        [[0.0, 1.0]]
    """
    if not 0 < finite("share", share) <= 1:
        raise OptionError(f"share={share}; expected above 0 and at most 1")
    if gradient is not None and random is not None:
        raise OptionError("give gradient= or random=, not both")
    raw = vectors.raw.double().cpu()
    if random is not None:
        generator = torch.Generator().manual_seed(whole("random", random, 0))
        score = torch.rand(raw.shape, generator=generator, dtype=torch.float64)
    elif gradient is not None:
        vectors._require_same_space(gradient)
        score = raw * gradient.raw.double().cpu()
    else:
        score = raw.abs()
    n = math.ceil(share * raw.shape[1] - 1e-9)
    mask = torch.zeros_like(raw).scatter(1, score.topk(n, dim=1).indices, 1.0)
    kept = (raw * mask).to(vectors.directions.device).float()
    by = "random" if random is not None else "size" if gradient is None else "gradient"
    info = {**vectors.info, "kept": {"by": by, "coordinates": n, "of": raw.shape[1], "seed": random}}
    return vectors._with_raw(kept, torch.zeros_like(vectors.magnitudes), info)


def sparsity_curve(
    model: HookedModel,
    steering: Steering,
    pairs: Records,
    *,
    gradient: SteeringVectors | None = None,
    shares: Sequence[float] = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    kl: float = 0.05,
    n_random: int = 3,
    texts: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Effect and cost against the share of a vector's coordinates that is kept.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: ``vectors.steering(alpha, layer)``: the step to make sparse.
        pairs: records to measure on, others than those the vectors were built from.
        gradient: vectors of ``recipe="margin_gradient"`` from the building records, to choose coordinates by.
        shares: of the coordinates that are kept.
        kl: the budget, nats per token of neutral text.
        n_random: draws of random coordinates, averaged.
        texts: neutral texts; default the first bundled ones.

    Returns:
        One row per way to choose (``by``: ``"size"``, ``"gradient"``, ``"random"``) and ``share``: ``coordinates``,
        ``cosine`` to the whole vector; at equal KL ``effect`` (mean change of the margin, nats) with ``low`` and ``high``
        (95 % over records), ``alpha``, ``kl``; and with the kept coordinates as they are in the whole step
        ``effect_as_is`` and ``kl_as_is``. ``n`` records.

    Raises:
        ValueError: before anything runs, for no records, something else than a steering, shares or a budget out of range.

    Examples:
        >>> curve = sparsity_curve(model, vectors.steering(0.1, 18), pairs, gradient=gradient)     # doctest: +SKIP
        >>> curve.pivot(index="share", columns="by", values="effect")                             # doctest: +SKIP
    """
    if not isinstance(steering, Steering):
        raise OptionError(f"steering is a {type(steering).__name__}; expected vectors.steering(alpha, layer)")
    if not finite("kl", kl) > 0:
        raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
    vectors: Any = steering.vectors.at(list(steering.layers))
    own = None if gradient is None else gradient.at(list(steering.layers))
    wanted = sorted({float(finite("share", share)) for share in listed("shares", shares)})
    ways: list[tuple[KeptBy, float, SteeringVectors]] = []
    for share in wanted:
        ways.append(("size", share, keep_coordinates(vectors, share)))
        ways += [] if own is None else [("gradient", share, keep_coordinates(vectors, share, gradient=own))]
        ways += [
            ("random", share, keep_coordinates(vectors, share, random=i)) for i in range(whole("n_random", n_random))
        ]
    tokenized = as_tokenized(model, pairs)
    if not ways or not tokenized:
        raise ValueError("nothing to measure: give shares and records")
    neutral = neutral_texts(COST_TEXTS) if texts is None else list(texts)
    # the step of the kept coordinates alone is as much shorter as the vector is
    unit = steering.scale == "residual"
    plain = [
        replace(steering, vectors=v, alpha=steering.alpha * (_length(v, vectors) if unit else 1)) for *_, v in ways
    ]
    spent = kl_of(model, plain, neutral)
    equal, costs = at_kl(model, [replace(one, alpha=steering.alpha) for one in plain], kl, neutral)
    effects = []
    for steps in (equal, plain):
        base, steered = measure(model, tokenized, steps)
        effects.append((margins(steered) - margins(base)).double().numpy())
    rows = []
    for (by, share), places in _groups(ways).items():
        mean, _, low, high = mean_interval(effects[0][places].mean(0))
        rows.append(
            {
                "by": by,
                "share": share,
                "coordinates": ways[places[0]][2].info["kept"]["coordinates"],
                "cosine": float(np.mean([float(ways[i][2].cosine(vectors).mean()) for i in places])),
                "effect": mean,
                "low": low,
                "high": high,
                "alpha": float(np.mean([equal[i].alpha for i in places])),
                "kl": float(costs[places].mean()),
                "effect_as_is": float(effects[1][places].mean()),
                "kl_as_is": float(spent[places].mean()),
                "n": len(tokenized),
            }
        )
    return pd.DataFrame(rows).sort_values(["by", "share"], ignore_index=True)


def _length(part: SteeringVectors, vectors: SteeringVectors) -> float:
    sizes: Tensor = part.magnitudes / vectors.magnitudes.clamp(min=1e-30)
    return float(sizes.mean())


def _groups(ways: Sequence[tuple[KeptBy, float, SteeringVectors]]) -> dict[tuple[str, float], list[int]]:
    found: dict[tuple[str, float], list[int]] = {}
    for i, (by, share, _) in enumerate(ways):
        found.setdefault((by, share), []).append(i)
    return found
