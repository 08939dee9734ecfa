"""What a step changes, and the gradients of the margin along it: averaged over points from no steering to all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.analysis.holding import keep_values
from grains_tl.analysis.patching import as_leaf
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import margins
from grains_tl.models.state import autograd
from grains_tl.types import FwdHooks, HookedModel

#: Hook points by part and layer.
Points = Mapping[tuple[str, int], list[str]]


def both_runs(
    model: HookedModel, batch: Batch, steering: FwdHooks, points: Points
) -> tuple[dict[str, Tensor], dict[str, Tensor], Float[Tensor, "record"]]:
    """Activations at the points without steering and with it, by hook point, and the change of the margin, nats."""
    kept: dict[str, Tensor] = {}
    steered: dict[str, Tensor] = {}
    with torch.no_grad():
        base = margins(batch_logprobs(model, batch, keep_values(points, kept)))
        effect = margins(batch_logprobs(model, batch, [*steering, *keep_values(points, steered)])) - base
    return kept, steered, effect


def by_record(rows: Float[Tensor, "item row"], batch: Batch) -> Float[Tensor, "item record"]:
    """Values of a batch's rows added up over the rows of each record."""
    zeros = torch.zeros(len(rows), batch.n_records, device=rows.device)
    return zeros.index_add(1, batch.record.to(rows.device), rows).cpu()


def mean_gradients(
    model: HookedModel, batch: Batch, steering: FwdHooks, points: Points, places: Sequence[float], start: str
) -> dict[str, Tensor]:
    """Gradient of the margin by what passes the points, float32, mean over some shares of the step.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        batch: the records.
        steering: hooks of the whole step.
        points: where.
        places: shares of the step, from 0 (none) to 1 (all of it).
        start: the hook point of the residual stream from which the graph is kept; before all others.

    Returns:
        By hook point, of the activation's shape.
    """
    names = [name for own in points.values() for name in own]
    mean: dict[str, Tensor] = {}
    for place in places:
        live: dict[str, Tensor] = {}
        with autograd(model):
            hooks = [*_part_of(steering, place), (start, as_leaf), *_keep_live(names, live)]
            found = margins(batch_logprobs(model, batch, hooks))
            gradients = torch.autograd.grad(found.sum(), [live[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            part = gradient.float() / len(places)
            mean[name] = mean[name] + part if name in mean else part
    return mean


def _part_of(steering: FwdHooks, share: float) -> FwdHooks:
    """The same step, a share of the way: of any operator."""

    def part(fn: Any) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            return act + share * (fn(act, hook=hook) - act)

        return hook_fn

    return [(name, part(fn)) for name, fn in steering]


def _keep_live(names: Sequence[str], store: dict[str, Tensor]) -> FwdHooks:
    """Hooks that keep activations with their graph."""

    def keep(name: str) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            store[name] = act
            return act  # a bridge may hand over a reshaped view: returning it keeps it on the path of the gradient

        return hook_fn

    return [(name, keep(name)) for name in names]
