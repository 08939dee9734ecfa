"""The report on a gate: rates, what is left of the effect, and what is saved, against numbers put together by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import grains_tl as gr
from grains_tl.analysis import gate_report
from grains_tl.hooks import FunctionGate, ProbeGate
from tests.hooks.test_gates import OTHERS, TARGETS, vectors

N_NEW = 5


def records() -> list[gr.PreferencePair]:
    return [gr.PreferencePair(prompt, " great", " awful") for prompt in TARGETS]


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
def test_figures_are_those_of_the_parts(model: Any, decide: Any) -> None:
    gate = ProbeGate.fit(model, TARGETS[::2], OTHERS[::2], 0, decide=decide)
    middle = float(np.median([float(x) for r in gate.readings(model, TARGETS) for x in r]))
    gate = replace(gate, threshold=middle)
    steering = vectors().steering(0.6, 1, gate=gate)
    found = gate_report(model, steering, records(), OTHERS, max_new_tokens=N_NEW)
    assert found["gated"].tolist() == [False, True] and found["n_neutral"].tolist() == [len(OTHERS)] * 2
    shares = {
        name: np.array([float((r > gate.threshold).float().mean()) for r in gate.readings(model, prompts)])
        for name, prompts in (("targets", TARGETS), ("neutral", OTHERS))
    }
    assert 0 < shares["targets"].mean() < 1
    for row, step in zip(found.to_dict("records"), (replace(steering, gate=None), steering), strict=True):
        margins = [x[:, 0] - x[:, 1] for x in (gr.score_pairs(model, records(), h) for h in (step, None))]
        change = (margins[0] - margins[1]).numpy()
        opened = shares["targets"] > 0 if row["gated"] else np.ones(len(TARGETS), dtype=bool)
        assert row["effect"] == pytest.approx(change.mean(), abs=1e-4) and row["n_open"] == opened.sum()
        assert row["effect_open"] == pytest.approx(change[opened].mean(), abs=1e-4)
        for name, prompts in (("targets", TARGETS), ("neutral", OTHERS)):
            share = shares[name].mean() if row["gated"] else 1.0
            assert row[f"fires_{name}"] == pytest.approx(share)
            assert row[f"fires_{name}_low"] <= share <= row[f"fires_{name}_high"]
            kl = gr.evaluate.generation_quality(model, prompts, step, max_new_tokens=N_NEW)["kl"]
            assert row[f"kl_{name}"] == pytest.approx(kl.mean(), abs=1e-5)
    if decide == "prompt_end":
        n = int(shares["targets"].sum())
        wanted = stats.binomtest(n, len(TARGETS)).proportion_ci(method="wilson")
        assert found["fires_targets_low"][1] == pytest.approx(wanted.low)
        assert found["fires_targets_high"][1] == pytest.approx(wanted.high)


def test_a_gate_that_never_opens_saves_everything(model: Any) -> None:
    steering = vectors().steering(0.6, 1, gate=FunctionGate(lambda resid: resid.norm(dim=-1) < 0, 0))
    _, gated = gate_report(model, steering, records()[:4], OTHERS[:3], max_new_tokens=N_NEW).to_dict("records")
    assert gated["effect"] == gated["kl_neutral"] == gated["kl_targets"] == gated["fires_neutral"] == 0
    assert gated["n_open"] == 0 and np.isnan(gated["effect_open"])


def test_what_has_no_such_gate_is_refused(bridge: Any, unchecked: None) -> None:
    wrong: Any = vectors().hooks(0.2, [1])
    for steering in (vectors().steering(0.2, 1), wrong):
        with pytest.raises(ValueError, match="ProbeGate"):
            gate_report(bridge, steering, records(), OTHERS)
    gate = ProbeGate(vectors().directions[0], 0)
    with pytest.raises(ValueError, match="0 neutral prompts"):
        gate_report(bridge, vectors().steering(0.2, 1, gate=gate), records(), [])
