"""Unembedding picked places against unembedding every position of every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.hooks.mask import mask_hook
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import target_logits
from grains_tl.models.running import forward_logits
from tests.conftest import tiny_model

ATOL = 1e-5  # the same products in another order; logits of a few units


def every_position(model: Any, batch: Any, hooks: Any = None) -> Tensor:
    everywhere = torch.arange(batch.ids.shape[1])
    logits = forward_logits(model, batch.ids, batch.attention_mask, everywhere, hooks)
    return logits[batch.target_row, batch.keep[batch.target_keep]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_equal_to_every_position(model: Any, pairs: list[gr.PreferencePair], padding_side: str) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs), padding_side=padding_side)
    hidden = torch.zeros_like(batch.ids, dtype=torch.bool)
    hidden[:, 6] = True
    for hooks in ([], mask_hook(model, hidden, "zero")):
        torch.testing.assert_close(
            target_logits(model, batch, hooks), every_position(model, batch, hooks), atol=ATOL, rtol=0
        )


def test_equal_with_learned_positions(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model("bridge", "gpt2")
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    torch.testing.assert_close(target_logits(model, batch), every_position(model, batch), atol=ATOL, rtol=0)


def test_gradients_are_equal(model: Any, pairs: list[gr.PreferencePair]) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    grads = []
    for logits in (target_logits, every_position):
        probe = torch.zeros(*batch.ids.shape, 32, requires_grad=True)
        found = logits(model, batch, [("hook_embed", lambda act, hook, probe=probe: act + probe)])
        grads.append(torch.autograd.grad(found.log_softmax(-1)[:, 5].sum(), probe)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)
    assert grads[0].abs().max() > 0.1


def test_no_position_is_unembedded_twice(model: Any, pairs: list[gr.PreferencePair]) -> None:
    """Single-token responses: both are predicted at one place; others take one place per token."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    batch = scoring_batch(model, tokenized)
    seen: list[int] = []
    handle = model.unembed.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    try:
        found = target_logits(model, batch)
    finally:
        handle.remove()
    assert len(found) == sum(len(t.chosen) + len(t.rejected) for t in tokenized)
    assert seen == [sum(len(t.chosen) + len(t.rejected) - (len(t.inputs) == 1) for t in tokenized)]


@pytest.mark.parametrize("method", ["leave_one_out", "integrated_gradients"])
def test_half_precision_accumulates_in_float32(pairs: list[gr.PreferencePair], method: Any) -> None:
    whole, half = tiny_model(), tiny_model().to(torch.bfloat16)
    a, b = (gr.attribute(m, pairs[0], method=method, n_steps=8) for m in (whole, half))
    assert b.scores.dtype == torch.float32
    cosine = torch.cosine_similarity(a.scores, b.scores, dim=0)
    assert cosine > 0.99  # bfloat16 keeps three digits
