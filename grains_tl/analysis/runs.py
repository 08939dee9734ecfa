"""Margins of records under hooks, with the shared part of many runs computed once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import (
    HooksForBatch,
    batch_logprobs,
    gather_logprobs,
    hooks_for,
    score_batches,
)
from grains_tl.inference.objectives import Objective, kl_divergence, margins
from grains_tl.inference.restart import prepare_restart, restart_logprobs
from grains_tl.models.running import forward_logits, resid_post
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import FwdHooks, HookedModel

#: Hooks -> margins ``[record]`` of one batch, nats.
RunBatch = Callable[[FwdHooks], Tensor]


def batch_runner(model: HookedModel, batch: Batch, names: Sequence[str]) -> RunBatch:
    """A function that runs one batch under hooks on some of ``names``; blocks below all of them run only once.

    The function needs no gradients and gives none.
    """
    layer = restart_layer(names)
    if layer < 0:

        def run_whole(fwd_hooks: FwdHooks) -> Float[Tensor, "record"]:
            with torch.no_grad():
                return margins(batch_logprobs(model, batch, fwd_hooks))

        return run_whole
    restart = prepare_restart(model, batch, [layer])
    return lambda fwd_hooks: margins(restart_logprobs(model, restart, layer, fwd_hooks))


def restart_layer(names: Sequence[str]) -> int:
    """The highest layer whose ``resid_post`` lies before all these hook points; -1 if there is none.

    Examples:
        >>> restart_layer(["blocks.5.hook_resid_post", "blocks.6.attn.hook_z"])
        5
        >>> restart_layer(["blocks.5.hook_mlp_out"]), restart_layer(["hook_embed"])
        (4, -1)
    """
    lowest = []
    for name in names:
        found = re.match(r"blocks\.(\d+)\.", str(name))
        layer = int(found.group(1)) if found else -1
        lowest.append(layer if name == resid_post(layer) else layer - 1)
    return max(-1, min(lowest, default=-1))


def margins_and_kl(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    settings: Sequence[HooksForBatch],
    *,
    objective: Objective = "sum",
) -> tuple[Float[Tensor, "record"], Float[Tensor, "setting record"], Float[Tensor, "setting record"]]:
    """Margins without hooks, margins under every setting, and KL(setting || without hooks) at each prompt's end; nats."""
    base = torch.zeros(len(tokenized))
    found, kl = torch.zeros(len(settings), len(tokenized)), torch.zeros(len(settings), len(tokenized))
    total = (len(settings) + 1) * len(tokenized)
    with torch.no_grad(), progress_bar(total=total, desc="ablate", unit="run") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            base[group], plain = _margins_and_next(model, batch, [])
            bar.update(len(group))
            for i, setting in enumerate(settings):
                found[i, group], changed = _margins_and_next(model, batch, hooks_for(setting, batch))
                each = kl_divergence(changed, plain).cpu()
                # a record with two rows has the same prompt in both
                kl[i, torch.tensor(group)[batch.record.cpu()]] = each
                bar.update(len(group))
    return base, found, kl


def _margins_and_next(
    model: HookedModel, batch: Batch, fwd_hooks: FwdHooks
) -> tuple[Float[Tensor, "record"], Float[Tensor, "row vocab"]]:
    """Margins, and log-probabilities of the token after each row's prompt."""
    last = batch.offset + batch.prompt_len - 1
    targets = batch.keep[batch.target_keep]
    keep = torch.cat([targets, last]).unique()
    logits = forward_logits(model, batch.ids, batch.attention_mask, keep, fwd_hooks, batch.inputs)
    scored = logits[batch.target_row, torch.searchsorted(keep, targets)]
    row = torch.arange(len(last), device=last.device)
    following = logits[row, torch.searchsorted(keep, last)].float().log_softmax(-1)
    return margins(gather_logprobs(scored, batch)).cpu(), following
