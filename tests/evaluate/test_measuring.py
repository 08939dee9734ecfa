"""Every table comes from one loop: the same numbers whichever way they are asked for, and one KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl._util.stats import centred_interval, mean_interval, rank_correlation, tails
from grains_tl.evaluate.equal_cost import crossing
from grains_tl.evaluate.measuring import swings
from grains_tl.finding.measuring import alpha_at
from grains_tl.inference.objectives import kl_divergence


@pytest.fixture
def vectors(bridge: Any, pairs: list[gr.PreferencePair]) -> gr.SteeringVectors:
    return gr.build_vectors(bridge, pairs, recipe="caa", layers=[1])


def test_tables_and_tensors_hold_the_same_numbers(bridge: Any, pairs: list[Any], vectors: gr.SteeringVectors) -> None:
    settings = gr.evaluate.grid({"v": vectors}, [1], [-0.3, 0.3])
    base, steered = gr.evaluate.measure(bridge, pairs, settings)
    frame = gr.evaluate.record_effects(bridge, pairs, settings)
    change = (steered.double()[..., 0] - steered.double()[..., 1]) - (base.double()[:, 0] - base.double()[:, 1])
    assert frame["change"].tolist() == change.flatten().tolist()
    _, swing = swings(bridge, gr.tokens.tokenize_pairs(bridge, pairs), [vectors], 0.3)
    assert swing[0].tolist() == pytest.approx(gr.evaluate.two_sided(frame)["swing"].tolist(), abs=1e-5)


def test_a_record_that_is_given_twice_is_measured_both_times(
    bridge: Any, pairs: list[Any], vectors: gr.SteeringVectors
) -> None:
    settings = gr.evaluate.grid({"v": vectors}, [1], [0.3])
    twice = [pairs[0], *pairs, pairs[0]]
    base, steered = gr.evaluate.measure(bridge, twice, settings)
    assert base[0].tolist() == pytest.approx(base[-1].tolist(), abs=1e-4)
    assert gr.evaluate.record_effects(bridge, twice, settings)["change"].iloc[-1] == pytest.approx(
        float(steered[0, 0, 0] - steered[0, 0, 1] - base[0, 0] + base[0, 1]), abs=1e-4
    )


# Was a bug: measure handed NaN on where record_effects refused the model.
def test_a_broken_model_is_refused(bridge: Any, pairs: list[Any], vectors: gr.SteeringVectors) -> None:
    settings = gr.evaluate.grid({"v": vectors}, [1], [0.3])
    weight = next(iter(bridge.original_model.lm_head.parameters()))
    before = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            gr.evaluate.measure(bridge, pairs, settings)
    finally:
        weight.data.copy_(before)


def test_kl_against_torch() -> None:
    steered, base = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(base, steered, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(steered, base), wanted)


def test_intervals_against_scipy() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(size=12)
    mean, se, low, high = mean_interval(values, 0.9)
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 11, mean, se))
    assert (mean, se) == pytest.approx((values.mean(), stats.sem(values)))
    assert tails(0.95) == [0.025, 0.975]
    low, high = centred_interval(values, 3.0, 0.9)
    assert high - low == pytest.approx(np.subtract(*np.quantile(values, [0.95, 0.05])))


@pytest.mark.parametrize("budget", [0.005, 0.0225, 0.04, 1.0])
def test_where_a_kl_is_reached_is_the_same_in_tables_and_searches(budget: float) -> None:
    """Against interpolation by NumPy in the root of the KL."""
    alphas, kls = [0.1, 0.2, 0.4], [0.01, 0.04, 0.09]
    wanted = float(np.interp(budget**0.5, [0.0, *np.sqrt(kls)], [0.0, *alphas]))
    assert alpha_at(alphas, kls, budget) == pytest.approx(wanted, abs=1e-6)
    crossed = crossing(np.array([0.0, *kls]), budget)
    if budget > max(kls):
        assert crossed is None
    else:
        assert crossed is not None
        place, share = crossed
        steps = [0.0, *alphas]
        assert steps[place - 1] + share * (steps[place] - steps[place - 1]) == pytest.approx(wanted)


def test_rank_correlation_has_no_value_for_a_constant() -> None:
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))
    assert rank_correlation(np.array([1.0, 5.0, 3.0, 3.0]), np.array([0.0, 9.0, 4.0, 4.0])) == pytest.approx(1.0)
