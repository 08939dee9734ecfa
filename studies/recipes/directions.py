"""Vectors of every recipe from contributions of some building records; no model runs here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.gradients import MarginGradient
from grains_tl.vectors.kl_optimal import SHRINKAGES, held_out_gain
from studies.recipes.parts import Parts

#: Recipes that are compared.
RECIPES = ("grains", "grains_weighted", "caa", "margin_gradient", "kl_optimal")

#: Recipes that look at attributed tokens, and the same with tokens (or scores) dealt out at random.
ATTRIBUTED = {
    "grains": "random_tokens",
    "grains_weighted": "shuffled_scores",
    "grains_at_token": "random_at_token",
    "grains_over_price": "random_over_price",
    "gradient_at_tokens": "gradient_at_random",
    "kl_optimal_at_tokens": "kl_optimal_at_random",
}

#: Those of them that are measured beside ``RECIPES``.
VARIANTS = tuple(name for name in ATTRIBUTED if name not in RECIPES)

CONTROLS = ("random_tokens", "random_direction")


def direction(name: str, parts: Parts, column: int, layer: int, fisher: Fisher, seed: int = 0) -> Tensor:
    """One recipe's vector at one layer.

    Args:
        name: one of ``RECIPES``, ``ATTRIBUTED`` or ``CONTROLS``.
        parts: contributions of the building records.
        column: the layer's place in them.
        layer: its number.
        fisher: of the model.
        seed: of the controls.

    Returns:
        ``[d_model]``, of any length.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "random_direction":
        return torch.randn(parts.caa.shape[-1], generator=generator)
    if name == "caa":
        return parts.caa[:, column].mean(0)
    if name in ("margin_gradient", "kl_optimal"):
        raw = MarginGradient().reduced(parts.gradients[:, [column]])[0]
    else:
        raw = torch.stack(list(_of_tokens(name, parts, column, generator))).mean(0)
    if name not in OVER_PRICE:
        return raw
    here = fisher.at([layer])
    return here.solve(raw[None], best_shrinkage(parts, column, here)[0])[0].float()


#: Divided by the price, F^-1 v, with the shrinkage that suits the gradient of all positions.
OVER_PRICE = ("kl_optimal", "grains_over_price", "random_over_price", "kl_optimal_at_tokens", "kl_optimal_at_random")


def _of_tokens(name: str, parts: Parts, column: int, generator: torch.Generator) -> Iterator[Tensor]:
    """What each record contributes to a recipe that looks at some of its tokens."""
    kind = parts.masked
    if name in ("grains_at_token", "random_at_token"):
        kind = parts.at_token
    if "gradient_at" in name or "kl_optimal_at" in name:
        kind = parts.of_token
    sign = 1.0 if kind is parts.of_token else -1.0  # a gradient points toward chosen whatever the token's score
    for scores, every in zip(parts.scores, kind, strict=True):
        rows = every[:, column]
        if name == "grains_weighted":
            yield scores @ rows
        elif name == "shuffled_scores":
            yield scores[torch.randperm(len(scores), generator=generator)] @ rows
        elif "random" in name:
            first, second = torch.randperm(len(rows), generator=generator)[:2].tolist()
            yield rows[first] + sign * rows[second]
        else:
            yield _strongest(scores, rows, sign)


def _strongest(scores: Tensor, rows: Tensor, sign: float) -> Tensor:
    """Row of the largest positive score and ``sign`` times that of the most negative one (k = 1)."""
    up, down = int(scores.argmax()), int(scores.argmin())
    zero = torch.zeros_like(rows[0])
    return (rows[up] if scores[up] > 0 else zero) + sign * (rows[down] if scores[down] < 0 else zero)


def best_shrinkage(parts: Parts, column: int, here: Fisher) -> tuple[float, float]:
    """The shrinkage that does best on held-out texts and records, and its gain there (nats per sqrt(2 KL))."""
    gains = held_out_gain(here, parts.gradients[:, [column]], MarginGradient())[:, 0]
    return SHRINKAGES[int(gains.argmax())], float(gains.max())
