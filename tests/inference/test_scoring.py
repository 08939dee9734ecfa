"""Log-likelihoods against a plain loop over the Hugging Face model, in any batching and from a cached residual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.inference import restart as scoring
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs, score_batches
from grains_tl.inference.objectives import Objective, token_logprobs, token_weights
from grains_tl.inference.restart import prepare_restart, restart_logprobs
from grains_tl.models.running import forward_logits
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.oracles import edited, pair_logprobs, steered

LOGPROB_ATOL = 1e-4  # float32 round-off of log-probabilities of some nats, summed in another order
LAYERS = [0, 1, 2]
OBJECTIVES = list(get_args(Objective))


def usable(tokenized: Sequence[gr.tokens.TokenizedPair], objective: str) -> list[gr.tokens.TokenizedPair]:
    """objective="single" needs a token that differs."""
    return [t for t in tokenized if objective != "single" or t.chosen[0] != t.rejected[0] or len(t.chosen) > 1]


def plain_scores(hf: Any, tokenized: Sequence[gr.tokens.TokenizedPair], objective: str = "sum") -> Tensor:
    """A plain loop: one sequence at a time, full logits, log_softmax."""
    with torch.no_grad():
        return torch.tensor([[float(x) for x in pair_logprobs(hf, t, objective)] for t in tokenized])


def direction(seed: int = 0) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_equal_a_plain_loop(model: Any, hf: Any, pairs: list[gr.PreferencePair], objective: Objective) -> None:
    tokenized = usable(gr.tokens.tokenize_pairs(model, pairs), objective)
    found = gr.score_pairs(model, tokenized, objective=objective)
    torch.testing.assert_close(found, plain_scores(hf, tokenized, objective), atol=LOGPROB_ATOL, rtol=0)


def test_scores_equal_a_plain_loop_with_learned_positions(pairs: list[gr.PreferencePair]) -> None:
    model, hf = tiny_model("bridge", "gpt2"), tiny_hf("gpt2")
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    torch.testing.assert_close(gr.score_pairs(model, tokenized), plain_scores(hf, tokenized), atol=LOGPROB_ATOL, rtol=0)


def test_objectives_differ(model: Any, pairs: list[gr.PreferencePair]) -> None:
    """A negative control: the three objectives are not the same number on a response of several tokens."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)[1:2]
    values = [float(gr.score_pairs(model, tokenized, objective=o)[0, 0]) for o in OBJECTIVES]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 100 * LOGPROB_ATOL


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_any_batching_gives_the_same(model: Any, pairs: list[gr.PreferencePair], max_tokens: int) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    single = torch.cat([gr.score_pairs(model, [t]) for t in tokenized])
    torch.testing.assert_close(
        gr.score_pairs(model, tokenized, max_tokens=max_tokens), single, atol=LOGPROB_ATOL, rtol=0
    )


# Was a bug: a record with two rows counts as one, so a pass holds up to twice the budget.
def test_token_budget_holds_for_a_forward_pass(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs) * 4
    budget = 100
    with gr.settings(max_tokens=budget):
        batches = list(score_batches(bridge, tokenized))
    assert sorted(i for group, _ in batches for i in group) == list(range(len(tokenized)))
    assert len(batches) > 1
    assert max(batch.ids.numel() for _, batch in batches) <= budget


def test_hooks_may_depend_on_the_batch(model: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    step = direction()

    def steer_prompts(batch: Any) -> Any:
        return gr.hooks.steer_hook(
            1, step, float(step.norm()), operator="add", positions="prompt", prompt_len=batch.prompt_len
        )

    found = gr.score_pairs(model, tokenized, steer_prompts)
    for row, pair in zip(found, tokenized, strict=True):
        inside = torch.arange(64)[:, None] < len(pair.prompt)
        with edited(hf, 1, lambda act, inside=inside: act + step * inside[: act.shape[1]]):  # type: ignore[misc]
            torch.testing.assert_close(row[None], plain_scores(hf, [pair]), atol=LOGPROB_ATOL, rtol=0)


def test_logits_only_where_they_are_asked_for(model: Any, hf: Any) -> None:
    ids = torch.tensor([[4, 5, 8, 12, 18], [6, 8, 13, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    keep = torch.tensor([1, 2])
    with torch.no_grad():
        found = forward_logits(model, ids, mask, keep)
        wanted = torch.stack([hf(ids[:1]).logits[0, 1:3], hf(ids[1:, :3]).logits[0, 1:3]])
    assert found.shape == (2, 2, model.cfg.d_vocab)
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=LOGPROB_ATOL, rtol=0)


def test_unknown_hook_name_is_refused(model: Any, pairs: list[gr.PreferencePair]) -> None:
    hooks: Any = [("blocks.1.hook_resid_pots", lambda act, hook: act)]
    with pytest.raises(KeyError, match="hook_resid_pots.*hook_resid_post"):
        gr.score_pairs(model, gr.tokens.tokenize_pairs(model, pairs), hooks)


# -- objectives -------------------------------------------------------------------------------------------------------


def test_token_logprobs_in_half_precision_are_computed_in_float32() -> None:
    logits = torch.tensor([[20.0, 19.0, -5.0]])
    wanted = logits.double().log_softmax(-1)[0, 1]
    found = token_logprobs(logits.bfloat16(), torch.tensor([1]))
    assert found.dtype == torch.float32
    assert abs(float(found[0]) - float(wanted)) < 1e-5  # bfloat16 would be off by 5e-3


def test_weights() -> None:
    assert token_weights([1, 2, 3], [1, 4], "sum") == ([1, 1, 1], [1, 1])
    assert token_weights([1, 2, 3], [1, 4], "mean") == ([1 / 3] * 3, [0.5, 0.5])
    assert token_weights([1, 2, 3], [1, 4], "single") == ([0, 1, 0], [0, 1])


def test_single_needs_a_token_that_differs() -> None:
    with pytest.raises(ValueError, match="beginning of the other"):
        token_weights([1, 2], [1, 2, 3], "single")


@pytest.mark.usefixtures("unchecked")
def test_unknown_objective(unchecked: None) -> None:
    unknown: Any = "product"
    with pytest.raises(ValueError, match="product"):
        token_weights([1], [2], unknown)


# -- restart ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_restart_equals_a_full_run_and_a_plain_hook(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], layer: int
) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    batch = scoring_batch(model, tokenized)
    step = direction(layer)
    hooks = gr.hooks.steer_hook(layer, step, 3.0)
    restart = prepare_restart(model, batch, LAYERS)
    assert restart.exact
    torch.testing.assert_close(restart.base, plain_scores(hf, tokenized), atol=LOGPROB_ATOL, rtol=0)
    found = restart_logprobs(model, restart, layer, hooks)
    with torch.no_grad():
        torch.testing.assert_close(found, batch_logprobs(model, batch, hooks), atol=LOGPROB_ATOL, rtol=0)
    with edited(hf, layer, lambda act: steered(act, 3.0 * step / step.norm(), renorm=True)):
        torch.testing.assert_close(found, plain_scores(hf, tokenized), atol=LOGPROB_ATOL, rtol=0)
    assert (found - restart.base).abs().max() > 100 * LOGPROB_ATOL  # the steering shows


def test_restart_with_hooks_at_several_layers(model: Any, pairs: list[gr.PreferencePair]) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    hooks = [h for layer in LAYERS for h in gr.hooks.steer_hook(layer, direction(layer), 2.0)]
    restart = prepare_restart(model, batch, LAYERS)
    with torch.no_grad():
        for first in (0, 1):
            wanted = batch_logprobs(model, batch, hooks[first:])
            found = restart_logprobs(model, restart, first, hooks[first:])
            torch.testing.assert_close(found, wanted, atol=LOGPROB_ATOL, rtol=0)


def test_restart_runs_hooks_of_one_layer_in_order(model: Any, pairs: list[gr.PreferencePair]) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    restart = prepare_restart(model, batch, [1])
    add, clamp = (
        gr.hooks.steer_hook(1, direction(), 3.0, operator="add"),
        gr.hooks.steer_hook(1, direction(), 0.0, operator="clamp"),
    )
    with torch.no_grad():
        for hooks in (add + clamp, clamp + add):
            found = restart_logprobs(model, restart, 1, hooks)
            torch.testing.assert_close(found, batch_logprobs(model, batch, hooks), atol=LOGPROB_ATOL, rtol=0)


def test_restart_without_hooks_is_the_base(model: Any, pairs: list[gr.PreferencePair]) -> None:
    restart = prepare_restart(model, scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs)), LAYERS)
    for layer in LAYERS:
        torch.testing.assert_close(restart_logprobs(model, restart, layer, []), restart.base, atol=LOGPROB_ATOL, rtol=0)


def test_a_restart_that_is_not_exact_runs_the_whole_model(model: Any, pairs: list[gr.PreferencePair]) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    restart = prepare_restart(model, batch, LAYERS)
    spoiled = {layer: torch.full_like(resid, math.nan) for layer, resid in restart.resid.items()}
    hooks = gr.hooks.steer_hook(1, direction(), 3.0)
    with torch.no_grad():
        wanted = batch_logprobs(model, batch, hooks)
    found = restart_logprobs(model, replace(restart, resid=spoiled, exact=False), 1, hooks)
    assert torch.equal(found, wanted)
    assert restart_logprobs(model, replace(restart, resid=spoiled), 1, hooks).isnan().all()  # and exact ones restart


def test_a_model_that_cannot_be_continued_is_noticed(
    model: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a soft-cap after the unembedding that a continued run leaves out."""
    true_continue = scoring._continue
    monkeypatch.setattr(scoring, "_continue", lambda *args: true_continue(*args) + 0.1 * direction())
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    restart = prepare_restart(model, batch, [0])
    assert not restart.exact
    with torch.no_grad():
        assert torch.equal(restart_logprobs(model, restart, 0, []), batch_logprobs(model, batch))


def test_restart_leaves_no_hooks(model: Any, pairs: list[gr.PreferencePair]) -> None:
    batch = scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs))
    with torch.no_grad():
        before = batch_logprobs(model, batch)
        restart_logprobs(model, prepare_restart(model, batch, LAYERS), 0, gr.hooks.steer_hook(1, direction(), 3.0))
        assert torch.equal(batch_logprobs(model, batch), before)
    assert not any(block._forward_pre_hooks for block in model.blocks)
