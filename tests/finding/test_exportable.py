"""The addition that costs the same KL: against KL computed from plain logits, and against hand-made cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.costs import cost_rows
from tests.helpers.oracles import edited, steered

TEXTS = ["the film was great and we liked it", "no the hotel was bad . they hated the food", "it is one and two"]


def vectors(n_layers: int = 3) -> gr.SteeringVectors:
    raw = torch.randn(n_layers, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(n_layers), torch.full((n_layers,), 4.0), {"method": "test"})


def kl_of(hf: Any, model: Any, layer: int, step: torch.Tensor, renorm: bool) -> float:
    """KL(steered || base) per predicted token, from a Hugging Face model with plain hooks."""
    total, n = 0.0, 0
    for ids in cost_rows(model, TEXTS):
        row = torch.tensor([ids])
        with torch.no_grad():
            base = hf(row).logits[0, :-1].log_softmax(-1)
            with edited(hf, layer, lambda act: steered(act, step, renorm=renorm)):
                new = hf(row).logits[0, :-1].log_softmax(-1)
        total += float((new.exp() * (new - base)).sum())
        n += len(ids) - 1
    return total / n


@pytest.mark.parametrize("alpha", [0.3, -1.0])
def test_the_addition_costs_as_much(model: Any, hf: Any, pairs: Any, alpha: float) -> None:
    v = vectors()
    found = gr.finding.as_add(model, v.steering(alpha, 1), pairs, texts=TEXTS)
    assert found.steering.operator == "add" and found.steering.layers == (1,)
    assert np.sign(found.steering.alpha) == np.sign(alpha)
    wanted = kl_of(hf, model, 1, alpha * 4.0 * v.directions[1], renorm=True)
    got = kl_of(hf, model, 1, float(found.steering.alpha) * 4.0 * v.directions[1], renorm=False)
    assert got == pytest.approx(wanted, rel=0.02)
    table = found.table.set_index("steering")
    assert table.loc["as chosen", "kl"] == pytest.approx(wanted, rel=1e-3)
    assert table.loc["same KL", "kl"] == pytest.approx(got, rel=1e-3)
    assert table.loc["as chosen", "lost"] == 0
    # the effects are those that scoring gives
    base, chosen, added = (gr.score_pairs(model, pairs, s) for s in (None, v.steering(alpha, 1), found.steering))
    change = [float(((s[:, 0] - s[:, 1]) - (base[:, 0] - base[:, 1])).mean()) for s in (chosen, added)]
    assert table.loc["as chosen", "effect"] == pytest.approx(change[0], abs=1e-3)
    assert table.loc["same KL", "effect"] == pytest.approx(change[1], abs=1e-3)
    assert table.loc["same KL", "lost"] == pytest.approx(change[1] - change[0], abs=1e-3)
    assert found.verdict.count("\n") == 2 and "same KL" not in found.verdict
    assert "<table" in found._repr_html_()


def test_several_layers_and_no_records(bridge: Any) -> None:
    found = gr.finding.as_add(bridge, vectors().steering(0.3, [0, 2]), texts=TEXTS)
    kl = found.table.set_index("steering")["kl"]
    assert kl["same KL"] == pytest.approx(kl["as chosen"], rel=0.011)
    assert "effect" not in found.table and "give pairs" in found.verdict


def test_what_is_refused(bridge: Any, pairs: Any) -> None:
    for steering in (
        vectors().steering(0.3, 1, operator="add"),
        vectors().steering(0.0, 1),
        vectors().steering(1.0, 1, operator="ablate"),
    ):
        with pytest.raises(ValueError, match="add_renorm"):
            gr.finding.as_add(bridge, steering, pairs)
    with pytest.raises(ValueError, match="at least 2"):
        gr.finding.as_add(bridge, vectors().steering(0.3, 1), pairs[:1])
