"""Models in several places: blocks on disk go through the same hooks as blocks on another GPU, which no test here has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import grains_tl as gr
from grains_tl.finding.workload import random_vectors
from grains_tl.models import building as gr_models
from tests.conftest import TL_MAJOR, tiny_hf, tiny_model, tiny_tokenizer

ATOL = 1e-5  # the same kernels on the same numbers


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny Llama, booted by TransformerLens with its last two blocks on disk."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("offloaded")
    tiny_hf().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    tokenizer = tiny_tokenizer()
    gr_models.keep_tokenizer_as_is(tokenizer, "tiny")
    options = {"device_map": places, "offload_folder": str(folder / "disk"), "dtype": torch.float32}
    try:
        return TransformerBridge.boot_transformers(str(folder / "model"), tokenizer=tokenizer, **options)
    except TypeError:
        pytest.skip("this TransformerLens has no offload_folder")


@pytest.mark.parametrize("method", ["leave_one_out", "gradient_x_input"])
def test_build_and_sweep(offloaded: Any, pairs: list[gr.PreferencePair], method: Any) -> None:
    whole = tiny_model()
    assert offloaded.original_model.model.layers[2].mlp.down_proj.weight.device.type == "meta"  # it is on disk
    built = [gr.build_vectors(m, pairs, top_k=1, method=method, progress=False) for m in (whole, offloaded)]
    torch.testing.assert_close(built[1].raw, built[0].raw, atol=ATOL, rtol=0)
    swept = [gr.sweep(m, built[0], pairs, progress=False) for m in (whole, offloaded)]
    torch.testing.assert_close(
        torch.tensor(swept[1]["effect"].to_numpy()), torch.tensor(swept[0]["effect"].to_numpy()), atol=ATOL, rtol=0
    )


# -- accelerate: weights that come for each pass ------------------------------------------------------------------------
def placed(way: str, hf_model: Any, folder: Path) -> Any:
    """The model with all its weights elsewhere, in one of the ways that transformers and accelerate have."""
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    if way == "cpu_offload":
        return accelerate.cpu_offload(hf_model, execution_device=cpu)
    if way == "disk_offload":
        return accelerate.disk_offload(hf_model, str(folder / "offloaded"), execution_device=cpu)
    hf_model.save_pretrained(folder / "model")
    places: dict[str, Any] = {"": "disk"}
    if way == "device_map":
        names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"]
        places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=str(folder / "disk"), dtype=torch.float32
    )


def numbers_of(model: Any, pairs: list[gr.PreferencePair], vectors: gr.SteeringVectors) -> dict[str, Any]:
    """Attribution with and without gradients, builds, a sweep, steered scores and steered generation."""
    with gr.settings(progress=False):
        built = {name: gr.build_vectors(model, pairs, recipe=name).raw for name in ("margin_gradient", "caa")}
        return {
            "leave_one_out": gr.attribute(model, pairs[0]).scores,
            "integrated_gradients": gr.attribute(model, pairs[1], method="integrated_gradients", n_steps=4).scores,
            "build": gr.build_vectors(model, pairs, top_k=1).raw,
            **built,
            "scores": gr.score_pairs(model, pairs, vectors.hooks(0.3, [1])),
            "sweep": torch.tensor(gr.sweep(model, vectors, pairs)["effect"].to_numpy()),
            "texts": gr.generate(model, ["the film was", "this hotel"], vectors.hooks(0.3, [1]), max_new_tokens=5),
        }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["device_map", "all on disk", "cpu_offload", "disk_offload"])
def test_offloaded_models_give_the_numbers_of_the_whole_one(
    way: str, tied: bool, tmp_path: Path, pairs: list[gr.PreferencePair]
) -> None:
    def fresh() -> Any:
        hf_model = tiny_hf()
        if tied:
            hf_model.config.tie_word_embeddings = True
            hf_model.tie_weights()
        return hf_model

    whole = gr.wrap_model(fresh(), tiny_tokenizer())
    vectors = random_vectors(whole)
    wanted = numbers_of(whole, pairs, vectors)
    elsewhere = placed(way, fresh(), tmp_path)
    if TL_MAJOR < 4 and way != "device_map":
        with pytest.raises(ValueError, match="lm_head.*offloaded.*TransformerLens 3"):
            gr.wrap_model(elsewhere, tiny_tokenizer())
        return
    model = gr.wrap_model(elsewhere, tiny_tokenizer())
    assert any(p.device.type == "meta" for p in model.original_model.parameters())
    found = numbers_of(model, pairs, vectors)
    assert found.pop("texts") == wanted.pop("texts")
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, atol=ATOL, rtol=0)
    checks = gr.check_model(model)
    assert checks["ok"].all(), checks.query("not ok")
    assert "offloaded" in checks["detail"][0]


def test_weights_that_nothing_brings_in_are_refused() -> None:
    config = tiny_hf().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    model = gr.wrap_model(empty, tiny_tokenizer())
    with pytest.raises(ValueError, match="meta device"):
        gr.score_pairs(model, [gr.PreferencePair(prompt="the film was", chosen=" good", rejected=" bad")])


#: Runs in a process of its own, with a model that is three times as large in float32 as it may be.
LARGE = """
import json, re, sys, threading, time
from pathlib import Path
import torch, accelerate, transformers
import grains_tl as gr
from grains_tl.finding.workload import random_vectors
from tests.conftest import tiny_tokenizer
from tests.models.test_devices import large_pairs
folder, peak = Path(sys.argv[1]), [0]
def resident():  # of one's own, without pages of files
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.003)
torch.set_num_threads(1)
from transformer_lens.model_bridge.sources import _bridge_builder
before = resident()
threading.Thread(target=watch, daemon=True).start()
hf_model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "model", dtype=torch.float32, device_map={"": "disk"}, offload_folder=str(folder / "disk")
)
model = gr.wrap_model(hf_model, tiny_tokenizer())
vectors, pairs = random_vectors(model), large_pairs()
with gr.settings(progress=False, max_tokens=256):
    found = {
        "leave_one_out": gr.attribute(model, pairs[0]).scores.tolist(),
        "caa": gr.build_vectors(model, pairs, recipe="caa").raw.tolist(),
        "scores": gr.score_pairs(model, pairs, vectors.hooks(0.2, [3])).tolist(),
        "texts": gr.generate(model, [p.prompt for p in pairs], vectors.hooks(0.3, [3]), max_new_tokens=4),
    }
    found["mib"] = peak[0] - before
    found["gradient"] = gr.attribute(model, pairs[0], method="gradient_x_input").scores.tolist()
print(json.dumps(found))
"""


def large_pairs() -> list[gr.PreferencePair]:
    texts = ("the film was", "this hotel was cold and")
    return [gr.PreferencePair(prompt=text, chosen=" good", rejected=" bad") for text in texts]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_model_larger_than_the_memory_it_may_have(tmp_path: Path) -> None:
    """135 MiB of weights in float32; what needs no gradients must stay below 45 MiB."""
    pytest.importorskip("accelerate")
    if TL_MAJOR < 4:
        pytest.skip("TransformerLens 3 refuses an offloaded unembedding")
    config = tiny_hf().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 10
    config.head_dim, config.num_key_value_heads, config.initializer_range = 128, 4, 0.05
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf_model.save_pretrained(tmp_path / "model", max_shard_size="8MB")
    model = gr.wrap_model(hf_model.float().requires_grad_(False), tiny_tokenizer())
    weights = sum(p.numel() for p in hf_model.parameters()) * 4 / 2**20
    assert weights > 3 * 42
    # blocks of the C library's heap would keep the memory of weights that are gone
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mib"] < weights / 3
    pairs, vectors = large_pairs(), random_vectors(model)
    with gr.settings(progress=False, max_tokens=256):
        assert found["texts"] == gr.generate(
            model, [str(p.prompt) for p in pairs], vectors.hooks(0.3, [3]), max_new_tokens=4
        )
        wanted = {
            "leave_one_out": gr.attribute(model, pairs[0]).scores,
            "caa": gr.build_vectors(model, pairs, recipe="caa").raw,
            "scores": gr.score_pairs(model, pairs, vectors.hooks(0.2, [3])),
            "gradient": gr.attribute(model, pairs[0], method="gradient_x_input").scores,
        }
    for name, values in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name]), values, atol=1e-4, rtol=1e-4)
