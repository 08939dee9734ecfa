"""Effects over layers, and beside the controls'."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from grains_tl.evaluate.choosing import Choice
from grains_tl.evaluate.controls import Comparison
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
)
from grains_tl.plotting.sweeps import EFFECT, legend_above

EFFECT_LABEL = "effect: half the change of the margin\nbetween +alpha and \u2212alpha, nats"

_DASHES = ("-", "--", ":", "-.")


def plot_layers(
    sweep_frame: pd.DataFrame,
    chosen_layer: int | Choice | None = None,
    *,
    label: str | None = None,
    title: str | None = None,
) -> Any:
    """Effect over layers with bands of 1.96 standard errors: a line per vector and, in a sweep, per scope and alpha.

    Args:
        sweep_frame: from ``sweep`` as it is; or columns ``layer``, ``vector``, ``effect`` and ``se`` (nats), with
            ``positions`` and ``alpha`` where there are several. NaN leaves a gap.
        chosen_layer: marked by a dotted line; a ``Choice`` also gets a ring around its point.
        label: what ``effect`` is, with its unit; by default that of ``sweep`` where there is ``effect_se``, else that of
            ``evaluate.effects``.
        title: of the figure; by default what all lines have in common, and how many records.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns, no rows, or several rows for one layer of a line.

    Examples:
        >>> rows = {"layer": [21, 24], "vector": ["ours"] * 2, "effect": [1.9, 3.2], "se": [0.2, 0.2]}
        >>> fig = plot_layers(pd.DataFrame(rows), chosen_layer=24)
    """
    if isinstance(sweep_frame, pd.DataFrame) and "effect_se" in sweep_frame and "se" not in sweep_frame:
        sweep_frame, label = sweep_frame.rename(columns={"effect_se": "se"}), EFFECT if label is None else label
    lines = _layer_lines(sweep_frame)
    vectors = list(dict.fromkeys(lines.vector))
    parts = ["vector", "positions", "step"]
    several = [part for part in parts if lines[part].nunique() > 1] or ["vector"]
    common = [str(lines[part].iloc[0]) for part in parts if part not in several and lines[part].iloc[0]]
    with style():
        fig = figure(8.0, 4.2, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
        handles: list[Any] = []
        for i, (key, rows) in enumerate(lines.groupby(parts, sort=False)):
            names = dict(zip(parts, key, strict=True))
            nth = vectors.index(names["vector"]) if len(vectors) > 1 else i
            handles += _layer_line(ax, rows.sort_values("layer"), nth, i if len(vectors) > 1 else 0)
            handles[-1].set_label(shortened(", ".join(str(names[part]) for part in several)))
        handles += _mark_choice(ax, lines, chosen_layer)
        _layer_axis(ax)
        ax.set_ylabel(EFFECT_LABEL if label is None else label)
        legend_above(fig, handles, "bands: \u00b1 1.96 se over records")
        n = sweep_frame["n"].max() if "n" in sweep_frame else None
        shown = ", ".join([*common, *([] if n is None else [f"{n:.0f} records"])]) if title is None else title
        if shown:
            ax.set_title(textwrap.fill(shortened(shown, 160), 90), parse_math=False)
    return fig


def _layer_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows to draw, with what makes a line: ``vector``, ``positions`` and ``step`` (alpha as text)."""
    rows = numbers(frame, "vector", ("layer", "effect", "se"))
    scopes, steps = frame.get("positions"), frame.get("alpha")
    rows["positions"] = "" if scopes is None else [f"positions {scope}" for scope in scopes]
    rows["step"] = "" if steps is None else [f"alpha {_alpha(a)}" for a in pd.to_numeric(steps, errors="coerce")]
    twice = rows[rows.duplicated(["layer", "vector", "positions", "step"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(
            f"several rows for layer {row.layer:.0f} of {row.vector!r}{row.step and ', ' + row.step}; expected one for each "
            "layer of a vector, scope and alpha"
        )
    return rows


def _alpha(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "\u2212")


def _layer_line(ax: Any, rows: pd.DataFrame, nth: int, dash: int) -> list[Any]:
    colour, marker = COLOURS[nth % len(COLOURS)], MARKERS[nth % len(MARKERS)]
    dashes = _DASHES[max(dash, nth // len(COLOURS)) % len(_DASHES)]
    ax.fill_between(
        rows.layer, rows.effect - 1.96 * rows.se, rows.effect + 1.96 * rows.se, color=colour, alpha=0.13, lw=0
    )
    return list(ax.plot(rows.layer, rows.effect, dashes, color=colour, marker=marker, ms=4.5, lw=1.8))


def _mark_choice(ax: Any, lines: pd.DataFrame, choice: int | Choice | None) -> list[Any]:
    if choice is None:
        return []
    if not isinstance(choice, Choice):
        handle = ax.axvline(choice, color=GREY, lw=1.2, ls=":", zorder=1.4)
        handle.set_label(f"chosen layer {choice}")
        return [handle]
    handle = ax.axvline(choice.layer, color=GREY, lw=1.2, ls=":", zorder=1.4)
    handle.set_label(shortened(f"chosen: {choice.vector}, layer {choice.layer}, alpha {_alpha(choice.alpha)}"))
    step = (lines.step == f"alpha {_alpha(choice.alpha)}") | (lines.step == "")
    scope = (lines.positions == f"positions {choice.positions}") | (lines.positions == "")
    point = lines[(lines.vector == choice.vector) & (lines.layer == choice.layer) & step & scope]
    ax.scatter(point.layer, point.effect, s=130, facecolor="none", edgecolor="black", lw=1.6, zorder=5)
    return [handle]


def _layer_axis(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.margins(x=0.03)
    ax.set_xlabel("layer (steered after this block, counted from 0)")


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

    Examples:
        >>> table = pd.DataFrame({"vector": ["ours"], "effect": [2.5], "low": [2.1], "high": [2.9]})
        >>> fig = plot_controls(table, {"ours": [2.4, 2.6], "random directions": [0.3, -0.2]})
    """
    from matplotlib.lines import Line2D

    if isinstance(table_frame, Comparison):
        table_frame, draws = table_frame.table, table_frame.draws if draws is None else draws
    frame = numbers(table_frame, "vector", ("effect", "low", "high"))
    if not isinstance(draws, Mapping):
        raise ValueError(
            f"draws={draws!r}; expected effects by name: plot_controls(found.table, found.draws), or plot_controls(found)"
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
