"""Models in several places: blocks on disk go through the same hooks as blocks on another GPU, which no test here has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.models import building as gr_models
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer

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
