"""Figures of the analysis rooms: what they show is what the tables say, and bad tables are refused."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

import grains_tl as gr
from grains_tl.plotting.style import figure_png


def image_of(fig: Any) -> np.ndarray:
    return np.asarray(fig.axes[0].images[0].get_array())


def probe_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [3, 6, 9],
            "accuracy": [0.6, 0.8, 0.9],
            "se": [0.05, 0.04, 0.03],
            "floor": [0.5, 0.52, 0.48],
            "floor_high": [0.6, 0.58, 0.55],
        }
    )


def patch_frame(**columns: list[int]) -> pd.DataFrame:
    n = 4
    return pd.DataFrame(
        {
            "component": "z",
            "layer": [5, 5, 6, 6],
            **columns,
            "effect": [0.1, -0.4, 0.2, 0.0],
            "se": [0.05] * n,
            "share": [0.2, -0.8, 0.4, 0.0],
            "total": [0.5] * n,
        }
    )


def test_cosine_map_shows_the_table() -> None:
    table = pd.DataFrame([[1.0, -0.25], [-0.25, 1.0]], index=["a$b", "5"], columns=["a$b", "5"])
    fig = gr.plotting.plot_cosines(table, title="cosines, $no unit$")
    np.testing.assert_array_equal(image_of(fig), table.to_numpy())
    assert fig.axes[0].images[0].get_clim() == (-1, 1)
    assert "\u22120.25" in [t.get_text() for t in fig.axes[0].texts]
    assert figure_png(fig)[:4] == b"\x89PNG"  # names and titles with a dollar are drawn as they stand
    with pytest.raises(ValueError, match="square"):
        gr.plotting.plot_cosines(table[:1])


def test_probes_show_accuracy_and_floor() -> None:
    frame = probe_frame()
    fig = gr.plotting.plot_probes(frame, title="t")
    lines = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    np.testing.assert_array_equal(lines["probe, held-out (± 1.96 se)"], frame.accuracy)
    np.testing.assert_array_equal(lines["shuffled labels, mean"], frame.floor)
    assert fig.axes[0].get_title(loc="left") == "t" and "layer" in fig.axes[0].get_xlabel()
    assert figure_png(fig)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="accuracy"):
        gr.plotting.plot_probes(frame.drop(columns="accuracy"))


@pytest.mark.parametrize("across", ["head", "pos"])
def test_patching_heatmap_shows_the_effects(across: str) -> None:
    frame = patch_frame(**{across: [0, 1, 0, 1]})
    fig = gr.plotting.plot_patching(frame)
    np.testing.assert_array_equal(image_of(fig), [[0.1, -0.4], [0.2, 0.0]])
    assert fig.axes[0].images[0].get_clim() == (-0.4, 0.4)  # white is zero
    assert "nats" in fig.axes[1].get_ylabel()
    share = gr.plotting.plot_patching(frame, value="share")
    np.testing.assert_array_equal(image_of(share), [[0.2, -0.8], [0.4, 0.0]])
    assert "share" in share.axes[1].get_ylabel()
    assert figure_png(fig)[:4] == b"\x89PNG"


def test_patching_bars_by_component() -> None:
    one = patch_frame()[::2].assign(component="attn_out")
    two = patch_frame()[1::2].assign(component="mlp_out")
    fig = gr.plotting.plot_patching(pd.concat([one, two]), value="share")
    heights = [bar.get_height() for bar in fig.axes[0].patches]
    assert heights == pytest.approx([0.2, 0.4, -0.8, 0.0])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["attn_out", "mlp_out"]
    assert figure_png(fig)[:4] == b"\x89PNG"


def test_writers_are_summed_by_block() -> None:
    rows = {"kind": ["head", "head", "mlp", "embed"], "layer": [3, 3, 4, 0], "projection": [0.2, 0.1, -0.5, 9.0]}
    axes = gr.plotting.plot_writers(pd.DataFrame(rows)).axes[0]
    heights = sorted(round(bar.get_height(), 6) for bar in axes.patches)
    assert heights == [-0.5, 0.3]


def test_nothing_global_changes() -> None:
    before = dict(matplotlib.rcParams)
    gr.plotting.plot_probes(probe_frame())
    gr.plotting.plot_patching(patch_frame(head=[0, 1, 0, 1]))
    assert dict(matplotlib.rcParams) == before
