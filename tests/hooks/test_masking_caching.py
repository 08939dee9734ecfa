"""Choosing tokens, taking them out of the input, and reading the residual stream, against a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution.selection import random_selection
from grains_tl.hooks.mask import replacement_embedding
from grains_tl.vectors.readout import Readout
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.oracles import embeddings, first_tensor, residuals

LOGIT_ATOL = 1e-4  # float32 round-off of logits of size 10
RESID_ATOL = 2e-5  # float32 round-off of residuals of size 5
EOS = 2
LAYERS = [0, 1, 2]
PLAIN_MASKERS = ["eos", "pad", "zero", "mean_embedding"]
READOUTS = [name for name in get_args(Readout) if name != "attributed"]  # which test_attributed covers
SELECTIONS = [
    gr.attribution.Selection((4, 1), (8,)),
    gr.attribution.Selection((3,), (1, 2)),
    gr.attribution.Selection((), (2, 3)),
    gr.attribution.Selection((5, 2), ()),
]


def attribution(scores: Sequence[float], content: Sequence[bool] | None = None) -> gr.Attribution:
    n = len(scores)
    return gr.Attribution(
        scores=torch.tensor(scores),
        tokens=["x"] * n,
        content=torch.tensor([True] * n if content is None else content),
        is_image=torch.zeros(n, dtype=torch.bool),
        gap=None,
        objective=0.0,
        baseline_objective=None,
        method="leave_one_out",
    )


def stand_in(hf: Any, masker: str) -> Tensor:
    table = hf.get_input_embeddings().weight
    return {"eos": table[EOS], "pad": table[0], "zero": torch.zeros(32), "mean_embedding": table.mean(0)}[masker]


def masked_embeds(hf: Any, ids: Sequence[int], positions: Sequence[int], masker: str) -> Tensor:
    x = embeddings(hf, ids).clone()
    x[0, list(positions)] = stand_in(hf, masker)
    return x


def knocked_out(length: int, positions: Sequence[int]) -> Tensor:
    """A 4-D additive mask: causal, and nobody but the token itself attends to the positions."""
    hidden = torch.ones(length, length).triu(1).bool()
    hidden[:, list(positions)] = True
    hidden.fill_diagonal_(False)
    hidden |= torch.ones(length, length).triu(1).bool()
    return torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)


# -- selection --------------------------------------------------------------------------------------------------------


def test_largest_of_each_sign_strongest_first() -> None:
    found = gr.attribution.select_tokens(attribution([0.5, -1.0, 2.0, 0.0, -3.0, 1.0]), top_k=2)
    assert found == gr.attribution.Selection(toward_chosen=(2, 5), toward_rejected=(4, 1))


def test_fewer_where_there_are_fewer() -> None:
    assert gr.attribution.select_tokens(attribution([0.5, 0.0, 2.0]), top_k=5) == gr.attribution.Selection((2, 0), ())
    assert gr.attribution.select_tokens(attribution([0.0, float("nan")]), top_k=5) == gr.attribution.Selection((), ())


def test_only_content_is_selected() -> None:
    found = gr.attribution.select_tokens(attribution([9.0, 1.0, -9.0, -1.0], [False, True, False, True]), top_k=2)
    assert found == gr.attribution.Selection((1,), (3,))


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_must_be_positive(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k}"):
        gr.attribution.select_tokens(attribution([1.0]), top_k=top_k)


@settings(deadline=None, max_examples=50)
@given(scores=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12), top_k=st.integers(1, 12))
def test_selection_as_sorting(scores: list[float], top_k: int) -> None:
    found = gr.attribution.select_tokens(attribution(scores), top_k)
    up, down = [scores[i] for i in found.toward_chosen], [scores[i] for i in found.toward_rejected]
    assert up == sorted((s for s in scores if s > 0), reverse=True)[:top_k]
    assert down == sorted(s for s in scores if s < 0)[:top_k]
    assert len({*found.toward_chosen, *found.toward_rejected}) == len(up) + len(down)


def test_random_selection() -> None:
    content = [True, False, True, True, False, True, True]
    like = gr.attribution.Selection((0, 2), (3,))
    before = torch.random.get_rng_state()
    draws = [random_selection(content, like, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draws[3] == random_selection(content, like, torch.Generator().manual_seed(3))
    for draw in draws:
        assert (len(draw.toward_chosen), len(draw.toward_rejected)) == (2, 1)
        assert len({*draw.toward_chosen, *draw.toward_rejected}) == 3
    drawn = {i for draw in draws for i in (*draw.toward_chosen, *draw.toward_rejected)}
    assert drawn == {0, 2, 3, 5, 6}  # every content token comes up, nothing else does


def test_random_selection_overlaps_only_if_it_must() -> None:
    draw = random_selection(
        [True, True, True], gr.attribution.Selection((0, 1), (1, 2)), torch.Generator().manual_seed(0)
    )
    assert len(set(draw.toward_chosen)) == 2 and len(set(draw.toward_rejected)) == 2
    assert {*draw.toward_chosen, *draw.toward_rejected} == {0, 1, 2}


# -- maskers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masker", PLAIN_MASKERS)
def test_replaced_tokens_equal_edited_embeddings(model: Any, hf: Any, masker: Any) -> None:
    ids = [5, 8, 12, 18, 13]
    hooks = gr.hooks.mask_hook(model, torch.tensor([[False, True, False, True, False]]), masker)
    found = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
    wanted = hf(inputs_embeds=masked_embeds(hf, ids, [1, 3], masker)).logits
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=LOGIT_ATOL, rtol=0)
    assert (found - model(torch.tensor([ids]))).abs().max() > 100 * LOGIT_ATOL


def test_eos_mask_equals_a_prompt_with_eos(model: Any, hf: Any) -> None:
    hooks = gr.hooks.mask_hook(model, torch.tensor([[False, True, False]]), "eos")
    found = model.run_with_hooks(torch.tensor([[5, 8, 12]]), fwd_hooks=hooks)
    wanted = hf(torch.tensor([[5, EOS, 12]])).logits
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=LOGIT_ATOL, rtol=0)


@pytest.mark.parametrize("masker", PLAIN_MASKERS)
def test_position_embeddings_stay(masker: Any) -> None:
    model, hf, ids = tiny_model("bridge", "gpt2"), tiny_hf("gpt2"), [5, 8, 12]
    hooks = gr.hooks.mask_hook(model, torch.tensor([[False, True, False]]), masker)
    found = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
    wanted = hf(inputs_embeds=masked_embeds(hf, ids, [1], masker)).logits
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=LOGIT_ATOL, rtol=0)


def attention_case(model: Any, hf: Any) -> None:
    ids, positions = [5, 8, 12, 18, 13], [0, 2]
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    hidden[0, positions] = True
    found = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=gr.hooks.mask_hook(model, hidden, "attention"))
    wanted = hf(torch.tensor([ids]), attention_mask=knocked_out(5, positions)).logits
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=LOGIT_ATOL, rtol=0)
    assert (found - model(torch.tensor([ids]))).abs().max() > 100 * LOGIT_ATOL


def test_attention_knock_out(model: Any, hf: Any) -> None:
    attention_case(model, hf)


def test_attention_knock_out_with_learned_positions() -> None:
    attention_case(tiny_model("bridge", "gpt2"), tiny_hf("gpt2"))


@pytest.mark.parametrize("masker", ["attention", "zero"])
def test_leave_one_out_with_any_masker_in_padded_batches(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], masker: Any
) -> None:
    """Attention masks and padding together; the first record has single-token responses, so one row is enough."""
    tokenized = gr.tokens.tokenize_pairs(model, [pairs[0], gr.PreferencePair("film was very", " good", " bad")])
    found = gr.attribution.attribute_all(model, tokenized, method="leave_one_out", mask=masker)
    for a, pair in zip(found, tokenized, strict=True):
        ids, n = torch.tensor([pair.prompt]), len(pair.prompt)
        for position in range(n):
            if masker == "zero":
                logits = hf(inputs_embeds=masked_embeds(hf, pair.prompt, [position], masker)).logits
            else:
                logits = hf(ids, attention_mask=knocked_out(n, [position])).logits
            without = logits[0, -1, pair.chosen[0]] - logits[0, -1, pair.rejected[0]]
            assert float(a.scores[position]) == pytest.approx(a.objective - float(without), abs=LOGIT_ATOL)


def test_mask_leaves_its_input_alone(bridge: Any) -> None:
    act = torch.randn(1, 3, 32)
    copy = act.clone()
    (_, fn), *_ = gr.hooks.mask_hook(bridge, torch.tensor([[True, False, True]]), "zero")
    new = fn(act, hook=None)
    assert torch.equal(act, copy)
    assert torch.equal(new[:, 1], act[:, 1]) and not new[:, [0, 2]].any()


def test_mean_embedding(model: Any, hf: Any) -> None:
    wanted = hf.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(replacement_embedding(model, "mean_embedding"), wanted, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_bad_maskers(bridge: Any) -> None:
    mask = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="noise"):
        gr.hooks.mask_hook(bridge, mask, "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mask token"):
        gr.hooks.mask_hook(bridge, mask, "mask")
    for masker in ("zero", "attention"):
        with pytest.raises(ValueError, match=r"\(1, 2\) does not fit"):
            bridge.run_with_hooks(torch.tensor([[5, 8, 12]]), fwd_hooks=gr.hooks.mask_hook(bridge, mask, masker))  # type: ignore[arg-type]


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_residuals_are_the_hidden_states(architecture: str) -> None:
    model, hf = tiny_model("bridge", architecture), tiny_hf(architecture)
    hidden_case(model, hf)


def test_residuals_are_the_hidden_states_for_every_class(model: Any, hf: Any) -> None:
    hidden_case(model, hf)


def hidden_case(model: Any, hf: Any) -> None:
    pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("film was very", " good", " bad")])
    states = hf(torch.tensor([pair[0].prompt]), output_hidden_states=True).hidden_states
    found = gr.vectors.read_out(model, pair, layers=LAYERS)[0]
    for layer in LAYERS[:-1]:
        torch.testing.assert_close(found[layer], states[layer + 1][0, -1], atol=RESID_ATOL, rtol=0)
    norm = hf.model.norm if hasattr(hf, "model") else hf.transformer.ln_f  # the last hidden state is after it
    torch.testing.assert_close(norm(found[-1]), states[-1][0, -1], atol=RESID_ATOL, rtol=0)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_readouts(model: Any, hf: Any, pairs: list[gr.PreferencePair], readout: Readout, max_tokens: int) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    with gr.settings(max_tokens=max_tokens):
        found = gr.vectors.read_out(model, tokenized, layers=LAYERS, readout=readout)
    for row, pair in zip(found, tokenized, strict=True):
        n = len(pair.prompt)
        both = [residuals(hf, pair.prompt + response) for response in (pair.chosen, pair.rejected)]
        wanted = {
            "prompt_end": both[0][:, n - 1],
            "response_end": (both[0][:, -1] + both[1][:, -1]) / 2,
            "response_mean": (both[0][:, n:].mean(1) + both[1][:, n:].mean(1)) / 2,
        }[readout]
        torch.testing.assert_close(row, wanted, atol=RESID_ATOL, rtol=0)


@pytest.mark.parametrize("masker", [*PLAIN_MASKERS, "attention"])
def test_readout_of_masked_prompts(model: Any, hf: Any, pairs: list[gr.PreferencePair], masker: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    masked = [[1, 4], [3], [], [0, 2, 5]]
    found = gr.vectors.read_out(model, tokenized, masked, layers=[0, 2], mask=masker)
    for row, pair, positions in zip(found, tokenized, masked, strict=True):
        if masker == "attention":
            wanted = knocked_out_residuals(hf, pair.prompt, positions)
        else:
            wanted = residuals(hf, pair.prompt, masked_embeds(hf, pair.prompt, positions, masker))
        torch.testing.assert_close(row, wanted[[0, 2], -1], atol=RESID_ATOL, rtol=0)


def knocked_out_residuals(hf: Any, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(first_tensor(output)[0]))
        for layer in hf.model.layers
    ]
    hf(torch.tensor([list(ids)]), attention_mask=knocked_out(len(ids), positions))
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_layers_come_in_the_order_given_and_upper_blocks_do_not_run(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    everything = gr.vectors.read_out(model, tokenized, layers=LAYERS)
    ran: list[int] = []
    handle = model.blocks[2].mlp.register_forward_pre_hook(lambda module, args: ran.append(1))
    try:
        assert torch.equal(gr.vectors.read_out(model, tokenized, layers=[1, 0, 1]), everything[:, [1, 0, 1]])
    finally:
        handle.remove()
    assert not ran


def test_cache_hook_by_itself(model: Any, hf: Any) -> None:
    ids = [5, 8, 12, 18]
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    store = torch.zeros(1, 2, 32)
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([ids]), fwd_hooks=gr.hooks.cache_hook([0, 2], weights, store))
    torch.testing.assert_close(store[0], residuals(hf, ids)[[0, 2], 1:3].mean(1), atol=RESID_ATOL, rtol=0)


@pytest.mark.parametrize("readout", READOUTS)
def test_differences_by_hand(model: Any, hf: Any, pairs: list[gr.PreferencePair], readout: Readout) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    found = gr.vectors.collect_differences(model, tokenized, SELECTIONS, layers=[0, 2], readout=readout, mask="eos")
    assert found.layers == (0, 2)

    def read(pair: gr.tokens.TokenizedPair, positions: Sequence[int]) -> Tensor:
        prompt = [EOS if i in positions else token for i, token in enumerate(pair.prompt)]
        if readout == "prompt_end":
            return residuals(hf, prompt)[[0, 2], -1]
        both = [residuals(hf, prompt + list(r))[[0, 2], len(prompt) :] for r in (pair.chosen, pair.rejected)]
        ends = [r[:, -1] if readout == "response_end" else r.mean(1) for r in both]
        return (ends[0] + ends[1]) / 2

    for i, (pair, selection) in enumerate(zip(tokenized, SELECTIONS, strict=True)):
        whole = read(pair, [])
        up, down = whole - read(pair, selection.toward_chosen), whole - read(pair, selection.toward_rejected)
        torch.testing.assert_close(found.toward_chosen[i], up, atol=2 * RESID_ATOL, rtol=0)
        torch.testing.assert_close(found.toward_rejected[i], down, atol=2 * RESID_ATOL, rtol=0)
    assert not found.toward_chosen[2].any() and not found.toward_rejected[3].any()  # nothing masked, exactly zero


@pytest.mark.parametrize("readout", READOUTS)
def test_residual_norms_by_hand(model: Any, hf: Any, pairs: list[gr.PreferencePair], readout: Readout) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    found = gr.vectors.collect_differences(model, tokenized, SELECTIONS, layers=[1, 2], readout=readout)
    copies = 1 if readout == "prompt_end" else 2
    norms = torch.cat([residuals(hf, t.prompt)[[1, 2]][:, list(t.content)].norm(dim=-1) for t in tokenized * copies], 1)
    torch.testing.assert_close(found.resid_norms, norms.median(dim=1).values, atol=RESID_ATOL, rtol=0)


def test_bootstrap_subset(model: Any, pairs: list[gr.PreferencePair]) -> None:
    found = gr.vectors.collect_differences(model, gr.tokens.tokenize_pairs(model, pairs), SELECTIONS)
    some = found.subset([2, 0, 0])
    assert torch.equal(some.toward_chosen, found.toward_chosen[[2, 0, 0]])
    assert torch.equal(some.toward_rejected, found.toward_rejected[[2, 0, 0]])
    assert found.layers == (0, 1, 2)


@pytest.mark.usefixtures("unchecked")
def test_bad_layers_and_readouts(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    for layers, message in (([3], "layers 0 to 2"), ([-1], r"\[-1\] do not exist"), ([], "no layers")):
        with pytest.raises(ValueError, match=message):
            gr.vectors.read_out(bridge, tokenized, layers=layers)
    with pytest.raises(ValueError, match="middle"):
        gr.vectors.read_out(bridge, tokenized, layers=[0], readout="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 2\) do not fit"):
        bridge.run_with_hooks(
            torch.tensor([[5, 8, 12]]), fwd_hooks=gr.hooks.cache_hook([0], torch.ones(1, 2), torch.zeros(1, 1, 32))
        )
