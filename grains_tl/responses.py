"""A response token by token, before and after steering."""

from __future__ import annotations

import pandas as pd
import torch

from grains_tl.batches import batch_of
from grains_tl.models import forward_logits
from grains_tl.objectives import token_logprobs
from grains_tl.scoring import HooksForBatch, hooks_for
from grains_tl.tokens import tokenize_responses
from grains_tl.types import HookedModel, Text


def response_logprobs(
    model: HookedModel, prompt: Text, response: str, fwd_hooks: HooksForBatch | None = None
) -> pd.DataFrame:
    """log p of every token of a response, without hooks and with them; ``plot_token_logprobs`` draws it.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        prompt, response: as in a ``PreferencePair``.
        fwd_hooks: hooks to run with, or a function ``Batch -> hooks``.

    Returns:
        One row per token: ``token`` (text), ``before`` and ``after`` (nats). The sums are what ``score_pairs`` gives.

    Raises:
        ValueError: an empty response, or one that is too long for the context.

    Example:
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
