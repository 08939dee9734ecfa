"""A step of length zero added to the residual stream after each block: what gradients of steering are taken by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.hooks.sites import Site, edit_hooks
from grains_tl.hooks.steer import Positions
from grains_tl.inference.batches import Batch
from grains_tl.types import FwdHooks

#: How the step will be applied, to first order: ``"add"`` as it is; ``"add_renorm"`` without its part along the residual,
#: which rescaling to the old norm takes back.
StepOperator = Literal["add", "add_renorm"]


def check_step(scope: str, operator: str) -> None:
    """Refuse an unknown scope or operator (OptionError)."""
    if scope not in get_args(Positions):
        raise OptionError(f"scope={scope!r}; expected one of {', '.join(get_args(Positions))}")
    if operator not in get_args(StepOperator):
        raise OptionError(f"operator={operator!r}; expected one of {', '.join(get_args(StepOperator))}")


def zero_steps(
    batch: Batch,
    layers: Sequence[int],
    width: int,
    *,
    scope: Positions,
    operator: StepOperator,
    only: Bool[Tensor, "batch pos"] | None = None,
    site: Site = "resid_post",
) -> tuple[list[Float[Tensor, "owner width"]], FwdHooks]:
    """Leaves to differentiate by, and the hooks that add them.

    The leaves are float32 whatever the model's precision, so that their gradients are summed over positions in float32.

    Args:
        batch: rows of a model; those with one ``record`` share a leaf.
        layers: after (or in) which blocks.
        width: length of the step (``site_width``).
        scope: where the step acts, in the sense of ``steer_hook``; padding never counts.
        operator: see ``StepOperator``.
        only: of these positions, those where this is True.
        site: which activation of the block the step is added to.

    Returns:
        One ``[owner, width]`` leaf per layer, and the hooks of every layer.
    """
    n_owners = int(batch.record.max()) + 1
    leaves = [torch.zeros(n_owners, width, device=batch.ids.device, requires_grad=True) for _ in layers]
    where = in_scope(batch, scope) if only is None else in_scope(batch, scope) & only
    hooks: FwdHooks = []
    for layer, leaf in zip(layers, leaves, strict=True):
        hooks += edit_hooks(site, layer, _adds(leaf, batch.record, where, operator))
    return leaves, hooks


def in_scope(batch: Batch, scope: Positions) -> Bool[Tensor, "batch pos"]:
    """True at the real tokens that steering with ``positions=scope`` would change."""
    place = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None] - batch.offset[:, None]
    border = batch.prompt_len[:, None]
    inside = {
        "all": torch.ones_like(place, dtype=torch.bool),
        "prompt": place < border,
        "generated": place >= border,
        "last": place >= border - 1,
    }[scope]
    return inside & batch.attention_mask.bool()


def _adds(
    leaf: Float[Tensor, "owner width"],
    owner: Int[Tensor, "batch"],
    where: Bool[Tensor, "batch pos"],
    operator: StepOperator,
) -> Any:
    def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> Float[Tensor, "batch pos *shape"]:
        step = leaf.to(act.device)[owner.to(act.device)][:, None] * where.to(act.device)[..., None]
        step = step.view(act.shape)  # of heads, each has a norm of its own
        if operator == "add_renorm":
            h = act.detach().float()  # squares of half-precision residuals overflow
            size = (h * h).sum(-1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
            step = step - h * ((h * step).sum(-1, keepdim=True) / size)
        return act + step.to(act.dtype)

    return hook_fn
