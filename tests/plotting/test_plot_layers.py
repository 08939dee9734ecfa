"""Effects over layers: a sweep is drawn as it is, a line per vector, scope and alpha, the choice marked."""

from __future__ import annotations

import math

import pandas as pd
import pytest

import grains_tl as gr
from grains_tl.plotting.effects import plot_layers
from grains_tl.plotting.style import figure_png
from grains_tl.plotting.sweeps import plot_cost
from tests.evaluate.test_display import effects
from tests.plotting.test_plot_sweeps import HOSTILE, assert_inside, curve, texts


def labels(fig: object) -> list[str]:
    return [t.get_text() for t in fig.legends[0].get_texts()]  # type: ignore[attr-defined]


def test_a_default_sweep_has_a_line_per_alpha_and_a_title() -> None:
    frame = effects((HOSTILE,), layers=range(3, 9))
    fig = plot_layers(frame)
    assert labels(fig) == ["alpha \u22120.2", "alpha +0.2"]
    lines = fig.axes[0].lines[1:]  # after the zero line
    for line, alpha in zip(lines, (-0.2, 0.2), strict=True):
        own = frame[frame.alpha == alpha]
        assert list(line.get_xdata()) == list(own.layer)
        assert list(line.get_ydata()) == pytest.approx(list(own.effect))
    title = fig.axes[0].get_title(loc="left").replace("\n", " ")
    assert HOSTILE in title and "3 records" in title and "all" in title
    assert figure_png(fig)
    assert_inside(fig)


def test_the_choice_is_marked_on_its_line() -> None:
    frame = effects(("ours", "caa"), layers=range(3, 9))
    frame.loc[(frame.vector == "caa") & (frame.layer == 5) & (frame.alpha > 0), "effect"] = 9.0
    frame.attrs["records"] = ["a"]
    choice = gr.choose(frame)
    fig = plot_layers(frame, choice)
    assert labels(fig)[:4] == [f"{v}, alpha {a}0.2" for v in ("ours", "caa") for a in ("\u2212", "+")]
    assert labels(fig)[4] == "chosen: caa, layer 5, alpha +0.2"
    rings = [
        c.get_offsets().tolist() for c in fig.axes[0].collections if len(c.get_offsets()) == 1 and c.get_sizes().size
    ]
    assert [5.0, 9.0] in [ring[0] for ring in rings]
    assert plot_layers(frame, 5).axes[0].lines[-1].get_xdata()[0] == 5
    assert len({(line.get_color(), line.get_linestyle()) for line in fig.axes[0].lines[1:5]}) == 4


def test_scopes_are_lines_of_their_own_and_repeats_are_refused() -> None:
    frame = pd.DataFrame(effects(layers=range(3)))
    both = pd.concat([frame, frame.assign(positions="last")])
    assert len(labels(plot_layers(both))) == 4
    with pytest.raises(ValueError, match=r"several rows for layer 0 of 'ours', alpha \u22120.2"):
        plot_layers(pd.concat([frame, frame]))
    assert plot_layers(frame, title="mine").axes[0].get_title(loc="left") == "mine"


def test_effects_at_equal_cost_are_marked() -> None:
    frame = pd.concat([curve("a"), curve("b").assign(effect=lambda t: 2 * t.effect)])
    rows = {"layer": 3, "kl": 0.02, "effect": [0.7, 1.4], "low": [0.5, 1.2], "high": [0.9, math.nan]}
    at_kl = pd.DataFrame({"vector": ["a", "b"], **rows})
    fig = plot_cost(frame, at_kl=at_kl)
    assert labels(fig) == ["a", "b", "equal cost: 0.02 nats per token"]
    rings = [tuple(c.get_offsets()[0]) for c in fig.axes[0].collections if c.get_zorder() == 5]
    assert rings == [(0.02, 0.7), (0.02, 1.4)]
    assert not any("nan" in text for text in texts(fig)) and figure_png(fig)
    assert_inside(fig)
