"""The study of half precision: what it compares, and that the page shows its table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from studies import precision
from tests.conftest import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_shows_the_table_of_the_results() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(precision.START)[2].partition(precision.END)[0]
    assert shown and shown == precision.table(precision.RESULTS)
    assert shown == (precision.RESULTS / "table.md").read_text(encoding="utf-8")


def files(folder: Path, **changed: Any) -> None:
    raw = {"raw": [[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]], "resid_norms": [1.0, 1.0, 1.0]}
    full: dict[str, Any] = {
        "model": "m", "dtype": "float32", "records": 2, "layers": [1, 2, 3], "refused": {}, "margins": [1.0, 3.0],
        "scores": {"leave_one_out": [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]}, "vectors": {"caa": raw},
        "effects": {"caa of float32": [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]},
    }  # fmt: skip
    (folder / "m-float32.json").write_text(json.dumps(full))
    (folder / "m-float16.json").write_text(json.dumps({**full, "dtype": "float16", **changed}))


def test_table_of_known_numbers(tmp_path: Path) -> None:
    files(
        tmp_path,
        margins=[1.0, 3.2],
        scores={"leave_one_out": [[3.0, 2.0, 1.0], [30.0, 10.0, 20.0]]},
        vectors={"caa": {"raw": [[2.0, 0.0], [4.0, 3.0], [1.0, 1.0]]}},
        effects={"caa of float32": [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]},
    )
    cells = [cell.strip() for cell in precision.table(tmp_path).splitlines()[2].split("|")[1:-1]]
    assert cells[:4] == ["m", "float16", "2", "0.000 (-1.00)"]  # one order turned round, one kept
    # the least cosine is 24/25; means of 1.5 and 2 nats; a root mean square of 0.2 / sqrt(2)
    assert cells[-3:] == ["0.9600", "+1.50, +2.00", "0.141"]


def test_what_is_refused_is_said(tmp_path: Path) -> None:
    files(tmp_path, scores={}, effects={}, refused={"scores: leave_one_out": "NaN", "effects: caa of float32": "NaN"})
    cells = precision.table(tmp_path).splitlines()[2].split("|")[:-1]
    assert [cell.strip() for cell in cells].count("refused") == 3  # scores, effect, margins


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(spec: str, dtype: str, device: str) -> Any:
        loaded.append(dtype)
        return tiny_model().to(getattr(torch, dtype))

    monkeypatch.setattr(precision, "load", load)
    args = argparse.Namespace(out=tmp_path, dtype=None, device="cpu", records=2, method=["gradient_x_input"])
    precision.run("tiny", args)
    precision.run("tiny", args)
    assert loaded == ["float32", "bfloat16", "float16"]
    assert precision.table(tmp_path).count("| tiny |") == 2
