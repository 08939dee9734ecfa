"""The figure of the features: ``python -m studies.sparse_vectors_figure studies/results/sparse_vectors FILE.png``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from grains_tl.plotting.style import COLOURS, DRAW, GREY, effects_with_band, figure, log_ticks, style
from studies.pieces import RECIPE_NAMES
from studies.sparse_vectors import RECIPES


def draw(folder: Path) -> Any:
    """Effects over the number of features, and of features that are clamped and taken out over the KL they cost."""
    there = [recipe for recipe in RECIPES if (folder / f"features_{recipe}.json").exists()]
    with style():
        fig = figure(3.1 * len(there) + 0.4, 6.0, constrained=True)
        panels = fig.subplots(2, len(there), squeeze=False, sharey="row")
        for column, recipe in enumerate(there):
            sums(panels[0][column], pd.read_json(folder / f"features_{recipe}.json"))
            panels[0][column].set_title(RECIPE_NAMES[recipe], loc="left")
            file = folder / f"interventions_{recipe}.json"
            if file.exists():
                interventions(panels[1][column], pd.read_json(file))
        panels[0][0].set_ylabel("effect at equal KL, nats")
        panels[1][0].set_ylabel("effect, nats")
        for row in panels:
            lines, labels = row[0].get_legend_handles_labels()
            row[-1].legend(lines, labels, fontsize=7.5, loc="best")
    return fig


def sums(ax: Any, table: pd.DataFrame) -> None:
    """Vectors that are sums of a few decoder rows, all at one KL."""
    whole = table[table["decoder"] == "whole vector"].iloc[0]
    ax.grid(True)
    ax.axhspan(whole["low"], whole["high"], color=GREY, alpha=0.12, lw=0)
    ax.axhline(whole["effect"], color=GREY, linewidth=1, label="whole vector")
    for name, colour in (("trained", COLOURS[0]), ("random directions", DRAW)):
        effects_with_band(ax, table[table["decoder"] == name], "features", colour, f"sum of features, {name}")
    log_ticks(ax, {n: str(n) for n in sorted(set(table["features"]) - {0})})
    ax.set_xlabel("features in the sum")


def interventions(ax: Any, table: pd.DataFrame) -> None:
    """Single features set to a value or to 0."""
    ax.grid(True)
    ax.axhline(0, color=GREY, linewidth=0.8)
    for of, colour, label in (("vector", COLOURS[0], "the vector's features"), ("random", DRAW, "others as active")):
        for way, marker in (("clamp and ablate", "o"), ("ablate towards chosen", "s")):
            own = table[(table["of"] == of) & (table["intervention"] == way)]
            spread = [own["effect"] - own["low"], own["high"] - own["effect"]]
            said = f"{label}: {'clamped, taken out' if marker == 'o' else 'taken out'}"
            ax.errorbar(own["kl"], own["effect"], spread, fmt=marker, color=colour, ms=4, lw=1, label=said)
    ax.set_xscale("log")
    ax.set_xlabel("KL, nats per token")


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(sys.argv[2], dpi=110)
