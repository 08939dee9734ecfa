"""Attribution methods side by side, as ``compare_attributions`` measured them."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def plot_comparison(
    frame: pd.DataFrame,
    *,
    panels: Mapping[str, str] | None = None,
    name: str = "method",
    reference: str = "random_tokens",
    title: str = "",
) -> Any:
    """One row per method, one panel per measure, with bars of 1.96 standard errors.

    The dotted line is the reference row, by default the random choice of tokens, where the table has one.

    Args:
        frame: measures with their ``_se``, one row per method; from ``compare_attributions`` for example.
        panels: measure -> what it is, with its unit; by default those of ``compare_attributions`` that the table has
            (nats, larger is better in all of them).
        name: the column with the rows' names.
        reference: the name of the row to draw in orange, with a dotted line.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: no rows, or none of the measures.

    Example:
        >>> rows = pd.DataFrame({"method": ["one", "other"], "effect": [2.0, 0.1], "effect_se": [0.3, 0.2]})
        >>> fig = plot_comparison(rows)
    """
    known = PANELS if panels is None else panels
    shown = [measure for measure in known if {measure, f"{measure}_se"} <= set(frame.columns)]
    if not shown:
        raise ValueError(f"a table with one of {list(known)} (and _se) is needed; it has {list(frame.columns)}")
    data = numbers(frame, name, [column for measure in shown for column in (measure, f"{measure}_se")])
    with style():
        fig = figure(2.1 + 2.2 * len(shown), 1.3 + 0.34 * len(data) + 0.25 * bool(title), constrained=True)
        axes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        places = list(range(len(data)))[::-1]
        for ax, measure in zip(axes, shown, strict=True):
            _panel(ax, data, measure, known[measure], data[name] == reference, places)
        axes[0].set_yticks(places, [shortened(m, 32) for m in data[name]])
        for label in axes[0].get_yticklabels():
            label.set_parse_math(False)  # names are drawn as they stand
        axes[0].set_ylim(-0.6, len(data) - 0.4)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, parse_math=False)
    return fig


def _panel(ax: Any, data: pd.DataFrame, measure: str, label: str, is_reference: pd.Series, places: list[int]) -> None:
    ax.grid(True, axis="x")
    ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
    chance = data.loc[is_reference, measure]
    if len(chance) and math.isfinite(chance.iloc[0]):
        ax.axvline(chance.iloc[0], color=GREY, lw=1.2, ls=":", zorder=1.4)
    for place, value, se, marked in zip(places, data[measure], data[f"{measure}_se"], is_reference, strict=True):
        if math.isfinite(value):
            error = 1.96 * se if math.isfinite(se) else None
            ax.errorbar(value, place, xerr=error, fmt="o", ms=5, lw=1.6, color=DRAW if marked else CHOSEN)
    ax.set_title(label, parse_math=False)
    ax.tick_params(axis="y", length=0)
