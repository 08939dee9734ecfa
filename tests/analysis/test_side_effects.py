"""Steerings on other sets of records, and several of them together: each cell is what scoring gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.analysis import side_effects
from grains_tl.analysis.besides import ANSWERS, REFUSAL, REFUSES
from grains_tl.evaluate.costs import cost_rows
from tests.helpers.oracles import plain_kl

TEXTS = ["the film was good and the room was warm .", "we liked the soup and they liked the hotel room ."]


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral texts that a tiny model can read."""
    monkeypatch.setattr("grains_tl.analysis.besides.neutral_texts", lambda n: TEXTS)


def steering(seed: int, operator: Any = "add") -> gr.Steering:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0)).steering(0.4, 1, operator=operator)


def change(model: Any, records: Any, hooks: Any) -> float:
    base, new = (gr.score_pairs(model, records, h) for h in (None, hooks))
    return float(((new[:, 0] - new[:, 1]) - (base[:, 0] - base[:, 1])).mean())


def test_every_cell_is_the_change_of_that_set(model: Any, pairs: Any) -> None:
    a, b = steering(0), steering(1, "rotate")
    sets = {"own": pairs[:2], "other": pairs[2:]}
    prompts = ["the film was", "we liked the soup"]
    table = side_effects(model, {"a": a, "b": b, "both": a + b}, sets, harmless=prompts)
    assert len(table) == 9 and set(table["measured_on"]) == {"own", "other", REFUSAL}
    refusals = [gr.PreferencePair(p, " " + REFUSES, " " + ANSWERS) for p in prompts]
    for name, one in {"a": a, "b": b, "both": a + b}.items():
        for place, records in {**sets, REFUSAL: refusals}.items():
            row = table[(table["built_on"] == name) & (table["measured_on"] == place)].iloc[0]
            assert row["effect"] == pytest.approx(change(model, records, one), abs=1e-3)
            assert row["n"] == len(records) and row["low"] <= row["effect"] <= row["high"] and row["kl"] > 0
    assert gr.plotting.plot_transfer(table) is not None


def test_interaction_is_what_the_sum_misses(model: Any, pairs: Any) -> None:
    a, b = steering(0), steering(1)
    table = side_effects(model, {"a": a, "b": b}, {"own": pairs}, together=True).set_index("built_on")
    alone = [change(model, pairs, one) for one in (a, b)]
    together = change(model, pairs, a + b)
    assert table.loc["together", "effect"] == pytest.approx(together, abs=1e-3)
    assert table.loc["interaction", "effect"] == pytest.approx(together - sum(alone), abs=2e-3)
    cosine = side_effects(model, {"a": a, "b": b}, {"own": pairs}, together=True).attrs["cosines"]
    assert cosine["cosine"].tolist() == pytest.approx([float(a.vectors[1].cosine(b.vectors[1])[0])])
    same = side_effects(model, {"a": a, "nothing": steering(1).scaled(0)}, {"own": pairs}, together=True).set_index(
        "built_on"
    )
    assert same.loc["interaction", "effect"] == 0.0 and same.loc["nothing", "effect"] == 0.0


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_before_anything_runs(pairs: Any) -> None:
    a: Any = steering(0)
    for steerings, sets in (
        ({}, {"s": pairs}),
        ({"a": a}, {}),
        ({"a": a}, {"s": []}),
        ({"a": a.vectors}, {"s": pairs}),
    ):
        with pytest.raises(ValueError):
            side_effects(None, steerings, sets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="harmless"):
        side_effects(None, {"a": a}, {"s": pairs}, harmless="one")  # type: ignore[arg-type]
    for steerings in ({"a": a}, {"a": a, "together": a}):
        with pytest.raises(ValueError, match="two names"):
            side_effects(None, steerings, {"s": pairs}, together=True)  # type: ignore[arg-type]


def test_steerings_can_be_compared_at_one_kl(model: Any, pairs: Any) -> None:
    """Each costs the KL, and its effects are those of the step at the alpha that the table names."""
    a, b = steering(0), steering(1).scaled(0.4)
    table = side_effects(model, {"a": a, "b": b, "both": a + b}, {"own": pairs}, kl=0.02).set_index("built_on")
    assert table["kl"].tolist() == pytest.approx([0.02] * 3, rel=0.2)
    for name, one in {"a": a, "b": b}.items():
        scaled = one.scaled(table.loc[name, "alpha"] / one.alpha)
        assert table.loc[name, "effect"] == pytest.approx(change(model, pairs, scaled), abs=1e-3)
        assert table.loc[name, "kl"] == pytest.approx(plain_kl(model, scaled, cost_rows(model, TEXTS)), rel=0.01)
    assert table.loc["both", "alpha"] != table.loc["both", "alpha"]
    joint = side_effects(model, {"a": a, "b": b}, {"own": pairs}, kl=0.02, together=True).set_index("built_on")
    assert joint.loc["a", "effect"] == pytest.approx(table.loc["a", "effect"], abs=1e-4)
    parts = [one.scaled(joint.loc[name, "alpha"] / one.alpha) for name, one in {"a": a, "b": b}.items()]
    assert joint.loc["together", "effect"] == pytest.approx(change(model, pairs, parts[0] + parts[1]), abs=1e-3)


def test_what_cannot_cost_a_kl_is_refused(model: Any, pairs: Any) -> None:
    a: Any = steering(0)
    shut = gr.hooks.FunctionGate(lambda resid: resid[..., 0] > 1e9, layer=0)
    never = a.vectors.steering(0.4, 1, gate=shut)
    for given, kl, message in (
        ({"a": a}, 0.0, "kl=0"),
        ({"a": a}, -1.0, "kl=-1"),
        ({"a": a, "nothing": a.scaled(0)}, 0.02, "'nothing'.*do nothing"),
        ({"a": a, "shut": never}, 0.02, "was not reached: 'shut' costs 0"),
    ):
        with pytest.raises(ValueError, match=message):
            side_effects(model, given, {"own": pairs}, kl=kl)
