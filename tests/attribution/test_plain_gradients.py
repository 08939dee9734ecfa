"""Gradients through a bridge's own Hugging Face modules: those of the bridge, and no trace afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grains_tl as gr
from grains_tl.attribution import field as fields
from grains_tl.attribution.field import ModelField, Run, fixed, in_order, real_inputs
from grains_tl.attribution.sharing import shares_prompts
from tests.conftest import tiny_model
from tests.helpers.architectures import CONFIGS, architecture
from tests.models.test_plain_blocks import tree


def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every component of the bridge runs."""
    monkeypatch.setattr(fields, "runs_plain", lambda model: False)


def sampled(field: ModelField) -> list[tuple[float, Tensor]]:
    """f and its gradient half way to zero and at the input of every record."""
    points = real_inputs(field)[0]
    runs = [Run(i, make) for i, p in enumerate(points) for make in (fixed(p / 2), None)]
    found = in_order(field.sample(runs, gradient=True))
    return [(s.value, s.gradient) for s in found if s.gradient is not None]


def agree(plain: list[tuple[float, Tensor]], general: list[tuple[float, Tensor]]) -> None:
    assert len(plain) == len(general) > 0
    for (value, gradient), (wanted, wanted_gradient) in zip(plain, general, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4 * float(wanted_gradient.abs().max()))


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_bridge(
    name: str, layer: int | None, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture(name)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    shared = shares_prompts(model, tokenized, "sum")
    field = ModelField(model, tokenized, layer=layer, shared=shared)
    before = tree(model)
    plain = sampled(field)
    assert tree(model)[: len(before)] == before
    wrapped(monkeypatch)
    agree(plain, sampled(field))


def test_the_wrappers_are_gone_in_a_pass_with_gradients(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model()
    tokenized = gr.tokens.tokenize_pairs(model, pairs[:1])
    seen: list[str] = []

    def look(act: Tensor, hook: Any) -> None:
        layers = model.original_model.model.layers
        seen.append(f"{type(layers[1]).__name__} {isinstance(layers[1].self_attn.q_proj, nn.Linear)}")

    field = ModelField(model, tokenized, extra_hooks=lambda: [("blocks.0.hook_resid_post", look)])
    list(field.sample([Run(0, None)], gradient=True))
    assert seen == ["LlamaDecoderLayer True"]


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"])
def test_a_users_hooks_take_part(name: str, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    field = ModelField(model, gr.tokens.tokenize_pairs(model, pairs))
    without = sampled(field)
    with model.hooks(fwd_hooks=[(name, lambda act, hook: act * 1.5)]):
        plain = sampled(field)
        wrapped(monkeypatch)
        agree(plain, sampled(field))
    assert max(float((a - b).abs().max()) for (_, a), (_, b) in zip(plain, without, strict=True)) > 1e-3


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "attention_aware", "discretized_ig"])
def test_scores_are_those_of_the_bridge(
    method: str, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    plain = gr.attribution.attribute_all(model, pairs, method=method, n_steps=5, progress=False)
    wrapped(monkeypatch)
    for a, b in zip(
        plain, gr.attribution.attribute_all(model, pairs, method=method, n_steps=5, progress=False), strict=True
    ):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)


def test_everything_is_back_after_an_exception(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model()
    tokenized = gr.tokens.tokenize_pairs(model, pairs)

    def fails(act: Tensor, hook: Any) -> None:
        raise RuntimeError("inside")

    field = ModelField(model, tokenized, extra_hooks=lambda: [("blocks.2.hook_resid_pre", fails)])
    sampled(ModelField(model, tokenized))
    before = tree(model)
    with pytest.raises(RuntimeError, match="inside"):
        list(field.sample([Run(0, None)], gradient=True))
    assert tree(model) == before
