"""On a GPU the package gives the CPU's numbers. Skipped where torch sees no GPU.

``GRAINS_TL_TEST_DEVICE=cuda python -m pytest tests -m "not real"`` runs the other unit tests there as well; those that
compare with tensors of their own need a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.demo.scene_captions import caption_kl, caption_split, kl_meter
from grains_tl.demo.scene_records import caption_pairs
from grains_tl.demo.scene_skills import answer_logprobs, describe
from grains_tl.models._scenes import QUESTIONS
from grains_tl.models.tiny_vlm import question_text
from grains_tl.vectors import KLOptimal, Trained
from tests.conftest import tiny_model
from tests.records.test_record_kinds import CALLS, LAYERS, Made, parts

DEVICE = os.environ.get("GRAINS_TL_GPU", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"
)

#: Methods by name with the options that keep them short, and that draw nothing that a device could change.
METHODS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "leave_k_out": {"n_steps": 16},
    "gradient_x_input": {},
    "integrated_gradients": {"n_steps": 4},
    "discretized_ig": {"n_steps": 4},
    "sequential_ig": {"n_steps": 4},
    "expected_gradients": {"n_steps": 4},
    "smoothgrad": {"n_steps": 4},
    "attention_aware": {},
}
RECIPES = (
    "grains",
    "margin_gradient",
    "caa",
    "icv",
    "prompt_mean",
    "random_direction",
    "shuffled_labels",
    "random_tokens",
)
TEXTS = ["the film was good and the room was warm .", "we liked the soup and they liked the hotel room ."]

#: More calls, with the model, its records and vectors; each gives numbers or texts.
MORE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "generate": lambda m, r, made: gr.generate(
        m, [p.prompt for p in r], made.vectors.steering(0.2, 1), max_new_tokens=5
    ),
    "generate by hooks": lambda m, r, made: gr.generate(
        m, [p.prompt for p in r], made.vectors.hooks(0.2, [1]), max_new_tokens=5
    ),
    "sweep": lambda m, r, made: gr.sweep(m, made.vectors, r, layers=[1, 2], alphas=[0.1, 0.3], progress=False),
    "costs": lambda m, r, made: gr.evaluate.text_costs(m, [made.vectors.steering(0.2, 1)], TEXTS),
    "texts": lambda m, r, made: gr.evaluate.generation_quality(
        m, TEXTS, made.vectors.hooks(0.2, [1]), max_new_tokens=4
    ),
    "choices": lambda m, r, _: gr.inference.score_choices(
        m, [gr.MultipleChoice("the film was", (" good", " very bad"), (True, False))]
    ),
    "lens": lambda m, r, made: gr.analysis.lens_logits(m, made.vectors),
    "probes": lambda m, r, _: gr.analysis.fit_probes(
        gr.analysis.residuals(m, [*r, *r], layers=LAYERS, readout="response_end"), LAYERS, n_folds=2
    ),
    "bare hooks": lambda m, r, made: torch.cat(
        [
            m.run_with_hooks(
                torch.tensor([[3, 4, 5, 6]]).to(next(m.parameters()).device), fwd_hooks=made.vectors.hooks(0.2, [layer])
            ).cpu()
            for layer in (1, 2)
        ]
    ),
    "compare attributions": lambda m, r, _: gr.compare_attributions(
        m, r, methods=["gradient_x_input", "leave_one_out"], progress=False
    ).drop(columns=["seconds", "relative_seconds"]),
    "heads": lambda m, r, _: gr.baselines.head_vectors(m, [*r, *r], n_heads=2),
    "with a system prompt": lambda m, r, _: gr.baselines.with_system_prompt(r, "good"),
    "check": lambda m, r, _: gr.check_model(m),
}


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """A tiny Llama on the CPU and the same on the GPU."""
    return tiny_model(device="cpu"), tiny_model(device=DEVICE)


def assert_same(given: Any, expected: Any) -> None:
    """Numbers within the round-off of another device, everything else alike."""
    one, other = parts(given), parts(expected)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert a.device.type == "cpu" or b.device.type != "cpu"
            torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=2e-3, atol=2e-3, equal_nan=True)
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a.cpu(), b.cpu())
        elif isinstance(b, (float, np.floating)):
            assert a == pytest.approx(b, rel=2e-3, abs=2e-3, nan_ok=True)
        elif isinstance(b, (str, int, bool, pd.Index)) or b is None:
            assert a == b


@pytest.mark.parametrize("name", METHODS)
def test_attribution(both: tuple[Any, Any], pairs: list[gr.PreferencePair], name: str) -> None:
    cpu, gpu = (gr.attribute(m, pairs[0], method=name, **METHODS[name]) for m in both)
    torch.testing.assert_close(gpu.scores, cpu.scores, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert gpu.tokens == cpu.tokens


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(both: tuple[Any, Any], pairs: list[gr.PreferencePair], name: str) -> None:
    cpu, gpu = (gr.build_vectors(m, pairs, recipe=name, layers=LAYERS, progress=False) for m in both)
    torch.testing.assert_close(gpu.directions, cpu.directions, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gpu.resid_norms, cpu.resid_norms, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("recipe", [KLOptimal(texts=TEXTS, n_samples=40), Trained(texts=TEXTS, n_steps=3)])
def test_recipes_that_draw(both: tuple[Any, Any], pairs: list[gr.PreferencePair], recipe: Any) -> None:
    """Drawn tokens can differ where two devices round differently; the directions stay close."""
    cpu, gpu = (gr.build_vectors(m, [*pairs, *pairs], recipe=recipe, layers=[1], progress=False) for m in both)
    assert float(torch.nn.functional.cosine_similarity(cpu.directions, gpu.directions).min()) > 0.9


@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_calls(both: tuple[Any, Any], pairs: list[gr.PreferencePair], name: str) -> None:
    call = {**CALLS, **MORE}[name]
    cpu, gpu = (call(m, pairs, Made(m, pairs)) for m in both)
    assert_same(gpu, cpu)


def test_vectors_move_between_devices(
    both: tuple[Any, Any], pairs: list[gr.PreferencePair], tmp_path: Any, bridge: Any
) -> None:
    """A file written beside a GPU steers on a CPU, and vectors on either device steer a model on the other."""
    cpu, gpu = both
    vectors = gr.build_vectors(gpu, pairs, recipe="caa", layers=[1])
    vectors.save(tmp_path / "v.safetensors")
    read = gr.load_vectors(tmp_path / "v.safetensors")
    expected = gr.score_pairs(cpu, pairs, read.hooks(0.3, [1]))
    for own in (read, read.to(DEVICE)):
        torch.testing.assert_close(gr.score_pairs(gpu, pairs, own.hooks(0.3, [1])), expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(gr.score_pairs(cpu, pairs, own.hooks(0.3, [1])), expected, rtol=2e-3, atol=2e-3)


def test_alpha_zero_is_exact(both: tuple[Any, Any], pairs: list[gr.PreferencePair]) -> None:
    gpu = both[1]
    vectors = gr.build_vectors(gpu, pairs, recipe="caa", layers=[1])
    assert torch.equal(gr.score_pairs(gpu, pairs, vectors.hooks(0.0, [1])), gr.score_pairs(gpu, pairs))


@pytest.mark.parametrize("name", ["tiny-vlm"])
def test_pictures(name: str) -> None:
    """Captions, their KL, answers, attribution over patches and a steered caption of the vision model in the package."""
    found = []
    for device in ("cpu", DEVICE):
        model = gr.load_model(name, device=device)
        part = caption_split(model, "test", 6)
        records = caption_pairs("build", 3)
        vectors = gr.build_vectors(model, records, recipe="caa", layers=[1])
        meter = kl_meter(model, part, 4)
        scores = gr.attribute(model, records[0], method="gradient_x_input").scores
        texts = [question_text(QUESTIONS["caption"][0])] * 2
        answers = answer_logprobs(model, texts, part.pictures[:2], without_image=True)
        kl = caption_kl(model, meter, vectors.hooks(0.3, [1]))
        found.append((part.said, scores, answers, kl, describe(model, part.pictures, vectors.hooks(0.3, [1]))))
    assert_same(list(found[1]), list(found[0]))
