"""Taking a direction, or a span of directions, out of the residual stream, and what the model loses by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import layer_numbers, listed
from grains_tl._util.stats import mean_and_se
from grains_tl.analysis.runs import margins_and_kl
from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.hooks.cache import cache_hook
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.inference.batches import by_token_budget, image_inputs, pad_rows
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import hooked, require_layers, resid_post, run_blocks
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
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
        raise ValueError("no vectors given; expected at least one direction to take out")
    for v in every:
        residual_stream_only("ablate_hooks", v.site)
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
    vectors: SteeringVectors | Sequence[SteeringVectors],
    *,
    layers: Sequence[Sequence[int] | int] | None = None,
    from_layer: int | None = None,
    center: Literal["mean", "zero"] | Mapping[int, Float[Tensor, "d_model"]] = "mean",
    n_random: int = 10,
    seed: int = 0,
    objective: Objective = "sum",
) -> pd.DataFrame:
    """What the model loses without the direction, beside random directions of the same rank.

    The component along the direction is set to its mean over the records' content tokens. Setting it to zero instead
    (``center="zero"``) takes away the typical position of the residual stream too, which can push a model far off for
    reasons that have nothing to do with what varies along the direction.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records to measure on, tokenized or not.
        vectors: the direction, or several whose span is taken out.
        layers: sets of layers to ablate at, one measurement each (a number is a set of one); default every layer stored in
            the first of the vectors alone, then all at once.
        from_layer: see ``ablate_hooks``.
        center: what the component is set to: ``"mean"``, ``"zero"``, or that of a residual ``[d_model]`` per layer.
        n_random: draws of random directions, as many in each as vectors are given.
        seed: of the draws.
        objective: as elsewhere.

    Returns:
        One row per set of layers for ``vector`` ``"own"`` and one for every random ``draw`` (-1 for own): ``layers``
        as text, ``rank``, ``margin`` and ``change`` (mean over records, nats), ``change_se``, ``kl`` = KL(ablated ||
        whole) of the token after the prompt (nats) and ``kl_se``, ``n``. Rows of ``"own"`` also have ``z``, the distance of
        ``change`` from the mean of the random draws in their standard deviations, and ``p``, the share of draws, own one
        included, whose change is at least as large either way: at least 1 / (n_random + 1).

    Raises:
        ValueError: layers that do not exist or are not stored, vectors of another model, an unknown ``center``; before
            anything runs.

    Examples:
        >>> table = ablation_table(model, tokenized, vectors, layers=[[18], [21], [18, 21]])   # doctest: +SKIP
        >>> table[table.vector == "own"][["layers", "change", "z", "p"]]                       # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    every = [vectors] if isinstance(vectors, SteeringVectors) else list(vectors)
    if not every:
        raise ValueError("no vectors given; expected at least one direction to take out")
    for v in every:
        residual_stream_only("ablation_table", v.site)
        v.require_match(model)
    stored = list(every[0].layers)
    wanted = [*stored, stored] if len(stored) > 1 else stored
    given: list[Any] = wanted if layers is None else listed("layers", layers)
    sets = [require_layers(model, s if hasattr(s, "__iter__") else [s]) for s in given]
    if from_layer is not None:
        every = [v.at([from_layer]) for v in every]
    for at in sets:  # refuse layers that are not stored before anything runs
        ablate_hooks(every, at, from_layer=from_layer)
    centers = _centers(model, tokenized, sorted({layer for at in sets for layer in at}), center)
    drawn = [random_direction_vectors(v, n_draws=n_random, seed=seed + i) for i, v in enumerate(every)]
    subjects: list[tuple[str, int, list[SteeringVectors]]] = [("own", -1, every)]
    subjects += [("random", i, list(draw)) for i, draw in enumerate(zip(*drawn, strict=True))]
    rows: list[dict[str, Any]] = []
    settings: list[FwdHooks] = []
    for at in sets:
        label = ", ".join(map(str, at)) if len(at) <= 3 else f"{len(at)} layers"
        source = at[0] if from_layer is None else from_layer
        for name, draw, subject in subjects:
            settings.append(ablate_hooks(subject, at, from_layer=from_layer, center=centers))
            rank = len(span([v.at([source]).directions[0] for v in subject]))
            rows.append({"layers": label, "vector": name, "draw": draw, "rank": rank})
    base, margins, kl = margins_and_kl(model, tokenized, settings, objective=objective)
    return _ablation_frame(pd.DataFrame(rows), base, margins, kl)


def _ablation_frame(
    rows: pd.DataFrame,
    base: Float[Tensor, "record"],
    margins: Float[Tensor, "setting record"],
    kl: Float[Tensor, "setting record"],
) -> pd.DataFrame:
    """The settings with their measures; every own one is followed by its random draws."""
    (change, change_se), (kl_mean, kl_se) = mean_and_se(margins - base), mean_and_se(kl)
    by_set = rearrange(change, "(set subject) -> set subject", subject=int(rows["draw"].max()) + 2)
    own, random = by_set[:, :1], by_set[:, 1:]
    z, p = torch.full_like(by_set, torch.nan), torch.full_like(by_set, torch.nan)
    if random.shape[1] > 1:
        z[:, :1] = (own - random.mean(1, keepdim=True)) / random.std(1, keepdim=True)
    if random.shape[1]:
        p[:, 0] = (1 + (random.abs() >= own.abs()).sum(1)) / (1 + random.shape[1])
    return rows.assign(
        margin=margins.mean(-1).tolist(),
        change=change.tolist(),
        change_se=change_se.tolist(),
        kl=kl_mean.tolist(),
        kl_se=kl_se.tolist(),
        z=z.flatten().tolist(),
        p=p.flatten().tolist(),
        n=len(base),
    )


def _centers(
    model: HookedModel, tokenized: Sequence[TokenizedPair], layers: Sequence[int], center: Any
) -> Mapping[int, Float[Tensor, "d_model"]] | None:
    if isinstance(center, Mapping):
        return center
    if center not in ("mean", "zero"):
        raise ValueError(f"center={center!r}; expected 'mean', 'zero' or a residual per layer, {{layer: [d_model]}}")
    return mean_residuals(model, tokenized, layers) if center == "mean" else None


def mean_residuals(
    model: HookedModel, tokenized: Sequence[TokenizedPair], layers: Sequence[int]
) -> dict[int, Float[Tensor, "d_model"]]:
    """Mean residual after each layer over the content tokens of all prompts, in residual units.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        layers: counted from 0.
    """
    total = torch.zeros(len(layers), int(model.cfg.d_model))
    n_tokens = sum(t.n_content for t in tokenized)
    for group in by_token_budget([len(t.prompt) for t in tokenized]):
        records = [tokenized[g] for g in group]
        ids, mask, offset = pad_rows(model, [t.prompt for t in records])
        weights = torch.zeros(ids.shape)
        for row, t in enumerate(records):
            weights[row, : len(t.prompt)] = torch.tensor(t.content, dtype=torch.float32) / n_tokens
        sums = torch.zeros(len(group), *total.shape)
        inputs = image_inputs(model, [t.images for t in records], ids, offset)
        with torch.no_grad(), hooked(model, cache_hook(list(layers), weights, sums)):
            run_blocks(model, ids, mask, max(layers) + 1, inputs)
        total += sums.sum(0)
    return dict(zip(layers, total, strict=True))


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
