"""Activation patching between the plain and the steered run: which components carry the effect of a steering vector.

``transformer_lens.patching`` does the same for prompts of one length (``get_act_patch_attn_head_out_all_pos(model, ids,
steered_cache, metric)`` inside or outside ``model.hooks(steering)``); here records of any lengths are patched in padded
batches, by distance from the prompt's end, on both model classes, and blocks below the steering run only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.renamed import old_keywords
from grains_tl._util.stats import rank_correlation
from grains_tl.analysis.runs import batch_runner
from grains_tl.analysis.sites import (
    By,
    Component,
    Site,
    act_name,
    by_and_offsets,
    check_options,
    positions,
    site_table,
    sites_for,
)
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import HooksForBatch, batch_logprobs, hooks_for, score_batches
from grains_tl.inference.objectives import Objective, margins
from grains_tl.models.running import require_hook_names
from grains_tl.models.state import autograd
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import FwdHooks, HookedModel, PromptHooks


def patch_hook(
    component: Component,
    layer: int,
    source: Float[Tensor, "batch pos *shape"],
    *,
    head: int = -1,
    where: Bool[Tensor, "batch pos"] | None = None,
) -> FwdHooks:
    """Replace an activation by its value in another run of the same ids: a hook to go with any others.

    Args:
        component: what to replace.
        layer: in which block.
        source: the other run's activation, for example ``cache["blocks.3.attn.hook_z"]``.
        head: for ``"z"`` a single head; -1 for all.
        where: ``[batch, pos]``, True where to replace; default everywhere.

    Returns:
        ``[(hook name, fn)]``.

    Raises:
        ValueError: an unknown component, a head of something that has none; during the run, a shape that does not fit.

    Examples:
        >>> name, fn = patch_hook("z", 0, torch.ones(1, 1, 2, 1), head=1)[0]
        >>> name, fn(torch.zeros(1, 1, 2, 1), hook=None).flatten().tolist()
        ('blocks.0.attn.hook_z', [0.0, 1.0])
    """
    name = act_name(component, layer)
    if head >= 0 and component != "z":
        raise ValueError(f"head={head} of {component!r}; only component='z' has heads")

    def hook_fn(act: Tensor, hook: Any) -> Tensor:
        if act.shape != source.shape:
            raise ValueError(f"{name} is {tuple(act.shape)} here and was {tuple(source.shape)} in the other run")
        mask = torch.ones(act.shape[:2], dtype=torch.bool) if where is None else where
        mask = rearrange(mask.to(act.device), f"batch pos -> batch pos{' 1' * (act.ndim - 2)}")
        if head >= 0:
            mask = mask & (torch.arange(act.shape[2], device=act.device) == head)[:, None]
        return torch.where(mask, source.to(act), act)

    return [(name, hook_fn)]


@torch.inference_mode(False)
def patch(
    model: HookedModel,
    tokenized: Records,
    steering: HooksForBatch,
    *,
    component: Component | Sequence[Component] = "mlp_out",
    by: By | Sequence[int] = "layer",
    layers: Sequence[int] | None = None,
    into: Literal["base", "steered"] = "base",
    method: Literal["exact", "gradient"] = "exact",
    fwd_hooks: HooksForBatch | None = None,
    objective: Objective = "sum",
    **old: Any,
) -> pd.DataFrame:
    """Exchange activations between the plain and the steered run and see what that does to the margin.

    ``into="base"`` puts steered activations into the plain run: are they enough to make the effect?
    ``into="steered"`` puts plain activations into the steered run: are they needed for it? The two differ where
    components act together.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        steering: of the steered run, ``vectors.steering(0.2, [15])``, or hooks, or a function ``Batch -> hooks``.
        component: what to exchange; with ``by="layer"`` or ``"all"`` several can be exchanged together.
        by: one site per ``"layer"``, per ``"head"`` (component ``"z"``), per layer and ``"pos"``, or ``"all"`` layers
            at once; positions of your own are counted from the prompt's last token, ``by=[-1, 0, 1]`` for the token before
            it, itself, and the first token of the response.
        layers: default those that the steering can reach.
        into: see above.
        method: ``"exact"`` runs the model once per site. ``"gradient"`` is attribution patching (arXiv 2310.10348):
            (other - own activation) . gradient of the margin, all sites from one backward pass; ``compare_patching``
            shows its error.
        fwd_hooks: your own hooks, present in every run.
        objective: as elsewhere.
        old: ``offsets`` of release 0.1, positions in place of ``by``, with a DeprecationWarning.

    Returns:
        One row per site: ``component``, ``layer`` (-1 for all), ``head``, ``pos`` (from the prompt's end; only if asked
        for), ``effect`` (nats, mean over records: what of the steering's effect on the margin is gained by patching into
        the plain run, or lost by patching into the steered one), ``se``, ``share`` of ``total``, the whole effect of
        steering on those records, ``n`` records that have the position.

    Raises:
        ValueError: unknown options, layers or combinations, before anything runs.
        KeyError: a hook point that the model lacks.

    Examples:
        >>> heads = patch(model, tokenized, vectors.hooks(0.2, [15]), component="z", by="head")   # doctest: +SKIP
        >>> heads.nlargest(3, "effect")                                                          # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    components: tuple[Component, ...] = (component,) if isinstance(component, str) else tuple(component)
    by = old_keywords("patch", old, {"offsets": "by={value!r}"}).get("offsets", by)
    kind, offsets = by_and_offsets(by)
    check_options(components, kind, into, method)
    if not callable(steering) and not steering:
        raise ValueError("steering is an empty list of hooks; expected some, such as vectors.steering(0.2, [15])")
    known = steering.for_prompt(None) if isinstance(steering, PromptHooks) else steering
    sites = sites_for(model, tokenized, components, kind, layers, offsets, None if callable(known) else known)
    places = sorted({place for site in sites for place in site.places})
    require_hook_names(model, [(act_name(*place), id) for place in places])
    found = torch.full((len(sites), len(tokenized)), float("nan"))
    total = torch.zeros(len(tokenized))
    sign = 1.0 if into == "base" else -1.0  # what is gained by the one, what is lost by the other
    with progress_bar(total=len(sites) * len(tokenized), desc="patch", unit="run") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            own = hooks_for(fwd_hooks, batch)
            pair = (own, hooks_for(steering, batch) + own)
            target, other = pair if into == "base" else pair[::-1]
            effects, both = (_exact if method == "exact" else _by_gradient)(model, batch, target, other, sites, places)
            found[:, group] = sign * effects
            total[group] = sign * both
            bar.update(len(sites) * len(group))
    return site_table(sites, components, kind, found, total)


def compare_patching(exact: pd.DataFrame, quick: pd.DataFrame, *, n_top: int = 5) -> pd.Series:
    """How well attribution patching stands for the real one, over the sites of two tables from ``patch``.

    Args:
        exact: from ``patch``.
        quick: from ``patch(..., method="gradient")``, the same sites.
        n_top: how many of the largest effects to compare.

    Returns:
        ``correlation`` and ``rank_correlation`` over sites, ``slope`` of quick on exact (1 if unbiased),
        ``mean_error`` (mean absolute, nats), ``relative_error`` (sum of absolute errors over sum of absolute exact
        effects), ``sign_agreement``, ``top_overlap`` (share of the ``n_top`` largest exact effects among the
        ``n_top`` largest quick ones), ``n_sites``.

    Raises:
        ValueError: the tables do not have the same sites.

    Examples:
        >>> exact = pd.DataFrame({"component": ["z"] * 3, "layer": [1, 2, 3], "effect": [0.1, 0.2, 0.4]})
        >>> round(float(compare_patching(exact, exact, n_top=1)["correlation"]), 3)
        1.0
    """
    keys = [c for c in ("component", "layer", "head", "pos") if c in exact.columns]
    both = exact.merge(quick, on=keys, suffixes=("", "_quick")) if set(keys) <= set(quick.columns) else exact[:0]
    if len(both) != len(exact) or len(quick) != len(exact):
        raise ValueError(
            f"the tables have {len(exact)} and {len(quick)} sites, {len(both)} in common; patch the same sites"
        )
    a, b = both.effect.to_numpy(dtype=float), both.effect_quick.to_numpy(dtype=float)
    error = np.abs(b - a)
    top = [set(np.argsort(-np.abs(x), kind="stable")[:n_top].tolist()) for x in (a, b)]
    return pd.Series(
        {
            "correlation": _correlation(a, b),
            "rank_correlation": rank_correlation(a, b),
            "slope": float(a @ b / (a @ a)),
            "mean_error": float(error.mean()),
            "relative_error": float(error.sum() / np.abs(a).sum()),
            "sign_agreement": float(((a > 0) == (b > 0)).mean()),
            "top_overlap": len(top[0] & top[1]) / len(top[0]),
            "n_sites": float(len(a)),
        }
    )


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's; NaN where all sites are alike."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 1e-6 and np.ptp(b) > 1e-6 else float("nan")


# -- the two methods --------------------------------------------------------------------------------------------------
def _exact(
    model: HookedModel,
    batch: Batch,
    target: FwdHooks,
    other: FwdHooks,
    sites: Sequence[Site],
    places: Sequence[tuple[Component, int]],
) -> tuple[Float[Tensor, "site record"], Float[Tensor, "record"]]:
    """Change of the margin towards the other run at every site, and the whole difference of the two runs."""
    run = batch_runner(model, batch, [n for n, _ in target + other] + [act_name(*p) for p in places])
    source: dict[tuple[Component, int], Tensor] = {}
    difference = run(other + _keep_hooks(places, source))
    start = run(target)
    effects = torch.full((len(sites), batch.n_records), float("nan"))
    for i, site in enumerate(sites):
        where, has = positions(batch, site.offset)
        hooks = [h for place in site.places for h in patch_hook(*place, source[place], head=site.head, where=where)]
        effects[i, has] = (run(target + hooks) - start).cpu()[has]
    return effects, (difference - start).cpu()


def _by_gradient(
    model: HookedModel,
    batch: Batch,
    target: FwdHooks,
    other: FwdHooks,
    sites: Sequence[Site],
    places: Sequence[tuple[Component, int]],
) -> tuple[Float[Tensor, "site record"], Float[Tensor, "record"]]:
    """The same to first order around the target run."""
    source: dict[tuple[Component, int], Tensor] = {}
    own: dict[tuple[Component, int], Tensor] = {}
    with torch.no_grad():
        there = margins(batch_logprobs(model, batch, other + _keep_hooks(places, source)))
    leaf = [(act_name("resid_pre", min(layer for _, layer in places)), as_leaf)]
    with autograd(model):
        here = margins(batch_logprobs(model, batch, leaf + target + _keep_hooks(places, own, keep_graph=True)))
        gradients = torch.autograd.grad(here.sum(), [own[place] for place in places])
    # per place: [batch, pos, head or 1], nats
    first_order = {}
    for place, gradient in zip(places, gradients, strict=True):
        product = ((source[place] - own[place].detach()) * gradient).float()
        first_order[place] = product.sum(-1) if place[0] == "z" else product.sum(-1, keepdim=True)
    effects = torch.full((len(sites), batch.n_records), float("nan"))
    for i, site in enumerate(sites):
        where, has = positions(batch, site.offset)
        rows = torch.zeros(len(batch.ids), device=where.device)
        for place in site.places:
            values = first_order[place]
            values = values.sum(-1) if site.head < 0 else values[..., site.head]
            rows = rows + (values * where).sum(-1)
        each = torch.zeros(batch.n_records, device=where.device).index_add(0, batch.record, rows).cpu()
        effects[i, has] = each[has]
    return effects, (there - here.detach()).cpu()


def _keep_hooks(
    places: Sequence[tuple[Component, int]], store: dict[tuple[Component, int], Tensor], *, keep_graph: bool = False
) -> FwdHooks:
    def keep(place: tuple[Component, int]) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            store[place] = act if keep_graph else act.detach()
            return act  # a bridge may hand over a reshaped view: returning it keeps it on the path of the gradient

        return hook_fn

    return [(act_name(*place), keep(place)) for place in places]


def as_leaf(act: Tensor, hook: Any) -> Tensor:
    """A hook from which the gradient starts: nothing below it is kept."""
    return act.detach().requires_grad_(True)
