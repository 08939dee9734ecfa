"""The fidelity benchmark on a tiny model: engines that are here agree, differences are seen, what is missing is said."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from benchmarks import fidelity
from benchmarks.fidelity_peer import ENGINES
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer


@pytest.fixture
def job(tmp_path: Path) -> fidelity.Job:
    raw = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    vectors = gr.SteeringVectors.from_raw(raw, (0, 2), torch.full((2,), 4.0))
    tiny_hf().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = fidelity.Job(
        tiny_model("bridge"), vectors.steering(0.4, [0, 2], operator="add"), ([1, 3, 5, 8], [1, 9, 10]), tmp_path
    )
    fidelity.write_input(made)
    return made


def test_engines_that_are_here_agree(job: fidelity.Job) -> None:
    reference = fidelity.ours(job)
    assert np.abs(reference["steered_0"] - reference["base_0"]).max() > 0.01
    assert fidelity.compared(fidelity.torch_hooks(job), reference)["with"] < 1e-4
    found, version = fidelity.elsewhere("plain hooks", fidelity.sys.executable, job)
    figures = fidelity.compared(found, reference)
    assert figures["without"] < 1e-4 and figures["with"] < 1e-4 and version
    if util.find_spec("lm_eval") is not None:
        assert fidelity.compared(fidelity.lm_eval_steered(job), reference)["with"] < 1e-4


def test_a_wrong_layer_would_be_seen(job: fidelity.Job) -> None:
    reference = fidelity.ours(job)
    steering = job.steering
    other = gr.SteeringVectors(
        steering.vectors.directions, (0, 1), steering.vectors.magnitudes, steering.vectors.resid_norms
    )
    moved = fidelity.Job(job.model, other.steering(0.4, [0, 1], operator="add"), job.ids, job.folder)
    figures = fidelity.compared(fidelity.ours(moved), reference)
    assert figures["without"] == 0 and figures["with"] > 0.01


def test_what_is_not_there_is_said(job: fidelity.Job) -> None:
    reference = fidelity.ours(job)
    for engine in ENGINES:
        package = fidelity.PACKAGES[engine].replace("-", "_")
        if util.find_spec(package) is None:
            figures = fidelity.figures_of(engine, job, None, reference)
            assert "not installed" in figures["left_out"] and engine in figures["left_out"]
    broken = fidelity.figures_of("repeng", job, fidelity.sys.executable, reference)
    if util.find_spec("repeng") is None:
        assert "repeng" in broken["left_out"]
    shown: dict[str, Any] = {
        "engines": {"a": {"left_out": "no"}, "b": {"package": "p", "version": "1", "without": 0.0, "with": 2e-3}}
    }
    assert fidelity.table(shown).splitlines()[2:] == ["| a | not run: no | |", "| b (p 1) | 0.0e+00 | 2.0e-03 |"]


def test_the_figures_that_are_kept_are_those_of_the_docs() -> None:
    kept = json.loads(fidelity.LAST.read_text("utf-8"))["engines"]
    page = (fidelity.LAST.parents[3] / "docs" / "how-to" / "export.md").read_text("utf-8")
    for row in kept.values():
        for figure in (row["without"], row["with"]):
            said = "0" if figure == 0 else f"{figure:.1e}".replace("e-0", "e-")
            assert f"| {said} |" in page, row
