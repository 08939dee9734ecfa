"""Exports: read back with the formats' own readers, and compared with plain PyTorch hooks on the Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.models import building as gr_models_loading
from grains_tl.models import running as gr_models_running
from grains_tl.vectors.export import export_gguf, export_hf, steps, vllm_interventions
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer

LOGIT_ATOL = 1e-4  # float32 sums in another order, logits of a few units
IDS = torch.tensor([[1, 3, 12, 9, 10, 7, 22]])


def vectors(layers: tuple[int, ...] = (0, 1, 2), d_model: int = 32) -> gr.SteeringVectors:
    raw = torch.randn(len(layers), d_model, generator=torch.Generator().manual_seed(1))
    return gr.SteeringVectors.from_raw(raw, layers, torch.linspace(3.0, 5.0, len(layers)), {"method": "test"})


def plain_logits(hf: Any, blocks: Any, rows: dict[int, Tensor]) -> Tensor:
    """The Hugging Face model with PyTorch hooks that add the rows to the blocks' outputs."""

    def add(row: Tensor) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

        return hook

    handles = [blocks[layer].register_forward_hook(add(row)) for layer, row in rows.items()]
    try:
        with torch.no_grad():
            return hf(IDS).logits
    finally:
        for handle in handles:
            handle.remove()


def tiny_of(hf_model: Any) -> Any:
    tokenizer = tiny_tokenizer()
    gr_models_loading.keep_tokenizer_as_is(tokenizer, "tiny")
    return gr_models_loading.bridge_of(hf_model.eval().requires_grad_(False), tokenizer, "tiny")


def test_steps_are_what_the_hook_adds() -> None:
    v = vectors()
    zero = torch.zeros(1, 1, 32)
    for layer, row in steps(v, 0.3, [0, 2]).items():
        ((_, fn),) = v.hooks(0.3, [layer], operator="add")
        torch.testing.assert_close(row, fn(zero, hook=None)[0, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "add_renorm"}, "only add a vector"),
        ({"operator": "ablate"}, "only add a vector"),
        ({"alpha": 0.0}, "other than 0"),
        ({"alpha": float("nan")}, "finite"),
        ({"layers": None}, "name the layers"),
        ({"layers": [7]}, "7"),
    ],
)
def test_refused(change: dict[str, Any], message: str, bridge: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": [1], "alpha": 0.2, **change}
    with pytest.raises(ValueError, match=message):
        export_gguf(vectors(), tmp_path / "v.gguf", **options)
    with pytest.raises(ValueError, match=message):
        vllm_interventions(vectors(), **options)
    with pytest.raises(ValueError, match=message):
        export_hf(bridge, vectors(), tmp_path / "hf", **options)
    assert list(tmp_path.iterdir()) == []


# -- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_holds_one_float_row_per_layer(tmp_path: Path) -> None:
    v = vectors()
    reader = GGUFReader(export_gguf(v, tmp_path / "new" / "v.gguf", layers=[1, 2], alpha=0.5))
    said = {name: field.parts[field.data[0]] for name, field in reader.fields.items()}
    assert said["general.architecture"].tobytes() == b"controlvector"
    assert said["controlvector.model_hint"].tobytes() == b"llama"
    assert said["controlvector.layer_count"].tolist() == [2]
    assert json.loads(said["grains_tl.manifest"].tobytes()) == {"method": "test", "alpha": 0.5}
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert set(found) == {"direction.1", "direction.2"}
    for layer in (1, 2):
        assert found[f"direction.{layer}"].dtype == torch.float32
        torch.testing.assert_close(found[f"direction.{layer}"], 0.5 * v.resid_norms[layer] * v.directions[layer])


def test_gguf_refuses_layer_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block 0"):
        export_gguf(vectors(), tmp_path / "v.gguf", layers=[0, 1])


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpoint_equals_hooks(architecture: str, tmp_path: Path) -> None:
    model, hf = tiny_model("bridge", architecture), tiny_hf(architecture)
    blocks = hf.model.layers if architecture == "llama" else hf.transformer.h
    v = vectors()
    rows = steps(v, 0.4, [0, 2])
    before = model(IDS)
    folder = export_hf(model, v, tmp_path / "steered", layers=[0, 2], alpha=0.4)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = loaded(IDS).logits
    expected = plain_logits(hf, blocks, rows)
    assert (expected - before).abs().max() > 100 * LOGIT_ATOL  # the steering does something
    torch.testing.assert_close(logits, expected, atol=LOGIT_ATOL, rtol=0)
    ours = model.run_with_hooks(IDS, fwd_hooks=v.hooks(0.4, [0, 2], operator="add"))
    torch.testing.assert_close(logits, ours, atol=LOGIT_ATOL, rtol=0)
    assert AutoTokenizer.from_pretrained(folder)("the film").input_ids == model.tokenizer("the film").input_ids
    assert torch.equal(model(IDS), before)  # the model itself is as it was


def test_checkpoint_can_be_loaded_and_steered_again(tmp_path: Path) -> None:
    v = vectors()
    once = export_hf(tiny_model(), v, tmp_path / "once", layers=[1], alpha=0.2)
    twice = export_hf(gr.load_model(str(once)), v, tmp_path / "twice", layers=[2], alpha=-0.3)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(twice)(IDS).logits
    hf = tiny_hf()
    expected = plain_logits(hf, hf.model.layers, steps(v, 0.2, [1]) | steps(v, -0.3, [2]))
    torch.testing.assert_close(logits, expected, atol=LOGIT_ATOL, rtol=0)


def small(config: type, **more: Any) -> Any:
    return config(
        vocab_size=45, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, **more,
    )  # fmt: skip


def test_architecture_without_a_bias_is_refused(tmp_path: Path) -> None:
    model = tiny_of(MistralForCausalLM(small(MistralConfig)))
    with pytest.raises(ValueError, match="MistralForCausalLM.*no bias after the MLP"):
        export_hf(model, vectors(), tmp_path / "hf", layers=[1], alpha=0.3)
    assert list(tmp_path.iterdir()) == []


def test_scaled_residual_is_refused(tmp_path: Path) -> None:
    model = tiny_of(GraniteForCausalLM(small(GraniteConfig, residual_multiplier=0.5)))
    with pytest.raises(ValueError, match="other logits than the hook"):
        export_hf(model, vectors(), tmp_path / "hf", layers=[1], alpha=0.3)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_needs_a_bridge_a_new_folder_and_its_own_vectors(model: Any, bridge: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_hf(bridge, vectors(), tmp_path / "full", layers=[1], alpha=0.3)
    with pytest.raises(ValueError, match="do not fit"):
        export_hf(bridge, vectors(d_model=31), tmp_path / "hf", layers=[1], alpha=0.3)
    if not gr_models_running.is_bridge(model):
        with pytest.raises(ValueError, match="expected a TransformerBridge, got a HookedTransformer"):
            export_hf(model, vectors(), tmp_path / "hf", layers=[1], alpha=0.3)


# -- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm_spec_does_what_the_hook_does(bridge: Any) -> None:
    specs = pytest.importorskip("transformer_lens.model_bridge.sources.vllm.intervention_specs")
    worker = pytest.importorskip("transformer_lens.model_bridge.sources.vllm.worker_extension")
    v = vectors()
    intervene = json.loads(json.dumps(vllm_interventions(v, layers=[0, 2], alpha=0.4)))
    assert set(intervene) == {"blocks.0.hook_out", "blocks.2.hook_out"}

    def as_the_worker(spec: Any) -> Any:
        return lambda act, hook: worker._apply_op(act, spec)

    fwd_hooks = [(n, as_the_worker(specs.validate_spec(n, spec, width=32))) for n, spec in intervene.items()]
    theirs = bridge.run_with_hooks(IDS, fwd_hooks=fwd_hooks)
    ours = bridge.run_with_hooks(IDS, fwd_hooks=v.hooks(0.4, [0, 2], operator="add"))
    torch.testing.assert_close(theirs, ours, atol=LOGIT_ATOL, rtol=0)


# -- shell ------------------------------------------------------------------------------------------------------------


def test_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v = vectors()
    stored = str(v.save(tmp_path / "v.safetensors"))
    checkpoint = export_hf(tiny_model(), v, tmp_path / "model", layers=[1], alpha=1e-6)  # a model in a folder
    common = ["export", "--vectors", stored, "--layer", "1"]
    assert main([*common, "--format", "gguf", "--out", str(tmp_path / "v.gguf")]) == 0
    assert [t.name for t in GGUFReader(tmp_path / "v.gguf").tensors] == ["direction.1"]
    assert main([*common, "--format", "vllm", "--alpha", "0.4", "--out", str(tmp_path / "v.json")]) == 0
    assert json.loads((tmp_path / "v.json").read_text()) == vllm_interventions(v, layers=[1], alpha=0.4)
    hf = ["--format", "hf", "--alpha", "0.4", "--model", str(checkpoint), "--out", str(tmp_path / "hf")]
    assert main([*common, *hf]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.mlp_bias
    capsys.readouterr()
    assert main([*common, "--format", "vllm", "--out", str(tmp_path / "no.json")]) == 2
    assert "--alpha" in capsys.readouterr().err
    assert main([*common, "--format", "gguf", "--operator", "add_renorm", "--out", str(tmp_path / "no.gguf")]) == 2
    assert "add_renorm" in capsys.readouterr().err
    assert not (tmp_path / "no.gguf").exists() and not (tmp_path / "no.json").exists()
