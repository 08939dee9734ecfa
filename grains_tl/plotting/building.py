"""Pictures of ``analysis.learning_curve`` and ``analysis.transfer``."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl.plotting.style import (
    COLOURS,
    DRAW,
    GREY,
    effects_with_band,
    figure,
    log_ticks,
    numbers,
    shortened,
    signed,
    style,
)

PLACEBO = "random direction"


def plot_learning_curve(frame: pd.DataFrame, *, title: str = "") -> Any:
    """The effect over the number of building records, with its interval, the range of the draws, and the placebo's level.

    Args:
        frame: from ``analysis.learning_curve``; tables of several recipes may be concatenated.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"vector": ["caa"] * 2, "size": [2, 20], "effect": [0.3, 0.9], "low": [0.0, 0.7], "high": [0.6, 1.1]}
        >>> fig = plot_learning_curve(pd.DataFrame(rows).assign(worst=[0.1, 0.9], best=[0.5, 0.9]))
    """
    rows = numbers(frame, "vector", ("size", "effect", "low", "high", "worst", "best"))
    placebo, curves = rows[rows["vector"] == PLACEBO], rows[rows["vector"] != PLACEBO]
    with style():
        fig = figure(6.4, 3.8, constrained=True)
        ax = fig.subplots()
        ax.grid(True)
        ax.axhline(0, color=GREY, linewidth=0.8)
        for row in placebo.head(1).itertuples():
            ax.axhspan(row.low, row.high, color=DRAW, alpha=0.2, lw=0)
            ax.axhline(row.effect, color=DRAW, linewidth=1.6, label=f"{PLACEBO}s of equal KL")
        for i, (name, own) in enumerate(curves.groupby("vector", sort=False)):
            own, colour = own.sort_values("size"), COLOURS[i % len(COLOURS)]
            effects_with_band(ax, own, "size", colour, shortened(name))
            ax.vlines(own["size"], own["worst"], own["best"], color=colour, linewidth=1)
        log_ticks(ax, {size: f"{size:.0f}" for size in sorted(set(curves["size"]))})
        ax.set_xlabel("building records")
        ax.set_ylabel("effect on test records: change of the\nmargin at equal KL, nats")
        ax.legend(loc="best")
        ax.set_title(title or "bands: 95 % over draws and test records; lines: range of the draws", loc="left")
    return fig


def plot_transfer(frame: pd.DataFrame, *, title: str = "") -> Any:
    """The matrix of effects: a row per building set, a column per test set, with each interval.

    Args:
        frame: from ``analysis.transfer``.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"built_on": ["a", "b"], "measured_on": ["a", "a"], "effect": [1.0, 0.4], "low": [0.8, 0.1]}
        >>> fig = plot_transfer(pd.DataFrame(rows).assign(high=[1.2, 0.7]))
    """
    rows = numbers(frame, "built_on", ("effect", "low", "high"))
    there = frame["measured_on"].astype(str).to_numpy()
    other = frame["template"].astype(str).to_numpy() if "template" in frame else ["own"] * len(rows)
    rows["column"] = [name if t == "own" else f"{name},\ntemplate {t}" for name, t in zip(there, other, strict=True)]
    down, across = list(dict.fromkeys(rows["built_on"])), list(dict.fromkeys(rows["column"]))
    # the placebo stands last
    down = [name for name in down if name != PLACEBO] + [PLACEBO] * (PLACEBO in down)
    largest = float(rows["effect"].abs().max()) or 1.0
    with style():
        fig = figure(2.6 + 1.5 * len(across), 1.3 + 0.62 * len(down), constrained=True)
        ax = fig.subplots()
        grid = rows.pivot_table(index="built_on", columns="column", values="effect").reindex(down)[across]
        shown = ax.imshow(grid.to_numpy(), cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        for row in rows.itertuples():
            place = (across.index(row.column), down.index(row.built_on))
            dark = abs(row.effect) > 0.6 * largest
            said = f"{signed(row.effect)}\n({signed(row.low)} to {signed(row.high)})"
            ax.annotate(said, place, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        ax.set_xticks(range(len(across)), [shortened(name, 40) for name in across])
        ax.set_yticks(range(len(down)), [shortened(name, 30) for name in down])
        ax.tick_params(length=0)
        ax.set_xlabel("measured on")
        ax.set_ylabel("built on")
        fig.colorbar(shown, ax=ax, label="change of the margin, nats", shrink=0.9)
        if title:
            ax.set_title(title, loc="left")
    return fig
