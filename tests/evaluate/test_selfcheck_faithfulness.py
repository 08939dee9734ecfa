"""The self-check passes on sound models and names what a broken one breaks; compared methods are judged by masking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.model_check import check_model
from grains_tl.faithfulness.compare import compare_attributions
from tests.conftest import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sound_models_pass_every_check(architecture: str) -> None:
    frame = check_model(tiny_model("bridge", architecture))
    assert frame["ok"].all(), frame[~frame["ok"]].to_string()


def test_hooked_and_bridge_pass_alike(model: Any) -> None:
    assert check_model(model)["ok"].all()


def test_a_model_with_nan_weights_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    failed = set(check_model(model).query("not ok")["check"])
    assert {"residual parts sum up", "gradients at the attribution point"} <= failed


def test_an_edit_that_leaks_backwards_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    # a hook point that reads the layer after its own
    monkeypatch.setattr(
        "grains_tl.evaluate.model_check.resid_post", lambda layer: f"blocks.{2 - layer}.hook_resid_post"
    )
    failed = set(check_model(model).query("not ok")["check"])
    assert "an edit at a layer changes nothing before it" in failed


def test_compared_methods_and_their_removal_effects(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    frame = compare_attributions(bridge, pairs, top_k=1, n_steps=4, n_draws=3, progress=False).set_index("method")
    assert list(frame.index) == ["leave_one_out", "integrated_gradients", "gradient_x_input", "random_tokens"]
    assert frame["relative_gap"].notna().tolist() == [False, True, False, False]
    assert frame.loc["gradient_x_input", "relative_seconds"] == 1.0
    # with one token a side, leave-one-out takes out exactly the token with the largest effect
    scores = [gr.attribute(bridge, p, method="leave_one_out") for p in pairs]
    largest = sum(float(a.scores[a.content].max().clamp(min=0)) for a in scores) / len(pairs)
    assert frame.loc["leave_one_out", "removed_chosen"] == pytest.approx(largest, abs=1e-5)
    others = frame.drop(index="leave_one_out")["removed_chosen"]
    assert others.max() <= largest + 1e-5


def test_comparison_refuses_bad_options_before_running(
    bridge: Any, pairs: list[gr.PreferencePair], unchecked: None
) -> None:
    with pytest.raises(ValueError, match="no methods"):
        compare_attributions(bridge, pairs, methods=[])
    with pytest.raises(ValueError, match="method='magic'"):
        compare_attributions(bridge, pairs, methods=["magic"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="top_k=99"):
        compare_attributions(bridge, pairs, top_k=99)


def test_comparing_goes_on_where_it_stopped(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    """The same table, seconds of both runs together, and nothing is attributed twice."""
    path = tmp_path / "kept.jsonl"
    options: dict[str, Any] = {"top_k": 1, "n_steps": 4, "n_draws": 1, "progress": False}
    whole = compare_attributions(bridge, pairs, **options)
    compare_attributions(bridge, pairs[:2], methods=["leave_one_out"], **options, checkpoint=path)
    before = path.read_text(encoding="utf-8").splitlines()
    frame = compare_attributions(bridge, pairs, **options, checkpoint=path)
    after = path.read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before and len(after) == 3 * len(pairs)
    timed = ["seconds", "relative_seconds"]
    pd.testing.assert_frame_equal(frame.drop(columns=timed), whole.drop(columns=timed), rtol=1e-3, atol=1e-4)
    assert bool((frame["seconds"][:3] > 0).all())
