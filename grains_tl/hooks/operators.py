"""How a step is applied to residuals: the formulas, without hooks, scopes or a model.

Every operator moves each residual h on its own, with the unit direction u, its component c = h . u and an amount a:

1. ``"add"``: h + a u.
2. ``"add_renorm"`` (arXiv 2507.18043, section 3): (h + a u) scaled to the length of h.
3. ``"rotate"``: h turned by the angle a toward u, in the plane of the two; the length stays (the geodesic of
   arXiv 2602.08169; in arXiv 2510.26243 the plane is a fixed one). It ends at u, and at -u for negative angles.
4. ``"clip"``: as ``"add"``, but no further than c = a; what is there already stays.
5. ``"ablate"``: the share a of c taken out.
6. ``"match"``: the share a of the way from c to a target, which is the mean of a class of texts.
7. ``"clamp"``: c set to a.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

#: How a step is applied; the module says what each does.
Operator = Literal["add_renorm", "add", "rotate", "clip", "ablate", "match", "clamp"]

#: Operators whose amount is ``alpha`` itself (an angle in radians, or a share) and no length in residual units.
UNITLESS = frozenset({"rotate", "ablate", "match"})


def require_operator(operator: Any) -> None:
    """Refuse an unknown operator (ValueError)."""
    if operator not in get_args(Operator):
        raise ValueError(f"operator={operator!r}; expected one of {get_args(Operator)}")


def moved(
    act: Float[Tensor, "*shape d_model"],
    unit: Float[Tensor, "*heads d_model"],
    amount: float | Tensor,
    operator: Operator,
    target: float = 0.0,
) -> Float[Tensor, "*shape d_model"]:
    """Residuals after one step.

    Args:
        act: residuals.
        unit: the direction, of length 1 (of heads, for ``"add_renorm"``: all of them together).
        amount: see the module; a tensor for another one at each position.
        operator: how it is applied.
        target: the component that ``"match"`` moves to.

    Returns:
        Residuals of the same dtype.
    """
    size = amount.to(act.device, torch.float32) if isinstance(amount, Tensor) else amount
    if operator == "add":
        return act + (size * unit).to(act.dtype)
    h = act.float()  # norms and projections of half-precision residuals overflow or round too much
    if operator == "add_renorm":
        there = h + size * unit
        # where the step cancels h exactly there is no direction left to scale: keep h
        scale = h.norm(dim=-1, keepdim=True) / there.norm(dim=-1, keepdim=True)
        return torch.where(torch.isfinite(scale), there * scale, h).to(act.dtype)
    component = (h * unit).sum(-1, keepdim=True)  # not a matrix product: autocast would round it
    if operator == "rotate":
        return _rotated(h, unit, component, size).to(act.dtype)
    if operator == "clip":
        level = torch.as_tensor(size, dtype=torch.float32, device=act.device)
        left = torch.minimum(torch.maximum(level - component, level.clamp(max=0)), level.clamp(min=0))
        return (h + left * unit).to(act.dtype)
    if operator == "match":
        wanted = component + size * (target - component)
    elif operator == "ablate":
        # the share that stays is rounded once, in the precision in which it was given
        stays = (1 - amount).to(act.device, torch.float32) if isinstance(amount, Tensor) else 1 - amount
        wanted = component * stays
    else:
        wanted = torch.full_like(component, float(amount))
    return (h + (wanted - component) * unit).to(act.dtype)


def _rotated(
    h: Float[Tensor, "*shape d_model"],
    unit: Float[Tensor, "d_model"],
    along: Float[Tensor, "*shape 1"],
    angle: float | Tensor,
) -> Float[Tensor, "*shape d_model"]:
    """Turned toward the direction by an angle, at most onto it; a residual along the direction has no plane and stays."""
    across = h - along * unit
    width = across.norm(dim=-1, keepdim=True)
    size = h.norm(dim=-1, keepdim=True)
    new = (torch.atan2(width, along) - angle).clamp(0, math.pi)
    turned = size * (torch.cos(new) * unit + torch.sin(new) * across / width)
    return torch.where(width > 1e-6 * size, turned, h)
