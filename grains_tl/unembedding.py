"""Logits of the scored tokens and of nothing else."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from grains_tl.batches import Batch
from grains_tl.models import final_norm, hooked, is_bridge
from grains_tl.precision import exact_unembedding, full_precision
from grains_tl.types import FwdHooks, HookedModel


def target_logits(model: HookedModel, batch: Batch, fwd_hooks: FwdHooks | None = None) -> Float[Tensor, "target vocab"]:
    """Logits that predict each scored token of a batch; differentiable.

    Rows of different lengths end at different places. Keeping some positions of every row would unembed rows times places;
    here each pair of row and position is unembedded once, also where it predicts the first token of both responses.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        batch: rows and what is scored in them.
        fwd_hooks: hooks to run with; they see the full ``[batch, pos, d_model]`` residual.
    """
    width = batch.ids.shape[1]
    places, again = (batch.target_row * width + batch.keep[batch.target_keep]).unique(return_inverse=True)

    def pick(act: Float[Tensor, "batch pos d_model"], hook: Any = None) -> Float[Tensor, "1 place d_model"]:
        here = places.to(act.device)  # of a model on several devices, the last one
        return act[here // width, here % width][None]

    hooks = list(fwd_hooks or [])
    if is_bridge(model):
        with hooked(model, [*hooks, ("unembed.hook_in", pick)]), exact_unembedding(model):
            logits = model(batch.ids, use_cache=False, **{"attention_mask": batch.attention_mask, **batch.inputs})
    else:
        side = "left" if bool((batch.attention_mask[:, 0] == 0).any()) else "right"
        with hooked(model, hooks):
            resid = model(
                batch.ids,
                attention_mask=batch.attention_mask,
                padding_side=side,
                stop_at_layer=model.cfg.n_layers,
            )
            with full_precision(model):
                logits = model.unembed(final_norm(model, pick(resid)))  # type: ignore[attr-defined]
    return logits[0][again.to(logits.device)].to(batch.ids.device)
