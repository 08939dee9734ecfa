"""Modes of autograd and states of a model that change numbers: the same numbers as ever, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.baselines.lora import lora_adapter
from grains_tl.models.state import autograd, require_ready
from tests.conftest import KINDS, tiny_model

ATOL = 2e-5  # float32 scores of some nats, another attention kernel
WITH_GRADIENTS = [
    "gradient_x_input",
    "integrated_gradients",
    "sequential_ig",
    "discretized_ig",
    "expected_gradients",
    "smoothgrad",
    "attention_aware",
]
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}
RECORD = gr.PreferencePair("the film was good", " and we liked it", " but they hated this film")


def scores(model: Any, method: Any) -> Tensor:
    return gr.attribute(model, RECORD, method=method, n_steps=3).scores


# -- modes of autograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [*WITH_GRADIENTS, "leave_one_out"])
def test_attribution_is_the_same_in_every_mode(kind: str, mode: str, method: str) -> None:
    model = tiny_model(kind)
    want = scores(model, method)
    with MODES[mode]():
        got = scores(model, method)
    assert torch.equal(got, want)
    assert not got.is_inference()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_attribution_is_the_same_with_weights_that_want_gradients(kind: str, mode: str) -> None:
    model = tiny_model(kind)
    want = scores(model, "gradient_x_input")
    model.requires_grad_(True)
    with MODES[mode]():
        assert torch.equal(scores(model, "gradient_x_input"), want)
        assert not gr.score_pairs(model, [RECORD]).requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_patching_and_checks_work_in_every_mode(mode: str, model: Any, pairs: list[gr.PreferencePair]) -> None:
    hooks = gr.hooks.steer_hook(1, torch.arange(32.0) - 16, 2.0)

    def effects() -> Tensor:
        frame = gr.analysis.patch(model, pairs, hooks, method="gradient")
        return torch.tensor(frame["effect"].to_numpy())

    want = effects()
    with MODES[mode]():
        assert torch.equal(effects(), want)
        table = gr.check_model(model)
    assert bool(table["ok"].all()), table


@pytest.mark.parametrize("mode", MODES)
def test_vectors_built_in_any_mode_serve_gradients_later(mode: str, model: Any, pairs: list[gr.PreferencePair]) -> None:
    want = gr.build_vectors(model, pairs, top_k=1, method="gradient_x_input", progress=False)
    with MODES[mode]():
        vectors = gr.build_vectors(model, pairs, top_k=1, method="gradient_x_input", progress=False)
        inside = vectors.hooks(0.5, [1], operator="ablate")
    assert torch.equal(vectors.directions, want.directions)
    for hooks in (inside, vectors.hooks(0.5, [1], operator="ablate")):
        with model.hooks(fwd_hooks=hooks):
            assert bool(torch.isfinite(scores(model, "gradient_x_input")).all())


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_trained_or_refused(mode: str, bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    pytest.importorskip("peft")
    refused = pytest.raises(ValueError, match="inference_mode") if mode == "inference_mode" else nullcontext()
    with MODES[mode](), refused, lora_adapter(bridge, pairs, n_epochs=1) as run:
        assert all(loss > 0 for loss in run.losses)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_made_in_inference_mode_are_refused_only_where_gradients_are_needed(kind: str) -> None:
    want = tiny_model(kind)
    with torch.inference_mode():
        model = tiny_model(kind)
    assert torch.equal(scores(model, "leave_one_out"), scores(want, "leave_one_out"))
    with pytest.raises(ValueError, match="load the model outside"):
        scores(model, "gradient_x_input")


def test_a_model_loaded_in_inference_mode_has_ordinary_weights(tmp_path: Any) -> None:
    with torch.inference_mode():
        model = gr.load_model("tiny-vlm")
    assert not any(p.is_inference() for p in model.parameters())
    with autograd(model):
        assert torch.is_grad_enabled()


# -- states of the model ----------------------------------------------------------------------------------------------


def numbers(model: Any, pairs: list[gr.PreferencePair]) -> dict[str, Any]:
    vectors = gr.build_vectors(model, pairs[:2], top_k=1, progress=False)
    hooks = gr.hooks.steer_hook(1, torch.arange(32.0) - 16, 5.0)
    return {
        "scores": gr.score_pairs(model, pairs),
        "gradients": scores(model, "gradient_x_input"),
        "directions": vectors.directions,
        "sweep": torch.tensor(
            gr.sweep(model, vectors, pairs, layers=[0, 1], alphas=[0.5], progress=False)["margin"].to_numpy()
        ),
        "texts": gr.generate(model, ["the film was", "the soup was cold and the food"], hooks, max_new_tokens=6),
    }


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, value in want.items():
        if isinstance(value, Tensor):
            assert torch.allclose(got[name], value, atol=ATOL), name
        else:
            assert got[name] == value, name


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "train mode without dropout": lambda hf: hf.train(),
    "gradient checkpointing in eval mode": lambda hf: hf.gradient_checkpointing_enable(),
    "no cache by default": lambda hf: setattr(hf.config, "use_cache", False),
    "no cache in generation": lambda hf: setattr(hf.generation_config, "use_cache", False),
    "static cache in generation": lambda hf: setattr(hf.generation_config, "cache_implementation", "static"),
    "beams and penalties": lambda hf: hf.generation_config.update(num_beams=3, repetition_penalty=1.5),
    "sdpa": lambda hf: hf.set_attn_implementation("sdpa"),
    "eager": lambda hf: hf.set_attn_implementation("eager"),
    "hidden states in the output": lambda hf: setattr(hf.config, "output_hidden_states", True),
    "inputs that want gradients": lambda hf: hf.enable_input_require_grads(),
}


@pytest.mark.parametrize("state", HARMLESS)
def test_harmless_states_give_the_same_numbers(state: str, bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model()
    HARMLESS[state](model.original_model)
    assert_same(numbers(model, pairs), numbers(bridge, pairs))


def checkpointing(hf: Any) -> None:
    hf.train()
    hf.gradient_checkpointing_enable()


REFUSED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "gradient checkpointing": (checkpointing, "llama", "eval"),
    "dropout": (lambda hf: hf.train(), "gpt2", "eval"),
    "dropout in one block": (lambda hf: hf.transformer.h[1].train(), "gpt2", "eval"),
    "flex attention": (lambda hf: setattr(hf.config, "_attn_implementation", "flex_attention"), "llama", "sdpa"),
    "tuples": (lambda hf: setattr(hf.config, "return_dict", False), "llama", "return_dict = True"),
}
CALLS: dict[str, Callable[[Any, list[gr.PreferencePair]], Any]] = {
    "score_pairs": lambda m, pairs: gr.score_pairs(m, pairs),
    "attribute": lambda m, pairs: gr.attribute(m, pairs[0]),
    "attribute by gradients": lambda m, pairs: gr.attribute(m, pairs[0], method="gradient_x_input"),
    "build_vectors": lambda m, pairs: gr.build_vectors(m, pairs, top_k=1, progress=False),
    "generate": lambda m, pairs: gr.generate(m, ["the film"], max_new_tokens=2),
    "compare_attributions": lambda m, pairs: gr.compare_attributions(m, pairs, methods=["leave_one_out"]),
    "caa_differences": lambda m, pairs: gr.baselines.caa_differences(
        m, gr.tokens.tokenize_pairs(m, pairs), layers=[1], resid_norms=torch.ones(1)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", REFUSED)
def test_states_that_change_numbers_are_refused(state: str, call: str, pairs: list[gr.PreferencePair]) -> None:
    change, architecture, advice = REFUSED[state]
    model = tiny_model("bridge", architecture)
    change(model.original_model)
    with pytest.raises(ValueError, match=advice):
        CALLS[call](model, pairs)


def test_a_refused_state_is_the_failing_line_of_check_model() -> None:
    model = tiny_model()
    checkpointing(model.original_model)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        require_ready(model)
    table = gr.check_model(model)
    assert not bool(table["ok"].iloc[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_rest_of_the_package_works_in_every_mode(mode: str, bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    def everything() -> dict[str, Any]:
        heads = gr.baselines.head_vectors(bridge, pairs, n_heads=2)
        vectors = gr.baselines.baseline_vectors(bridge, pairs, ["caa", "icv"], layers=[1])
        return {**numbers(bridge, pairs), **{name: v.directions for name, v in vectors.items()}, "heads": str(heads)}

    want = everything()
    with MODES[mode]():
        assert_same(everything(), want)
