"""The benchmarks run, on tiny shapes; their arithmetic is checked on cases with a known answer."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import build_vectors, growth, peers, probes, starting, steering, table
from benchmarks.__main__ import keep
from benchmarks.common import load, load_plain, off_the_line, slope
from benchmarks.gpu_shapes import JOBS, Machine, measure, predict, rows
from benchmarks.rows import Row, as_json, python_shares, torch_shares
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


def test_peers_do_the_same_work(small: object) -> None:
    plain = load_plain("random:2x64")
    found = [
        *peers.caa(small, plain, records=2, repeats=1),
        *peers.leave_one_out(small, plain, records=1, repeats=1),
        *peers.integrated_gradients(small, plain, records=2, steps=10, repeats=1),
        *peers.generation(small, plain, new_tokens=3, repeats=1),
    ]
    captum = [row for row in found if row.peer.startswith("captum")]
    assert len(captum) == 4  # it is always there
    for row in captum:
        assert row.agreement.startswith("cosine") and float(row.agreement.split()[1]) > 0.9999
        assert row.rest.count("%") == 4 and row.ours > 0
    assert found[-1].work.startswith("generation, 3 tokens after 4 prompts")
    for row in peers.sweep(small, plain, records=1, repeats=1):
        assert row.agreement.startswith("within") and float(row.agreement.split()[1]) < 1e-4


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "No such file"),
        ("{folder}/not-python", "expected a Python interpreter; it stopped with"),
        (sys.executable, "repeng"),
    ],
)
def test_a_python_without_the_peers_is_refused(python: str, reason: str, tmp_path: Path) -> None:
    if python == sys.executable and find_spec("repeng") is not None:
        pytest.skip("repeng is here")
    other = tmp_path / "not-python"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    found = peers.missing(python.format(folder=tmp_path))
    assert found is not None and found.startswith("--peers ") and reason in found


def test_probes_are_scikit_learns(small: object) -> None:
    (row,) = probes.run(small, shapes=((12, 2),), repeats=1)
    assert float(row.agreement.split()[-1]) <= 0.05  # one side of one record at the border


def test_tokenizing(small: object) -> None:
    (row,) = starting.tokenizing(small, 1, number=20)
    assert row.work == "tokenizing 20 pairs" and row.ours > 0 < row.theirs


# -- the table -------------------------------------------------------------------------------------------------------


def figures() -> dict[str, Any]:
    rows = [
        Row("reading", 2.0, "a peer", 5.0, "2", agreement="cosine 1.0000", rest="matrix products 80%"),
        Row("peak memory", 110.0, "one pass", 100.0, "+25%", "MiB"),
    ]
    part = {"threads": 1, "repeats": 3, "load": [0.5, 2.0], "rows": as_json(rows), "lines": [("growth", "size^1.00")]}
    return {"model": "m", "parts": {"first": part}}


def test_the_table_has_ratio_peer_threads_and_load() -> None:
    text = table.markdown(figures())
    assert "| reading | 2.00 s | a peer: 5.00 s (cosine 1.0000) | **2.50** | 2 | 1, 3, 0.5 to 2.0 |" in text
    assert "| peak memory | 110 MiB | one pass: 100 MiB | **+10%** | +25% | 1, 3, 0.5 to 2.0 |" in text
    assert "| reading | matrix products 80% |" in text and "| growth | size^1.00 |" in text
    page = table.page_with(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", text)
    assert page.startswith("before\n") and page.endswith("after\n") and text in page and "old" not in page
    assert table.page_with(page, text) == page


def test_a_part_replaces_its_own_figures_only(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for name, threads in (("a", 1), ("b", 1), ("a", 2)):
        keep(file, "m", name, {"threads": threads})
    found = json.loads(file.read_text())
    assert {name: part["threads"] for name, part in found["parts"].items()} == {"a": 2, "b": 1}
    keep(file, "other", "a", {"threads": 3})
    assert list(json.loads(file.read_text())["parts"]) == ["a"]


def test_shares_add_up() -> None:
    x = torch.randn(300, 300)
    shares = torch_shares(lambda: [x @ x for _ in range(30)])
    assert shares.startswith("matrix products") and 90 <= sum(map(int, re.findall(r"(\d+)%", shares))) <= 110
    assert "test_benchmarks.slow" in python_shares(slow)


def slow() -> int:
    total = 0
    for i in range(10**6):
        total += i
    return total


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


def test_the_page_has_the_last_figures() -> None:
    figures = json.loads(table.LAST.read_text(encoding="utf-8"))
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.page_with(page, table.markdown(figures)) == page, "run python -m benchmarks.table"
    works = {row.work for row, _ in table.rows_of(figures)}
    for kind in ("CAA", "generation", "integrated", "leave-one-out", "sweep", "probes", "peak memory", "tokenizing",
                 "import load_model", "load_model"):  # fmt: skip
        assert any(work.startswith(kind) for work in works), kind
    assert {what for part in figures["parts"].values() for what, _ in part["lines"] if "growth" in what}
