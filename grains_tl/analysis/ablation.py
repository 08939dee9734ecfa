"""Taking a direction, or a span of directions, out of the residual stream, and what the model loses by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import layer_numbers, listed
from grains_tl._util.stats import mean_and_se
from grains_tl.analysis.runs import margins_and_kl
from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import require_layers, resid_post
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors


def ablate_hooks(
    vectors: SteeringVectors | Sequence[SteeringVectors],
    layers: Sequence[int] | None = None,
    *,
    from_layer: int | None = None,
    center: Mapping[int, Float[Tensor, "d_model"]] | None = None,
) -> FwdHooks:
    """Project the residual stream onto the complement of the vectors' span, after each of some blocks.

    With one vector and no ``center`` this is ``vectors.hooks(1.0, layers, operator="ablate")``.

    Args:
        vectors: one set, or several whose span is taken out (directions that depend on each other count once).
        layers: where; default all layers of the first set.
        from_layer: take the directions of this one layer out everywhere (as arXiv 2406.11717 does with one direction);
            default each layer's own.
        center: a residual ``[d_model]`` per layer whose component is kept, for example the mean over records: the
            stream then loses what varies along the span, not its typical position (mean ablation). Default zero.

    Returns:
        ``[(hook name, fn)]``, pure functions for ``run_with_hooks`` next to any others.

    Raises:
        ValueError: no list of layers, a layer below 0, not stored or without ``center``, no vectors, different ``d_model``.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[0.0, 1.0]]), (4,), torch.ones(1), torch.ones(1))
        >>> name, fn = ablate_hooks(v)[0]
        >>> fn(torch.tensor([[[3.0, 5.0]]]), hook=None).tolist()
        [[[3.0, 0.0]]]
    """
    every = [vectors] if isinstance(vectors, SteeringVectors) else list(vectors)
    if not every:
        raise ValueError("no vectors given; at least one direction is needed to take out")
    at = layer_numbers(every[0].layers if layers is None else layers)
    if any(layer < 0 for layer in at):
        raise ValueError(f"layers={at}; layers are counted from 0, from the bottom")
    if center is not None and set(at) - set(center):
        raise ValueError(f"center lacks layers {sorted(set(at) - set(center))}; give one residual per ablated layer")
    hooks: FwdHooks = []
    for layer in at:
        basis = span([v.at([layer if from_layer is None else from_layer]).directions[0] for v in every])
        hooks.append((resid_post(layer), _project_out(basis, None if center is None else center[layer])))
    return hooks


def span(directions: Sequence[Float[Tensor, "d_model"]]) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the directions' span.

    Examples:
        >>> span([torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])]).shape
        torch.Size([1, 2])
    """
    sizes = sorted({len(d) for d in directions})
    if len(sizes) != 1:
        raise ValueError(f"directions of d_model {sizes} have no common span")
    _, values, basis = torch.linalg.svd(torch.stack(list(directions)).double(), full_matrices=False)
    return basis[values > 1e-6 * values.max()].float()


def ablation_table(
    model: HookedModel,
    tokenized: Records,
    vectors: SteeringVectors,
    *,
    layers: Sequence[Sequence[int] | int] | None = None,
    others: Sequence[SteeringVectors] = (),
    from_layer: int | None = None,
    center: Mapping[int, Float[Tensor, "d_model"]] | None = None,
    n_random: int = 10,
    seed: int = 0,
    objective: Objective = "sum",
) -> pd.DataFrame:
    """What the model loses without the direction, beside random directions of the same rank.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records to measure on, tokenized or not.
        vectors: the direction.
        layers: sets of layers to ablate at, one measurement each (a number is a set of one); default every stored layer
            alone, then all at once.
        others: further vectors whose span with ``vectors`` is taken out.
        from_layer: see ``ablate_hooks``.
        center: ``[d_model]`` per layer, see ``ablate_hooks``.
        n_random: draws of random directions, as many in each as vectors are given.
        seed: of the draws.
        objective: as elsewhere.

    Returns:
        One row per set of layers for ``vector`` ``"own"`` and one for every random ``draw`` (-1 for own): ``layers``
        as text, ``rank``, ``margin`` and ``change`` (mean over records, nats), ``change_se``, ``kl`` = KL(ablated ||
        whole) of the token after the prompt (nats) and ``kl_se``, ``n``.

    Raises:
        ValueError: layers that do not exist or are not stored, vectors of another model; before anything runs.

    Examples:
        >>> table = ablation_table(model, tokenized, vectors, layers=[[18], [21], [18, 21]])   # doctest: +SKIP
        >>> table.groupby(["layers", "vector"]).change.mean()                                  # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    every = [vectors, *others]
    for v in every:
        v.require_match(model)
    stored = list(vectors.layers)
    wanted = [*stored, stored] if len(stored) > 1 else stored
    given: list[Any] = wanted if layers is None else listed("layers", layers)
    sets = [require_layers(model, s if hasattr(s, "__iter__") else [s]) for s in given]
    if from_layer is not None:
        every = [v.at([from_layer]) for v in every]
    drawn = [random_direction_vectors(v, n_draws=n_random, seed=seed + i) for i, v in enumerate(every)]
    subjects: list[tuple[str, int, list[SteeringVectors]]] = [("own", -1, every)]
    subjects += [("random", i, list(draw)) for i, draw in enumerate(zip(*drawn, strict=True))]
    rows: list[dict[str, Any]] = []
    settings: list[FwdHooks] = []
    for at in sets:
        for name, draw, subject in subjects:
            settings.append(ablate_hooks(subject, at, from_layer=from_layer, center=center))
            label = ", ".join(map(str, at)) if len(at) <= 3 else f"{len(at)} layers"
            source = at[0] if from_layer is None else from_layer
            rank = len(span([v.at([source]).directions[0] for v in subject]))
            rows.append({"layers": label, "vector": name, "draw": draw, "rank": rank})
    base, found, kl = margins_and_kl(model, tokenized, settings, objective=objective)
    (change, change_se), (kl_mean, kl_se) = mean_and_se(found - base), mean_and_se(kl)
    return pd.DataFrame(rows).assign(
        margin=found.mean(-1).tolist(),
        change=change.tolist(),
        change_se=change_se.tolist(),
        kl=kl_mean.tolist(),
        kl_se=kl_se.tolist(),
        n=len(tokenized),
    )


def _project_out(basis: Float[Tensor, "rank d_model"], center: Float[Tensor, "d_model"] | None) -> Any:
    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        if act.shape[-1] != basis.shape[1]:
            raise ValueError(f"directions of d_model {basis.shape[1]} do not fit activations {tuple(act.shape)}")
        b = basis.to(act.device)
        h = act.float()  # projections of half-precision residuals round too much
        offset = h if center is None else h - center.to(h)
        with torch.autocast(act.device.type, enabled=False):
            return (h - (offset @ b.T) @ b).to(act.dtype)

    return hook_fn
