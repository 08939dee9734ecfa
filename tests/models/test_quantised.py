"""Models with 8- and 4-bit linear layers on a CPU: what works, and gradients that are right or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import grains_tl as gr
from tests.conftest import tiny_tokenizer
from tests.helpers.architectures import LLAMA

KINDS = ["torchao-int8", "torchao-int8-dynamic", "torchao-int8-dynamic-lm_head", "bitsandbytes-8", "bitsandbytes-4"]
# bitsandbytes packs 4-bit weights for the processor in the first run without a graph; its layers then give no gradient
FORWARD_ONLY = {"torchao-int8-dynamic", "torchao-int8-dynamic-lm_head", "bitsandbytes-4"}
# 4 bits round weights by up to a tenth; 8 bits by less than a hundredth
NEAR = {"bitsandbytes-4": 0.5}


def plain() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).eval().requires_grad_(False)


def quantised(kind: str, folder: Path) -> Any:
    package, _, rest = kind.partition("-")
    pytest.importorskip(package)
    if package == "bitsandbytes":
        plain().save_pretrained(folder)
        options: dict[str, Any] = {"load_in_8bit": True} if rest == "8" else {"load_in_4bit": True}
        if rest == "4":
            options["bnb_4bit_compute_dtype"] = torch.float32
        config = transformers.BitsAndBytesConfig(**options)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu"
        ).eval()
    from torchao import quantization as ao

    model = plain()
    dynamic = rest.startswith("int8-dynamic")
    config = ao.Int8DynamicActivationInt8WeightConfig() if dynamic else ao.Int8WeightOnlyConfig()

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and (name != "lm_head" or rest.endswith("lm_head"))

    ao.quantize_(model, config, filter_fn=chosen)
    return model


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    hf = quantised(request.param, tmp_path_factory.mktemp("quantised"))
    return request.param, gr.wrap_model(hf, tiny_tokenizer(), name=request.param)


@pytest.fixture(scope="module")
def full() -> Any:
    return gr.wrap_model(plain(), tiny_tokenizer())


def test_scores_caching_and_steering(made: Any, full: Any, pairs: list[gr.PreferencePair]) -> None:
    kind, model = made
    near = NEAR.get(kind, 0.15)
    base, wanted = gr.score_pairs(model, pairs), gr.score_pairs(full, pairs)
    assert float((base - wanted).abs().max() / wanted.abs().max()) < near
    vectors = gr.build_vectors(full, pairs, recipe="caa")
    assert float(gr.build_vectors(model, pairs, recipe="caa").cosine(vectors).min()) > 1 - near
    hooks = vectors.hooks(0.5, [1])
    moved, moved_full = gr.score_pairs(model, pairs, hooks) - base, gr.score_pairs(full, pairs, hooks) - wanted
    assert float((moved - moved_full).norm() / moved_full.norm()) < 2 * near
    assert torch.equal(gr.score_pairs(model, pairs, vectors.hooks(0.0, [1])), base)
    assert gr.generate(model, ["the film was"], hooks, max_new_tokens=3)


def test_gradients_are_right_or_refused(made: Any, full: Any, pairs: list[gr.PreferencePair]) -> None:
    """Through an unquantised residual stream they would flow around the layers and look like gradients."""
    kind, model = made
    if kind in FORWARD_ONLY:
        for call in (
            lambda: gr.attribute(model, pairs[0], method="gradient_x_input"),
            lambda: gr.build_vectors(model, pairs, recipe="margin_gradient"),
        ):
            with pytest.raises(ValueError, match=r"no gradient passes.*leave_one_out"):
                call()
        assert gr.attribute(model, pairs[0], method="leave_one_out").scores.isfinite().any()
        return
    found = gr.build_vectors(model, pairs, recipe="margin_gradient")
    assert float(found.cosine(gr.build_vectors(full, pairs, recipe="margin_gradient")).min()) > 0.98
    assert gr.attribute(model, pairs[0], method="gradient_x_input").scores.isfinite().any()


def test_check_model_runs_to_its_end(made: Any) -> None:
    """Rounding of activations, by row or by batch, may cost the checks that compare two runs."""
    kind, model = made
    frame = gr.check_model(model).set_index("check")
    assert frame.loc["gradients at the attribution point", "ok"] == (kind not in FORWARD_ONLY)
    exact = ["eval mode", "hook points", "an edit at a layer changes nothing before it"]
    assert frame.loc[[*exact, "steering at alpha 0 and after a run is bit-exact"], "ok"].all()


def test_packed_weights_of_torch_are_refused_and_steered_plainly(full: Any, pairs: list[gr.PreferencePair]) -> None:
    hf = torch.ao.quantization.quantize_dynamic(plain(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"packed.*torch_hooks"):
        gr.wrap_model(hf, tiny_tokenizer())
    ids = torch.tensor([[3, 5, 8, 12, 6]])
    vectors = gr.build_vectors(full, pairs, recipe="caa")
    base, wanted = hf(ids).logits, full(ids)
    with vectors.torch_hooks(hf, 0.5, 1):
        moved = hf(ids).logits - base
    steered = full.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.5, [1])) - wanted
    assert float((moved - steered).norm() / steered.norm()) < 0.3
    assert torch.equal(hf(ids).logits, base)
