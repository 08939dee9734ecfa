"""Pictures of a sweep: they draw the numbers they were given, as they stand, and refuse what they cannot draw."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import matplotlib.pyplot
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from grains_tl.plotting.records import plot_records, plot_token_logprobs
from grains_tl.plotting.style import CHOSEN, REJECTED, figure_png
from grains_tl.plotting.sweeps import plot_cost, plot_heatmap

HOSTILE = "$x_1$ <b>\\frac & \u96fb"


def texts(fig: Any) -> list[str]:
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def grid(layers: list[int], alphas: list[float]) -> pd.DataFrame:
    return pd.DataFrame([{"layer": la, "alpha": a, "effect": la * a} for la in layers for a in alphas])


def curve(vector: str = "a", alphas: tuple[float, ...] = (-0.2, -0.1, 0.0, 0.1, 0.2), layer: int = 3) -> pd.DataFrame:
    rows = [{"layer": layer, "alpha": a, "effect": 5 * a, "effect_se": 0.1, "kl": a * a, "kl_se": 0.05} for a in alphas]
    return pd.DataFrame(rows).assign(vector=vector)


def records(n: int) -> pd.DataFrame:
    return pd.DataFrame({"record": range(n), "change": [(-1) ** i * (i + 1.0) for i in range(n)]})


def tokens() -> pd.DataFrame:
    return pd.DataFrame(
        {"token": [" good", " film", "\n"], "before": [-1.0, -2.0, -3.0], "after": [-0.5, math.nan, -5.0]}
    )


def test_heatmap_draws_the_cells_where_they_belong() -> None:
    frame = grid([0, 6, 12], [-0.2, 0.2]).sample(frac=1, random_state=0)
    frame.loc[(frame.layer == 6) & (frame.alpha == 0.2), "effect"] = math.nan
    fig = plot_heatmap(frame, (12, 0.2))
    mesh = fig.axes[0].collections[0]
    assert mesh.get_clim() == pytest.approx((-2.4, 2.4))  # centred at 0
    values = mesh.get_array().reshape(2, 3)
    assert values[0].tolist() == pytest.approx([0.0, -1.2, -2.4])  # alpha -0.2 below
    assert values[1, 2] == pytest.approx(2.4)
    assert not math.isfinite(float(values.filled(math.nan)[1, 1]))
    frames = [p for p in fig.axes[0].patches if not p.get_hatch()]
    assert {p.get_xy() for p in frames} == {(2, 1)}  # the chosen cell
    assert [p.get_xy() for p in fig.axes[0].patches if p.get_hatch()] == [(1, 1)]  # the missing one
    assert {"+2.40", "\u22122.40", "\u22121.20", "framed: layer 12, alpha +0.2"} <= set(texts(fig))
    assert any("nats" in text for text in texts(fig))


def test_heatmap_sizes() -> None:
    alphas = [round(-0.4 + 0.1 * i, 1) for i in range(9)]
    fig = plot_heatmap(grid(list(range(30)), alphas), (18, 0.3))
    ticks = fig.axes[0].get_xticks()
    assert 10 <= len(ticks) <= 16
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()][:2] == ["0", "2"]
    assert not fig.axes[0].texts  # 270 numbers would not be legible
    for frame in (grid([4], [0.2]), grid(list(range(100)), [0.1]), grid([1], [0.1]).assign(effect=math.nan)):
        fig = plot_heatmap(frame)
        figure_png(fig)
        assert_inside(fig)


def assert_inside(fig: Any) -> None:
    """Every text lies within the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    box, (width, height) = fig.get_tightbbox(canvas.get_renderer()), fig.get_size_inches()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


def test_cost_draws_effect_over_kl() -> None:
    frame = pd.concat([curve("a"), curve("b", (0.2, 0.1))])
    fig = plot_cost(frame)
    lines = [line for line in fig.axes[0].lines if len(line.get_xdata()) > 1 and line.get_marker() != "None"]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
    assert list(lines[0].get_xdata()) == pytest.approx([0.0, 0.01, 0.04])
    assert list(lines[0].get_ydata()) == pytest.approx([0.0, 0.5, 1.0])
    assert list(lines[1].get_ydata()) == pytest.approx([0.0, -0.5, -1.0])
    assert list(lines[2].get_xdata()) == pytest.approx([0.01, 0.04])  # sorted
    band = fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.0 - 0.196, 1.0 + 0.196))
    reach = [p.vertices[:, 0].min() for c in fig.axes[0].collections[1:2] for p in c.get_paths()]
    assert min(reach) == 0.0  # no KL below 0
    assert fig.axes[0].get_xlabel() == "KL(steered || base) per token, nats"
    assert "nats" in fig.axes[0].get_ylabel()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b"]


def test_cost_with_several_layers_and_on_a_log_scale() -> None:
    frame = pd.concat([curve("a"), curve("a", layer=9)])
    fig = plot_cost(frame, scale="log")
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a, layer 3", "a, layer 9"]
    assert fig.axes[0].get_xscale() == "log"
    assert all(min(line.get_xdata()) > 0 for line in fig.axes[0].lines if line.get_marker() != "None")
    scopes = pd.concat([curve("a").assign(positions="all"), curve("a").assign(positions="last")])
    assert [t.get_text() for t in plot_cost(scopes).legends[0].get_texts()] == ["a, all", "a, last"]
    fig = plot_cost(curve("one point", (0.2,)))
    figure_png(fig)
    assert_inside(fig)


def test_records_are_sorted_and_coloured() -> None:
    frame = records(5)
    frame.loc[5] = [7, math.nan]
    fig = plot_records(frame.assign(vector=HOSTILE))
    bars = fig.axes[0].patches
    assert [bar.get_height() for bar in bars] == [5.0, 3.0, 1.0, -2.0, -4.0]
    assert [bar.get_facecolor() for bar in bars] == [to_rgba(CHOSEN)] * 3 + [to_rgba(REJECTED)] * 2
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["4", "2", "0", "1", "3"]
    (title,) = [text for text in texts(fig) if "helped" in text]
    assert title == f"{HOSTILE};  3 helped, 2 hurt of 5;  mean +0.60 \u00b1 1.63 (se, dotted);  1 missing"
    assert "nats" in fig.axes[0].get_ylabel()


@pytest.mark.parametrize("n", [1, 30, 31, 400])
def test_records_of_any_number_are_legible(n: int) -> None:
    fig = plot_records(records(n).assign(record=[f"a long question, number {i}" for i in range(n)]))
    figure_png(fig)
    assert_inside(fig)
    assert (len(fig.axes[0].get_xticks()) == n) == (n <= 30)
    assert not any("nan" in text for text in texts(fig))


def test_token_strips_have_every_number() -> None:
    fig = plot_token_logprobs(tokens())
    found = texts(fig)
    for number in ("\u22121.00", "\u22120.50", "+0.50", "\u22125.00", "\u22122.00", "\u2013", "\u21b5", "good"):
        assert number in found
    assert found.count("before") == 1
    assert any(text.startswith("log p of each token, nats; sum before \u22126.00") for text in found)
    long = pd.concat([tokens()] * 40)
    fig = plot_token_logprobs(long)
    assert_inside(fig)
    assert fig.get_size_inches()[1] > 5


def test_names_are_drawn_as_they_stand() -> None:
    figures = [
        plot_heatmap(grid([1, 2], [0.1]).assign(vector=HOSTILE), (2, 0.1), label=HOSTILE),
        plot_cost(curve(HOSTILE)),
        plot_records(records(3).assign(record=[HOSTILE, "$$", "_"], vector=HOSTILE), label=HOSTILE),
        plot_token_logprobs(tokens().assign(token=[HOSTILE, "$", "\\"])),
    ]
    for fig in figures:
        assert figure_png(fig).startswith(b"\x89PNG")
        shown = [t for t in fig.findobj(matplotlib.text.Text) if "$x_1$" in t.get_text() and t.get_visible()]
        assert shown
        assert not any(t.get_parse_math() for t in shown)


def test_nothing_global_changes() -> None:
    before = dict(matplotlib.rcParams)
    for fig in (
        plot_heatmap(grid([1], [0.1])),
        plot_cost(curve()),
        plot_records(records(2)),
        plot_token_logprobs(tokens()),
    ):
        plain = figure_png(fig)
        assert plain
    assert {k: v for k, v in matplotlib.rcParams.items() if k != "backend"} == {
        k: v for k, v in before.items() if k != "backend"
    }
    assert matplotlib.pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_heatmap(grid([1], [0.1]).drop(columns="alpha")), "missing: \\['alpha'\\]"),
        (lambda: plot_heatmap(grid([1], [0.1]), value="kl"), "missing: \\['kl'\\]"),
        (lambda: plot_heatmap(grid([1], [0.1])[:0]), "missing: rows"),
        (lambda: plot_heatmap(pd.concat([grid([1], [0.1])] * 2)), "several rows for layer 1, alpha 0.1"),
        (
            lambda: plot_heatmap(grid([1, 2], [0.1]).assign(vector=["a", "b"])),
            "2 values of 'vector' .a, b.; plot one: frame\\[frame.vector == 'a'",
        ),
        (lambda: plot_heatmap(grid([1], [0.1]), (2, 0.1)), "not in the table; it has layers \\[1\\]"),
        (lambda: plot_cost(curve().drop(columns=["kl_se", "kl"])), "missing: \\['kl', 'kl_se'\\]"),
        (lambda: plot_cost(pd.concat([curve()] * 2)), "several rows for vector 'a'"),
        (lambda: plot_cost(curve().assign(kl=math.nan)), "no row has an effect and a KL; nothing"),
        (lambda: plot_cost(curve().assign(kl=0.0), scale="log"), "a KL above 0"),
        (lambda: plot_cost(curve(), scale="cubic"), "scale='cubic'"),  # type: ignore[arg-type]
        (lambda: plot_records(records(2).drop(columns="change")), "missing: \\['change'\\]"),
        (lambda: plot_records(pd.concat([records(2)] * 2)), "several rows for record '0'"),
        (lambda: plot_records(records(2).assign(alpha=[0.1, 0.2])), "2 values of 'alpha'"),
        (lambda: plot_heatmap(grid([1, 2], [0.1]).assign(positions=["all", "last"])), "2 values of 'positions'"),
        (lambda: plot_records(records(2).assign(change=math.nan)), "no record has a finite change"),
        (lambda: plot_token_logprobs(tokens().drop(columns="before")), "missing: \\['before'\\]"),
        (lambda: plot_token_logprobs(tokens()[:0]), "missing: rows"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
