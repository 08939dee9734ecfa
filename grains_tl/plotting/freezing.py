"""Pictures of ``analysis.mechanism``: what carries an effect, by kind of part, by block, by head."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl.plotting.style import COLOURS, GREY, figure, numbers, signed, style
from grains_tl.plotting.vectors import plot_patching

#: What a part is, in the picture's words.
LABELS = {
    "direct": "direct path",
    "norms": "norms",
    "QK": "attention patterns (QK)",
    "OV": "attention values (OV)",
    "MLP": "MLPs",
    "total": "total",
}


def plot_mechanism(frame: pd.DataFrame, *, title: str = "") -> Any:
    """What carries a steering effect: parts with their intervals, or bars over blocks, or a heatmap of heads.

    Args:
        frame: from ``analysis.mechanism``; of a table by layer or head only the rows of the vector itself are drawn.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"part": ["direct", "MLP"], "effect": [0.2, 1.1], "low": [0.1, 0.8], "high": [0.3, 1.4]}
        >>> fig = plot_mechanism(pd.DataFrame(rows).assign(vector="steering"))
    """
    if "layer" in frame.columns:
        own = frame[frame["vector"] == "steering"]
        if "head" in frame.columns:
            own = own[own["part"] == "head"]
        table = own.rename(columns={"part": "component"}).drop(columns="effect", errors="ignore")
        return plot_patching(table.rename(columns={"lost": "effect"}), title=title or "Lost if this alone is frozen")
    rows = numbers(frame, "part", ("effect", "low", "high")).assign(vector=frame["vector"].to_numpy())
    vectors, parts = list(dict.fromkeys(rows["vector"])), list(dict.fromkeys(rows["part"]))
    if not parts:
        raise ValueError("the table has no rows; expected those of analysis.mechanism")
    with style():
        fig = figure(6.4, 0.9 + 0.42 * len(parts), constrained=True)
        ax = fig.subplots()
        ax.axvline(0, color=GREY, linewidth=0.8)
        for number, name in enumerate(vectors):
            own = rows[rows["vector"] == name]
            shift = 0.28 * (number - (len(vectors) - 1) / 2)
            heights = [parts.index(part) + shift for part in own["part"]]
            colour = COLOURS[number % len(COLOURS)]
            ax.hlines(heights, own["low"], own["high"], color=colour, linewidth=2)
            ax.plot(own["effect"], heights, "o", color=colour, markersize=5, label=name)
            if number == 0:
                for height, effect in zip(heights, own["effect"], strict=True):
                    ax.annotate(
                        signed(effect),
                        (1.01, height),
                        xycoords=("axes fraction", "data"),
                        va="center",
                    )
        ax.set_yticks(range(len(parts)), [LABELS.get(part, part) for part in parts])
        ax.invert_yaxis()
        ax.set_xlabel("part of the effect on the margin, nats")
        if len(vectors) > 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(vectors))
        if title:
            ax.set_title(title, loc="left")
    return fig
