"""Effects over layers, and a vector beside its controls."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from grains_tl.comparison import Comparison
from grains_tl.plotting.style import (
    CHOSEN,
    COLOURS,
    DRAW,
    GREY,
    MARKERS,
    figure,
    number,
    numbers,
    shortened,
    signed,
    style,
    text_widths,
)
from grains_tl.plotting.sweeps import EFFECT

EFFECT_LABEL = "effect: half the change of the margin\nbetween +alpha and \u2212alpha, nats"


def plot_layers(sweep_frame: pd.DataFrame, chosen_layer: int | None = None, *, label: str | None = None) -> Any:
    """Effect over layers, one line per vector, with bands of 1.96 standard errors.

    Args:
        sweep_frame: columns ``layer``, ``vector``, ``effect`` and ``se`` (nats; ``effect_se`` in a table of ``sweep``),
            one row per layer and vector; NaN leaves a gap.
        chosen_layer: marked by a dotted line.
        label: what ``effect`` is, with its unit; by default that of ``sweep`` where there is ``effect_se``, else that of
            ``evaluate.effects``.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns, no rows, or several rows for one layer and vector.

    Example:
        >>> rows = {"layer": [21, 24], "vector": ["ours"] * 2, "effect": [1.9, 3.2], "se": [0.2, 0.2]}
        >>> fig = plot_layers(pd.DataFrame(rows), chosen_layer=24)
    """
    from matplotlib.ticker import MaxNLocator

    if isinstance(sweep_frame, pd.DataFrame) and "effect_se" in sweep_frame and "se" not in sweep_frame:
        sweep_frame, label = sweep_frame.rename(columns={"effect_se": "se"}), EFFECT if label is None else label
    frame = numbers(sweep_frame, "vector", ("layer", "effect", "se"))
    twice = frame[frame.duplicated(["layer", "vector"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"several rows for layer {row.layer:.0f} of {row.vector!r}; plot one alpha at a time")
    with style():
        fig = figure(8.0, 4.2, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
        lines: list[Any] = []
        for i, (name, rows) in enumerate(frame.groupby("vector", sort=False)):
            rows = rows.sort_values("layer")
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            line_style = ("-", "--", ":")[i // len(COLOURS) % 3]
            low, high = rows.effect - 1.96 * rows.se, rows.effect + 1.96 * rows.se
            ax.fill_between(rows.layer, low, high, color=colour, alpha=0.13, lw=0)
            lines += ax.plot(rows.layer, rows.effect, line_style, color=colour, marker=marker, ms=4.5, lw=1.8)
            lines[-1].set_label(shortened(name))
        if chosen_layer is not None:
            lines.append(ax.axvline(chosen_layer, color=GREY, lw=1.2, ls=":", zorder=1.4))
            lines[-1].set_label(f"chosen layer {chosen_layer}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.margins(x=0.03)
        ax.set_xlabel("layer (steered after this block, counted from 0)")
        ax.set_ylabel(EFFECT_LABEL if label is None else label)
        columns = max(1, min(4, int(7.6 / (0.65 + max(text_widths([line.get_label() for line in lines]))))))
        legend = fig.legend(
            handles=lines, loc="outside upper left", ncols=columns, title="bands: \u00b1 1.96 se over records"
        )
        legend._legend_box.align = "left"  # the title stands over the first entry
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig


def plot_controls(table_frame: pd.DataFrame | Comparison, draws: Mapping[str, Sequence[Any]] | None = None) -> Any:
    """Each vector's effect and interval on its own row, with the single draws as small dots behind.

    Args:
        table_frame: columns ``vector``, ``effect``, ``low`` and ``high`` (nats), one row per vector; or what
            ``compare_with_controls`` gave, which brings its draws.
        draws: effects of single draws by vector name, nats (None and NaN are left out); names without a row get one
            with the dots alone.

    Returns:
        A matplotlib ``Figure``; it grows with the number of rows.

    Raises:
        ValueError: missing columns, no rows, or a table without draws.

    Example:
        >>> table = pd.DataFrame({"vector": ["ours"], "effect": [2.5], "low": [2.1], "high": [2.9]})
        >>> fig = plot_controls(table, {"ours": [2.4, 2.6], "random directions": [0.3, -0.2]})
    """
    from matplotlib.lines import Line2D

    if isinstance(table_frame, Comparison):
        table_frame, draws = table_frame.table, table_frame.draws if draws is None else draws
    frame = numbers(table_frame, "vector", ("effect", "low", "high"))
    if not isinstance(draws, Mapping):
        raise ValueError(
            f"draws={draws!r}; effects by name are needed: plot_controls(found.table, found.draws), or plot_controls(found)"
        )
    alone = [name for name in draws if name not in set(frame.vector)]
    names = [*frame.vector, *alone]
    with style():
        fig = figure(8.0, 1.35 + 0.42 * len(names), constrained=True)
        ax = fig.add_subplot()
        ax.grid(True, axis="x")
        ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
        for y, name in enumerate(names):
            values = [v for v in map(number, draws.get(name, ())) if math.isfinite(v)]
            # golden-ratio steps spread neighbours evenly without a random generator
            heights = [y + 0.5 * ((i * 0.6180339887 + 0.5) % 1 - 0.5) for i in range(len(values))]
            ax.scatter(values, heights, s=13, color=DRAW, alpha=0.65, lw=0, zorder=2)
        rows = range(len(frame))
        ax.hlines(rows, frame.low, frame.high, color=CHOSEN, lw=2.4, zorder=3)
        ax.scatter(frame.effect, rows, s=46, color=CHOSEN, edgecolor="white", lw=1.0, zorder=4)
        ax.set_yticks(range(len(names)), [textwrap.fill(shortened(name), 36) for name in names])
        for label in ax.get_yticklabels():
            label.set_parse_math(False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.06)
        ax.set_xlabel(EFFECT_LABEL.replace("\n", " "))
        values_axis = ax.secondary_yaxis("right")
        values_axis.set_yticks(list(rows), [signed(v) for v in frame.effect])
        values_axis.tick_params(length=0)
        values_axis.spines["right"].set_visible(False)
        entries = [
            Line2D([], [], color=CHOSEN, lw=2.4, marker="o", ms=7, mec="white", label="effect and its interval"),
            Line2D([], [], color=DRAW, lw=0, marker="o", ms=4, alpha=0.65, label="single draws"),
        ]
        fig.legend(handles=entries, loc="outside upper left", ncols=2)
    return fig
