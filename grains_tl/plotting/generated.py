"""KL over the positions of generated texts."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl.evaluate.generation_tables import generation_curve
from grains_tl.plotting.style import COLOURS, figure, style
from grains_tl.plotting.sweeps import legend_above


def plot_generation_kl(frame: pd.DataFrame, *, title: str | None = None) -> Any:
    """Where along the generated text the KL is spent: a line per vector with its interval over prompts.

    Args:
        frame: from ``evaluate.generation_quality``; with a column ``vector``, a line for each.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``: the mean over prompts at each generated position, the band its 95 % interval (Student's t),
        dotted the 95 % quantile over texts; nats.

    Raises:
        ValueError: another table.

    Examples:
        >>> table = gr.evaluate.generation_quality(model, prompts, vectors.steering(0.2, 12))      # doctest: +SKIP
        >>> gr.plotting.plot_generation_kl(table).savefig("kl.png")                               # doctest: +SKIP
    """
    curve = generation_curve(frame)
    with style():
        fig = figure(7.0, 4.0, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        for i, (vector, rows) in enumerate(curve.groupby("vector", sort=False)):
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(rows["position"], rows["kl"], color=colour, label=str(vector))
            ax.fill_between(rows["position"], rows["low"].clip(lower=0), rows["high"], color=colour, alpha=0.15, lw=0)
            ax.plot(rows["position"], rows["p95"], ":", color=colour, lw=1.0)
        ax.set(xlabel="generated token", ylabel="KL(steered || base), nats", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlim(1, max(2, int(curve["position"].max())))
        if curve["vector"].nunique() > 1:
            legend_above(fig, ax.get_legend_handles_labels()[0], "vector")
        if title is not None:
            ax.set_title(title)
    return fig
