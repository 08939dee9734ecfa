"""Patching: a planted circuit is found, plain PyTorch hooks and ``transformer_lens.patching`` give the same numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import grains_tl as gr
from grains_tl.analysis.runs import restart_layer
from tests.conftest import KINDS
from tests.helpers.oracles import steered
from tests.helpers.planted import COPY, HEAD, LAYER, MOOD, axis, planted_model, planted_pairs

ATOL = 2e-4  # nats; float32 round-off of log-likelihoods of size 10 through two implementations
COMPONENTS: list[Any] = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]


@pytest.fixture(scope="module", params=KINDS)
def planted(request: pytest.FixtureRequest) -> Any:
    return planted_model(request.param)


@pytest.fixture(scope="module")
def vector() -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return gr.SteeringVectors.from_raw(raw, [0, 1, 2], torch.full((3,), 6.0))


def margin(model: Any, tokenized: Any, hooks: Any = None) -> Tensor:
    scores = gr.score_pairs(model, tokenized, hooks)
    return scores[:, 0] - scores[:, 1]


# -- the planted circuit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["base", "steered"])
@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_the_planted_head_is_named(planted: Any, into: Any, method: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(planted, planted_pairs()[:12])
    steering = axis(MOOD, [0]).hooks(0.3)
    options: Any = {"into": into, "method": method}
    heads = gr.analysis.patch(planted, tokenized, steering, component="z", by="head", **options)
    first = heads.nlargest(1, "effect").iloc[0]
    assert (first.layer, first["head"]) == (LAYER, HEAD)
    layers = gr.analysis.patch(planted, tokenized, steering, component="attn_out", **options).set_index("layer").share
    assert layers.idxmax() == LAYER and layers.drop(LAYER).abs().max() < 0.1
    assert heads.share.abs().nlargest(2).iloc[1] < 0.1
    if (method, into) != (
        "gradient",
        "steered",
    ):  # there the final norm is saturated: the gradient sees who, not how much
        assert first.share > 0.8 and layers[LAYER] > 0.8
    assert gr.analysis.patch(planted, tokenized, steering, **options).share.abs().max() < 0.1  # no MLP


def test_the_planted_head_works_at_the_last_position_alone(planted: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(planted, planted_pairs()[:12])
    steering = axis(MOOD, [0]).hooks(0.3)
    found = gr.analysis.patch(planted, tokenized, steering, component="z", by="pos", layers=[LAYER])
    shares = found.set_index("pos").share
    assert shares[0] > 0.8 and shares.drop(0).abs().max() < 0.1
    lengths = [len(t.prompt) for t in tokenized]
    assert found.n.tolist() == [sum(length > -pos for length in lengths) for pos in found.pos]


def test_taking_the_found_vector_out_removes_the_effect(planted: Any) -> None:
    pairs = planted_pairs()
    tokenized = gr.tokens.tokenize_pairs(planted, pairs)
    found = gr.build_vectors(planted, pairs, top_k=1, layers=[1, 2], progress=False)
    assert found.cosine(axis(COPY, [1, 2])).min() > 0.97  # what the head writes, from preferences alone
    steering = axis(MOOD, [0]).hooks(0.3)
    effect = (margin(planted, tokenized, steering) - margin(planted, tokenized)).mean()
    assert effect > 1
    ablation = gr.analysis.ablate_hooks(found, [1, 2])
    left = margin(planted, tokenized, steering + ablation) - margin(planted, tokenized, ablation)
    assert left.mean().abs() < 0.1 * effect
    true_axis = gr.analysis.ablate_hooks(axis(COPY, [1]))
    assert margin(planted, tokenized, steering + true_axis).abs().max() < ATOL
    for draw in gr.baselines.random_direction_vectors(found.at([1]), n_draws=3):
        others = gr.analysis.ablate_hooks(draw)
        left = margin(planted, tokenized, steering + others) - margin(planted, tokenized, others)
        assert left.mean() > 0.7 * effect


# -- oracles ----------------------------------------------------------------------------------------------------------


def plain_logprob(hf: Any, prompt: Any, response: Any, hooks: Any) -> Tensor:
    """Log-likelihood of one response with plain PyTorch hooks ``(module, kind, fn)``."""
    handles = []
    for module, kind, fn in hooks:
        if kind == "pre":
            handles.append(module.register_forward_pre_hook(lambda m, args, fn=fn: (fn(args[0]), *args[1:])))
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, fn=fn: (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)
                )
            )
    try:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = hf(ids).logits
    finally:
        for handle in handles:
            handle.remove()
    each = log_softmax(logits[0, len(prompt) - 1 : -1].float(), -1)
    return each.gather(-1, torch.tensor(list(response))[:, None]).sum()


@pytest.mark.parametrize("into", ["base", "steered"])
@pytest.mark.parametrize("what", ["head", "mlp_out", "attn_out"])
def test_plain_hooks_give_the_same_effects(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors, into: Any, what: str
) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    layer, head, d_head = 2, 1, 8
    block = hf.model.layers[layer]
    module, kind = {
        "head": (block.self_attn.o_proj, "pre"),
        "mlp_out": (block.mlp, "out"),
        "attn_out": (block.self_attn, "out"),
    }[what]
    step = 0.5 * 6.0 * vector.directions[0]
    steer = [(hf.model.layers[0], "out", lambda act: steered(act, step, renorm=True))]
    wanted = []
    for t in tokenized:
        sides = []
        for response in (t.chosen, t.rejected):
            kept: list[Tensor] = []
            other, target = (steer, []) if into == "base" else ([], steer)
            plain_logprob(hf, t.prompt, response, [*other, (module, kind, lambda a, k=kept: (k.append(a), a)[1])])

            def exchange(act: Tensor, kept: list[Tensor] = kept) -> Tensor:
                new = act.clone()
                new[..., head * d_head : (head + 1) * d_head] = kept[0][..., head * d_head : (head + 1) * d_head]
                return new if what == "head" else kept[0]

            changed = plain_logprob(hf, t.prompt, response, [*target, (module, kind, exchange)])
            sides.append(changed - plain_logprob(hf, t.prompt, response, target))
        wanted.append(sides[0] - sides[1])
    sign = 1 if into == "base" else -1
    by: Any = "head" if what == "head" else "layer"
    component: Any = "z" if what == "head" else what
    found = gr.analysis.patch(
        model, tokenized, vector.hooks(0.5, [0]), component=component, by=by, layers=[layer], into=into
    )
    row = found[found["head"] == head].iloc[0] if what == "head" else found.iloc[0]
    effects = sign * torch.stack(wanted)
    assert row.effect == pytest.approx(effects.mean().item(), abs=ATOL)
    assert row.se == pytest.approx(effects.std().item() / 2, abs=ATOL)
    assert abs(row.effect) > 100 * ATOL  # there is something to find


@pytest.mark.parametrize("into", ["base", "steered"])
def test_transformer_lens_patching_gives_the_same_effects(model: Any, vector: gr.SteeringVectors, into: Any) -> None:
    from transformer_lens import patching

    pair = gr.PreferencePair(prompt="the film was very good and it was", chosen=" great", rejected=" awful")
    tokenized = gr.tokens.tokenize_pairs(model, [pair])
    ids = torch.tensor([tokenized[0].prompt])
    great, awful = tokenized[0].chosen[0], tokenized[0].rejected[0]
    steering = vector.hooks(0.5, [0])

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, great] - logits[0, -1, awful]

    with torch.no_grad():
        _, plain = model.run_with_cache(ids)
        with model.hooks(fwd_hooks=steering):
            logits, cache = model.run_with_cache(ids)
        total = metric(logits) - metric(model(ids))
        source, here = (cache, []) if into == "base" else (plain, steering)
        with model.hooks(fwd_hooks=here):
            start = metric(model(ids))
            heads = patching.get_act_patch_attn_head_out_all_pos(model, ids, source, metric) - start
            mlps = patching.get_act_patch_mlp_out(model, ids, source, metric) - start
    sign = 1 if into == "base" else -1
    options: Any = {"into": into, "layers": [0, 1, 2]}
    found = gr.analysis.patch(model, tokenized, steering, component="z", by="head", **options)
    torch.testing.assert_close(torch.tensor(found.effect.to_numpy()).float(), sign * heads.flatten(), atol=ATOL, rtol=0)
    assert found.total.iloc[0] == pytest.approx(total.item(), abs=ATOL)
    found = gr.analysis.patch(model, tokenized, steering, component="mlp_out", by="pos", **options)
    wide = found.pivot(index="layer", columns="pos", values="effect")
    assert wide.columns.tolist() == list(range(1 - ids.shape[1], 1))
    torch.testing.assert_close(torch.tensor(wide.to_numpy()).float(), sign * mlps, atol=ATOL, rtol=0)


def test_positions_of_ones_own(bridge: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors) -> None:
    steering = vector.hooks(0.5, [0])
    every = gr.analysis.patch(bridge, pairs, steering, by="pos", layers=[1])
    some = gr.analysis.patch(bridge, pairs, steering, by=[0, -1], layers=[1])
    assert some["pos"].tolist() == [0, -1]
    assert some["effect"].tolist() == every.set_index("pos")["effect"][[0, -1]].tolist()
    with pytest.warns(DeprecationWarning, match=r"by=\[0, -1\]"):
        old = gr.analysis.patch(bridge, pairs, steering, by="pos", offsets=[0, -1], layers=[1])
    assert old.equals(some)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("by", [[], [0.5], ["z"]])
def test_positions_are_whole_numbers(
    bridge: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors, by: Any
) -> None:
    with pytest.raises(ValueError, match="position"):
        gr.analysis.patch(bridge, pairs, vector.hooks(0.5, [0]), by=by, layers=[1])


# -- theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["base", "steered"])
def test_the_whole_stream_carries_the_whole_effect(
    model: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors, into: Any
) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    found = gr.analysis.patch(model, tokenized, vector.hooks(0.5, [0]), component="resid_post", into=into)
    assert found.layer.tolist() == [0, 1, 2]
    assert found.share.tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    total = (margin(model, tokenized, vector.hooks(0.5, [0])) - margin(model, tokenized)).mean()
    assert found.total.tolist() == pytest.approx([total.item()] * 3, abs=ATOL)


def test_layers_below_the_steering_carry_nothing(
    model: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors
) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    options: Any = {"component": "attn_out"}
    found = gr.analysis.patch(model, tokenized, vector.hooks(0.5, [1]), layers=[0, 1, 2], **options)
    assert found.effect[:2].abs().max() == 0 and found.effect[2].item() != 0
    assert gr.analysis.patch(model, tokenized, vector.hooks(0.5, [1]), **options).layer.tolist() == [2]


def test_one_call_or_one_hook_or_per_batch_hooks(
    model: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors
) -> None:
    """A user's hook is in every run; patch_hook goes beside it; hooks may be made per batch; the model is left alone."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)[:1]
    ids = torch.tensor([tokenized[0].prompt])
    before = model(ids)

    def drop_head(act: Tensor, hook: Any) -> Tensor:
        return torch.cat([torch.zeros_like(act[:, :, :1]), act[:, :, 1:]], dim=2)

    mine = [("blocks.1.attn.hook_z", drop_head)]
    steering = vector.hooks(0.5, [0])
    with torch.no_grad(), model.hooks(fwd_hooks=steering + mine):
        _, cache = model.run_with_cache(ids)
    with_patch = [*mine, *gr.analysis.patch_hook("z", 2, cache["blocks.2.attn.hook_z"], head=3)]
    wanted = (margin(model, tokenized, with_patch) - margin(model, tokenized, mine)).item()
    for user, steer in ((mine, steering), (lambda batch: mine, lambda batch: steering)):
        found = gr.analysis.patch(model, tokenized, steer, component="z", by="head", layers=[2], fwd_hooks=user)
        assert found.effect[3] == pytest.approx(wanted, abs=ATOL)
    assert abs(wanted) > 10 * ATOL
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("into", ["base", "steered"])
def test_the_gradient_is_exact_for_small_steps(
    model: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors, component: Any, into: Any
) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    by: Any = "head" if component == "z" else "layer"
    options: Any = {"component": component, "by": by, "into": into, "layers": [1, 2]}
    exact = gr.analysis.patch(model, tokenized, vector.hooks(0.02, [0]), **options)
    quick = gr.analysis.patch(model, tokenized, vector.hooks(0.02, [0]), method="gradient", **options)
    largest = exact.effect.abs().max()
    assert largest > 1e-3
    # 2 % steps: second order is a few percent of the first
    assert (exact.effect - quick.effect).abs().max() < 0.1 * largest
    error = gr.analysis.compare_patching(exact, quick)
    assert error.sign_agreement > 0.8 and error.relative_error < 0.1
    large = [
        gr.analysis.patch(model, tokenized, vector.hooks(0.9, [0]), method=m, **options) for m in ("exact", "gradient")
    ]
    if component != "resid_post" or into != "base":
        assert gr.analysis.compare_patching(*large).relative_error > error.relative_error


def test_comparison_against_numbers_by_hand() -> None:
    exact = pd.DataFrame({"component": "z", "layer": [0, 1, 2], "head": 0, "effect": [1.0, -2.0, 0.5]})
    quick = exact.assign(effect=[2.0, -4.0, -1.0])
    found = gr.analysis.compare_patching(exact, quick, n_top=2)
    assert found.slope == pytest.approx((2 + 8 - 0.5) / 5.25)
    assert found.mean_error == pytest.approx(4.5 / 3) and found.relative_error == pytest.approx(4.5 / 3.5)
    assert found.sign_agreement == pytest.approx(2 / 3) and found.top_overlap == 1
    assert gr.analysis.compare_patching(exact, exact).correlation == pytest.approx(1)
    with pytest.raises(ValueError, match="3 and 2 sites"):
        gr.analysis.compare_patching(exact, quick[:2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"component": "resid_mid"}, "component='resid_mid'"),
        ({"by": "head"}, "only component='z' has heads"),
        ({"by": "token"}, "by='token'"),
        ({"into": "clean"}, "into='clean'"),
        ({"method": "fast"}, "method='fast'"),
        ({"component": ("z", "mlp_out"), "by": "pos"}, "give one component"),
        ({"layers": [7]}, "layers 0 to 2"),
    ],
)
def test_bad_options_are_refused(
    bridge: Any, pairs: list[gr.PreferencePair], vector: gr.SteeringVectors, options: Any, words: str, unchecked: None
) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with pytest.raises(ValueError, match=words):
        gr.analysis.patch(bridge, tokenized, vector.hooks(0.5, [0]), **options)


def test_bad_patches_are_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with pytest.raises(ValueError, match="empty list"):
        gr.analysis.patch(bridge, tokenized, [])
    with pytest.raises(ValueError, match="only component='z'"):
        gr.analysis.patch_hook("mlp_out", 0, torch.zeros(1, 2, 4), head=1)
    ((_, fn),) = gr.analysis.patch_hook("mlp_out", 0, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="was .1, 2, 4. in the other run"):
        fn(torch.zeros(1, 3, 4), hook=None)


def test_restart_layer() -> None:
    assert restart_layer([]) == -1
    assert restart_layer(["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"]) == 2
    assert restart_layer(["blocks.3.hook_out"]) == 2  # a bridge's own name for resid_post: below it, to be safe


# Was a bug: restarted runs pack responses to one prompt into a row, and hooks on later blocks met rows and positions they
# did not know: patches and scoped steering at a second layer were refused or went to other positions.
@pytest.mark.parametrize("positions", ["last", "generated"])
def test_hooks_on_later_blocks_see_the_rows_of_the_batch(
    model: Any, vector: gr.SteeringVectors, positions: Any
) -> None:
    prompt = "question : was the film good and the room very warm but the soup cold ? answer :"
    pair = gr.PreferencePair(
        prompt=prompt, chosen=" it was good and we liked it", rejected=" no they hated it , very bad"
    )
    tokenized = gr.tokens.tokenize_pairs(model, [pair])

    def hooks(batch: Any) -> Any:
        return vector.hooks(0.5, [0, 1], positions=positions, prompt_len=batch.prompt_len)

    _, found = gr.evaluate.measure(model, tokenized, [gr.evaluate.Setting(0, hooks)])
    torch.testing.assert_close(found[0], gr.score_pairs(model, tokenized, hooks), atol=ATOL, rtol=0)
    mlps = gr.analysis.patch(model, tokenized, vector.hooks(0.5, [0]), by="pos", layers=[1])
    assert mlps.pos.max() == len(tokenized[0].rejected) - 1 and mlps.effect.abs().max() > 10 * ATOL
