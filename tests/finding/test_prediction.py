"""Predictions from building records: gradients by hand, calibration by hand, nothing promised where labels are mixed up."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.finding.agreement import agreement_table, halves, record_gradients
from grains_tl.finding.prediction import Calibration, calibration, calibration_table, promise
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.recipes import recipe_of
from tests.helpers.planted import LAYER, planted_model, planted_pairs


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model("bridge")


def records_of(model: Any, pairs: Any, layers: tuple[int, ...] = (0, LAYER)) -> BuildingRecords:
    return BuildingRecords(model, tokenize_pairs(model, pairs), layers)


def test_the_slope_is_the_change_of_the_margin_for_a_small_step(planted: Any) -> None:
    """Vectors of one half, steered by a small alpha on the other half: the measured change over the step."""
    pairs = planted_pairs()[:8]
    records = records_of(planted, pairs)
    found = halves(records, record_gradients(records), recipe_of("caa"), n_splits=1)
    order = np.random.default_rng(0).permutation(8).tolist()
    sides = [sorted(order[:4]), sorted(order[4:])]
    changes = []
    for own, other in (sides, sides[::-1]):
        vectors = gr.build_vectors(planted, [pairs[i] for i in own], recipe="caa", layers=[LAYER])
        ends = []
        for sign in (1, -1):
            logprobs = gr.score_pairs(planted, [pairs[i] for i in other], vectors.hooks(sign * 0.01, [LAYER]))
            ends.append(logprobs[:, 0] - logprobs[:, 1])
        changes.append((ends[0] - ends[1]) / (0.02 * vectors.resid_norms[0]))
    assert float(found.slope[1]) == pytest.approx(torch.cat(changes).mean().item(), rel=0.02)
    assert found.agree[1] == pytest.approx((torch.cat(changes) > 0).double().mean().item())


def test_prediction_of_a_vector_that_steers(model: Any, planted: Any) -> None:
    table = gr.finding.predict_effect(planted, planted_pairs()[:12], layers=[0, LAYER], recipe="caa")
    row = table.set_index("layer").loc[LAYER]
    assert row["low"] < row["predicted"] < row["high"] and row["predicted"] > 0
    assert row["linear"] == pytest.approx(row["slope"] * row["alpha"] * resid_norm(planted), rel=1e-4)
    assert row["kl"] == pytest.approx(0.05, rel=0.15) and row["n"] == 12
    again = gr.finding.predict_effect(planted, planted_pairs()[:12], layers=[0, LAYER], recipe="caa")
    assert table.equals(again)
    axes = gr.plotting.plot_prediction(table, {LAYER: 1.5}).axes[0]
    assert axes.get_lines()[-1].get_xydata().tolist() == [[pytest.approx(row["linear"]), 1.5]]
    assert len(gr.finding.predict_effect(model, planted_pairs()[:4], layers=[1])) == 1  # on HookedTransformer too


def resid_norm(model: Any) -> float:
    return float(records_of(model, planted_pairs()[:12], (LAYER,)).resid_norms[0])


def test_mixed_up_labels_promise_nothing(planted: Any) -> None:
    """Over many draws of labels the first-order effect is about zero, and for the true labels it is not."""
    pairs, rng = planted_pairs(), random.Random(0)
    true = agreement_table(records_of(planted, pairs))
    slopes = []
    for _ in range(8):
        mixed = [p if rng.random() < 0.5 else gr.PreferencePair(p.prompt, p.rejected, p.chosen) for p in pairs]
        slopes.append(agreement_table(records_of(planted, mixed))["slope"].to_numpy())
    assert (np.abs(np.mean(slopes, axis=0)) < 0.25 * true["slope"].to_numpy()).all()


def test_calibration_by_hand() -> None:
    linear = np.array([0.5, 1.0, 2.0, 4.0])
    table = pd.DataFrame({"linear": linear, "effect": 0.5 * linear, "family": list("abcd")})
    found = Calibration.of(table)
    assert found.factor == pytest.approx(0.5) and found.low == pytest.approx(0) and found.high == pytest.approx(0)
    # of two families the one is judged by the other's factor: 1 and 2 nats a nat, residuals -1/1.25 and +1/1.25
    found = Calibration.of(
        pd.DataFrame({"linear": [1.0, 1.0], "effect": [1.0, 2.0], "family": ["a", "b"]}), level=0.999
    )
    assert (found.factor, found.low, found.high) == pytest.approx((1.5, -0.8, 0.8), abs=2e-3)


def test_the_interval_holds_for_families_that_were_not_seen() -> None:
    """Simulated: every family has a factor of its own; 80 % of the cells of new families lie in the interval."""
    rng = np.random.default_rng(0)

    def cells(n_families: int) -> pd.DataFrame:
        linear, factor = rng.normal(0, 2, (n_families, 10)), rng.normal(0.7, 0.2, (n_families, 1))
        effect = factor * linear + (0.25 + np.abs(linear)) * rng.normal(0, 0.2, linear.shape)
        family = np.repeat(np.arange(n_families), 10)
        return pd.DataFrame({"linear": linear.ravel(), "effect": effect.ravel(), "family": family})

    inside = []
    for _ in range(40):
        found, new = Calibration.of(cells(15)), cells(10)
        _, low, high = found.predict(new["linear"].to_numpy())
        inside.append(((low < new["effect"]) & (new["effect"] < high)).mean())
        assert found.factor == pytest.approx(0.7, abs=0.25)
    assert np.mean(inside) == pytest.approx(0.8, abs=0.04)


def test_the_table_that_ships_has_many_sets() -> None:
    table = calibration_table()
    assert table["set"].nunique() >= 12 and table["family"].nunique() >= 8 and table["recipe"].nunique() >= 2
    assert table["set"].str.contains("shuffled").any()
    assert np.isfinite(table[["linear", "effect"]].to_numpy()).all()
    assert 0.2 < calibration().factor < 1.5 and calibration().n == len(table)


def test_a_search_prints_the_promise(planted: Any) -> None:
    pairs = planted_pairs()
    found = gr.find_vector(planted, pairs, ["caa", "random_direction"], layers=[0, LAYER], n_draws=2, n_examples=0)
    (line,) = [line for line in found.verdict.splitlines() if "building records alone" in line]
    assert f"at layer {found.best.layers[0]}" in line and "80% interval" in line
    assert promise(records_of(planted, pairs[:3]), LAYER, 0.05, ["the film was good"]) == ""  # too few to halve


def test_bad_calls_are_refused(planted: Any, unchecked: None) -> None:
    pairs = planted_pairs()[:6]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"pairs": pairs[:3]}, "3 building records"),
        ({"layers": [9]}, "9"),
        ({"kl": -1}, "kl=-1"),
        ({"recipe": "cca"}, "cca"),
    ]
    for wrong, words in bad:
        with pytest.raises(ValueError, match=words):
            gr.finding.predict_effect(**{"model": planted, "pairs": pairs, "layers": [0], **wrong})
