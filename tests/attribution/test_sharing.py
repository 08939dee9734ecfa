"""Rows that share a prompt's beginning, against one run at a time; visibility against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution import job, removal, sharing
from grains_tl.attribution.field import ModelField, Run
from grains_tl.attribution.removal import Removal, values_without
from grains_tl.attribution.sharing import branch, row_length, rows_of, shared_batches
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.models.operations import count_operations
from grains_tl.models.prompt_cache import PromptCache, empty_cache
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.architectures import CONFIGS, architecture

VALUE_ATOL = 1e-4  # differences of float32 log-probabilities of some nats
LONG = gr.PreferencePair(
    "Question: What do camels store in their humps?\nAnswer:", " It is mostly fat.", " It is water."
)


def removals_of(tokenized: list[gr.tokens.TokenizedPair]) -> list[Removal]:
    """Nothing, every token by itself, and a few together."""
    found: list[Removal] = []
    for r, pair in enumerate(tokenized):
        n = len(pair.prompt)
        found += [(r, ()), *((r, (p,)) for p in range(n)), (r, (0, n - 1)), (r, (1, 2)), (r, tuple(range(n)))]
    return found


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """``values_without`` without shared rows."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(removal, "can_share", lambda *_: False)
            return values_without(*args, **kwargs)

    return run


def one_at_a_time(
    hf: Any, tokenized: list[gr.tokens.TokenizedPair], removals: list[Removal], stand_in: Tensor
) -> Tensor:
    """A plain loop over the Hugging Face model: embeddings replaced, full logits, one response at a time."""
    embed, values = hf.get_input_embeddings(), []
    with torch.no_grad():
        for record, gone in removals:
            pair, margin = tokenized[record], 0.0
            for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
                x = embed(torch.tensor(pair.prompt + response))
                x[list(gone)] = stand_in
                logprobs = hf(inputs_embeds=x[None]).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
                margin += sign * float(logprobs.gather(-1, torch.tensor(response)[:, None]).sum())
            values.append(margin)
    return torch.tensor(values)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("max_tokens", [1, 60, 512])
def test_shared_rows_equal_a_plain_loop(name: str, max_tokens: int, pairs: list[gr.PreferencePair]) -> None:
    model, hf = tiny_model("bridge", name), tiny_hf(name)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    removals = removals_of(tokenized)
    wanted = one_at_a_time(hf, tokenized, removals, hf.get_input_embeddings().weight.mean(0))
    with count_operations(model) as counts, gr.settings(max_tokens=max_tokens):
        found = values_without(model, tokenized, removals)
    torch.testing.assert_close(found, wanted, atol=VALUE_ATOL, rtol=0)
    tokens = sum(sum(map(len, tokenized[r].inputs)) for r, _ in removals)
    if max_tokens > 1:  # and they were shared; one token at a time nothing is, and the plain runs answer
        assert counts.forward < 0.9 * tokens * model.cfg.n_layers


@pytest.mark.parametrize("masker", ["eos", "zero", "attention"])
@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_values_do_not_depend_on_sharing(
    model: Any, plain: Any, pairs: list[gr.PreferencePair], masker: Any, objective: Any
) -> None:
    """Both model classes; knocked-out attention is never shared."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    args, how = (model, tokenized, removals_of(tokenized)), {"mask": masker, "objective": objective}
    torch.testing.assert_close(values_without(*args, **how), plain(*args, **how), atol=VALUE_ATOL, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, plain: Any, pairs: list[gr.PreferencePair]) -> None:
    """Also where windows slide (16 tokens: the longest record is longer): the check then chooses the plain run."""
    model = architecture(family)
    long = gr.PreferencePair(prompt=" ".join([str(pairs[0].prompt)] * 2), chosen=" great", rejected=" awful and cold")
    tokenized = gr.tokens.tokenize_pairs(model, [*pairs, long])
    removals = removals_of(tokenized)
    wanted = plain(model, tokenized, removals)
    torch.testing.assert_close(values_without(model, tokenized, removals), wanted, atol=VALUE_ATOL, rtol=0)


def test_a_wrong_mask_is_noticed(plain: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token sees all earlier ones of its row: the values would be wrong, so plain runs give them."""
    model = tiny_model("bridge")
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    removals = removals_of(tokenized)
    wanted = plain(model, tokenized, removals)
    monkeypatch.setattr(sharing, "_sees", lambda pos, *_: pos[:, None, :] <= pos[:, :, None])
    assert not sharing.shares_prompts(model, tokenized, "sum")
    with torch.no_grad():
        rows = rows_of(tokenized, [sharing.Branch(i, r, tuple(gone), 0) for i, (r, gone) in enumerate(removals)])
        raw = torch.zeros(len(removals))
        with gr.settings(max_tokens=512):
            for part, batch, _ in shared_batches(model, tokenized, rows, "sum"):
                raw[part] = batch_logprobs(model, batch).diff(dim=-1)[:, 0]
    assert (raw + wanted).abs().max() > 100 * VALUE_ATOL  # a negative control
    torch.testing.assert_close(values_without(model, tokenized, removals), wanted, atol=VALUE_ATOL, rtol=0)


def test_what_is_not_shared(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    assert sharing.can_share(model, tokenized) == hasattr(model, "original_model")
    assert not sharing.shares_prompts(model, [t for t in tokenized if len(t.inputs) == 1], "sum")


def test_rows_hold_every_branch_once(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    branches = [branch(i, r, tokenized[r], gone) for i, (r, gone) in enumerate(removals_of(tokenized))]
    rows = rows_of(tokenized, branches)
    assert sorted(one.run for row in rows for one in row) == list(range(len(branches)))
    assert all(len({one.record for one in row}) == 1 for row in rows)
    lengths = [row_length(tokenized, row) for row in rows]
    longest = max(row_length(tokenized, [one]) for one in branches)
    assert max(lengths) <= 1.25 * longest + 1
    assert len(rows) * max(lengths) < 1.25 * sum(lengths)  # of 12 to 20 branches each, little is padding


def test_visibility_by_hand(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Follow the tokens that each token sees: they spell the run's own input up to it, and nothing else."""
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    branches = [branch(i, r, tokenized[r], gone) for i, (r, gone) in enumerate(removals_of(tokenized))]
    rows = rows_of(tokenized, branches)
    with gr.settings(max_tokens=512), torch.no_grad():
        whole = scoring_batch(bridge, tokenized)
        _, prompts = removal._run_prompts(bridge, whole, range(len(tokenized)))
        for part, batch, hidden in shared_batches(bridge, tokenized, rows, "sum", prompts=prompts):
            sees = batch.inputs["attention_mask"][:, 0] == 0
            before = sees.shape[-1] - batch.ids.shape[1]
            for row, keep, slot in zip(batch.target_row, batch.target_keep, batch.target_slot, strict=True):
                run = branches[part[int(slot) // 2]]
                earlier, own = sees[row, int(batch.keep[keep])].split([before, batch.ids.shape[1]])
                places = own.nonzero()[:, 0]
                position = batch.inputs["position_ids"][row, places]
                places, position = places[position.argsort()], position.sort().values
                kept = earlier.nonzero()[:, 0].tolist()  # the cache holds the prompt in order
                assert kept + position.tolist() == list(range(len(kept) + len(places)))
                seen = (*tokenized[run.record].prompt[: len(kept)], *batch.ids[row, places].tolist())
                assert seen in [ids[: len(seen)] for ids in tokenized[run.record].inputs]
                assert [int(position[i]) for i in hidden[row, places].nonzero()[:, 0]] == sorted(set(run.gone))


def test_own_mistakes_are_not_taken_for_a_refusal(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape error of our own is raised; one out of the model's code means that plain runs answer."""
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    removals = removals_of(tokenized)
    wanted = values_without(bridge, tokenized, removals)

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("past_key_values") is not None:
            raise_from("somebody.elses.model")

    layer = bridge.original_model.model
    handle = layer.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        torch.testing.assert_close(values_without(bridge, tokenized, removals), wanted, atol=VALUE_ATOL, rtol=0)
    finally:
        handle.remove()
    monkeypatch.setattr(removal, "mask_hook", lambda *_, **__: raise_from("grains_tl.hooks.mask"))
    with pytest.raises(TypeError, match=r"made in grains_tl\.hooks\.mask"):
        values_without(bridge, tokenized, removals)


def raise_from(module: str) -> None:
    """A TypeError whose last frame belongs to a module of that name."""
    exec(f"raise TypeError('made in {module}')", {"__name__": module})


@pytest.mark.parametrize("lose", ["a token", "a layer", "the keys"])
def test_a_cache_without_the_whole_prompt_is_not_used(bridge: Any, pairs: list[gr.PreferencePair], lose: str) -> None:
    batch = scoring_batch(bridge, gr.tokens.tokenize_pairs(bridge, pairs))
    filled = empty_cache()
    with torch.no_grad():
        bridge(batch.ids, attention_mask=batch.attention_mask, past_key_values=filled, use_cache=True)
    shape = (*batch.ids.shape, int(bridge.cfg.n_layers))
    assert PromptCache.of(filled, {0: 0}, *shape) is not None
    if lose == "a token":
        filled.layers[1].keys = filled.layers[1].keys[:, :, 1:]
    elif lose == "a layer":
        filled.layers.pop()
    else:
        filled.layers[0].keys = None
    assert PromptCache.of(filled, {0: 0}, *shape) is None


def test_rows_of_a_cache_are_those_of_transformers_and_keep_nothing() -> None:
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(3, 2, 7, 4, generator=generator), torch.randn(3, 2, 7, 5, generator=generator))] * 2
    found = PromptCache(tuple(prompts), {10: 0, 11: 1, 12: 2}).rows([12, 10, 12, 11], 4)
    wanted = DynamicCache()
    for layer, (keys, values) in enumerate(prompts):
        wanted.update(keys[[2, 0, 2, 1], :, :4], values[[2, 0, 2, 1], :, :4], layer)
    new = torch.randn(4, 2, 3, 4, generator=generator), torch.randn(4, 2, 3, 5, generator=generator)
    for layer, (keys, values) in enumerate(prompts):
        assert found.get_seq_length(layer) == wanted.get_seq_length(layer) == 4
        for ours, theirs in zip(found.update(*new, layer), wanted.update(*new, layer), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        held = found.layers[layer]
        assert held.keys.data_ptr() == keys.data_ptr() and held.values.data_ptr() == values.data_ptr()
        assert held.keys.shape[-2] == 4


@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_gradients_do_not_depend_on_sharing(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    """Integrated gradients with both responses after one prompt, against two rows."""
    tokenized = gr.tokens.tokenize_pairs(bridge, [p for p in pairs if len(str(p.chosen).split()) > 1])
    how: dict[str, Any] = {"method": "integrated_gradients", "n_steps": 4, "objective": objective}
    with count_operations(bridge) as few:
        found = gr.attribution.attribute_all(bridge, tokenized, **how)
    monkeypatch.setattr(job, "shares_prompts", lambda *_: False)
    with count_operations(bridge) as many:
        wanted = gr.attribution.attribute_all(bridge, tokenized, **how)
    assert few.backward < 0.8 * many.backward
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=VALUE_ATOL, rtol=1e-3)
        assert a.gap is not None and b.gap is not None and abs(a.gap - b.gap) < 10 * VALUE_ATOL


def test_a_pass_with_a_graph_takes_a_part_of_the_budget(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs) * 4
    sizes: list[int] = []
    for gradient in (False, True):
        field = ModelField(bridge, tokenized)
        runs = [Run(i, None) for i in range(len(tokenized))]

        def size(act: Tensor, hook: Any, sizes: list[int] = sizes) -> None:
            sizes.append(act.shape[0] * act.shape[1])

        with gr.settings(max_tokens=100), bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", size)]):
            assert len(list(field.sample(runs, gradient=gradient))) == len(runs)
        assert 0 < max(sizes) <= (37 if gradient else 100)
        sizes.clear()


@pytest.mark.real
def test_real_model(smollm2: Any, plain: Any) -> None:
    """Leave-one-out on both model classes: shared or not, the same scores."""
    model = smollm2.bridge
    tokenized = gr.tokens.tokenize_pairs(model, [*gr.load_bundled("sentiment", "build")[:3], LONG])
    removals: list[Removal] = [(r, ()) for r in range(len(tokenized))]
    removals += [(r, (p,)) for r, pair in enumerate(tokenized) for p in range(len(pair.prompt))]
    with count_operations(model) as few:
        found = values_without(model, tokenized, removals)
    with count_operations(model) as many:
        wanted = plain(model, tokenized, removals)
    torch.testing.assert_close(found, wanted, atol=VALUE_ATOL, rtol=0)
    assert few.forward < 0.65 * many.forward
    if smollm2.hooked is not None:
        other = values_without(smollm2.hooked, tokenized, removals)
        torch.testing.assert_close(other, wanted, atol=10 * VALUE_ATOL, rtol=0)  # another class: 4e-5 in logits
