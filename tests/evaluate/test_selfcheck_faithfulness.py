"""The self-check passes on sound models and names what a broken one breaks; compared methods are judged by masking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.attribution.gradient_methods import GradientXInput, IntegratedGradients
from grains_tl.attribution.removal_methods import LeaveOneOut
from grains_tl.evaluate.model_check import check_model
from grains_tl.faithfulness.compare import compare_attributions
from grains_tl.faithfulness.judging import Judging
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


METHODS = (LeaveOneOut(), IntegratedGradients(n_steps=4), GradientXInput())


def test_compared_methods_and_their_removal_effects(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    frame = compare_attributions(
        bridge, pairs, methods=METHODS, top_k=1, judging=Judging(n_draws=3), progress=False
    ).set_index("method")
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
    options: dict[str, Any] = {"top_k": 1, "judging": Judging(n_draws=1), "progress": False}
    whole = compare_attributions(bridge, pairs, methods=METHODS, **options)
    compare_attributions(bridge, pairs[:2], methods=["leave_one_out"], **options, checkpoint=path)
    before = path.read_text(encoding="utf-8").splitlines()
    frame = compare_attributions(bridge, pairs, methods=METHODS, **options, checkpoint=path)
    after = path.read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before and len(after) == 3 * len(pairs)
    timed = ["seconds", "relative_seconds"]
    pd.testing.assert_frame_equal(frame.drop(columns=timed), whole.drop(columns=timed), rtol=1e-3, atol=1e-4)
    assert bool((frame["seconds"][:3] > 0).all())


def test_keywords_of_the_last_release_give_the_same_table(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """``n_steps``, ``n_draws``, ... were keywords; the warning stands at the caller's line, where Python shows it."""
    given: dict[str, Any] = {"top_k": 1, "eval_pairs": pairs[2:], "progress": False}
    with pytest.warns(DeprecationWarning, match="next release; write") as said:
        old = compare_attributions(
            bridge, pairs[:2], n_steps=4, reference="zero", n_draws=2, seed=7, shares=[0.5], layer=1, alpha=0.4, **given
        )
    assert {str(w.message).partition("=")[0] for w in said} == {
        *("n_steps", "reference", "n_draws", "seed", "shares", "layer", "alpha")
    }
    assert {w.filename for w in said} == {__file__}
    methods = [LeaveOneOut(), IntegratedGradients(n_steps=4, reference="zero"), GradientXInput()]
    judging = Judging(n_draws=2, seed=7, shares=[0.5], layer=1, alpha=0.4)
    new = compare_attributions(bridge, pairs[:2], methods=methods, judging=judging, **given)
    timed = ["seconds", "relative_seconds"]
    pd.testing.assert_frame_equal(old.drop(columns=timed), new.drop(columns=timed))
    with pytest.raises(TypeError, match="n_jobs"):
        compare_attributions(bridge, pairs, n_jobs=2)


@pytest.mark.parametrize("bad", [{"n_draws": -1}, {"shares": [1.5]}, {"shares": []}, {"alpha": float("nan")}])
def test_settings_of_the_judge_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).rstrip("s")):
        Judging(**bad)


@pytest.mark.parametrize("old", ["masker", "baseline", "method_options"])
@pytest.mark.parametrize("call", ["attribute", "build_vectors"])
def test_warnings_about_old_keywords_stand_at_the_callers_line(
    call: str, old: str, bridge: Any, pairs: list[gr.PreferencePair]
) -> None:
    value = {"masker": "zero", "baseline": "zero", "method_options": {"nodes": "riemann"}}[old]
    records = pairs[0] if call == "attribute" else pairs[:2]
    with pytest.warns(DeprecationWarning, match=old) as said:
        getattr(gr, call)(bridge, records, method="integrated_gradients", n_steps=2, **{old: value})
    assert {w.filename for w in said if w.category is DeprecationWarning} == {__file__}
