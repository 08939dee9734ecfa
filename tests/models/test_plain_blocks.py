"""Generation without the bridge's wrappers: the same tokens as with them, and no trace afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grains_tl as gr
from grains_tl.inference import generation
from grains_tl.models.plain_blocks import plain_blocks, runs_plain
from tests.conftest import KINDS, tiny_model
from tests.helpers.architectures import CONFIGS, architecture

ATOL = 2e-5  # float32 logits of size 5 from another attention kernel
PROMPTS = ["the film was", "the soup was cold and the food", "we liked this hotel but"]
DIRECTION = torch.arange(32.0) - 16


def steering(layer: int = 1) -> Any:
    return gr.hooks.steer_hook(layer, DIRECTION, 4.0)


def scaled(name: str, by: float = 1.5) -> Any:
    return [(name, lambda act, hook: act * by)]


HOOKS: dict[str, Any] = {
    "none": [],
    "resid_post": steering(),
    "every layer": [hook for layer in range(3) for hook in steering(layer)],
    "resid_pre": scaled("blocks.1.hook_resid_pre"),
    "both ends": [*scaled("blocks.0.hook_resid_pre"), *steering(2)],
    "canonical names": [*scaled("blocks.1.hook_in"), *scaled("blocks.1.hook_out", 0.7)],
    "heads": scaled("blocks.1.attn.hook_z"),
    "attention out": scaled("blocks.1.hook_attn_out"),
    "mlp": [*scaled("blocks.0.hook_mlp_out"), *steering()],
    "embedding": scaled("hook_embed"),
    "final norm": scaled("ln_final.hook_normalized", 0.9),
    "only the answer": gr.hooks.steer_hook(1, DIRECTION, 4.0, positions="generated"),
}


@contextmanager
def wrapped() -> Iterator[None]:
    """The general path: every component of the bridge runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "runs_plain", lambda model: False)
        yield


def tree(model: Any) -> list[tuple[int, ...]]:
    """Every module of both trees with its children and its torch hooks, in order."""
    return [
        (id(m), *map(id, m._modules.values()), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in (*model.modules(), *model.original_model.modules())
    ]


def both_ways(model: Any, hooks: Any, **options: Any) -> tuple[list[str], list[str]]:
    plain = gr.generate(model, PROMPTS, hooks, max_new_tokens=8, **options)
    with wrapped():
        return plain, gr.generate(model, PROMPTS, hooks, max_new_tokens=8, **options)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.original_model(input_ids=ids).logits


@pytest.mark.parametrize("hooks", ["none", "every layer", "both ends", "heads"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_numbers_with_and_without_wrappers(name: str, hooks: str) -> None:
    model = architecture(name)
    ids = torch.tensor([[3, 5, 8, 12, 6, 20], [4, 9, 10, 11, 7, 30]])
    assert runs_plain(model)
    before = tree(model)
    with model.hooks(fwd_hooks=HOOKS[hooks]):
        want = logits(model, ids)
        with plain_blocks(model):
            got = logits(model, ids)
    assert torch.allclose(got, want, atol=ATOL), (got - want).abs().max()
    assert tree(model)[: len(before)] == before


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_text_with_and_without_wrappers(name: str, hooks: str) -> None:
    plain, general = both_ways(tiny_model("bridge", name), HOOKS[hooks])
    assert plain == general
    if hooks == "every layer":
        assert plain != both_ways(tiny_model("bridge", name), [])[0]


def test_the_same_draws_with_and_without_wrappers(bridge: Any) -> None:
    plain, general = both_ways(bridge, steering(), temperature=1.0, seed=3)
    assert plain == general


def test_wrappers_are_really_gone_where_no_hook_is() -> None:
    model = tiny_model()
    seen: list[str] = []
    hooks = [("blocks.1.hook_resid_post", lambda act, hook: seen.append(type(model.original_model.model).__name__))]
    with model.hooks(fwd_hooks=[*hooks, *scaled("blocks.2.attn.hook_z")]), plain_blocks(model):
        layers = model.original_model.model.layers
        assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer", "LlamaDecoderLayer", "BlockBridge"]
        assert isinstance(layers[0].self_attn.q_proj, nn.Linear)
        logits(model, torch.tensor([[3, 5, 8]]))
    assert len(seen) == 1


@pytest.mark.parametrize("hooks", ["resid_post", "heads"])
def test_everything_is_back_after_an_exception(hooks: str) -> None:
    model = tiny_model()
    assert runs_plain(model)
    before = tree(model)

    def fails(act: Tensor, hook: Any) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        gr.generate(model, PROMPTS, [*HOOKS[hooks], ("blocks.2.hook_resid_pre", fails)], max_new_tokens=3)
    assert tree(model) == before


def test_hooks_of_the_user_go_on_running() -> None:
    model = tiny_model()
    with model.hooks(fwd_hooks=[*steering(), *scaled("blocks.2.hook_mlp_out")]):
        plain, general = both_ways(model, scaled("blocks.0.hook_resid_post"))
    assert plain == general
    for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_v"):
        model.hook_dict[name].add_hook(lambda act, hook: act * -2.0)
        plain, general = both_ways(model, [])
        assert plain == general != both_ways(tiny_model(), [])[0]
        model.reset_hooks()


def test_torch_hooks_of_the_user_go_on_running() -> None:
    model = tiny_model()
    for module in (model.blocks[1].mlp, model.blocks[0]._original_component, model.original_model.model.layers[2]):
        handle = module.register_forward_hook(lambda module, args, out: -3.0 * out)
        plain, general = both_ways(model, steering())
        handle.remove()
        assert plain == general != both_ways(model, steering())[0]


def test_hooks_run_once_per_step_and_see_the_same(bridge: Any) -> None:
    shapes: list[list[tuple[int, ...]]] = []
    for _ in range(2):
        shapes.append([])
        record = [("blocks.1.hook_resid_post", lambda act, hook: shapes[-1].append(tuple(act.shape)))]
        if len(shapes) == 1:
            gr.generate(bridge, PROMPTS, record, max_new_tokens=4)
        else:
            with wrapped():
                gr.generate(bridge, PROMPTS, record, max_new_tokens=4)
    assert shapes[0] == shapes[1]
    assert all(shape[1] == 1 for shape in shapes[0][1:])


def test_comparing_is_done_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    runs: list[int] = []
    own = model.original_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(model.original_model, "forward", forward)
    assert runs_plain(model) and runs_plain(model)
    assert len(runs) == 3  # wrapped, plain, and plain with the last MLP at one place
    with torch.no_grad():
        model.blocks[1].mlp._original_component.down_proj._original_component.weight.mul_(1.1)
    assert runs_plain(model)
    assert len(runs) == 6


def test_a_bridge_whose_own_parts_have_changed_runs_as_it_is() -> None:
    model = tiny_model("bridge", "gpt2")
    assert runs_plain(model)
    query = model.blocks[0].attn.q._original_component
    query.weight.data.mul_(3.0)  # a view of the joint projection: both ways see it
    assert runs_plain(model)
    query.weight = nn.Parameter(query.weight.detach() * 3.0)
    assert not runs_plain(model)
    plain, general = both_ways(model, steering())
    assert plain == general


def test_folded_weights_run_as_they_are() -> None:
    model = tiny_model("bridge", "gpt2")
    before = runs_plain(model)
    model.enable_compatibility_mode(disable_warnings=True)
    plain, general = both_ways(model, steering())
    assert before and plain == general


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_take_part(name: str, pairs: list[gr.PreferencePair]) -> None:
    pytest.importorskip("peft")
    model = tiny_model("bridge", name)
    before = both_ways(model, [])[0]
    with gr.baselines.lora_adapter(model, pairs, n_epochs=8, learning_rate=0.05):
        plain, general = both_ways(model, [])
    assert plain == general != before
    assert both_ways(model, [])[0] == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_freed(kind: str) -> None:
    model = tiny_model(kind)
    assert runs_plain(model) == (kind == "bridge")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
