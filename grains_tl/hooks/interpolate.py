"""Hooks that move the input embeddings along a path from a baseline."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl.models.running import attribution_point
from grains_tl.types import FwdHooks, HookedModel


def interpolate_hook(
    model: HookedModel,
    alphas: Float[Tensor, "batch"],
    prompt_mask: Bool[Tensor, "batch pos"],
    baseline: Float[Tensor, "*position d_model"],
) -> FwdHooks:
    """One hook that moves the prompt's embeddings towards a baseline: ``x' + alpha * (x - x')``.

    The path of integrated gradients (arXiv 1703.01365).

    Args:
        model: gives the hook point.
        alphas: ``[batch]``, place on the path of every row; 1 is the real input.
        prompt_mask: ``[batch, pos]``, True where to interpolate.
        baseline: ``[d_model]`` x', or ``[batch, pos, d_model]`` for one of its own at every position.

    Returns:
        ``[(name, fn)]`` for ``run_with_hooks``.

    Raises:
        ValueError: during the run, shapes that do not fit.

    Examples:
        >>> hooks = interpolate_hook(model, torch.tensor([0.5]), mask, torch.zeros(576))   # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=hooks)                           # doctest: +SKIP
    """

    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        if prompt_mask.shape != act.shape[:2] or alphas.shape[0] != act.shape[0]:
            raise ValueError(
                f"alphas {tuple(alphas.shape)} and mask {tuple(prompt_mask.shape)} do not fit {tuple(act.shape)}"
            )
        start = baseline.to(act)
        moved = start + rearrange(alphas.to(act), "batch -> batch 1 1") * (act - start)
        return torch.where(rearrange(prompt_mask.to(act.device), "batch pos -> batch pos 1"), moved, act)

    return [(attribution_point(model), hook_fn)]
