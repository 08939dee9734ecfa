"""Whether a model can be trusted with a run: nothing random in it, and finite numbers out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grains_tl.types import FwdHooks, HookedModel


def require_eval(model: HookedModel) -> None:
    """Refuse a model that would drop activations at random: every number would differ from call to call.

    A model in train mode without dropout computes the same as in eval mode and passes.

    Raises:
        ValueError: naming the first module with active dropout.
    """
    inner: Any = getattr(model, "original_model", model)
    # the modules are walked only if something is in train mode: this runs before every forward pass
    if not any(part.training for part in (model, inner, *model.blocks)):  # type: ignore[attr-defined]
        return
    for name, module in inner.named_modules():
        p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "attention_dropout", 0)
        if module.training and isinstance(p, (int, float)) and p > 0:
            raise ValueError(
                f"the model is in train mode and {name or 'it'} drops out {p:.0%} at random, so no number would be "
                "repeatable; call model.eval() first"
            )


def finite_hook(name: str) -> FwdHooks:
    """A hook that stops a run whose last position has NaN or inf; greedy decoding would go on with made-up tokens.

    Raises:
        ValueError: during the run.
    """

    def hook_fn(act: Tensor, hook: Any) -> None:
        if not bool(torch.isfinite(act[:, -1]).all()):  # the last position is never padding here
            raise ValueError(
                f"the model gives NaN or inf at {name} ({act.dtype}); its weights are broken, or a step is too large for "
                "this precision: use a smaller alpha, or load the model in float32 or bfloat16"
            )

    return [(name, hook_fn)]
