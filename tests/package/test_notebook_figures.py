"""The functions and figures made for notebooks 05 and 06: yes/no against a bias, convergence, curves, agreement."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_curve

import grains_tl as gr
from grains_tl.demo.scene_questions import question_margins
from grains_tl.demo.scene_records import yes_no_questions
from grains_tl.demo.scene_yes_no import yes_no_curves


@pytest.fixture(scope="module")
def vlm() -> Any:
    return gr.load_model("tiny-vlm")


def test_a_bias_walks_along_the_roc_curve_and_alpha_0_is_the_model(vlm: Any) -> None:
    questions = [q for q in yes_no_questions("test", 20) if q.split == "adversarial"]
    width, n_layers = int(vlm.cfg.d_model), int(vlm.cfg.n_layers)
    vector = gr.SteeringVectors.from_raw(torch.ones(n_layers, width), tuple(range(n_layers)), torch.ones(n_layers), {})
    frame = yes_no_curves(vlm, questions, {"ones": (vector, 1)}, alphas=[0.5], n_biases=7)
    margins, truth = question_margins(vlm, questions).numpy(), [q.answer for q in questions]
    false_yes, recall, _ = roc_curve(truth, margins, drop_intermediate=False)
    on_curve = {(round(x, 6), round(y, 6)) for x, y in zip(false_yes, recall, strict=True)}
    bias = frame[frame.vector == "constant bias"]
    assert len(bias) == 8 and bias.auc.nunique() == 1
    assert all((round(x, 6), round(y, 6)) in on_curve for x, y in zip(bias.false_yes, bias.recall, strict=True))
    plain = frame[frame.strength == 0]
    assert set(plain.vector) == {"constant bias", "ones"} and plain.false_yes.nunique() == 1
    assert plain.recall.iloc[0] == pytest.approx(np.mean(margins[np.array(truth)] > 0))
    with pytest.raises(ValueError, match="both yes and no"):
        yes_no_curves(vlm, [q for q in questions if q.answer], {}, alphas=[0.5])


def test_yes_no_plot_keeps_the_part_that_is_compared() -> None:
    rows = {
        "vector": ["constant bias", "constant bias", "$a$", "$a$"],
        "strength": [-9.0, 0.0, 0.0, 0.2],
        "false_yes": [0.0, 0.8, 0.8, 0.5],
        "recall": [0.0, 0.99, 0.99, 0.98],
        "recall_se": [0.0, 0.01, 0.01, 0.01],
    }
    fig = gr.plotting.plot_yes_no(pd.DataFrame(rows), title="yes and no")
    assert 0.85 < fig.axes[0].get_ylim()[0] < 0.96
    names = [t.get_text() for t in fig.legends[0].get_texts()]
    assert sorted(names) == ["$a$", "constant bias", "unsteered"]
    assert gr.plotting.figure_png(fig)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="recall_se"):
        gr.plotting.plot_yes_no(pd.DataFrame({**rows, "recall_se": None}).drop(columns="recall_se"))


def test_convergence_plot_draws_records_and_medians() -> None:
    rows = [
        {"baseline": b, "record": r, "n_steps": n, "gap": sign * gap * (r + 1) / n}
        for b, gap, sign in (("zero", 90.0, -1), ("neutral", 9.0, 1))
        for r in range(3)
        for n in (9, 18)
    ]
    ax = gr.plotting.plot_convergence(pd.DataFrame(rows), title="gaps, nats").axes[0]
    thick = [line for line in ax.lines if line.get_linewidth() > 2]
    assert len(ax.lines) == 8 and [list(line.get_ydata()) for line in thick] == [[20.0, 10.0], [2.0, 1.0]]


def test_curves_plot_shows_falls_and_rises() -> None:
    c = gr.faithfulness.Curves(
        torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0.0, 2.0, 3.0]])
    )
    fig = gr.plotting.plot_curves({"one": c})
    drawn = [list(map(float, next(iter(ax.lines)).get_ydata())) for ax in fig.axes]
    assert drawn == [[0.0, 2.0, 3.0], [0.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="no curves"):
        gr.plotting.plot_curves({})


def test_agreement_map_is_symmetric_and_keeps_nan() -> None:
    frame = pd.DataFrame({"a": ["x", "x", "y"], "b": ["y", "z", "z"], "spearman": [0.5, math.nan, -0.25]})
    table = gr.faithfulness.agreement_map(frame)
    assert list(table.index) == list(table.columns) == ["x", "y", "z"]
    np.testing.assert_array_equal(table.to_numpy(), table.to_numpy().T)
    assert table.loc["z", "y"] == -0.25 and math.isnan(table.loc["z", "x"]) and table.loc["y", "y"] == 1.0


def test_comparison_plot_takes_other_measures() -> None:
    frame = pd.DataFrame({"vector": ["ours", "plain"], "share": [0.2, 0.5], "share_se": [0.02, 0.03]})
    fig = gr.plotting.plot_comparison(
        frame, panels={"share": "captions, share"}, name="vector", reference="plain", title="all"
    )
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["captions, share"]
    dotted = [line for line in fig.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [0.5]


def test_close_labels_under_tokens_stand_at_two_heights() -> None:
    n = 3
    a = gr.Attribution(
        torch.tensor([-22.2, 17.6, 1.0]), ["I", " a", " restaurant"], torch.tensor([True] * n),
        torch.tensor([False] * n), None, 3.3, None, "integrated_gradients",
    )  # fmt: skip
    texts = {t.get_text(): t.get_position()[1] for t in gr.plotting.plot_tokens(a).axes[0].texts}
    assert texts["\u221222.20"] != texts["+17.60"]
