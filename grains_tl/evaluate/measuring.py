"""What steering does to the margin: many settings on the same records, without running a lower layer twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.settings import current
from grains_tl.evaluate.settings import Setting, _require_reach, require_settings
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import HooksForBatch, hooks_for, score_batches
from grains_tl.inference.objectives import Objective, margins
from grains_tl.inference.restart import Restart, prepare_restart, restart_many
from grains_tl.models.running import forward_logits, resid_post
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


def measure(
    model: HookedModel,
    tokenized: Records,
    settings: Sequence[Setting | Steering],
    *,
    objective: Objective = "sum",
) -> tuple[Float[Tensor, "record 2"], Float[Tensor, "setting record 2"]]:
    """Log-likelihoods of both responses, unsteered and under every setting.

    Steering after layer l leaves the layers up to l alone, so each setting restarts from the residual cached there
    (equal to a full run to about 1e-5 nats; checked at the start, with full runs as the fallback).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        settings: what to measure.
        objective: how response tokens are combined.

    Returns:
        ``(base, steered)``: ``[record, 2]`` and ``[setting, record, 2]``, nats; column 0 chosen, 1 rejected.

    Raises:
        KeyError: a hook name that the model does not have.
        ValueError: no list of settings, or hooks that act before their setting's layer, which is not run again.

    Examples:
        >>> settings = [Setting(12, vectors.hooks(0.2, [12]), vector="ours", alpha=0.2)]     # doctest: +SKIP
        >>> base, steered = measure(model, tokenized, settings)                             # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    settings = require_settings(model, settings)
    base = torch.zeros(len(tokenized), 2)
    steered = torch.zeros(len(settings), len(tokenized), 2)
    total = len(settings) * len(tokenized)
    with progress_bar(total=total, desc="measure", unit="run") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            for i, logprobs in run_settings(model, batch, settings):
                if i is None:
                    base[group] = logprobs.cpu()
                else:
                    steered[i, group] = logprobs.cpu()
                    bar.update(len(group))
    return base, steered


def run_settings(
    model: HookedModel,
    batch: Batch,
    settings: Sequence[Setting],
) -> Iterator[tuple[int | None, Float[Tensor, "record 2"]]]:
    """Log-likelihoods of one batch: ``(None, base)`` first, then ``(index, logprobs)`` of every setting.

    Every setting restarts from the residual cached at its layer; settings of one layer share a pass as long as it stays
    under ``max_tokens``. Layers come in rising order, so that a run that is stopped has finished what it has yielded.
    """
    layers = [s.layer for s in settings] or [0]
    copies = copies_that_fit(batch.ids.numel()) > 1 and len(set(layers)) < len(layers)
    restart = prepare_restart(model, batch, layers, copies=copies)
    yield None, restart.base
    for layer, group, hooks in shared_passes(settings, restart):
        if hooks is None:
            yield from ((i, restart.base) for i in group)
        else:
            yield from zip(group, restart_many(model, restart, layer, hooks), strict=True)


def shared_passes(
    settings: Sequence[Setting],
    restart: Restart,
) -> Iterator[tuple[int, list[int], list[FwdHooks] | None]]:
    """Which settings run together: ``(layer, their indices, their hooks)``; no hooks for those that change nothing.

    Layers come in rising order. Hooks above the setting's own layer would act on its neighbours too: those run alone.
    """
    size = copies_that_fit(restart.n_tokens) if restart.tiles else 1
    for layer in sorted({s.layer for s in settings}):
        made = {i: hooks_for(s.hooks, restart.batch) for i, s in enumerate(settings) if s.layer == layer}
        for hooks in made.values():
            _require_reach(layer, hooks)
        idle = [i for i, hooks in made.items() if not hooks]
        alone = [i for i, hooks in made.items() if any(name != resid_post(layer) for name, _ in hooks)]
        shared = [i for i in made if i not in idle and i not in alone]
        if idle:
            yield layer, idle, None
        for group in [[i] for i in alone] + [shared[k : k + size] for k in range(0, len(shared), size)]:
            yield layer, group, [made[i] for i in group]


def copies_that_fit(n_tokens: int) -> int:
    """How many copies of a batch stay under the token budget, at least one."""
    return max(1, current().max_tokens // n_tokens)


def effects(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    vectors: Sequence[SteeringVectors],
    alpha: float,
    *,
    objective: Objective = "sum",
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
    base, steered = measure(model, tokenized, settings, objective=objective)
    both = margins(steered).view(len(vectors), 2, len(tokenized))
    return margins(base), (both[:, 0] - both[:, 1]) / 2


def next_token_kl(
    model: HookedModel,
    tokenized: Records,
    fwd_hooks: HooksForBatch,
) -> Float[Tensor, "record"]:
    """KL(steered || base) of the next-token distribution at the end of each prompt, nats: what steering costs there.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.

    Returns:
        ``[record]``, nats.

    Examples:
        >>> next_token_kl(model, tokenized, vectors.steering(0.2, 24)).mean()    # doctest: +SKIP
        tensor(0.2214)
    """
    tokenized = as_tokenized(model, tokenized)
    out = torch.zeros(len(tokenized))
    with torch.no_grad():
        for group, batch in score_batches(model, tokenized):
            hooks = hooks_for(fwd_hooks, batch)
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
