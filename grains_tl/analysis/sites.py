"""Where activations are exchanged: components of blocks, single heads, positions counted from the prompt's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.checks import listed, whole
from grains_tl._util.stats import standard_error
from grains_tl.inference.batches import Batch
from grains_tl.models.running import require_layers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import FwdHooks, HookedModel

#: What can be patched: the residual stream before and after a block, the outputs of attention and MLP, single heads.
#: The residual between attention and MLP is left out: editing it means another thing in a ``TransformerBridge``.
Component = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]


By = Literal["layer", "head", "pos", "all"]


@dataclass(frozen=True)
class Site:
    """Activations that are patched together: components, one head or all (-1), one offset from the prompt's end or all."""

    places: tuple[tuple[Component, int], ...]
    head: int = -1
    offset: int | None = None


def act_name(component: Component, layer: int) -> str:
    """TransformerLens' name of a component's hook point.

    Examples:
        >>> act_name("z", 3), act_name("mlp_out", 3)
        ('blocks.3.attn.hook_z', 'blocks.3.hook_mlp_out')
    """
    if component not in get_args(Component):
        raise ValueError(f"component={component!r}; expected one of {get_args(Component)}")
    return f"blocks.{layer}.attn.hook_z" if component == "z" else f"blocks.{layer}.hook_{component}"


def by_and_offsets(by: By | Sequence[int]) -> tuple[By, list[int] | None]:
    """What there is a site for, and the positions where they are given.

    Raises:
        ValueError: something else than a name or whole numbers, or no number.

    Examples:
        >>> by_and_offsets("head"), by_and_offsets(range(-1, 1))
        (('head', None), ('pos', [-1, 0]))
    """
    if isinstance(by, str):
        return by, None
    offsets = [whole("position", place) for place in listed("by", by)]
    if not offsets:
        raise ValueError("by is an empty list of positions; give some, such as by=[-1, 0], or by='pos' for all")
    return "pos", offsets


def check_options(components: Sequence[str], by: str, into: str, method: str) -> None:
    """Refuse unknown options, and combinations that do not exist (ValueError)."""
    for component in components:
        act_name(component, 0)  # type: ignore[arg-type]
    for name, value, known in (
        ("by", by, get_args(By)),
        ("into", into, ("base", "steered")),
        ("method", method, ("exact", "gradient")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}; expected one of {known}")
    if by == "head" and tuple(components) != ("z",):
        raise ValueError(f"by='head' with component={list(components)}; only component='z' has heads")
    if not components or (by == "pos" and len(components) > 1):
        raise ValueError(f"by={by!r} with component={list(components)}; give one component")


def sites_for(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    components: Sequence[Component],
    by: By,
    layers: Sequence[int] | None,
    offsets: Sequence[int] | None,
    steering: FwdHooks | None,
) -> list[Site]:
    """The sites to patch, one after the other in the order of the table."""
    at = require_layers(model, _reachable(model, components, steering) if layers is None else layers)
    if by == "all":
        return [Site(tuple((c, layer) for layer in at for c in components))]
    if by == "layer":
        return [Site(tuple((c, layer) for c in components)) for layer in at]
    if by == "head":
        return [Site((("z", layer),), head=head) for layer in at for head in range(int(model.cfg.n_heads))]
    if offsets is None:
        offsets = range(
            1 - max(len(t.prompt) for t in tokenized), max(t.longest - len(t.prompt) for t in tokenized) + 1
        )
    return [Site(((components[0], layer),), offset=offset) for layer in at for offset in offsets]


def _reachable(model: HookedModel, components: Sequence[Component], steering: FwdHooks | None) -> list[int]:
    """Layers whose component can differ between the runs, judged by where the hooks are."""
    named = [str(name).split(".") for name, _ in steering or []]
    lowest = min((int(n[1]) if n[0] == "blocks" and n[2] == "hook_resid_post" else -1 for n in named), default=-1)
    first = lowest if tuple(components) == ("resid_post",) and lowest >= 0 else lowest + 1
    return list(range(first, int(model.cfg.n_layers)))


def positions(batch: Batch, offset: int | None) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "record"]]:
    """Where to patch, and which records have such a position."""
    place = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    real = batch.attention_mask.bool()
    where = real if offset is None else real & (place - batch.offset[:, None] == batch.prompt_len[:, None] - 1 + offset)
    has = torch.zeros(batch.n_records, dtype=torch.long)
    has = has.index_add(0, batch.record.cpu(), where.any(-1).long().cpu()) > 0
    return where, has


def site_table(
    sites: Sequence[Site],
    components: Sequence[Component],
    by: By,
    found: Float[Tensor, "site record"],
    total: Float[Tensor, "record"],
) -> pd.DataFrame:
    """One row per site: mean effect over the records that have it, standard error, share of the total."""
    rows = []
    for site, effects in zip(sites, found, strict=True):
        has = ~effects.isnan()
        n, whole = int(has.sum()), total[has].mean().item()
        row: dict[str, Any] = {"component": "+".join(components), "layer": -1 if by == "all" else site.places[0][1]}
        if by == "head":
            row["head"] = site.head
        if by == "pos":
            row["pos"] = site.offset
        mean = effects[has].mean().item()
        se = standard_error(effects[has].tolist())
        rows.append({**row, "effect": mean, "se": se, "share": mean / whole, "total": whole, "n": n})
    return pd.DataFrame(rows)
