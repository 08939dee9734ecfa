"""What the README promises, run as it stands: its Python block, the command line on a csv, the notebooks, the docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.cli.steer import side_by_side
from grains_tl.demo.one_set import DemoSettings
from grains_tl.demo.text import QUICK, run_demo, summary
from tests.conftest import TL_MAJOR

ROOT = Path(__file__).parents[2]
TRUTHFULQA = ROOT.parent / "shared/data/truthfulqa/truthfulqa_half.csv"
COLUMNS = [
    "--column",
    "prompt=Question: {Question}\\nAnswer:",
    "--column",
    "chosen= {Best Answer}",
    "--column",
    "rejected= {Incorrect Answers[0]}",
]


def readme_python() -> str:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    return block.group(1)


ROOMS = [m.name for m in pkgutil.walk_packages(gr.__path__, "grains_tl.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", ROOMS)
def test_docstring_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_every_public_name_has_help() -> None:
    for name in gr.__all__:
        assert len((getattr(gr, name).__doc__ or "").strip()) > 30, name


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("transformer_lens", "transformers", "matplotlib")
    code = f"import sys, grains_tl; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_no_pickle_in_the_package() -> None:
    for path in (ROOT / "grains_tl").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.loads?\b|Unpickler\(|allow_pickle=True", text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", text)), path


def test_side_by_side_wraps_and_pads() -> None:
    lines = side_by_side("one two three", "x", ("a", "b"), width=7).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["a      ", "-------", "one two", "three  "]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["build", "--pairs", "missing.jsonl", "--out", "v.safetensors"], "no file missing.jsonl"),
        (["build", "--pairs", "PAIRS", "--out", "v.safetensors", "--column", "chosen"], "FIELD=COLUMN"),
        (["build", "--pairs", "PAIRS", "--out", "v.safetensors", "--column", "chosen=nope"], "row 1 has no column"),
        (["steer", "--vectors", "missing.safetensors", "--prompt", "x"], "no file missing.safetensors"),
    ],
)
def test_bad_input_on_the_command_line_exits_2_and_says_why(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n', encoding="utf-8")
    assert main([str(pairs) if a == "PAIRS" else a for a in argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_readme_example_runs_as_pasted(kind: str, smollm2: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smollm2.bridge if kind == "bridge" else smollm2.hooked
    if model is None:
        pytest.skip(f"TransformerLens {TL_MAJOR} has no HookedTransformer")
    monkeypatch.setattr(gr, "load_model", lambda name: model)  # loaded already, once for all tests
    space: dict[str, Any] = {}
    exec(compile(readme_python(), "README.md", "exec"), space)
    assert space["logits"].shape[-1] == model.cfg.d_vocab
    assert not torch.equal(space["logits"], model(space["ids"]))


@pytest.mark.real
def test_build_then_steer_on_truthfulqa(
    smollm2: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not TRUTHFULQA.exists():
        pytest.skip(f"no {TRUTHFULQA.name} beside the project")
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *a, **k: smollm2.bridge)
    out = tmp_path / "vectors.safetensors"
    build = ["build", "--pairs", str(TRUTHFULQA), *COLUMNS, "--limit", "2", "--top-k", "2", "--layers", "12,15"]
    assert main([*build, "--model", "smollm2", "--out", str(out)]) == 0
    assert out.exists() and not Path(f"{out}.partial.jsonl").exists()
    steer = ["steer", "--vectors", str(out), "--prompt", "Question: Is the earth flat?\nAnswer:", "--layer", "12"]
    assert main([*steer, "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert "base" in printed and "steered: alpha +0.3, layer 12" in printed


@pytest.mark.real
def test_demo_finds_its_way_from_records_to_verdict(smollm2: SimpleNamespace, tmp_path: Path) -> None:
    tiny = DemoSettings(
        sets=("sentiment",),
        n_build=4,
        n_choose=3,
        n_test=4,
        n_test_draws=3,
        n_draws=3,
        n_cost=3,
        n_neutral=2,
        layers=(18, 24),
        methods=QUICK.methods[:1],
    )
    results = run_demo(smollm2.bridge, tmp_path, tiny)
    assert {"random direction", "orthogonal direction", "shuffled labels"} < set(results["sets"][0]["draws"])
    assert [row["vector"] for row in results["sets"][0]["cost"]["at_kl"]] == ["leave_one_out", "CAA"]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    assert "attribution beats random tokens" in summary(results) and "better than CAA" in summary(results)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert not (tmp_path / "attributions.partial.jsonl").exists()


@pytest.mark.real
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs_top_to_bottom(path: Path, smollm2: SimpleNamespace, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    os.environ.update({k: v for k, v in environment.items() if k not in os.environ})
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
