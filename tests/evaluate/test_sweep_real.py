"""Sweeps of SmolLM2: exact, cheap, and resumed after a SIGKILL from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.evaluate.sweeps import counted_token_layers
from tests.helpers.oracles import edited, pair_logprobs, steered
from tests.package.test_real import plain, real, records  # noqa: F401 (two of them are fixtures)

pytestmark = pytest.mark.real

ATOL = 1e-4  # nats, the promise of the sweep
N_RECORDS = 6


def random_vectors(layers: range) -> gr.SteeringVectors:
    """Directions at some layers; residual norms grow from 45 to 680 there."""
    raw = torch.randn(len(layers), 576, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, layers, torch.full((len(layers),), 200.0))


def test_sweep_equals_plain_hooks(real: Any, plain: Any) -> None:  # noqa: F811
    """Single-token and long answers, two layers, against one Hugging Face run per response."""
    vectors, pairs = random_vectors(range(30)), records()
    found, _ = gr.evaluate.sweep_records(real, vectors, pairs, layers=[8, 21], alphas=[-0.3, 0.3], progress=False)
    tokenized = gr.tokens.tokenize_pairs(real, pairs)
    groups: Any = found.groupby(["layer", "alpha"])
    for (layer, alpha), group in groups:
        step = alpha * vectors.resid_norms[layer] * vectors.directions[layer]
        with torch.no_grad(), edited(plain, layer, lambda act, step=step: steered(act, step, renorm=True)):  # type: ignore[misc]
            wanted = [float(a - b) for a, b in (pair_logprobs(plain, t) for t in tokenized)]
        np.testing.assert_allclose(
            group["margin"], wanted, atol=2 * ATOL, rtol=0
        )  # a difference of two log-probabilities
        assert group["change"].abs().max() > 0.1


def test_killed_and_resumed_from_the_command_line(smollm2: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    path = random_vectors(range(14, 30)).save(tmp_path / "random.safetensors")
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in gr.load_bundled("sentiment", "choose")
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows[:N_RECORDS]))
    common = ["sweep", "--vectors", str(path), "--pairs", str(tmp_path / "pairs.json"), "--neutral", "0"]
    common += ["--report-share", "0", "--alphas=-0.2,-0.1,0.1,0.2,0.4", "--threads", "1"]
    killed, whole = tmp_path / "killed.csv", tmp_path / "whole.csv"
    results = Path(f"{killed}.records.jsonl")
    n_rows = N_RECORDS * (16 * 5 + 1)
    command = [sys.executable, "-m", "grains_tl", *common, "--out", str(killed)]
    environment = {**os.environ, "PYTHONPATH": str(Path(gr.__file__).parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 400
        while not results.exists() or len(results.read_text().splitlines()) <= n_rows // 3:
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline, "the command is too slow"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    before = len(results.read_text().splitlines())
    assert before < n_rows
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *args, **options: smollm2.bridge)
    with counted_token_layers(smollm2.bridge) as rest:
        assert main([*common, "--out", str(killed)]) == 0
    with counted_token_layers(smollm2.bridge) as all_of_it:
        assert main([*common, "--out", str(whole)]) == 0
    assert sum(rest) < 0.9 * sum(all_of_it)
    keys = [json.loads(line)["key"] for line in results.read_text().splitlines()[1:] if line.endswith("}")]
    assert len(keys) == len(set(keys)) == n_rows
    pd.testing.assert_frame_equal(pd.read_csv(killed), pd.read_csv(whole), atol=ATOL, rtol=0)
