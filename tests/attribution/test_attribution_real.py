"""Attribution on SmolLM2: the default path converges, the paper's does not; the linearised model conserves f."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import grains_tl as gr
from tests.conftest import KINDS

pytestmark = pytest.mark.real


@pytest.fixture(params=KINDS)
def real(request: pytest.FixtureRequest, smollm2: SimpleNamespace) -> Any:
    """SmolLM2 as every class that this TransformerLens has."""
    return getattr(smollm2, request.param)


def test_integrated_gradients_converge_by_default_and_not_from_zero(smollm2: SimpleNamespace) -> None:
    records = gr.tokens.tokenize_pairs(smollm2.bridge, gr.load_bundled("sentiment", "build")[::40])
    found = gr.attribution.attribute_all(smollm2.bridge, records, method="integrated_gradients", n_steps=64)
    assert np.median([a.relative_gap for a in found]) < 0.05 and max(a.steps or 0 for a in found) <= 64
    zero = gr.attribution.attribute_all(
        smollm2.bridge, records[:2], method="integrated_gradients", reference="zero", nodes="gauss_legendre", n_steps=8
    )
    assert not any(a.converged for a in zero)


def test_attention_aware_scores_add_up_to_f(real: Any) -> None:
    """SmolLM2 has no biases and the responses are one token: conservation through 30 linearised blocks."""
    record = gr.load_bundled("sentiment", "build")[0]
    a = gr.attribute(real, record, method="attention_aware")
    assert float(a.scores.sum()) == pytest.approx(a.objective, abs=2e-3)
    assert a.objective == pytest.approx(gr.attribute(real, record, method="gradient_x_input").objective, abs=1e-3)
