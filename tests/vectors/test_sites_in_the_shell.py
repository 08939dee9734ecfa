"""``grains-tl build --site``, and what ``steer`` and ``sweep`` make of such files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.hooks.sites import Site


def build(folder: Path, site: str) -> int:
    records, out = str(folder / "pairs.jsonl"), str(folder / f"{site}.safetensors")
    return main(["build", "--pairs", records, "--out", out, "--site", site, "--layers", "1", "--top-k", "1"])


@pytest.mark.parametrize("site", get_args(Site))
def test_build_takes_the_site_that_python_takes(folder: Path, bridge: Any, pairs: Any, site: Any, capsys: Any) -> None:
    assert build(folder, site) == 0
    found = gr.load_vectors(folder / f"{site}.safetensors", bridge)
    wanted = gr.build_vectors(bridge, pairs, layers=[1], top_k=1, site=site, progress=False)
    assert found.site == site and torch.equal(found.raw, wanted.raw)
    assert (f"site {site}" in capsys.readouterr().out) == (site != "resid_post")


def test_steer_and_sweep_follow_the_file(folder: Path, bridge: Any, pairs: Any, capsys: Any) -> None:
    assert build(folder, "attn_out") == 0
    file = folder / "attn_out.safetensors"
    vectors = gr.load_vectors(file, bridge)
    say = ["--vectors", str(file), "--prompt", "the film was", "--layer", "1", "--alpha", "2", "--max-new-tokens", "5"]
    capsys.readouterr()
    assert main(["steer", *say]) == 0
    shown = capsys.readouterr().out
    text = gr.inference.generate(bridge, ["the film was"], vectors.steering(2, 1), max_new_tokens=5)[0]
    other = gr.SteeringVectors.from_raw(
        vectors.raw, [1], vectors.resid_norms
    )  # at resid_post it would say something else
    assert text != gr.inference.generate(bridge, ["the film was"], other.steering(2, 1), max_new_tokens=5)[0]
    assert "attn_out" in shown and " ".join(text.split()) in " ".join(shown.split())

    options = ["--vectors", str(file), "--alphas=0.3", "--neutral", "0", "--report-share", "0"]
    table = folder / "table.csv"
    assert main(["sweep", "--pairs", str(folder / "pairs.jsonl"), *options, "--out", str(table)]) == 0
    wanted = gr.sweep(bridge, vectors, pairs, layers=[1], alphas=[0.3], neutral=None, progress=False)
    assert pd.read_csv(table)["effect"].tolist() == pytest.approx(wanted["effect"].tolist(), abs=1e-5)


def test_an_unknown_site_is_refused_before_anything_is_loaded(folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        build(folder, "resid_middle")
    assert stopped.value.code == 2
    assert "resid_mid" in capsys.readouterr().err
