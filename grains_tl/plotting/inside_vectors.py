"""Pictures of ``analysis.sparsity_curve`` and ``analysis.lens_agreement``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from grains_tl.plotting.style import COLOURS, DRAW, GREY, effects_with_band, figure, log_ticks, numbers, style

NAMES = {"size": "largest", "gradient": "largest vector x gradient", "random": "at random"}


def plot_sparsity(frame: pd.DataFrame, *, title: str = "") -> Any:
    """The effect at equal KL over the share of coordinates kept, for each way to choose them.

    Args:
        frame: from ``analysis.sparsity_curve``.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"by": ["size"] * 2, "share": [0.1, 1.0], "effect": [0.3, 0.9], "low": [0.0, 0.7], "high": [0.6, 1.1]}
        >>> fig = plot_sparsity(pd.DataFrame(rows).assign(coordinates=[58, 576]))
    """
    rows = numbers(frame, "by", ("share", "effect", "low", "high", "coordinates"))
    with style():
        fig = figure(6.4, 3.8, constrained=True)
        ax = fig.subplots()
        ax.grid(True)
        ax.axhline(0, color=GREY, linewidth=0.8)
        for i, (name, own) in enumerate(rows.groupby("by", sort=False)):
            own = own.sort_values("share")
            colour = DRAW if name == "random" else COLOURS[i % len(COLOURS)]
            effects_with_band(ax, own, "share", colour, NAMES.get(str(name), str(name)))
        ticks = rows.drop_duplicates("share").sort_values("share")
        log_ticks(ax, {row.share: f"{row.share:.3g}\n{row.coordinates:.0f}" for row in ticks.itertuples()})
        ax.set_xlabel("share of the coordinates kept, and their number")
        ax.set_ylabel("effect at equal KL: change of the margin, nats")
        ax.legend(loc="best", title="coordinates kept")
        ax.set_title(title or "bands: 95 % over test records", loc="left")
    return fig


def plot_lenses(frame: pd.DataFrame, *, title: str = "") -> Any:
    """How well each lens foretells the promoted tokens: rank correlation and overlaps, beside random directions.

    Args:
        frame: from ``analysis.lens_agreement``; tables of several vectors may be concatenated, with ``vector`` renamed.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"vector": ["steering", "random direction"], "lens": ["logit lens"] * 2, "rank_correlation": [0.5, 0.2]}
        >>> fig = plot_lenses(pd.DataFrame(rows).assign(overlap_up=[0.3, 0.0], overlap_down=[0.2, 0.1]))
    """
    measures = {"rank_correlation": "rank correlation\nover the vocabulary", "overlap_up": "promoted tokens\nfound"}
    measures["overlap_down"] = "demoted tokens\nfound"
    rows = numbers(frame, "vector", tuple(measures))
    if "lens" not in frame:
        raise ValueError(
            f"columns {list(frame.columns)}; expected a table of analysis.lens_agreement, with a column lens"
        )
    rows = rows.assign(lens=frame["lens"].astype(str).to_numpy())
    vectors, lenses = list(dict.fromkeys(rows["vector"])), list(dict.fromkeys(rows["lens"]))
    with style():
        fig = figure(7.2, 1.4 + 0.5 * len(vectors) * max(1, len(lenses)) / 1.6, constrained=True)
        axes = fig.subplots(1, len(measures), sharey=True)
        places = np.arange(len(vectors))[::-1]
        for ax, (name, label) in zip(axes, measures.items(), strict=True):
            ax.grid(True, axis="x")
            ax.axvline(0, color=GREY, linewidth=0.8)
            for k, lens in enumerate(lenses):
                shift = 0.25 * ((len(lenses) - 1) / 2 - k)
                for place, vector in zip(places, vectors, strict=True):
                    own = rows[(rows["vector"] == vector) & (rows["lens"] == lens)][name]
                    ax.plot(own, np.full(len(own), place + shift), "o", color=COLOURS[k], markersize=6, alpha=0.8)
            ax.set_xlabel(label)
        axes[0].set_yticks(list(places), vectors)
        axes[0].set_ylim(-0.6, len(vectors) - 0.4)
        for k, lens in enumerate(lenses):
            axes[0].plot([], [], "o", color=COLOURS[k], label=lens)
        fig.legend(loc="outside lower center", ncols=len(lenses))
        fig.suptitle(title or "agreement of lenses with the tokens promoted in context", x=0.01, ha="left")
    return fig
