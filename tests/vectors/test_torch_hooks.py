"""Steering a plain Hugging Face model: the effect of our hooks on a bridge, the scopes in generation, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grains_tl as gr
from grains_tl.models.running import forward_logits
from grains_tl.vectors.torch_hooks import _Follow
from tests.conftest import tiny_hf, tiny_tokenizer
from tests.helpers import vision_families
from tests.helpers.architectures import CONFIGS, architecture, plain
from tests.helpers.oracles import edited, greedy, steered

ATOL = 2e-5  # logits of size 1 to 10 in float32; the bridge may order its sums in another way
OPERATORS: list[Any] = ["add_renorm", "add", "rotate", "clip", "ablate", "clamp"]
SCOPES: list[Any] = ["all", "prompt", "generated", "last"]
PROMPT = [3, 5, 8, 12, 6]
LEFT = torch.tensor([[0, 0, *PROMPT], [4, 7, 9, 10, 11, 12, 13]])  # padded on the left
LEFT_MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
PLACES = (LEFT_MASK.cumsum(-1) - 1).clamp(min=0)  # GPT-2 does not number padded rows itself


def vectors(n_layers: int = 3, d_model: int = 32, **info: Any) -> gr.SteeringVectors:
    raw = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(n_layers), torch.full((n_layers,), 5.0), info)


def logits(hf: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **inputs).logits


# -- the same effect as hooks on a bridge -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_families_are_steered_as_their_bridge(family: str) -> None:
    hf, bridge, v = plain(family), architecture(family), vectors()
    every = torch.arange(LEFT.shape[1])
    for operator in OPERATORS:
        for positions in SCOPES:
            steering = v.steering(0.7, [0, 2], operator=operator, positions=positions)
            wanted = forward_logits(bridge, LEFT, LEFT_MASK, every, steering.for_prompt(5))
            with steering.torch_hooks(hf, prompt_len=5):
                found = logits(hf, LEFT, LEFT_MASK, position_ids=PLACES)
            real = LEFT_MASK.bool()
            torch.testing.assert_close(found[real], wanted[real], atol=ATOL, rtol=ATOL)
            assert (found - logits(hf, LEFT, LEFT_MASK, position_ids=PLACES))[real].abs().max() > 1e-2


@pytest.mark.parametrize("family", vision_families.FAMILIES, ids=lambda f: f.name)
def test_vision_families_are_steered_as_by_a_plain_hook(family: Any) -> None:
    hf, processor, v = vision_families.build(family), family.processor(), vectors()
    prompt = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = processor(images=[vision_families.picture(0)], text=text, return_tensors="pt")
    inputs["use_cache"] = False
    step = 0.7 * 5.0 * v.directions[1]
    layer = hf.get_decoder().layers[1]

    def edit(module: Any, args: Any, output: Any) -> Any:
        act = output[0] if isinstance(output, tuple) else output
        new = steered(act, step, renorm=True)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        base = hf(**inputs).logits
        handle = layer.register_forward_hook(edit)
        wanted = hf(**inputs).logits
        handle.remove()
        with v.torch_hooks(hf, 0.7, 1):
            found = hf(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=ATOL)
    assert (found - base).abs().max() > 1e-2


def test_adapters_stay_where_they_are(hf: Any) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        tiny_hf(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).eval()
    with vectors().torch_hooks(tuned, 0.7, 1):
        found = logits(tuned, LEFT)
    with edited(tuned.get_base_model(), 1, lambda act: steered(act, 3.5 * vectors().directions[1], renorm=True)):
        torch.testing.assert_close(found, logits(tuned, LEFT), atol=ATOL, rtol=ATOL)
    assert not torch.allclose(logits(tuned, LEFT), logits(hf, LEFT), atol=1e-2)


# -- generation -------------------------------------------------------------------------------------------------------


def generated(hf: Any, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    out = hf.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=6,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", SCOPES)
def test_scopes_in_generation(name: str, positions: Any) -> None:
    """With a cache, without one, and a prompt alone decoded by a plain hook that counts positions itself."""
    hf, v = tiny_hf(name), vectors()
    step = 1.5 * 5.0 * v.directions[1]

    def edit(act: Tensor) -> Tensor:
        place = torch.arange(act.shape[1])
        where = {
            "all": place >= 0, "prompt": place < 5, "generated": place >= 5, "last": place >= 4,
        }[positions]  # fmt: skip
        return torch.where(where[None, :, None], steered(act, step, renorm=True), act)

    hf.config.eos_token_id = -1
    wanted = greedy(hf, PROMPT, 6, 1, edit)
    assert wanted != greedy(hf, PROMPT, 6)
    steering = v.steering(1.5, 1, positions=positions)
    with steering.torch_hooks(hf):
        cached = generated(hf, LEFT, LEFT_MASK)
    with steering.torch_hooks(hf, prompt_len=LEFT.shape[1]):
        assert generated(hf, LEFT, LEFT_MASK) == generated(hf, LEFT, LEFT_MASK, use_cache=False) == cached
    assert cached[0] == wanted


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    hf, one = tiny_hf(), torch.tensor([[5]])
    cases: list[tuple[Any, bool]] = [("prompt", False), ("generated", True)]
    for positions, same in cases:
        with vectors().torch_hooks(hf, 1.5, 1, positions=positions):
            assert torch.equal(logits(hf, one), logits(tiny_hf(), one)) is same


def test_masks_and_gates_of_places_count_from_the_start() -> None:
    hf, v = tiny_hf(), vectors()
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 3] = mask[1, 5] = True
    last = torch.tensor([True, False])[:, None] & (torch.arange(7) == 6)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"positions": mask}, mask),
        ({"gate": mask}, mask),
        ({"gate": torch.tensor([True, False]), "positions": "last"}, last),
    ]
    for options, where in cases:
        with v.torch_hooks(hf, 1.5, 1, prompt_len=7, **options):
            assert generated(hf, LEFT, LEFT_MASK) == generated(hf, LEFT, LEFT_MASK, use_cache=False)
        with v.torch_hooks(hf, 1.5, 1, **options):
            found = logits(hf, LEFT, LEFT_MASK)

        def edit(act: Tensor, where: Tensor = where) -> Tensor:
            return torch.where(where[..., None], steered(act, 7.5 * v.directions[1], renorm=True), act)

        with edited(hf, 1, edit):
            torch.testing.assert_close(found, logits(hf, LEFT, LEFT_MASK), atol=ATOL, rtol=ATOL)


def test_the_gate_sees_the_activation() -> None:
    hf, v = tiny_hf(), vectors()
    with v.torch_hooks(hf, 1.5, 1, gate=gr.hooks.ThresholdGate(v.directions[1], 1e6)):
        assert torch.equal(logits(hf, LEFT), logits(tiny_hf(), LEFT))
    with v.torch_hooks(hf, 1.5, 1, gate=gr.hooks.ThresholdGate(v.directions[1], -1e6)):
        closed = logits(hf, LEFT)
    with v.torch_hooks(hf, 1.5, 1):
        assert torch.equal(logits(hf, LEFT), closed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    hf = tiny_hf().to(dtype)
    with vectors().torch_hooks(hf, 0.7, 1):
        found = logits(hf, LEFT)
    with vectors().torch_hooks(full := tiny_hf(), 0.7, 1):
        wanted = logits(full, LEFT)
    assert found.dtype == dtype
    assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 0.05


def test_gradients_pass_through() -> None:
    hf, v = tiny_hf(), vectors()
    embeds = hf.get_input_embeddings()(LEFT).detach().requires_grad_(True)
    with v.torch_hooks(hf, 0.7, 1):
        (found,) = torch.autograd.grad(hf(inputs_embeds=embeds).logits[:, -1].sum(), embeds)
    with edited(hf, 1, lambda act: steered(act, 3.5 * v.directions[1], renorm=True)):
        (wanted,) = torch.autograd.grad(hf(inputs_embeds=embeds).logits[:, -1].sum(), embeds)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# -- nothing stays, nothing is touched --------------------------------------------------------------------------------


def n_hooks(hf: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def test_hooks_are_gone_afterwards() -> None:
    hf, v = tiny_hf(), vectors()
    base = logits(hf, LEFT)
    with pytest.raises(RuntimeError, match="on purpose"), v.torch_hooks(hf, 0.7, 1, positions="last"):
        assert n_hooks(hf) == 2
        raise RuntimeError("on purpose")
    handles = v.torch_hooks(hf, 0.7, [0, 1])
    assert not torch.equal(logits(hf, LEFT), base)
    handles.remove()
    handles.remove()
    with pytest.raises(ValueError, match="d_model 16"):
        vectors(d_model=16).torch_hooks(hf, 0.7, 1)
    assert n_hooks(hf) == 0 and torch.equal(logits(hf, LEFT), base)


@pytest.mark.parametrize("positions", SCOPES)
def test_alpha_zero_and_empty_vectors_change_no_bit(positions: Any) -> None:
    hf, v = tiny_hf(), vectors()
    base = logits(hf, LEFT)
    for idle in (v.steering(0.0, 1, positions=positions), (v - v).steering(0.7, 1, positions=positions)):
        with idle.torch_hooks(hf):
            assert torch.equal(logits(hf, LEFT), base)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_models_that_do_not_fit(bridge: Any) -> None:
    v = vectors()
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=32, d_kv=8, d_ff=16, num_layers=3, num_heads=4)
    )
    strange = torch.nn.Linear(2, 2)
    strange.config = tiny_hf().config
    wrong: list[tuple[Any, gr.SteeringVectors, str]] = [
        (bridge, v, "applied"),
        (bridge.original_model, v, "inside a TransformerBridge"),
        (t5, v, "encoder-decoder"),
        (strange, v, "not found"),
        ("gpt2", v, "got str"),
        (tiny_hf(), vectors(d_model=16), "d_model 16"),
        (tiny_hf(), vectors(n_layers=5), "3 layers"),
        (tiny_hf(), vectors(model={"n_layers": 7}), "7 layers"),
    ]
    for hf, made, words in wrong:
        with pytest.raises(ValueError, match=words):
            made.torch_hooks(hf, 0.7, made.layers[-1])


def test_runs_whose_prompts_end_nobody_knows_where() -> None:
    hf, v = tiny_hf(), vectors()
    with v.torch_hooks(hf, 0.7, 1, positions="generated"):
        with pytest.raises(ValueError, match="give prompt_len"):
            generated(hf, LEFT, LEFT_MASK, use_cache=False)
        cache = hf(LEFT, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="give prompt_len"):
            hf(LEFT[:, :2], past_key_values=cache)
    with (
        v.torch_hooks(hf, 0.7, 1, positions="generated", prompt_len=9),
        pytest.raises(ValueError, match="beyond the 7"),
    ):
        logits(hf, LEFT)
    with (
        v.torch_hooks(hf, 0.7, 1, positions="last", prompt_len=torch.tensor([7, 5, 7])),
        pytest.raises(ValueError, match="3 rows"),
    ):
        logits(hf, LEFT)
    with (
        v.torch_hooks(hf, 0.7, 1, positions=torch.ones(2, 6, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"\[2, 6\]"),
    ):
        logits(hf, LEFT)


def test_chunks_behind_a_cache_count_on() -> None:
    """A second turn, or drafts of speculative decoding: positions count from the beginning of the text."""
    hf, v = tiny_hf(), vectors()
    with v.torch_hooks(hf, 0.7, 1, positions="generated", prompt_len=4):
        whole = logits(hf, LEFT)
        first = hf(LEFT[:, :4], use_cache=True)
        rest = hf(LEFT[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=ATOL, rtol=ATOL)


def test_the_tokenizer_is_not_needed() -> None:
    """Nothing but the model: ids in, text out."""
    hf, tokenizer = tiny_hf(), tiny_tokenizer()
    with vectors().torch_hooks(hf, 1.5, 1):
        ids = generated(hf, tokenizer("the film was", return_tensors="pt")["input_ids"], torch.ones(1, 3).long())
    assert len(tokenizer.decode(ids[0]).split()) == 6


def test_the_cache_under_its_new_name() -> None:
    """transformers calls it ``cache`` since 5.24; the decoder's place in the text must not start at 0 again."""
    v = vectors()
    follow = _Follow(v.steering(0.7, 1, positions="generated"), 4)
    cache = tiny_hf()(LEFT, use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):
        follow.enter(torch.nn.Identity(), (), {name: cache})
        assert follow.run.past == LEFT.shape[1]
