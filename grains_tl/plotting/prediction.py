"""The picture of ``gr.finding.predict_effect``: predictions among the sets that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from grains_tl.finding.prediction import LEVEL, calibration, calibration_table
from grains_tl.plotting.style import COLOURS, DRAW, GREY, figure, numbers, style


def plot_prediction(frame: pd.DataFrame, measured: Mapping[int, float] | None = None, *, title: str = "") -> Any:
    """Predicted effects among the calibration sets: first-order effect against what was measured.

    Args:
        frame: from ``gr.finding.predict_effect``.
        measured: by layer, what a measurement gave afterwards, nats.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``: a point per calibration set, recipe and layer (another colour where labels were shuffled),
        the prediction with its band, and the own layers.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"layer": [18], "linear": [3.0], "predicted": [2.1], "low": [0.9], "high": [3.6]}
        >>> fig = plot_prediction(pd.DataFrame(rows), {18: 2.4})
    """
    rows = numbers(frame, "layer", ("linear", "predicted", "low", "high"))
    known = calibration_table()
    linear = known["linear"].to_numpy(float)
    shuffled = known["set"].str.contains("shuffled").to_numpy()
    ends = np.concatenate([linear, rows["linear"]])
    grid = np.linspace(ends.min() - 0.3, ends.max() + 0.3, 200)
    middle, low, high = calibration().predict(grid)
    with style():
        fig = figure(6.4, 4.2, constrained=True)
        ax = fig.subplots()
        ax.grid(True)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.fill_between(grid, low, high, color=GREY, alpha=0.15, lw=0, label=f"{LEVEL:.0%} interval")
        ax.plot(grid, middle, color=GREY, linewidth=1.4)
        for label, own, colour in (("calibration sets", ~shuffled, COLOURS[5]), ("labels shuffled", shuffled, DRAW)):
            ax.plot(linear[own], known["effect"][own], "o", color=colour, markersize=4, alpha=0.7, label=label)
        ax.errorbar(
            rows["linear"],
            rows["predicted"],
            yerr=[rows["predicted"] - rows["low"], rows["high"] - rows["predicted"]],
            **{"fmt": "D", "color": COLOURS[1], "ms": 6, "capsize": 3, "label": "predicted"},
        )
        for i, row in enumerate(rows.itertuples()):  # names stand at either end in turn: bars may be close together
            end, place = (row.low, "top") if i % 2 else (row.high, "bottom")
            ax.annotate(f"layer {row.layer}", (row.linear, end), ha="center", va=place, fontsize=8)
        found = {str(layer): effect for layer, effect in (measured or {}).items()}
        there = rows[rows["layer"].isin(list(found))]
        if len(there):
            ax.plot(there["linear"], [found[layer] for layer in there["layer"]], "k*", ms=10, label="measured")
        ax.set_xlabel("first-order effect, from building records alone, nats")
        ax.set_ylabel("effect on other records, nats")
        ax.legend(loc="upper left")
        if title:
            ax.set_title(title, loc="left")
    return fig
