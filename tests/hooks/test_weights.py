"""Strength by position: all weights 1 are uniform steering bit for bit, and any weights are those of a plain hook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution import prompt_weights
from grains_tl.hooks import Weighted
from grains_tl.inference.generation import continue_prompts
from grains_tl.models.running import forward_logits
from tests.conftest import tiny_hf
from tests.helpers.oracles import edited, greedy, pair_logprobs
from tests.helpers.vision_families import FAMILIES, picture
from tests.helpers.vision_families import bridge as vision_bridge

ATOL = 1e-4  # nats, float32 round-off
NESTED: Any = [[1.0]]
OPERATORS: list[Any] = ["add_renorm", "add", "ablate"]


def vectors() -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 20.0), {"method": "made_up"})


def some_weights(ids: Any, seed: int = 0) -> list[float]:
    return (2 * torch.rand(len(ids), generator=torch.Generator().manual_seed(seed + len(ids)))).tolist()


def weighted_edit(weights: list[float], after: float, alpha: float = 0.8, layer: int = 1) -> Any:
    """The paper's step with another length at every position, written out for one row."""
    v = vectors()

    def edit(act: Tensor) -> Tensor:
        own = torch.tensor([*weights, *[after] * (act.shape[1] - len(weights))])[None, :, None]
        moved = act + own * alpha * v.resid_norms[layer] * v.directions[layer]
        return moved / moved.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True)

    return edit


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("alpha", [0.9, -0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_are_uniform_bit_for_bit(operator: Any, alpha: float, dtype: torch.dtype) -> None:
    v = vectors()
    act = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    scopes: list[Any] = ["all", *(Weighted(torch.full((1, 5), w), 0.0) for w in (1.0, 0.0, 2.0))]
    hooks = [v.steering(alpha, 1, operator=operator, positions=p).hooks()[0] for p in scopes]
    uniform, ones, none, two = (fn for _, fn in hooks)
    assert torch.equal(ones(act, hook=None), uniform(act, hook=None))
    assert torch.equal(none(act, hook=None), act)
    (_, double) = v.hooks(2 * alpha, [1], operator=operator)[0]
    assert torch.equal(two(act, hook=None), double(act, hook=None))


def test_weights_of_one_by_prompt_are_uniform_everywhere(model: Any, pairs: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    ones = Weighted({tuple(t.prompt): [1.0] * len(t.prompt) for t in tokenized})
    uniform, weighted = (vectors().steering(0.8, 1, positions=p) for p in ("all", ones))
    assert torch.equal(gr.score_pairs(model, pairs, weighted), gr.score_pairs(model, pairs, uniform))
    prompts = [p.prompt for p in pairs]
    for size in (1, 4):
        texts = gr.generate(model, prompts, weighted, max_new_tokens=6, batch_size=size)
        assert texts == gr.generate(model, prompts, uniform, max_new_tokens=6)
    zero = vectors().steering(0, 1, positions=ones)
    assert torch.equal(gr.score_pairs(model, pairs, zero), gr.score_pairs(model, pairs))


# -- against a plain hook ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 1.0, 0.5])
def test_scores_are_those_of_a_plain_hook(model: Any, hf: Any, pairs: Any, after: float) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    weights = {tuple(t.prompt): some_weights(t.prompt) for t in tokenized}
    steering = vectors().steering(0.8, 1, positions=Weighted(weights, after))
    found = gr.score_pairs(model, pairs, steering)
    for row, t in zip(found.tolist(), tokenized, strict=True):
        with torch.no_grad(), edited(hf, 1, weighted_edit(weights[tuple(t.prompt)], after)):
            wanted = [float(x) for x in pair_logprobs(hf, t)]
        assert row == pytest.approx(wanted, abs=ATOL)
    frame = gr.evaluate.record_effects(model, pairs, [steering])
    np.testing.assert_allclose(frame["margin"], (found[:, 0] - found[:, 1]).numpy(), atol=ATOL)


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_generation_with_a_cache_is_that_without(model: Any, hf: Any, after: float) -> None:
    prompts = ["the film was", "the food in this hotel was very", "we liked it"]
    ids = [tuple(one.prompt) for one in continue_prompts(model, prompts, max_new_tokens=1)]
    weights = {row: some_weights(row) for row in ids}
    steering = vectors().steering(0.8, 1, positions=Weighted(weights, after))
    wanted = [greedy(hf, row, 7, 1, weighted_edit(weights[row], after)) for row in ids]
    assert wanted != [greedy(hf, row, 7) for row in ids]
    for size in (1, 2, 8):
        assert [x.new for x in continue_prompts(model, prompts, steering, max_new_tokens=7, batch_size=size)] == wanted
    costs = gr.evaluate.text_costs(model, [steering], gr.inference.Continuations(prompts, 7))
    assert (costs["kl"] > 0).all() and costs["n_tokens"].tolist() == [len(w) for w in wanted]


def test_weights_from_the_activation(model: Any, hf: Any, pairs: Any) -> None:
    """A read-out of the residual in one pass: the same in whole runs and while decoding."""
    probe = torch.randn(32, generator=torch.Generator().manual_seed(3))

    def read(act: Tensor) -> Tensor:
        return (act @ probe).sigmoid()

    def edit(act: Tensor) -> Tensor:
        v, own = vectors(), read(act)[..., None]
        moved = act + own * 0.8 * v.resid_norms[1] * v.directions[1]
        return moved / moved.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True)

    steering = vectors().steering(0.8, 1, positions=Weighted(read, name="probe"))
    for row, t in zip(
        gr.score_pairs(model, pairs, steering).tolist(), gr.tokens.tokenize_pairs(model, pairs), strict=True
    ):
        with torch.no_grad(), edited(hf, 1, edit):
            assert row == pytest.approx([float(x) for x in pair_logprobs(hf, t)], abs=ATOL)
    (one,) = continue_prompts(model, "the film was", steering, max_new_tokens=7)
    assert one.new == greedy(hf, one.prompt, 7, 1, edit)


def test_left_padding_and_gates(model: Any) -> None:
    ids, mask = torch.tensor([[0, 0, 3, 5, 8], [4, 7, 9, 10, 11]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    rows: list[tuple[int | str, ...]] = [(3, 5, 8), (4, 7, 9, 10, 11)]
    weights = Weighted({row: some_weights(row) for row in rows})
    steering = vectors().steering(0.8, 1, positions=weights)
    both = forward_logits(model, ids, mask, torch.arange(5), steering.for_prompt(5, rows))
    for i, row in enumerate(rows):
        one = torch.tensor([row])
        alone = forward_logits(
            model, one, torch.ones_like(one), torch.arange(len(row)), steering.for_prompt(len(row), [row])
        )
        torch.testing.assert_close(both[i, 5 - len(row) :], alone[0], atol=1e-4, rtol=1e-4)
    first = vectors().steering(0.8, 1, positions=weights, gate=torch.tensor([True, False]))
    gated = forward_logits(model, ids, mask, torch.arange(5), first.for_prompt(5, rows))
    base = forward_logits(model, ids, mask, torch.arange(5))
    torch.testing.assert_close(gated[0], both[0])
    torch.testing.assert_close(gated[1], base[1])


# -- on a plain Hugging Face model ------------------------------------------------------------------------------------

LEFT = torch.tensor([[0, 0, 3, 5, 8], [4, 7, 9, 10, 11]])
LEFT_MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
ROWS: list[tuple[int | str, ...]] = [(3, 5, 8), (4, 7, 9, 10, 11)]


def probed(act: Tensor) -> Tensor:
    return (act @ torch.randn(act.shape[-1], generator=torch.Generator().manual_seed(3))).sigmoid()


def padded() -> Tensor:
    return torch.tensor([[9.0] * (5 - len(row)) + some_weights(row) for row in ROWS])


@pytest.mark.parametrize("after", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["by prompt", "tensor", "function"])
def test_torch_hooks_weigh_alike(bridge: Any, kind: str, after: float) -> None:
    """A padded batch with a cache and without one, and whole runs, against single rows with a plain hook."""
    given: Any = {"by prompt": {row: some_weights(row) for row in ROWS}, "tensor": padded(), "function": probed}[kind]
    steering = vectors().steering(0.8, 1, positions=Weighted(given, after))

    def edit(row: Any) -> Any:
        return moved if kind == "function" else weighted_edit(some_weights(row), after)

    def moved(act: Tensor) -> Tensor:
        v = vectors()
        new = act + probed(act)[..., None] * 0.8 * v.resid_norms[1] * v.directions[1]
        return new / new.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True)

    hf = tiny_hf()
    hf.config.eos_token_id = -1
    wanted = [greedy(hf, [int(x) for x in row], 6, 1, edit(row)) for row in ROWS]
    assert wanted != [greedy(hf, [int(x) for x in row], 6) for row in ROWS]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    with steering.torch_hooks(hf, prompt_len=5):
        for cached in (True, False):
            out = hf.generate(input_ids=LEFT, attention_mask=LEFT_MASK, use_cache=cached, **options)
            assert out[:, 5:].tolist() == wanted
    with steering.torch_hooks(hf), torch.no_grad():
        assert hf.generate(input_ids=LEFT, attention_mask=LEFT_MASK, **options)[:, 5:].tolist() == wanted
    position = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    with steering.torch_hooks(hf), torch.no_grad():
        found = hf(input_ids=LEFT, attention_mask=LEFT_MASK, position_ids=position).logits
    lens = forward_logits(bridge, LEFT, LEFT_MASK, torch.arange(5), steering.for_prompt(5, ROWS))
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(found[i, 5 - len(row) :], lens[i, 5 - len(row) :], atol=1e-4, rtol=1e-4)


def test_torch_hooks_refuse_weights_of_other_prompts() -> None:
    hf = tiny_hf()
    by_prompt = vectors().steering(0.8, 1, positions=Weighted({ROWS[0]: some_weights(ROWS[0])}))
    embeds = hf.get_input_embeddings()(LEFT)
    wide = vectors().steering(0.8, 1, positions=Weighted(torch.ones(1, 9)))
    several = vectors().steering(0.8, 1, positions=Weighted(torch.ones(3, 5)))
    with torch.no_grad():
        for steering, call, message in (
            (by_prompt, {"input_ids": LEFT, "attention_mask": LEFT_MASK}, "no weights for prompt 2"),
            (by_prompt, {"inputs_embeds": embeds}, "called with embeddings"),
            (wide, {"input_ids": LEFT}, r"\[1, 9\]"),
            (several, {"input_ids": LEFT}, r"\(3, 5\)"),
        ):
            with steering.torch_hooks(hf), pytest.raises(ValueError, match=message):
                hf(**call)
        with by_prompt.torch_hooks(hf):
            first = hf(input_ids=torch.tensor([[3, 5, 8]]), use_cache=True)
            with pytest.raises(ValueError, match="behind a cache of 3"):
                hf(input_ids=torch.tensor([[9, 10]]), past_key_values=first.past_key_values)


# -- weights from attributions ----------------------------------------------------------------------------------------


def test_prompt_weights_are_shares_of_what_pushes_toward_rejected(model: Any, pairs: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    for method in ("leave_one_out", "gradient_x_input"):
        found: Any = prompt_weights(model, pairs, method=method, floor=0.25, after=0.0)
        for a, t in zip(gr.attribution.attribute_all(model, tokenized, method=method), tokenized, strict=True):
            own = torch.tensor(found.weights[tuple(t.prompt)])
            (again,) = cast("Any", prompt_weights(model, [t], floor=0.25, after=0.0, attributions=[a]).weights).values()
            assert again == pytest.approx(own.tolist(), rel=1e-4, abs=1e-5)
            pushes = np.maximum(-np.nan_to_num(a.scores.numpy().astype(float)), 0) * a.content.numpy()
            wanted = 0.25 + 0.75 * pushes * len(pushes) / pushes.sum() if pushes.sum() else np.ones(len(pushes))
            np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)
            assert float(own.sum()) == pytest.approx(len(t.prompt))
    shuffled: Any = prompt_weights(model, pairs, shuffle_seed=1)
    true: Any = prompt_weights(model, pairs)
    assert shuffled.key != true.key != prompt_weights(model, pairs, shuffle_seed=2).key
    for ids, own in true.weights.items():
        assert sorted(shuffled.weights[ids]) == pytest.approx(sorted(own))
    uniform: Any = prompt_weights(model, pairs, floor=1.0)
    assert {w for own in uniform.weights.values() for w in own} == {1.0}
    effects = gr.evaluate.record_effects(model, pairs, [vectors().steering(0.5, 1, positions=true)])
    assert effects["positions"].unique().tolist() == ["attributed"] and (effects["change"] != 0).all()


# -- refusals, keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: Weighted(torch.ones(3)), "batch, pos"),
        (lambda m, p: Weighted(torch.tensor([[math.nan]])), "finite"),
        (lambda m, p: Weighted({(1, 2): [1.0]}), "1 weights for a prompt of 2"),
        (lambda m, p: Weighted({}), "no prompt"),
        (lambda m, p: Weighted(NESTED), "a list"),
        (lambda m, p: vectors().steering(0.2, 1, operator="clamp", positions=Weighted(torch.ones(1, 3))), "clamp"),
        (lambda m, p: gr.score_pairs(m, p, vectors().steering(0.2, 1, positions=Weighted({(1,): [1.0]}))), "no weights"),
        (lambda m, p: prompt_weights(m, p, floor=2.0), "floor"),
        (lambda m, p: prompt_weights(m, []), "no records"),
        (lambda m, p: prompt_weights(m, p, attributions=[]), "0 attributions for 4"),
        (lambda m, p: prompt_weights(m, p[:1], attributions=[gr.attribute(m, p[3])]), "record 1 has another"),
        (lambda m, p: m.run_with_hooks(torch.tensor([[3, 4]]), fwd_hooks=vectors().steering(
            0.2, 1, positions=Weighted({(3, 4): [1.0, 1.0]})).hooks()), "belong to prompts"),
        (lambda m, p: m.run_with_hooks(torch.tensor([[3, 4]]), fwd_hooks=vectors().steering(
            0.2, 1, positions=Weighted(lambda act: act.sum())).hooks()), "weights' function"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(bridge: Any, pairs: Any, unchecked: None, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(bridge, pairs)


def test_keys_and_labels(bridge: Any, pairs: Any, tmp_path: Path) -> None:
    made = [
        Weighted(torch.ones(1, 3)), Weighted(torch.ones(1, 3), 0.0), Weighted({(1,): [1.0]}), Weighted({(1,): [2.0]}),
        Weighted(torch.relu, name="a"), Weighted(torch.relu, name="b"),
    ]  # fmt: skip
    keys = {vectors().steering(0.2, 1, positions=w).key for w in made}
    assert len(keys) == len(made) and "" not in keys
    nameless = vectors().steering(0.2, 1, positions=Weighted(torch.relu))
    assert nameless.key == "" and "weighted positions" in nameless.label and "weighted" in nameless._repr_html_()
    for where in made:
        weighted = vectors().steering(0.2, 1, positions=where)
        with pytest.raises(ValueError, match="weighted positions.*no mask or weights.*again after loading"):
            weighted.save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_one_question_have_weights_of_their_own() -> None:
    """Two records with the same words and other pictures: each is steered by its own patches, in any batch."""
    model = vision_bridge(FAMILIES[0])
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    records = [gr.PreferencePair(parts, "a cat", "a dog", image=picture(seed)) for seed in (0, 1)]
    n_layers, d_model = int(model.cfg.n_layers), int(model.cfg.d_model)
    raw = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(0))
    v = gr.SteeringVectors.from_raw(raw, range(n_layers), torch.full((n_layers,), 20.0), {})
    weights: Any = prompt_weights(model, records, method="leave_one_out")
    a, b = weights.weights.values()
    tokenized = gr.tokens.tokenize_pairs(model, records)
    assert tokenized[0].prompt == tokenized[1].prompt and a != b
    patches = torch.tensor(tokenized[0].is_image)
    assert float(torch.tensor(a)[patches].sum()) > 0
    steering = v.steering(0.6, 1, positions=weights)
    both = gr.score_pairs(model, records, steering)
    for i, own in enumerate((a, b)):
        alone = v.steering(0.6, 1, positions=Weighted(torch.tensor([own])))
        torch.testing.assert_close(both[i : i + 1], gr.score_pairs(model, records[i : i + 1], alone), atol=ATOL, rtol=0)
    asked, images = [parts, parts], [picture(0), picture(1)]
    found = gr.generate(model, asked, steering, images=images, max_new_tokens=4)
    assert found == [
        gr.generate(model, [p], steering, images=[x], max_new_tokens=4)[0] for p, x in zip(asked, images, strict=True)
    ]
    texts = gr.inference.Continuations(asked, 4, images=images)
    assert (gr.evaluate.text_costs(model, [steering], texts)["kl"] > 0).all()
    ones = Weighted({key: [1.0] * len(w) for key, w in weights.weights.items()})
    uniform = v.steering(0.6, 1)
    assert torch.equal(
        gr.score_pairs(model, records, v.steering(0.6, 1, positions=ones)), gr.score_pairs(model, records, uniform)
    )
