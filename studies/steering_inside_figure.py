"""Effects by block and by head: ``python -m studies.steering_inside_figure studies/results/steering_inside FILE.png``.

Above, what the effect loses if one kind of part of one block is frozen, with 95 % intervals over records, and shaded what
a random direction of equal KL loses at most. Below, the same of single heads, on one scale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grains_tl.plotting.style import COLOURS, DRAW, GREY, figure, style
from studies.pieces import RECIPE_NAMES
from studies.steering_inside import RECIPES

PARTS = {"OV": "attention values", "MLP": "MLP", "QK": "attention patterns"}


def draw(folder: Path) -> Any:
    """Three vectors side by side."""
    exact = {recipe: heads_of(pd.read_json(folder / f"{recipe}_exact.json")) for recipe in RECIPES}
    most = max(float(np.abs(table.to_numpy()).max()) for table in exact.values())
    with style():
        fig = figure(10.4, 6.2, constrained=True)
        panels = fig.subplots(2, len(RECIPES), squeeze=False, sharey="row")
        for column, recipe in enumerate(RECIPES):
            blocks(panels[0][column], pd.read_json(folder / f"{recipe}_layers.json"))
            panels[0][column].set_title(RECIPE_NAMES[recipe], loc="left")
            ax, table = panels[1][column], exact[recipe]
            image = ax.pcolormesh(table.columns, table.index, table, cmap="RdBu", vmin=-most, vmax=most)
            ax.set_xlabel("block")
            ax.set_xticks(table.columns[::2])
            ax.set_yticks(table.index)
            ax.grid(False)
        panels[0][0].set_ylabel("lost if frozen, nats")
        panels[0][0].legend(fontsize=8)
        panels[1][0].set_ylabel("head")
        fig.colorbar(image, ax=list(panels[1]), label="lost if frozen, nats", shrink=0.9)
    return fig


def heads_of(table: pd.DataFrame) -> pd.DataFrame:
    """Scores of heads, head by block."""
    own = table[(table["vector"] == "steering") & (table["part"] == "head")]
    return own.pivot(index="head", columns="layer", values="score")


def blocks(ax: Any, table: pd.DataFrame) -> None:
    """Parts of each block."""
    own, random = (table[table["vector"] == name] for name in ("steering", "random direction"))
    ax.grid(True)
    ax.axhline(0, color=GREY, linewidth=0.8)
    widest = random.assign(size=random["lost"].abs()).groupby("layer")["size"].max()
    ax.fill_between(widest.index, -widest, widest, color=DRAW, alpha=0.25, lw=0, label="a random direction, any part")
    for i, (part, label) in enumerate(PARTS.items()):
        rows = own[own["part"] == part].sort_values("layer")
        spread = [rows["lost"] - rows["low"], rows["high"] - rows["lost"]]
        ax.errorbar(
            rows["layer"] + 0.18 * (i - 1), rows["lost"], spread, fmt="o", color=COLOURS[i], ms=4, lw=1.2, label=label
        )
    ax.set_xlabel("block")


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(sys.argv[2], dpi=110)
