"""The benchmarks run, on tiny shapes; their arithmetic is checked on cases with a known answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import build_vectors, growth, peers, steering
from benchmarks.common import load, off_the_line, slope
from benchmarks.gpu_shapes import JOBS, Machine, measure, predict, rows
from grains_tl.finding.workload import Workload
from grains_tl.models.operations import Operations, count_operations, floating_point_operations


@pytest.fixture(scope="module")
def small() -> Any:
    return load("random:2x64")


def test_slope_is_the_exponent() -> None:
    assert slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert slope([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    assert off_the_line([1, 2, 4], [7, 9, 13]) == pytest.approx(0)
    assert off_the_line([1, 2, 3], [1, 4, 9]) > 0.03


def test_a_random_model_has_the_shape_asked_for() -> None:
    model = load("random:3x96x4096")
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab) == (3, 96, 4096)
    assert model(torch.arange(3, 9)[None]).shape == (1, 6, 4096)
    for wrong in ("random:8", "random:8x", "random:0x64", "random:2x64x8x8", "random:twoxtwo"):
        with pytest.raises(ValueError, match=r"random:8x512"):
            load(wrong)
    with pytest.raises(ValueError, match="multiple of 64"):
        load("random:2x130")
    with pytest.raises(ValueError, match="no room"):
        load("random:2x64x512")


def test_operations_of_one_forward_pass(small: Any) -> None:
    ids = torch.arange(3, 17)[None].repeat(2, 1)
    with count_operations(small) as counts:
        small(ids)
    assert counts == Operations(forward=2 * 14 * 2, backward=0, unembedded=2 * 14)
    # 2 d^2 for each of q k v o, 2 * 3 * d * 3d for the MLP, per token-layer; 2 d vocab per unembedded position
    by_hand = 2 * (4 * 64**2 + 3 * 64 * 192) * counts.forward + 2 * 64 * 8192 * counts.unembedded
    assert floating_point_operations(small.original_model, counts) == by_hand


def test_build_agrees_with_the_plain_loop(small: Any) -> None:
    found = build_vectors.run(small, records=3, steps=2, repeats=1)
    assert found["smallest_cosine"] > 0.9999
    for kind in ("forward", "backward", "unembedded"):
        assert 0.3 < found["share_of_fewest"][kind] <= 1
    assert len(build_vectors.rows(found)) == 13


def test_steering_and_sweep(small: Any) -> None:
    generated = steering.generation(small, new_tokens=3, repeats=1)
    swept = steering.sweep(small, records=2, repeats=1)
    assert swept["largest_difference_nats"] < 1e-4
    assert 0.4 < swept["share_of_naive_token_layers"] < 1
    assert len(steering.rows(generated, swept)) >= 11


def test_peers_do_the_same_work(small: Any) -> None:
    plain = load("random:2x64").original_model
    found = peers.run(small, plain, repeats=1, records=(2, 1, 2))
    for job in found[1:]:  # captum is always there
        assert min(job["cosine"].values()) > 0.9999 and len(job["times"]) >= 1
    assert len(peers.rows(found)) >= 6


def test_growth(small: Any) -> None:
    found = growth.growth(small, sizes=(1, 2, 4))
    for name in ("records", "steps", "prompt length"):
        assert found[name]["operations"] < 1.2  # no faster than linearly; what does not grow lowers the exponent
    assert found["steps"]["operations"] > 0.4  # an offset: f(x), the ends, the caching
    assert found["prompt length, leave-one-out"]["operations"] > 1.6


def test_gpu_shapes_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    machine = Machine(device="cpu", dtype="float32", max_tokens=512, new_tokens=3)
    found = measure("tiny", Workload(records=3, prompt_tokens=24, steps=2), machine, out=out)
    assert found["weights"] == "random" and list(found["jobs"]) == list(JOBS)
    assert all(job["seconds"] > 0 for job in found["jobs"].values())
    assert json.loads(out.read_text()) == found
    for name, job in predict(out)["jobs"].items():
        if not name.startswith("generate"):
            planned = job["predicted"]
            assert [planned[k] for k in ("tokens", "tokens_back", "unembedded")] == [
                job[k] for k in ("tokens", "tokens_back", "unembedded")
            ]
    assert len(rows(json.loads(out.read_text()))) == len(JOBS)
