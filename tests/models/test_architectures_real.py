"""What gr.check_model says of SmolLM2 itself, on every class, and that docs/architectures.md says the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import grains_tl as gr
from tests.conftest import KINDS
from tests.models.test_architectures import said

pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", KINDS)
def test_smollm2(kind: str, smollm2: SimpleNamespace) -> None:
    frame = gr.check_model(getattr(smollm2, kind))
    assert len(frame) == 13
    assert set(frame.query("not ok")["check"]) == said("SmolLM2-135M-Instruct (trained)", kind), frame.to_string()
