"""Activations of one run, kept and put back in another: whole ones, or single heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grains_tl.types import FwdHooks

#: A set of (part, layer, head) that is held at its unsteered value; head -1 for all of them.
Frozen = frozenset[tuple[str, int, int]]


def keep_values(points: Mapping[tuple[str, int], list[str]], store: dict[str, Tensor]) -> FwdHooks:
    """Hooks that put what passes the points into a store."""

    def keep(name: str) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            store[name] = act.detach()
            return act

        return hook_fn

    return [(name, keep(name)) for own in points.values() for name in own]


def held(frozen: Frozen, points: Mapping[tuple[str, int], list[str]], kept: Mapping[str, Tensor]) -> FwdHooks:
    """Hooks that put kept values back: whole activations, or single heads of a pattern or of what heads write."""
    heads: dict[tuple[str, int], list[int]] = {}
    for part, layer, head in frozen:
        heads.setdefault((part, layer), []).append(head)

    def put_back(name: str, own: list[int], axis: int) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            before = kept[name].to(act)
            if -1 in own:
                return before
            mask = torch.zeros(act.shape[axis], dtype=torch.bool, device=act.device)
            mask[own] = True
            return torch.where(mask.view([-1 if a == axis else 1 for a in range(act.ndim)]), before, act)

        return hook_fn

    # patterns are [batch, head, query, key], values and outputs [batch, pos, head, d_head]
    return [
        (name, put_back(name, own, 1 if part == "QK" else 2))
        for (part, layer), own in sorted(heads.items())
        for name in points[part, layer]
    ]
