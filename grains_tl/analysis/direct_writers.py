"""Direct attribution onto a direction: which heads and MLPs write it into the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.selection import Selection
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.hooks.stand_ins import hide, replacements
from grains_tl.inference.batches import by_token_budget, image_inputs, pad_rows
from grains_tl.models.running import hooked, resid_post, run_blocks
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors

#: kind, layer, head; -1 where there is none.
Part = tuple[str, int, int]


def writers(
    model: HookedModel,
    tokenized: Records,
    vectors: SteeringVectors,
    *,
    layer: int,
    selections: Sequence[Selection] | None = None,
    mask: Mask | Masker = "mean_embedding",
) -> pd.DataFrame:
    """What each component up to a layer writes along its direction, at the end of the prompt.

    The residual stream is a sum, so its projection splits exactly into those of the embedding, of every head
    (``hook_z`` times its rows of W_O), of every MLP, and a rest (output biases of attention; anything an architecture
    puts between a component and the stream). With ``selections`` the quantity split is the one the vectors are made
    of, d+ - d-: the residual without the tokens toward rejected minus the one without those toward chosen.

    On equal-length prompts ``ActivationCache.stack_head_results`` and ``.stack_activation("mlp_out")`` give the same
    parts before projection; this works on padded batches of both model classes and keeps no full activations.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        vectors: the directions.
        layer: whose direction, and how far up to look: components of the blocks 0 to ``layer``.
        selections: the masked tokens of each record; ``None`` to split the plain prompt's projection.
        mask: as in ``build_vectors``, used with ``selections``.

    Returns:
        One row per component: ``kind`` (``"embed"``, ``"head"``, ``"mlp"``, ``"rest"``), ``layer``, ``head`` (-1
        where there is none), ``projection`` (mean over records, residual units), ``se`` over records, ``share`` of
        the sum. The projections add up to the mean projection of ``resid_post`` (with selections and mean-reduced
        vectors: the vector's norm).

    Raises:
        ValueError: a layer that is not stored, vectors of another model, or not as many selections as records.

    Examples:
        >>> table = writers(model, tokenized, vectors, layer=21, selections=selections)   # doctest: +SKIP
        >>> table.nlargest(5, "projection")                                               # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    residual_stream_only("writers", vectors.site)
    vectors.require_match(model)
    unit = vectors.at([layer]).directions[0]
    common: dict[str, Any] = {"layer": layer, "mask": mask}
    if selections is None:
        parts, values = _project(model, tokenized, [()] * len(tokenized), unit, **common)
    else:
        if len(selections) != len(tokenized):
            raise ValueError(f"{len(selections)} selections for {len(tokenized)} records; give one per record")
        parts, kept = _project(model, tokenized, [s.toward_rejected for s in selections], unit, **common)
        _, lost = _project(model, tokenized, [s.toward_chosen for s in selections], unit, **common)
        values = kept - lost
    mean, se = mean_and_se(values.T)
    kinds, layers, heads = zip(*parts, strict=True)
    table = pd.DataFrame({"kind": kinds, "layer": layers, "head": heads})
    return table.assign(projection=mean.tolist(), se=se.tolist(), share=(mean / mean.sum()).tolist())


def _project(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    masked: Sequence[Sequence[int]],
    unit: Float[Tensor, "d_model"],
    *,
    layer: int,
    mask: Mask | Masker,
) -> tuple[list[Part], Float[Tensor, "record part"]]:
    """Every component's projection at each prompt's last token."""
    needed = Mask.of(mask).text != "attention" and any(masked)
    stand_ins = replacements(model, tokenized, mask) if needed else None
    rows: dict[int, Tensor] = {}
    parts: list[Part] = []
    for group in by_token_budget([len(t.prompt) for t in tokenized]):
        ids, attention_mask, offset = pad_rows(model, [tokenized[g].prompt for g in group])
        inputs = image_inputs(model, [tokenized[g].images for g in group], ids, offset)
        hooks = hide(model, stand_ins, group, [masked[g] for g in group], offset=offset, like=ids)
        last = torch.tensor([len(tokenized[g].prompt) - 1 for g in group], device=ids.device)
        found: dict[Part, Tensor] = {}
        with torch.no_grad(), hooked(model, hooks + _read_hooks(model, layer, last, unit.to(ids.device), found)):
            run_blocks(model, ids, attention_mask, layer + 1, inputs)
        parts, values = _with_rest(found)
        rows.update(zip(group, values.cpu(), strict=True))
    return parts, torch.stack([rows[i] for i in range(len(tokenized))])


def _read_hooks(
    model: HookedModel, layer: int, last: Int[Tensor, "row"], unit: Float[Tensor, "d_model"], found: dict[Part, Tensor]
) -> FwdHooks:
    row = torch.arange(len(last), device=last.device)

    def read(part: Part) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> None:
            found[part] = (act[row, last].float() * unit).sum(-1)  # not a matrix product: autocast would round it

        return hook_fn

    def read_heads(at: int) -> Any:
        # [head, d_head]: what one unit of each entry of z writes along the direction
        along = (model.blocks[at].attn.W_O.detach().float() * unit).sum(-1)

        def hook_fn(act: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            each = (act[row, last].float() * along).sum(-1)
            found.update({("head", at, head): each[:, head] for head in range(each.shape[1])})

        return hook_fn

    hooks: FwdHooks = [("blocks.0.hook_resid_pre", read(("embed", -1, -1)))]
    for at in range(layer + 1):
        hooks.append((f"blocks.{at}.attn.hook_z", read_heads(at)))
        hooks.append((f"blocks.{at}.hook_mlp_out", read(("mlp", at, -1))))
    return [*hooks, (resid_post(layer), read(("total", -1, -1)))]


def _with_rest(found: dict[Part, Tensor]) -> tuple[list[Part], Float[Tensor, "row part"]]:
    total = found.pop(("total", -1, -1))
    parts = list(found)
    values = torch.stack([found[p] for p in parts], dim=-1)
    return [*parts, ("rest", -1, -1)], torch.cat([values, (total - values.sum(-1))[:, None]], dim=-1)
