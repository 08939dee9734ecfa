"""Hooks that read the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl.models.running import resid_post
from grains_tl.types import FwdHooks


def cache_hook(
    layers: Sequence[int], weights: Float[Tensor, "batch pos"], store: Float[Tensor, "batch layer d_model"]
) -> FwdHooks:
    """Hooks that keep one weighted read-out of ``resid_post`` per row and layer, and nothing else.

    Args:
        layers: which layers.
        weights: ``[batch, pos]``; one-hot to read one position, 1/n over n positions for their mean.
        store: ``[batch, layer, d_model]``, filled by the run.

    Returns:
        ``[(name, fn)]``, one per layer.

    Raises:
        ValueError: during the run, weights that do not fit the activations.

    Examples:
        >>> store = torch.zeros(1, 2, 576)                                             # doctest: +SKIP
        >>> model.run_with_hooks(ids, fwd_hooks=cache_hook([5, 6], weights, store))    # doctest: +SKIP
    """

    def keep(row: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            if weights.shape != act.shape[:2]:
                raise ValueError(
                    f"weights of shape {tuple(weights.shape)} do not fit activations of shape {tuple(act.shape)}"
                )
            # weights keep their precision: 1/n is no half-precision number, and differences of means are small
            store[:, row] = (weights.to(act.device)[..., None] * act.detach()).sum(1).to(store)

        return hook_fn

    return [(resid_post(layer), keep(row)) for row, layer in enumerate(layers)]


def place_hook(
    layers: Sequence[int], rows: Int[Tensor, "place"], positions: Int[Tensor, "place"], store: Tensor
) -> FwdHooks:
    """Hooks that keep ``resid_post`` at any places of a batch in ``store`` ``[place, layer, d_model]``."""

    def keep(column: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            store[:, column] = act.detach()[rows.to(act.device), positions.to(act.device)].to(store)

        return hook_fn

    return [(resid_post(layer), keep(column)) for column, layer in enumerate(layers)]


def _norm_hooks(
    layers: Sequence[int], contents: Sequence[Sequence[bool]], norms: list[Float[Tensor, "layer _"]]
) -> FwdHooks:
    found: dict[int, Tensor] = {}
    places = [(r, p) for r, own in enumerate(contents) for p, content in enumerate(own) if content]
    row, pos = torch.tensor(places, dtype=torch.long).view(-1, 2).T

    def keep(place: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            found[place] = act.detach()[row.to(act.device), pos.to(act.device)].float().norm(dim=-1).cpu()
            if len(found) == len(layers):
                norms.append(torch.stack([found[i] for i in range(len(layers))]))

        return hook_fn

    return [(resid_post(layer), keep(place)) for place, layer in enumerate(layers)]
