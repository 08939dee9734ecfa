"""Steering at every site of a block against plain PyTorch hooks on the Hugging Face model, and what cannot be steered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.hooks.sites import Site, edit_hooks, site_point, site_width
from grains_tl.models.running import hooked
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.architectures import CONFIGS, architecture

SITES: tuple[Any, ...] = get_args(Site)
IDS = torch.tensor([[3, 5, 8, 12, 6, 9, 11]])
ATOL = 3e-5
LAYER = 1


def direction(site: Any = "resid_post", seed: int = 0) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


def step(kind: str, amount: float = 3.0) -> Callable[[Tensor], Tensor]:
    """The operators written out anew; of heads, each keeps its own norm."""
    unit = direction() / direction().norm()

    def apply(h: Tensor) -> Tensor:
        moved = h + amount * unit.view(h.shape[2:])
        return moved if kind == "add" else moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)

    return apply


@contextmanager
def plain_hook(hf: Any, site: str, apply: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The same change by hooks on modules of a Hugging Face Llama."""
    block = hf.model.layers[LAYER]

    def on_output(module: Any, args: Any, output: Any) -> Any:
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    def on_input(module: Any, args: Any) -> Any:
        return (apply(args[0]), *args[1:])

    def on_heads(module: Any, args: Any) -> Any:
        z = args[0]
        return (apply(z.view(*z.shape[:2], 4, 8)).reshape(z.shape),)

    def between(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A Llama block with the change between its halves."""
        attn = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)[0]
        mid = apply(x + attn)
        return mid + block.mlp(block.post_attention_layernorm(mid))

    if site == "resid_mid":
        before, block.forward = block.forward, between
        try:
            yield
        finally:
            block.forward = before
        return
    handle = {
        "resid_pre": lambda: block.register_forward_pre_hook(on_input),
        "resid_post": lambda: block.register_forward_hook(on_output),
        "attn_out": lambda: block.self_attn.register_forward_hook(on_output),
        "mlp_out": lambda: block.mlp.register_forward_hook(on_output),
        "z": lambda: block.self_attn.o_proj.register_forward_pre_hook(on_heads),
    }[site]()
    try:
        yield
    finally:
        handle.remove()


def vectors_at(site: Any, norm: float = 3.0) -> gr.SteeringVectors:
    return gr.SteeringVectors.from_raw(direction()[None], [LAYER], torch.tensor([norm]), site=site)


@pytest.mark.parametrize("operator", ["add", "add_renorm"])
@pytest.mark.parametrize("site", SITES)
def test_equals_a_plain_hook_without_cache(model: Any, hf: Any, site: Any, operator: Any) -> None:
    with plain_hook(hf, site, step(operator)), torch.no_grad():
        wanted = hf(IDS).logits
    steering = vectors_at(site).steering(1.0, operator=operator)
    with torch.no_grad(), steering.applied(model):
        found = model(IDS)
    # a HookedTransformer's logits differ from Hugging Face's by a constant per position at most
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=ATOL, rtol=ATOL)
    with torch.no_grad():
        assert (model(IDS).log_softmax(-1) - found.log_softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("site", SITES)
def test_equals_a_plain_hook_with_a_cache(model: Any, hf: Any, site: Any) -> None:
    prompt = "the soup was cold but the room was"
    ids = torch.tensor([model.tokenizer(prompt).input_ids])
    with plain_hook(hf, site, step("add")), torch.no_grad():
        out = hf.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), use_cache=True)
    new = out[0, ids.shape[1] :].tolist()
    new = new[: new.index(2)] if 2 in new else new
    found = gr.generate(model, prompt, vectors_at(site).steering(1.0, operator="add"), max_new_tokens=8)[0]
    assert found.split() == model.tokenizer.decode(new, skip_special_tokens=True).split()


def cached_logits(hf: Any, ids: Tensor) -> Tensor:
    """Logits of the last three positions, each from a step behind the cache of those before."""
    cache, found = None, []
    for part in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
        out = hf(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[:, -1])
    return torch.stack(found[1:], dim=1)


@pytest.mark.parametrize("site", SITES)
def test_logits_behind_a_cache(site: Any) -> None:
    hf, bridge = tiny_hf(), tiny_model("bridge")
    steering = vectors_at(site).steering(1.0, positions="generated", operator="add_renorm")
    with plain_hook(hf, site, lambda h: step("add_renorm")(h) if h.shape[1] == 1 else h), torch.no_grad():
        wanted = cached_logits(hf, IDS)
    with torch.no_grad(), hooked(bridge, steering.hooks()):
        found = cached_logits(bridge.original_model, IDS)
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=ATOL)
    with torch.no_grad(), hooked(bridge, steering.for_prompt(IDS.shape[1] - 3)):
        torch.testing.assert_close(bridge(IDS)[:, -3:], wanted, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("site", SITES)
def test_alpha_0_and_other_heads_are_exact(model: Any, site: Any) -> None:
    with torch.no_grad():
        base = model(IDS)
        with vectors_at(site).steering(0.0).applied(model):
            assert torch.equal(model(IDS), base)
    if site != "z":
        return
    one = vectors_at("z").heads([(LAYER, 2)], n_heads=4)
    seen: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any) -> None:
        seen["z"] = act.clone()

    point = site_point("z", LAYER)
    with torch.no_grad(), hooked(model, [(point, keep)]):
        model(IDS)
    before = seen["z"]
    with torch.no_grad(), hooked(model, [*one.steering(2.0).hooks(), (point, keep)]):
        model(IDS)
    after = seen["z"]
    assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert (after[:, :, 2] - before[:, :, 2]).abs().max() > 1e-2


@pytest.mark.parametrize("family", CONFIGS)
def test_other_families(family: str) -> None:
    """Norms after attention (Gemma), parallel blocks (Pythia), mixtures of experts."""
    bridge = architecture(family)
    for site in SITES:
        width = site_width(bridge, site)
        raw = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        v = gr.SteeringVectors.from_raw(raw, [LAYER], torch.ones(1), site=site)
        v.require_match(bridge)
        if site == "resid_mid" and site_point(site, LAYER) not in bridge.hook_dict:
            with pytest.raises(KeyError, match="hook_resid_mid"), v.steering(1.0).applied(bridge):
                pass
            continue
        seen: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen[len(seen)] = act.flatten(2).clone()  # type: ignore[index]

        point = site_point(site, LAYER)
        with torch.no_grad():
            with hooked(bridge, [(point, keep)]):
                base = bridge(IDS)
            with hooked(bridge, [*v.steering(1.0, operator="add").hooks(), (point, keep)]):
                moved = bridge(IDS)
        before, after = seen.values()
        torch.testing.assert_close(after - before, v.directions[0].expand_as(before), atol=1e-5, rtol=1e-4)
        assert (moved - base).abs().max() > 1e-3


def test_a_residual_that_is_no_sum_is_refused(bridge: Any) -> None:
    """The attention output is not what reaches the residual stream: the edit would mean another thing."""

    def doubled(act: Tensor, hook: Any) -> Tensor:
        return 2 * act

    hooks = edit_hooks("resid_mid", LAYER, lambda act, hook: act + 1)
    with (
        pytest.raises(ValueError, match="resid_mid"),
        hooked(bridge, [*hooks, (site_point("attn_out", LAYER), doubled)]),
    ):
        bridge(IDS)


def test_what_does_not_fit_is_refused(bridge: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match="site='middle'"):
        vectors_at("middle")
    with pytest.raises(ValueError, match="site='middle'"):
        gr.hooks.steer_hook(0, direction(), 1.0, site="middle")  # type: ignore[arg-type]
    wide = gr.SteeringVectors.from_raw(torch.ones(1, 48), [LAYER], torch.ones(1), site="z")
    with pytest.raises(ValueError, match="width 32"):
        wide.require_match(bridge)
    with pytest.raises(ValueError, match="does not fit activations"), wide.steering(1.0).applied(bridge):
        bridge(IDS)
    for heads, n_heads in (([(LAYER, 4)], 4), ([], 4), ([(LAYER, 0)], None), ([(LAYER, 0)], 5)):
        with pytest.raises(ValueError, match="head"):
            vectors_at("z").heads(heads, n_heads=n_heads)
    with pytest.raises(ValueError, match="site"):
        vectors_at("attn_out").heads([(LAYER, 0)], n_heads=4)
    with pytest.raises(ValueError, match="different sites"):
        vectors_at("attn_out") + vectors_at("mlp_out")
