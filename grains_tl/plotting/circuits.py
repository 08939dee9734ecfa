"""The picture of ``analysis.steering_circuit`` and ``analysis.circuit_faithfulness``."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl.plotting.style import COLOURS, DRAW, GREY, figure, numbers, style

#: The lines of the second panel: column, its label, its dashes.
LINES = (("kept", "only these free", "-"), ("left", "only these frozen", "--"))


def plot_circuit(nodes: pd.DataFrame, curve: pd.DataFrame | None = None, *, n_top: int = 12, title: str = "") -> Any:
    """The strongest nodes or edges with their intervals and, beside them, what share of the effect the first k carry.

    Args:
        nodes: from ``analysis.steering_circuit``; of random directions the range of their scores at each rank is drawn.
        curve: from ``analysis.circuit_faithfulness``.
        n_top: how many nodes.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"part": ["head", "MLP"], "layer": [19, 20], "head": [3, -1], "score": [0.4, 0.2], "rank": [1, 2]}
        >>> fig = plot_circuit(pd.DataFrame(rows).assign(vector="steering", low=0.1, high=0.5))
    """
    rows = numbers(nodes, "vector", ("rank", "layer", "head", "score", "low", "high"))
    for name in ("part", "to", "to_layer"):
        if name in nodes.columns:
            rows[name] = nodes[name].to_numpy()
    own = rows[rows["vector"] == "steering"].sort_values("rank").head(n_top)
    other = rows[(rows["vector"] != "steering") & (rows["rank"] <= n_top)]
    if own.empty:
        raise ValueError("the table has no rows of 'steering'; expected those of analysis.steering_circuit")
    with style():
        fig = figure(
            (6.0 if "to" in own.columns else 4.6) if curve is None else 9.0,
            1.1 + 0.26 * max(len(own), 8),
            constrained=True,
        )
        panels = fig.subplots(1, 1 if curve is None else 2, squeeze=False)[0]
        ax = panels[0]
        places = range(len(own))
        ax.axvline(0, color=GREY, linewidth=0.8)
        if len(other):
            spread = other.assign(size=other["score"].abs()).groupby("rank")["size"].max().reindex(own["rank"])
            ax.barh(places, 2 * spread, left=-spread, color=DRAW, alpha=0.25, height=0.9, label="random directions")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8)  # inside it hides the last rows
        ax.hlines(places, own["low"], own["high"], color=COLOURS[0], linewidth=2)
        ax.plot(own["score"], places, "o", color=COLOURS[0], markersize=5)
        ax.set_yticks(places, [_name(row) for row in own.itertuples()])
        ax.invert_yaxis()
        ax.set_xlabel("carries of the effect, nats")
        if curve is not None:
            _curves(panels[1], curve)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return fig


def _name(row: Any) -> str:
    where = f"block {row.layer:.0f}"
    own = f"{where}, head {row.head:.0f}" if row.head >= 0 else "step" if row.part == "step" else f"{where}, MLP"
    if not hasattr(row, "to"):
        return own
    return f"{own} \N{RIGHTWARDS ARROW} {row.to if row.to_layer < 0 else f'block {row.to_layer:.0f}, {row.to}'}"


def _curves(ax: Any, curve: pd.DataFrame) -> None:
    columns = ("size", "kept_share", "left_share", "kept_low", "kept_high", "left_low", "left_high", "total")
    rows = numbers(curve, "order", columns)
    ax.grid(True)
    for level in (0, 1):
        ax.axhline(level, color=GREY, linewidth=0.8)
    for order, colour in (("circuit", COLOURS[0]), ("random nodes", DRAW)):
        own = rows[rows["order"] == order].sort_values("size")
        for name, label, dashes in LINES if len(own) else ():
            if order == "circuit":
                low, high = own[f"{name}_low"] / own["total"], own[f"{name}_high"] / own["total"]
                ax.fill_between(own["size"], low, high, color=colour, alpha=0.12, lw=0)
            ax.plot(
                own["size"], own[f"{name}_share"], dashes, color=colour, marker="o", ms=3.5, label=f"{order}, {label}"
            )
    ax.set_xscale("symlog", linthresh=1)
    sizes = sorted(set(rows["size"]))
    shown = [size for i, size in enumerate(sizes) if i in (0, 1, len(sizes) - 1) or i % 2]
    ax.set_xticks(shown, [f"{size:.0f}" for size in shown])
    ax.minorticks_off()
    ax.set_xlabel("nodes")
    ax.set_ylabel("share of the effect")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8)
