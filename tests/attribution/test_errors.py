"""Errors of single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.attribution import paths
from grains_tl.attribution.gradient_methods import IntegratedGradients
from grains_tl.attribution.store import attribute_records
from tests.attribution.test_attribution_methods import PlainField, ends


def test_errors_of_tokens_show_where_the_gap_does_not() -> None:
    """Two tokens whose errors cancel in the sum: the gap is 0, each score is wrong, and ``errors`` says so."""
    x, start = torch.ones(2, 1), torch.full((2, 1), 0.1)
    field = PlainField(lambda p: torch.cos(8 * p[0]).sum() - torch.cos(8 * p[1]).sum() + p[0].sum(), x)
    found = paths.adaptive_path(field, ends(field, start), budget=33, tolerance=0.05)[0]
    change = float(torch.cos(torch.tensor(8.0)) - torch.cos(torch.tensor(0.8)))
    true_error = (found.scores - torch.tensor([change + 0.9, -change])).abs()
    assert abs(found.gap or 0) < 1e-4 and bool((true_error > 0.01).all())
    assert found.errors is not None and bool((found.errors >= true_error).all())


@pytest.mark.parametrize("budget", [3, 5, 9, 33])
def test_errors_bound_smooth_functions_and_vanish_for_squares(budget: int) -> None:
    x = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    start = torch.full((2, 2), 0.1)
    curved = PlainField(lambda p: torch.exp(p.sum(-1)).sum(), x)
    found = paths.adaptive_path(curved, ends(curved, start), budget=budget, tolerance=1e-9)[0]
    true_error = (found.scores - (torch.exp(x.sum(-1)) - torch.exp(start.sum(-1)))).abs()
    assert found.errors is not None and bool((found.errors >= true_error - 1e-6).all())
    square = PlainField(lambda p: p.square().sum(), x)  # its rate is linear: every rule here is exact
    exact = paths.adaptive_path(square, ends(square, start), budget=budget, tolerance=1e-9)[0]
    assert exact.errors is not None and float(exact.errors.max()) < 1e-5


def test_errors_survive_a_checkpoint(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs[:2])
    method = IntegratedGradients(n_steps=9)
    first, again = (
        attribute_records(bridge, tokenized, method, checkpoint=tmp_path / "scores.jsonl") for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert a.errors is not None and b.errors is not None
        torch.testing.assert_close(a.errors, b.errors)
        assert a.errors.shape == a.scores.shape
    assert gr.attribute(bridge, pairs[0], method="leave_one_out").errors is None


@pytest.mark.usefixtures("unchecked")
def test_a_list_of_records_names_the_function_for_lists(model: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match=r"list of 4; attribute takes one record.*attribute_all"):
        gr.attribute(model, pairs[:4])  # type: ignore[arg-type]
