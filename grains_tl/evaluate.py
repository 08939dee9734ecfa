"""What steering does to the margin: many settings on the same records, without running a lower layer twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from grains_tl.models import forward_logits, require_hook_names
from grains_tl.objectives import Objective
from grains_tl.scoring import MAX_TOKENS, HooksForBatch, prepare_restart, restart_logprobs, score_batches
from grains_tl.tokens import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors import SteeringVectors


@dataclass(frozen=True)
class Setting:
    """One thing to measure.

    Attributes:
        layer: the lowest layer the hooks act on; everything below is shared with the unsteered run.
        hooks: hooks on ``resid_post`` of this and later layers, or a function ``Batch -> hooks``.
    """

    layer: int
    hooks: HooksForBatch


def measure(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    settings: Sequence[Setting],
    *,
    objective: Objective = "sum",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> tuple[Float[Tensor, "record 2"], Float[Tensor, "setting record 2"]]:
    """Log-likelihoods of both responses, unsteered and under every setting.

    Steering after layer l leaves the layers up to l alone, so each setting restarts from the residual cached there
    (equal to a full run to about 1e-5 nats; checked at the start, with full runs as the fallback).

    Args:
        model, tokenized: the model and records from ``tokenize_pairs``.
        settings: what to measure.
        objective: how response tokens are combined.
        max_tokens: token budget of one pass.
        progress: show a bar.

    Returns:
        ``(base, steered)``: ``[record, 2]`` and ``[setting, record, 2]``, nats; column 0 chosen, 1 rejected.
    """
    for setting in settings:
        if not callable(setting.hooks):
            require_hook_names(model, setting.hooks)
    base = torch.zeros(len(tokenized), 2)
    steered = torch.zeros(len(settings), len(tokenized), 2)
    layers = sorted({s.layer for s in settings})
    total = len(settings) * len(tokenized)
    with tqdm(total=total, desc="measure", unit="run", disable=not progress) as bar:
        for group, batch in score_batches(model, tokenized, objective, max_tokens=max_tokens):
            restart = prepare_restart(model, batch, layers)
            base[group] = restart.base.cpu()
            for i, setting in enumerate(settings):
                hooks = setting.hooks(batch) if callable(setting.hooks) else setting.hooks
                steered[i, group] = restart_logprobs(model, restart, setting.layer, hooks).cpu()
                bar.update(len(group))
    return base, steered


def effects(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    vectors: Sequence[SteeringVectors],
    alpha: float,
    *,
    objective: Objective = "sum",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> tuple[Float[Tensor, "record"], Float[Tensor, "vector record"]]:
    """Half the change of the margin between +alpha and -alpha, for single-layer vectors.

    The two signs together cancel what any push of that size does to the margin, whatever its direction.

    Returns:
        ``(base, effect)``: unsteered margins ``[record]`` and effects ``[vector, record]``, nats.

    Raises:
        ValueError: vectors of several layers; take one with ``vectors.at([layer])``.
    """
    several = [v.layers for v in vectors if len(v.layers) != 1]
    if several:
        raise ValueError(f"effects takes vectors of one layer, got layers {several[0]}; use vectors.at([layer])")
    settings = [Setting(v.layers[0], v.hooks(sign * alpha)) for v in vectors for sign in (1, -1)]
    base, steered = measure(model, tokenized, settings, objective=objective, max_tokens=max_tokens, progress=progress)
    both = margins(steered).view(len(vectors), 2, len(tokenized))
    return margins(base), (both[:, 0] - both[:, 1]) / 2


def margins(logprobs: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
    """log p(chosen) - log p(rejected), nats."""
    return logprobs[..., 0] - logprobs[..., 1]


def mean_and_se(values: Float[Tensor, "*shape record"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Mean over records and its standard error (NaN for a single record).

    Example:
        >>> mean, se = mean_and_se(torch.tensor([1.0, 3.0]))
        >>> mean.item(), se.item()
        (2.0, 1.0)
    """
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5


def next_token_kl(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    fwd_hooks: HooksForBatch,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Float[Tensor, "record"]:
    """KL(steered || base) of the next-token distribution at the end of each prompt, nats: what steering costs there."""
    out = torch.zeros(len(tokenized))
    with torch.no_grad():
        for group, batch in score_batches(model, tokenized, max_tokens=max_tokens):
            hooks = fwd_hooks(batch) if callable(fwd_hooks) else fwd_hooks
            last = batch.offset + batch.prompt_len - 1
            keep, place = last.unique(return_inverse=True)
            rows = torch.arange(len(last), device=last.device)
            base, steered = (
                forward_logits(model, batch.ids, batch.attention_mask, keep, h, batch.inputs)[rows, place]
                .float()
                .log_softmax(-1)
                for h in (None, hooks)
            )
            kl = (steered.exp() * (steered - base)).sum(-1)
            # a record with two rows has the same prompt in both
            out[torch.tensor(group)[batch.record.cpu()]] = kl.cpu()
    return out
