"""Log-probabilities of responses under any hooks: the one place where batches meet the model.

``score_pairs`` runs the whole model; ``prepare_restart`` + ``restart_logprobs`` give the same numbers from cached
residuals, for the many runs of a sweep that change nothing below some layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.settings import with_settings
from grains_tl.inference.batches import Batch, batch_of, by_token_budget, scoring_batch
from grains_tl.inference.objectives import Objective, token_logprobs
from grains_tl.models.plain_blocks import plain_blocks
from grains_tl.models.precision import exact_unembedding, full_precision, precision_hint
from grains_tl.models.running import (
    final_norm,
    forward_logits,
    hooked,
    is_bridge,
    listed_hooks,
    padding_side,
    resid_post,
)
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.tokens.prompts import tokenize_responses
from grains_tl.types import FwdHooks, HookedModel, PromptHooks, Text

#: Steering, hooks, or a function that makes hooks for a batch.
HooksForBatch = FwdHooks | PromptHooks | Callable[[Batch], FwdHooks]

#: Tokens per forward pass; on a CPU larger batches are not faster.


def hooks_for(hooks: HooksForBatch | None, batch: Batch) -> FwdHooks:
    """The hooks of a batch: as given, or made for the places where its prompts end."""
    if isinstance(hooks, PromptHooks):
        ids = batch.prompt_keys() if getattr(hooks, "needs_ids", False) else None
        return hooks.for_prompt(batch.offset + batch.prompt_len, ids)
    return listed_hooks(hooks(batch) if callable(hooks) else hooks)


def batch_logprobs(
    model: HookedModel, batch: Batch, fwd_hooks: HooksForBatch | None = None, *, plain: bool = False
) -> Float[Tensor, "record 2"]:
    """Weighted log-likelihood of chosen (0) and rejected (1) for each record of a batch, nats; differentiable.

    ``plain`` runs a bridge's own Hugging Face modules (``plain_blocks``; ask ``runs_plain`` first).
    """
    return gather_logprobs(target_logits(model, batch, hooks_for(fwd_hooks, batch), plain=plain), batch)


def score_batches(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    objective: Objective = "sum",
) -> Iterator[tuple[list[int], Batch]]:
    """Records in length-bucketed batches, with the indices of the records in each."""
    for group in by_token_budget([t.longest for t in tokenized], [len(t.inputs) for t in tokenized]):
        yield group, scoring_batch(model, [tokenized[i] for i in group], objective)


@with_settings
def score_pairs(
    model: HookedModel,
    tokenized: Records,
    fwd_hooks: HooksForBatch | None = None,
    *,
    objective: Objective = "sum",
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "record 2"]:
    """Log-likelihood of both responses of every record, nats.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.
        objective: how response tokens are combined.
        max_tokens: token budget of one forward pass.
        progress: show a bar.

    Returns:
        ``[record, 2]`` on the CPU, column 0 chosen, 1 rejected; their difference is the margin f(x).

    Raises:
        ValueError: NaN or infinite log-likelihoods, with the layer they come from (float16 overflows in many models).

    Examples:
        >>> logprobs = score_pairs(model, tokenized, vectors.hooks(0.2, [24]))     # doctest: +SKIP
        >>> (logprobs[:, 0] - logprobs[:, 1]).mean()                               # doctest: +SKIP
        tensor(4.8312)
    """
    tokenized = as_tokenized(model, tokenized)
    out = torch.zeros(len(tokenized), 2)
    with torch.no_grad(), progress_bar(total=len(tokenized), desc="score", unit="record") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            hooks = hooks_for(fwd_hooks, batch)
            out[group] = batch_logprobs(model, batch, hooks).cpu()
            _require_numbers(model, batch, out[group], hooks)
            bar.update(len(group))
    return out


def _require_numbers(model: HookedModel, batch: Batch, logprobs: Tensor, hooks: FwdHooks) -> None:
    """Refuse NaN and inf, naming the first block they come out of."""
    if bool(torch.isfinite(logprobs).all()):
        return
    finite: dict[int, bool] = {}
    real = batch.attention_mask.bool()

    def look(layer: int) -> FwdHooks:
        def hook_fn(act: Tensor, hook: Any) -> None:
            finite[layer] = bool(torch.isfinite(act[real.to(act.device)]).all())

        return [(resid_post(layer), hook_fn)]

    target_logits(model, batch, [*hooks, *(pair for layer in range(int(model.cfg.n_layers)) for pair in look(layer))])
    where = next((f"from block {layer} on" for layer, fine in sorted(finite.items()) if not fine), "in the logits")
    raise ValueError(
        f"the model gives NaN or infinite log-likelihoods, {where}{' with these hooks' if hooks else ''}; "
        f"{precision_hint(model)}"
    )


def gather_logprobs(target_logits: Float[Tensor, "target vocab"], batch: Batch) -> Float[Tensor, "record 2"]:
    """Weighted log-likelihoods of both responses from the logits of every target."""
    weighted = token_logprobs(target_logits, batch.target_id) * batch.target_weight
    flat = torch.zeros(2 * batch.n_records, dtype=weighted.dtype, device=weighted.device)
    both = flat.index_add(0, batch.target_slot, weighted)
    return rearrange(both, "(record response) -> record response", response=2)


def response_logprobs(
    model: HookedModel, prompt: Text, response: str, fwd_hooks: HooksForBatch | None = None
) -> pd.DataFrame:
    """log p of every token of a response, without hooks and with them; ``plot_token_logprobs`` draws it.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        prompt: text or messages, as in a ``PreferencePair``.
        response: the response to score, as in a ``PreferencePair``.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.

    Returns:
        One row per token: ``token`` (text), ``before`` and ``after`` (nats). The sums are what ``score_pairs`` gives.

    Raises:
        ValueError: an empty response, or one that is too long for the context.

    Examples:
        >>> frame = response_logprobs(model, "The film was", " great", vectors.hooks(0.2, [15]))   # doctest: +SKIP
        >>> plot_token_logprobs(frame)                                                            # doctest: +SKIP
    """
    ids, (answer,) = tokenize_responses(model, prompt, [response])
    targets = [(0, len(ids) - 1 + i, token, 1.0, 0) for i, token in enumerate(answer)]
    batch = batch_of(model, [ids + answer[:-1]], [0], [len(ids)], targets, 1)
    columns: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, hooks in (("before", None), ("after", hooks_for(fwd_hooks, batch))):
            logits = forward_logits(model, batch.ids, batch.attention_mask, batch.keep, hooks)
            columns[name] = token_logprobs(logits[batch.target_row, batch.target_keep], batch.target_id).tolist()
    return pd.DataFrame({"token": [model.tokenizer.decode([i]) for i in answer], **columns})


def target_logits(
    model: HookedModel, batch: Batch, fwd_hooks: FwdHooks | None = None, *, plain: bool = False
) -> Float[Tensor, "target vocab"]:
    """Logits that predict each scored token of a batch; differentiable.

    Rows of different lengths end at different places. Keeping some positions of every row would unembed rows times places;
    here each pair of row and position is unembedded once, also where it predicts the first token of both responses.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        batch: rows and what is scored in them.
        fwd_hooks: hooks to run with; they see the full ``[batch, pos, d_model]`` residual.
        plain: run a bridge's own Hugging Face modules, and the last block's MLP at the places that are read only.
    """
    width = batch.ids.shape[1]
    places, again = (batch.target_row * width + batch.keep[batch.target_keep]).unique(return_inverse=True)

    def pick(act: Float[Tensor, "batch pos d_model"], hook: Any = None) -> Float[Tensor, "1 place d_model"]:
        here = places.to(act.device)  # of a model on several devices, the last one
        return act[here // width, here % width][None]

    hooks = list(fwd_hooks or [])
    if is_bridge(model):
        inputs = {"attention_mask": batch.attention_mask, "use_cache": False, **batch.inputs}
        way = plain_blocks(model, (places // width, places % width)) if plain else nullcontext()
        with hooked(model, [*hooks, ("unembed.hook_in", pick)]), exact_unembedding(model), way:
            logits = model(batch.ids, **inputs)
    else:
        with hooked(model, hooks):
            resid = model(
                batch.ids,
                attention_mask=batch.attention_mask,
                padding_side=padding_side(batch.attention_mask),
                stop_at_layer=model.cfg.n_layers,
            )
            with full_precision(model):
                logits = model.unembed(final_norm(model, pick(resid)))
    return logits[0][again.to(logits.device)].to(batch.ids.device)
