"""Runs that begin at a layer, from a residual stream that was cached."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import batch_logprobs, gather_logprobs, target_logits
from grains_tl.inference.packing import BlockInputs, Packing, pack_batch
from grains_tl.models.precision import agrees, full_precision
from grains_tl.models.running import final_norm, hooked, is_bridge, require_layers, stream_after
from grains_tl.types import FwdHooks, HookedModel


# -- restart from a cached residual -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Restart:
    """A batch with its unsteered residuals, ready to be continued from any of some layers.

    Attributes:
        batch: the rows and targets.
        resid: layer -> ``[batch, pos, d_model]`` residual after that block (-1: before block 0).
        block_inputs: for a bridge, the further arguments each block was called with (masks, rotary tables).
        base: ``[record, 2]`` log-likelihoods of the unsteered run.
        exact: whether continuing reproduces ``base``; where it does not, full runs are used instead.
        tiles: whether continuing several copies of the batch in one pass does so too.
        packing: how the records go into rows without padding; ``None`` where that gains little or is not exact.
        points: hook points by name, looked up once (a bridge builds its ``hook_dict`` anew at every access).
    """

    batch: Batch
    resid: dict[int, Tensor]
    block_inputs: BlockInputs
    base: Float[Tensor, "record 2"]
    exact: bool
    tiles: bool = False
    packing: Packing | None = None
    points: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens of one copy of the batch in a pass, padding included."""
        return self.batch.ids.numel() if self.packing is None else self.packing.row.numel()


def prepare_restart(model: HookedModel, batch: Batch, layers: Sequence[int], *, copies: bool = False) -> Restart:
    """One full run that keeps what ``restart_logprobs`` needs, and a check that continuing gives the same numbers.

    Layer -1 is the residual stream before block 0. With ``copies`` the check is also made for two copies of the batch in
    one pass.
    """
    resid: dict[int, Tensor] = {}
    inputs: BlockInputs = []

    def keep(layer: int) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> None:
            resid[layer] = act.detach()

        return hook_fn

    def note_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        inputs.append((args[1:] if args else (), rest))

    blocks = [layer for layer in layers if layer != -1]
    places = [] if len(blocks) == len(layers) else [-1]
    places += require_layers(model, blocks) if blocks or not places else []
    handles = []
    if is_bridge(model):
        handles = [block.register_forward_pre_hook(note_inputs, with_kwargs=True) for block in model.blocks]
    try:
        with torch.no_grad():
            base = batch_logprobs(model, batch, [(stream_after(i), keep(i)) for i in places])
    finally:
        for handle in handles:
            handle.remove()
    restart = Restart(batch, resid, inputs, base, exact=True, points=model.hook_dict)
    packing = pack_batch(batch, inputs)
    for way, tiles in itertools.product([packing, None] if packing else [None], [True, False] if copies else [False]):
        trial = replace(restart, packing=way, tiles=tiles)
        if _continues(model, trial, 2 if tiles else 1):
            return trial
    return replace(restart, exact=False)


def _continues(model: HookedModel, restart: Restart, n: int) -> bool:
    """Whether ``n`` copies of the batch, continued from the lowest cached layer, give its base numbers."""
    if is_bridge(model) and len(restart.block_inputs) != len(model.blocks):  # a block that runs twice, or not at all
        return False
    try:
        again = restart_many(model, restart, min(restart.resid), [[]] * n)
    except MODEL_ERRORS as error:  # an architecture with block arguments of another kind
        require_from_outside(error)
        return False
    return agrees(model, again, restart.base)


def restart_logprobs(
    model: HookedModel, restart: Restart, layer: int, fwd_hooks: FwdHooks
) -> Float[Tensor, "record 2"]:
    """``batch_logprobs`` under hooks that act on ``blocks.{layer}.hook_resid_post`` and above only.

    Runs the blocks after ``layer`` and unembeds the scored positions alone.
    """
    with torch.no_grad():
        return gather_logprobs(restart_logits(model, restart, layer, [fwd_hooks])[0], restart.batch)


def restart_many(
    model: HookedModel, restart: Restart, layer: int, settings: Sequence[FwdHooks]
) -> Float[Tensor, "setting record 2"]:
    """``restart_logprobs`` of several hooks in one pass: the batch is continued in as many copies."""
    with torch.no_grad():
        return torch.stack([gather_logprobs(x, restart.batch) for x in restart_logits(model, restart, layer, settings)])


def restart_logits(
    model: HookedModel, restart: Restart, layer: int, settings: Sequence[FwdHooks]
) -> Float[Tensor, "setting target vocab"]:
    """Logits that predict the scored tokens, under each of several hooks on ``layer`` (one setting: and above it).

    Raises:
        ValueError: several settings, one of which has hooks above ``layer``; they would act on the others too.
    """
    batch, here = restart.batch, stream_after(layer)
    later = [(name, fn) for hooks in settings for name, fn in hooks if name != here]
    if later and len(settings) > 1:
        raise ValueError(f"hooks on {later[0][0]} cannot share a pass with other settings; run them one at a time")
    if not restart.exact:
        return torch.stack([target_logits(model, batch, hooks) for hooks in settings])
    with hooked(model, later):
        resid = torch.stack([_edited(restart, restart.resid[layer], hooks, here) for hooks in settings])
        row, pos, packing = batch.target_row, batch.keep[batch.target_keep], restart.packing
        # a hook on a later block expects the batch's own rows and positions
        if packing is not None and not later and packing.keeps(resid):
            final = _continue(model, restart, layer + 1, packing.pack(resid), packing.block_inputs, len(packing.row))
            row, pos = packing.to_row[row, pos], packing.to_pos[row, pos]
        else:
            tiled = rearrange(resid, "setting row pos d_model -> (setting row) pos d_model")
            final = _continue(model, restart, layer + 1, tiled, restart.block_inputs, len(batch.ids))
        # a place that predicts the first token of both responses is unembedded once
        places, again = (row * final.shape[1] + pos).to(final.device).unique(return_inverse=True)
        per_setting = rearrange(final, "(setting row) pos d_model -> setting (row pos) d_model", setting=len(settings))
        read = rearrange(per_setting[:, places], "setting place d_model -> (setting place) 1 d_model")
        with full_precision(model):
            logits = model.unembed(final_norm(model, read))
        return rearrange(logits, "(setting place) 1 vocab -> setting place vocab", setting=len(settings))[:, again]


def _edited(
    restart: Restart, resid: Float[Tensor, "batch pos d_model"], hooks: FwdHooks, here: str
) -> Float[Tensor, "batch pos d_model"]:
    """What the hooks on one point make of its activation."""
    for name, fn in hooks:
        if name == here:
            changed = fn(resid, hook=restart.points[name])
            resid = resid if changed is None else changed
    return resid


def _continue(
    model: HookedModel,
    restart: Restart,
    first: int,
    resid: Float[Tensor, "rows pos d_model"],
    block_inputs: BlockInputs,
    n_rows: int,
) -> Float[Tensor, "rows pos d_model"]:
    """Run the blocks from ``first`` on; ``resid`` may hold several copies of a batch of ``n_rows``."""
    n_layers = int(model.cfg.n_layers)
    if first == n_layers:
        return resid
    if not is_bridge(model):
        mask = restart.batch.attention_mask.repeat(len(resid) // n_rows, 1)
        return model(resid, start_at_layer=first, stop_at_layer=n_layers, attention_mask=mask)
    copies = len(resid) // n_rows
    for block, (args, kwargs) in list(zip(model.blocks, block_inputs, strict=True))[first:]:
        out = block(resid, *_copied(args, n_rows, copies), **_copied(kwargs, n_rows, copies))
        resid = out[0] if isinstance(out, tuple) else out
    return resid


def _copied(value: Any, n_rows: int, copies: int) -> Any:
    """A block's arguments for several copies of the batch: whatever has a row per batch row is repeated."""
    if copies == 1:
        return value
    if isinstance(value, dict):
        return {k: _copied(v, n_rows, copies) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(v, n_rows, copies) for v in value)
    if isinstance(value, Tensor) and value.ndim > 1 and n_rows > 1 and value.shape[0] == n_rows:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value
