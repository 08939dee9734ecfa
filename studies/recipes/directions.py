"""Vectors of every recipe from contributions of some building records; no model runs here."""

from __future__ import annotations

import torch
from torch import Tensor

from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.gradients import MarginGradient
from grains_tl.vectors.kl_optimal import SHRINKAGES, held_out_gain
from studies.recipes.parts import Parts

#: Recipes that are compared, then the two controls.
RECIPES = ("grains", "grains_weighted", "caa", "margin_gradient", "kl_optimal")
CONTROLS = ("random_tokens", "random_direction")


def direction(name: str, parts: Parts, column: int, layer: int, fisher: Fisher, seed: int = 0) -> Tensor:
    """One recipe's vector at one layer.

    Args:
        name: one of ``RECIPES`` or ``CONTROLS``.
        parts: contributions of the building records.
        column: the layer's place in them.
        layer: its number.
        fisher: of the model.
        seed: of the controls.

    Returns:
        ``[d_model]``, of any length.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "grains":
        return torch.stack([_top_one(s, m[:, column]) for s, m in zip(parts.scores, parts.masked, strict=True)]).mean(0)
    if name == "grains_weighted":
        return torch.stack([s @ m[:, column] for s, m in zip(parts.scores, parts.masked, strict=True)]).mean(0)
    if name == "random_tokens":
        return torch.stack([_two_at_random(m[:, column], generator) for m in parts.masked]).mean(0)
    if name == "shuffled_scores":
        rows = zip(parts.scores, parts.masked, strict=True)
        return torch.stack([s[torch.randperm(len(s), generator=generator)] @ m[:, column] for s, m in rows]).mean(0)
    if name == "random_direction":
        return torch.randn(parts.caa.shape[-1], generator=generator)
    if name == "caa":
        return parts.caa[:, column].mean(0)
    gradient = MarginGradient().reduced(parts.gradients[:, [column]])
    if name == "margin_gradient":
        return gradient[0]
    assert name == "kl_optimal", name
    here = fisher.at([layer])
    return here.solve(gradient, best_shrinkage(parts, column, here)[0])[0].float()


def best_shrinkage(parts: Parts, column: int, here: Fisher) -> tuple[float, float]:
    """The shrinkage that does best on held-out texts and records, and its gain there (nats per sqrt(2 KL))."""
    gains = held_out_gain(here, parts.gradients[:, [column]], MarginGradient())[:, 0]
    return SHRINKAGES[int(gains.argmax())], float(gains.max())


def _top_one(scores: Tensor, masked: Tensor) -> Tensor:
    """d+ of the token with the largest positive score minus d- of that with the most negative one (k = 1)."""
    up, down = int(scores.argmax()), int(scores.argmin())
    zero = torch.zeros_like(masked[0])
    return (masked[up] if scores[up] > 0 else zero) - (masked[down] if scores[down] < 0 else zero)


def _two_at_random(masked: Tensor, generator: torch.Generator) -> Tensor:
    up, down = torch.randperm(len(masked), generator=generator)[:2].tolist()
    return masked[up] - masked[down]
