"""Yes/no answers under steering, beside a constant bias."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl.plotting.style import COLOURS, GREY, MARKERS, figure, numbers, shortened, style


def plot_yes_no(frame: pd.DataFrame, *, reference: str = "constant bias", title: str = "") -> Any:
    """Recall against false yes: one line per vector as its strength grows, the constant bias as a thick grey curve.

    Above the grey curve an answer is better than any shift of the threshold can make it; the open circle is the unsteered
    model.

    Args:
        frame: columns ``vector``, ``strength``, ``false_yes``, ``recall`` (shares) and ``recall_se``, as
            ``tiny_vlm.yes_no_curves`` makes them. A row with strength 0 is the unsteered model.
        reference: the row name to draw as the grey curve.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``; bars are 1.96 standard errors of the recall over questions.

    Raises:
        ValueError: missing columns, or no rows.

    Example:
        >>> rows = {"vector": ["CAA", "CAA"], "strength": [0.0, 0.4], "false_yes": [0.8, 0.4], "recall": [1.0, 0.9]}
        >>> fig = plot_yes_no(pd.DataFrame({**rows, "recall_se": [0.0, 0.03]}))
    """
    points = numbers(frame, "vector", ("strength", "false_yes", "recall", "recall_se"))
    with style():
        fig = figure(8.0, 4.8, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        names = [name for name in dict.fromkeys(points.vector) if name != reference]
        bias = points[points.vector == reference].sort_values(["false_yes", "recall"])
        if len(bias):
            ax.plot(bias.false_yes, bias.recall, color=GREY, lw=4.0, alpha=0.45, zorder=1.5, label=shortened(reference))
        for i, name in enumerate(names):
            rows = points[points.vector == name].sort_values("strength")
            rows = rows[rows.strength != 0]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.errorbar(
                rows.false_yes, rows.recall, yerr=1.96 * rows.recall_se, color=colour, marker=marker, ms=5, lw=1.8,
                elinewidth=0.9, label=shortened(name, 48),
            )  # fmt: skip
        plain = points[points.strength == 0].head(1)
        ax.plot(plain.false_yes, plain.recall, "o", ms=10, mfc="white", mec="black", mew=1.5, zorder=5, lw=0,
                label="unsteered")  # fmt: skip
        ax.set_xlabel("false yes: share of absent digits answered with yes")
        ax.set_ylabel("recall: share of shown digits\nanswered with yes")
        ax.margins(0.04)
        shown = points[points.vector != reference]
        if len(shown):  # the grey curve goes down to 0, where nobody steers: keep the part that is compared
            low = float((shown.recall - 1.96 * shown.recall_se.fillna(0)).min())
            ax.set_ylim(max(-0.02, 1.2 * low - 0.22), 1.01 if low > 0.8 else 1.03)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, parse_math=False)
        legend = fig.legend(loc="outside lower left", ncols=3, title="bars: \u00b1 1.96 se over questions")
        legend._legend_box.align = "left"  # the title stands over the first entry
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig
