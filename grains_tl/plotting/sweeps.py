"""Pictures of a sweep: layers and alphas, and effect against cost."""

from __future__ import annotations

import math
import textwrap
from typing import Any, Literal

import pandas as pd

from grains_tl.plotting.style import (
    CHOSEN,
    COLOURS,
    GREY,
    MARKERS,
    REJECTED,
    figure,
    largest,
    numbers,
    shortened,
    signed,
    style,
    text_widths,
)

EFFECT = "effect: change of the margin, nats"


KL = "KL(steered || base) per token, nats"

#: Up to so many cells a heatmap has its numbers written in.
MAX_WRITTEN = 60


def plot_heatmap(
    frame: pd.DataFrame,
    chosen: tuple[int, float] | None = None,
    *,
    value: str = "effect",
    label: str = EFFECT,
) -> Any:
    """One vector's effect over layers and alphas: blue above 0, red below, white at 0.

    Args:
        frame: columns ``layer``, ``alpha`` and ``value``, one row per cell, as ``sweep`` makes them; a cell that is missing
            or NaN is hatched. Where there is a column ``vector`` or ``positions``, it holds one name.
        chosen: ``(layer, alpha)`` of the cell to mark.
        value: the column to colour by.
        label: what it is, with its unit.

    Returns:
        A matplotlib ``Figure``; up to 60 cells have their numbers written in.

    Raises:
        ValueError: missing columns, no rows, several vectors, several rows for one cell, or a chosen cell that is not
            among the rows.

    Examples:
        >>> frame = pd.DataFrame({"layer": [21, 24], "alpha": [0.2, 0.2], "effect": [1.9, 3.2]})
        >>> fig = plot_heatmap(frame, chosen=(24, 0.2))
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    name = one_vector(frame)
    cells = numbers(frame.assign(vector=name), "vector", ("layer", "alpha", value))
    no_repeats(cells, ["layer", "alpha"])
    table = cells.pivot(index="alpha", columns="layer", values=value)
    layers, alphas = [int(x) for x in table.columns], [float(x) for x in table.index]
    if chosen is not None and (chosen[0] not in layers or not any(math.isclose(chosen[1], a) for a in alphas)):
        raise ValueError(f"chosen={chosen} is not in the table; it has layers {layers} and alphas {alphas}")
    values = table.to_numpy()
    top = largest([v for v in values.flat if math.isfinite(v)])
    with style():
        width, height = max(4.4, min(8.0, 2.4 + 0.55 * len(layers))), max(2.7, 1.55 + 0.3 * len(alphas))
        fig = figure(width, height, constrained=True)
        ax = fig.add_subplot()
        ax.set_facecolor("#EDEDED")
        colours = LinearSegmentedColormap.from_list("effect", [REJECTED, "white", CHOSEN])
        mesh = ax.pcolormesh(values, cmap=colours, vmin=-top, vmax=top, edgecolors="white", linewidth=0.6)
        for y, x in zip(*(~pd.notna(values)).nonzero(), strict=True):
            ax.add_patch(Rectangle((x, y), 1, 1, fc="none", ec="#BBBBBB", hatch="////", lw=0))
        if values.size <= MAX_WRITTEN and len(layers) <= 12:
            for (y, x), v in [
                ((y, x), v) for y, row in enumerate(values) for x, v in enumerate(row) if math.isfinite(v)
            ]:
                ink = "white" if abs(v) > 0.62 * top else "black"
                ax.text(x + 0.5, y + 0.5, signed(v), ha="center", va="center_baseline", fontsize=8, color=ink)
        if chosen is not None:
            corner = (layers.index(chosen[0]), next(i for i, a in enumerate(alphas) if math.isclose(chosen[1], a)))
            ax.add_patch(Rectangle(corner, 1, 1, fc="none", ec="white", lw=4.0, zorder=3, clip_on=False))
            ax.add_patch(Rectangle(corner, 1, 1, fc="none", ec="black", lw=2.0, zorder=4, clip_on=False))
        every = max(1, math.ceil(len(layers) / 16))
        ax.set_xticks([i + 0.5 for i in range(0, len(layers), every)], [str(x) for x in layers[::every]])
        ax.set_yticks([i + 0.5 for i in range(len(alphas))], [_alpha(a) for a in alphas])
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
        ax.set_xlabel("layer (steered after this block)")
        ax.set_ylabel("alpha (fraction of\nresidual norm)")
        title = shortened(name) if name else ""
        if chosen is not None:
            title += f"{',  ' if title else ''}framed: layer {chosen[0]}, alpha {_alpha(chosen[1])}"
        if title:
            ax.set_title(textwrap.fill(title, int(11 * width - 18)), fontsize=9.5, parse_math=False)
        bar = fig.colorbar(mesh, ax=ax, pad=0.02, ticks=[-top, 0, top])
        bar.ax.set_yticklabels([signed(-top), "0", signed(top)])
        bar.set_label(textwrap.fill(label, int(11 * height - 8)), parse_math=False)
        bar.outline.set_visible(False)
    return fig


def plot_cost(
    frame: pd.DataFrame, *, scale: Literal["linear", "log"] = "linear", at_kl: pd.DataFrame | None = None
) -> Any:
    """Effect against what it costs: one line per vector (and layer), so that vectors can be compared at equal KL.

    Args:
        frame: columns ``vector``, ``layer``, ``alpha``, ``effect``, ``effect_se``, ``kl`` and ``kl_se`` (nats), one row
            per vector, layer and alpha (and ``positions``, where there is such a column), as ``sweep`` with ``neutral``
            makes them. A row whose effect or KL is NaN is left out.
        scale: of the KL axis; ``"log"`` leaves out rows with a KL of 0.
        at_kl: from ``effect_at_kl``: the vectors' effects at one KL, drawn as rings with their intervals on a dotted line.

    Returns:
        A matplotlib ``Figure``: bands are 1.96 standard errors of the effect, thin bars those of the KL. Negative alphas
        are a dashed line with open marks.

    Raises:
        ValueError: missing columns, no rows left, several rows for one point, or an unknown scale.

    Examples:
        >>> rows = {"layer": [24, 24], "alpha": [0.2, 0.4], "effect": [2.8, 5.9], "effect_se": [0.2, 0.4]}
        >>> fig = plot_cost(pd.DataFrame({"vector": ["ours"] * 2, **rows, "kl": [0.2, 0.9], "kl_se": [0.02, 0.1]}))
    """
    if scale not in ("linear", "log"):
        raise ValueError(f"scale={scale!r}; expected 'linear' or 'log'")
    points = _cost_points(frame, scale)
    equal = None if at_kl is None else numbers(at_kl, "vector", ("layer", "kl", "effect", "low", "high"))
    with style():
        fig = figure(8.0, 4.4, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
        ax.set_xscale(scale)
        lines: list[Any] = []
        for i, ((name, layer), rows) in enumerate(points.groupby(["vector", "layer"], sort=False)):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            several = points[points.vector == name].layer.nunique() > 1
            for sign in (1, -1):
                if not (rows.alpha * sign >= 0).any() or (sign < 0 and not (rows.alpha < 0).any()):
                    continue
                line = _branch(ax, rows[rows.alpha * sign >= 0].sort_values("kl"), sign, colour, marker)
                line.set_label(shortened(name, 48) + (f", layer {layer:.0f}" if several else ""))
                if sign > 0 or not (rows.alpha >= 0).any():
                    lines.append(line)
            if equal is not None:
                _equal_cost(ax, equal[(equal.vector == name) & (equal.layer == layer)], colour)
        if equal is not None:
            lines.append(ax.axvline(equal.kl.iloc[0], color=GREY, lw=1.2, ls=":", zorder=1.4))
            lines[-1].set_label(f"equal cost: {equal.kl.iloc[0]:g} nats per token")
        ax.set_xlabel(KL + (" (log scale)" if scale == "log" else ""))
        ax.set_ylabel(EFFECT.replace("of the", "of\nthe"))
        dashed = ";  dashed: alpha < 0" if (points.alpha < 0).any() else ""
        legend_above(fig, lines, f"bands and thin bars: \u00b1 1.96 se{dashed}")
    return fig


def _cost_points(frame: pd.DataFrame, scale: str) -> pd.DataFrame:
    points = numbers(frame, "vector", ("layer", "alpha", "effect", "effect_se", "kl", "kl_se"))
    if "positions" in frame.columns and frame["positions"].nunique() > 1:
        points["vector"] += [f", {scope}" for scope in frame["positions"]]
    no_repeats(points, ["vector", "layer", "alpha"])
    points = points[points.effect.notna() & points.kl.notna() & points.alpha.notna()]
    points = points[points.kl > 0] if scale == "log" else points
    if not len(points):
        raise ValueError(f"no row has an effect and a KL{' above 0' if scale == 'log' else ''}; nothing to draw")
    return points


def _branch(ax: Any, rows: pd.DataFrame, sign: int, colour: str, marker: str) -> Any:
    """The alphas of one sign; alpha 0 begins both branches."""
    band, reach = 1.96 * rows.effect_se.fillna(0), 1.96 * rows.kl_se.fillna(0)
    ax.fill_between(rows.kl, rows.effect - band, rows.effect + band, color=colour, alpha=0.13, lw=0)
    # a KL is never negative, whatever its standard error
    least = (rows.kl - reach).clip(lower=0.05 * rows.kl if ax.get_xscale() == "log" else 0.0)
    ax.hlines(rows.effect, least, rows.kl + reach, color=colour, lw=0.8, alpha=0.7)
    if len(rows) == 1:  # a band of one point cannot be seen
        ax.vlines(rows.kl, rows.effect - band, rows.effect + band, color=colour, lw=2.4, alpha=0.4)
    dashes, face = ("-", colour) if sign > 0 else ("--", "white")
    (line,) = ax.plot(rows.kl, rows.effect, dashes, color=colour, marker=marker, mfc=face, ms=5, lw=1.8)
    return line


def _equal_cost(ax: Any, rows: pd.DataFrame, colour: str) -> None:
    ax.vlines(rows.kl, rows.low, rows.high, color=colour, lw=2.4, zorder=4)
    ax.scatter(rows.kl, rows.effect, s=90, facecolor="white", edgecolor=colour, lw=2.0, zorder=5)


def one_vector(frame: pd.DataFrame) -> str:
    """The name in the column ``vector``, empty without one (ValueError for several vectors or scopes)."""
    one_value(frame, "positions")
    return one_value(frame, "vector")


def one_value(frame: pd.DataFrame, column: str) -> str:
    """The only value of a column, empty without the column."""
    found = list(dict.fromkeys(frame[column])) if column in frame.columns else []
    if len(found) > 1:
        shown = ", ".join(str(value) for value in found[:4])
        only = found[0] if isinstance(found[0], str) else float(found[0])
        raise ValueError(
            f"the table holds {len(found)} values of {column!r} ({shown}); plot one: frame[frame.{column} == {only!r}]"
        )
    return str(found[0]) if found else ""


def no_repeats(frame: pd.DataFrame, columns: list[str]) -> None:
    """Refuse a table with several rows for one point."""
    twice = frame[frame.duplicated(columns)]
    if len(twice):
        values = [(column, twice.iloc[0][column]) for column in columns]
        place = ", ".join(
            f"{name} {value!r}" if isinstance(value, str) else f"{name} {value:g}" for name, value in values
        )
        raise ValueError(f"several rows for {place}; give one row for each")


def legend_above(fig: Any, lines: list[Any], title: str) -> None:
    """A legend over the axes in as many columns as fit; names are drawn as they stand."""
    columns = max(1, min(4, int(7.6 / (0.65 + max(text_widths([line.get_label() for line in lines]))))))
    legend = fig.legend(handles=lines, loc="outside upper left", ncols=columns, title=title)
    legend._legend_box.align = "left"  # the title stands over the first entry
    for text in legend.get_texts():
        text.set_parse_math(False)


def _alpha(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "\u2212") if alpha else "0"
