"""Steps are scaled to one KL, from wherever they begin, and what they cost there is what hooks cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.costs import cost_rows
from grains_tl.evaluate.equal_kl import at_kl, kl_of
from tests.helpers.oracles import plain_kl

TEXTS = ["the film was good and the room was warm .", "we liked the soup and they liked the hotel room ."]
KL = 0.02


def vectors(seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0))


@pytest.mark.parametrize("begin", [1e-3, 0.1, 30.0])
def test_every_operator_gets_there_from_any_beginning(model: Any, begin: float) -> None:
    """Turning saturates and clipping ends at a level, so that their KL does not grow with the square of alpha."""
    made = [vectors().steering(begin, 1, operator=name) for name in ("add", "add_renorm", "rotate", "clip")]
    steps, spent = at_kl(model, made, KL, TEXTS)
    np.testing.assert_allclose(spent, KL, rtol=0.05)
    for step, price in zip(steps, spent, strict=True):
        assert plain_kl(model, step, cost_rows(model, TEXTS)) == pytest.approx(price, rel=1e-3)


def test_the_first_search_is_kept_where_it_is_near(model: Any) -> None:
    """Twice by the root of what is missing, as published figures were made."""
    step = vectors().steering(0.2, 1)
    (found,), _ = at_kl(model, [step], KL, TEXTS)
    for _ in range(2):
        step = step.scaled(float(np.sqrt(KL / kl_of(model, [step], TEXTS)[0])))
    assert found.alpha == pytest.approx(step.alpha, rel=0.01)


def test_steps_that_cost_nothing_are_not_scaled_on_and_on(model: Any) -> None:
    shut = gr.hooks.FunctionGate(lambda resid: resid[..., 0] > 1e9, layer=0)
    steps, spent = at_kl(model, [vectors().steering(0.2, 1, gate=shut), vectors().steering(0.2, 1)], KL, TEXTS)
    assert spent[0] == 0 and steps[0].alpha <= 0.2 * 25 and spent[1] == pytest.approx(KL, rel=0.05)
