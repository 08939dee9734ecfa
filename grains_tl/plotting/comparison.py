"""Attribution methods side by side, as ``compare_attributions`` measured them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from grains_tl.plotting.style import CHOSEN, DRAW, GREY, figure, numbers, shortened, style

#: What each panel shows; those that the table lacks are left out.
PANELS = {
    "deletion_area": "deletion area, nats",
    "insertion_area": "insertion area, nats",
    "removed_chosen": "f falls without I+, nats",
    "effect": "effect of the vector, nats",
}


def plot_comparison(frame: pd.DataFrame) -> Any:
    """One row per method, one panel per measure, with bars of 1.96 standard errors; larger is better in all of them.

    The dotted line is the random choice of tokens, where the table has one.

    Args:
        frame: from ``compare_attributions``: ``method``, and measures with their ``_se``.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: no rows, or none of the measures.

    Example:
        >>> plot_comparison(compare_attributions(model, pairs))     # doctest: +SKIP
    """
    shown = [name for name in PANELS if {name, f"{name}_se"} <= set(frame.columns)]
    if not shown:
        raise ValueError(f"a table with one of {list(PANELS)} (and _se) is needed; it has {list(frame.columns)}")
    data = numbers(frame, "method", [column for name in shown for column in (name, f"{name}_se")])
    with style():
        fig = figure(2.1 + 2.2 * len(shown), 1.3 + 0.34 * len(data), constrained=True)
        axes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        places = list(range(len(data)))[::-1]
        for ax, name in zip(axes, shown, strict=True):
            _panel(ax, data, name, places)
        axes[0].set_yticks(places, [shortened(m, 32) for m in data["method"]])
        for label in axes[0].get_yticklabels():
            label.set_parse_math(False)  # names are drawn as they stand
        axes[0].set_ylim(-0.6, len(data) - 0.4)
    return fig


def _panel(ax: Any, data: pd.DataFrame, name: str, places: list[int]) -> None:
    ax.grid(True, axis="x")
    ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
    is_random = data["method"] == "random_tokens"
    chance = data.loc[is_random, name]
    if len(chance) and math.isfinite(chance.iloc[0]):
        ax.axvline(chance.iloc[0], color=GREY, lw=1.2, ls=":", zorder=1.4)
    for place, value, se, random in zip(places, data[name], data[f"{name}_se"], is_random, strict=True):
        if math.isfinite(value):
            error = 1.96 * se if math.isfinite(se) else None
            ax.errorbar(value, place, xerr=error, fmt="o", ms=5, lw=1.6, color=DRAW if random else CHOSEN)
    ax.set_title(PANELS[name])
    ax.tick_params(axis="y", length=0)
