"""The explorer on SmolLM2: what it shows is what plain Hugging Face hooks generate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grains_tl as gr
from tests.exploring.test_page import data_of

LAYER, ALPHA, N_NEW = 18, 0.15, 10
PROMPTS = ["The hotel was near the station and", "All in all, the meal was"]


@pytest.mark.real
def test_a_page_of_smollm2_shows_what_a_plain_hook_generates(smollm2: SimpleNamespace, tmp_path: Path) -> None:
    model, tokenizer = smollm2.bridge, smollm2.tokenizer
    vectors = gr.build_vectors(model, gr.load_bundled("sentiment", "build")[:6], recipe="caa", layers=[LAYER])
    page = gr.explore(
        model, vectors, PROMPTS, static=tmp_path / "page.html", alphas=[ALPHA], max_new_tokens=N_NEW, attribution=None
    )
    data = data_of(page)
    views = data["vectors"][0]["layers"][0]["views"]
    assert data["alphas"] == [0.0, ALPHA] and page.stat().st_size < 100_000

    step = ALPHA * vectors.resid_norms[0] * vectors.directions[0]

    def steer(module: Any, args: Any, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        moved = resid + step
        moved = moved * resid.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hf_model = model.original_model
    block = hf_model.model.layers[LAYER]
    for prompt, (plain, steered) in zip(PROMPTS, views, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        for view, hook in ((plain, None), (steered, steer)):
            handle = block.register_forward_hook(hook) if hook else None
            try:
                out = hf_model.generate(**ids, max_new_tokens=N_NEW, do_sample=False)
            finally:
                if handle:
                    handle.remove()
            text = tokenizer.decode(out[0], skip_special_tokens=True)[len(prompt) :]
            assert "".join(token for token, _ in view["steered"]) == text
        assert steered["changed"] and not plain["changed"]
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    assert torch.isfinite(model(ids)).all()  # and the model is as it was
