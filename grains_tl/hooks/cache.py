"""Hooks that read the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl.hooks.sites import Site, flat, site_point
from grains_tl.types import FwdHooks


def cache_hook(
    layers: Sequence[int],
    weights: Float[Tensor, "batch pos"],
    store: Float[Tensor, "batch layer width"],
    site: Site = "resid_post",
) -> FwdHooks:
    """Hooks that keep one weighted read-out of ``resid_post``, or of another site, per row and layer.

    Args:
        layers: which layers.
        weights: ``[batch, pos]``; one-hot to read one position, 1/n over n positions for their mean.
        store: ``[batch, layer, d_model]``, filled by the run (``"z"``: ``[batch, layer, n_heads * d_head]``).
        site: what is read.

    Returns:
        ``[(name, fn)]``, one per layer.

    Raises:
        ValueError: during the run, weights that do not fit the activations.

    Examples:
        >>> store = torch.zeros(1, 2, 576)                                             # doctest: +SKIP
        >>> model.run_with_hooks(ids, fwd_hooks=cache_hook([5, 6], weights, store))    # doctest: +SKIP
    """

    def keep(row: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> None:
            if weights.shape != act.shape[:2]:
                raise ValueError(
                    f"weights of shape {tuple(weights.shape)} do not fit activations of shape {tuple(act.shape)}"
                )
            # weights keep their precision: 1/n is no half-precision number, and differences of means are small
            store[:, row] = (weights.to(act.device)[..., None] * flat(act.detach())).sum(1).to(store)

        return hook_fn

    return [(site_point(site, layer), keep(row)) for row, layer in enumerate(layers)]


def place_hook(
    layers: Sequence[int],
    rows: Int[Tensor, "place"],
    positions: Int[Tensor, "place"],
    store: Tensor,
    site: Site = "resid_post",
) -> FwdHooks:
    """Hooks that keep a site at any places of a batch in ``store`` ``[place, layer, width]``."""

    def keep(column: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> None:
            store[:, column] = flat(act.detach())[rows.to(act.device), positions.to(act.device)].to(store)

        return hook_fn

    return [(site_point(site, layer), keep(column)) for column, layer in enumerate(layers)]


def _norm_hooks(
    layers: Sequence[int],
    contents: Sequence[Sequence[bool]],
    norms: list[Float[Tensor, "layer _"]],
    site: Site = "resid_post",
) -> FwdHooks:
    found: dict[int, Tensor] = {}
    places = [(r, p) for r, own in enumerate(contents) for p, content in enumerate(own) if content]
    row, pos = torch.tensor(places, dtype=torch.long).view(-1, 2).T

    def keep(place: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> None:
            found[place] = flat(act.detach())[row.to(act.device), pos.to(act.device)].float().norm(dim=-1).cpu()
            if len(found) == len(layers):
                norms.append(torch.stack([found[i] for i in range(len(layers))]))

        return hook_fn

    return [(site_point(site, layer), keep(place)) for place, layer in enumerate(layers)]
