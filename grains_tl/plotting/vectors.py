"""Pictures for ``grains_tl.analysis``: cosine maps, probe accuracies, patching effects."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from grains_tl.analysis.probes import Probes
from grains_tl.evaluate.controls import Comparison
from grains_tl.plotting.style import (
    CHOSEN,
    COLOURS,
    DRAW,
    GREY,
    MARKERS,
    figure,
    number,
    numbers,
    shortened,
    signed,
    style,
    text_widths,
)
from grains_tl.plotting.sweeps import EFFECT

EFFECT_LABEL = "effect: half the change of the margin\nbetween +alpha and \u2212alpha, nats"


def plot_cosines(table: pd.DataFrame, *, title: str = "", label: str = "cosine") -> Any:
    """A cosine map as a square of colours: blue 1, white 0, red -1; small maps with their numbers.

    Args:
        table: square, from ``analysis.cosine_map``; or other correlations (no unit).
        title: of the figure.
        label: of the colour bar.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: no table, or one that is not square.

    Examples:
        >>> names = ["ours", "CAA"]
        >>> fig = plot_cosines(pd.DataFrame([[1.0, 0.3], [0.3, 1.0]], names, names))
    """
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"a {type(table).__name__} came; a table is needed: plot_cosines(analysis.cosine_map(vectors))"
        )
    n = len(table)
    if table.shape != (n, n) or not n:
        raise ValueError(f"a table of shape {table.shape}; a square one from analysis.cosine_map is needed")
    names = [shortened(name, 24) for name in table.index]
    side, room = min(6.0, max(2.4, 0.6 * n)), 0.075 * max(len(name) for name in names)  # inches
    with style():
        fig = figure(side + room + 1.5, side + room + 0.5, constrained=True)
        ax = fig.add_subplot()
        image = ax.imshow(table.to_numpy(dtype=float), cmap="RdBu", vmin=-1, vmax=1)
        step = -(-n // 32)
        rotated = max(len(name) for name in names) > 3
        ax.set_xticks(range(0, n, step), names[::step], rotation=90 if rotated else 0, fontsize=8.5)
        ax.set_yticks(range(0, n, step), names[::step], fontsize=8.5)
        _as_text(ax)
        if n <= 10:
            _numbers(ax, table.to_numpy(dtype=float))
        fig.colorbar(image, ax=ax, shrink=0.8, label=label, ticks=[-1, -0.5, 0, 0.5, 1])
        _title(fig, title)
    return fig


def plot_probes(frame: pd.DataFrame | Probes, *, title: str = "") -> Any:
    """Probe accuracy over layers with its standard error, above the floor of shuffled labels.

    Args:
        frame: from ``analysis.fit_probes``, the probes or their ``frame``: ``layer``, ``accuracy``, ``se``, ``floor``,
            ``floor_high``.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: something else, missing columns or no rows.

    Examples:
        >>> rows = {"layer": [18, 21], "accuracy": [0.7, 0.8], "se": [0.05, 0.04]}
        >>> fig = plot_probes(pd.DataFrame({**rows, "floor": [0.5, 0.5], "floor_high": [0.6, 0.6]}))
    """
    table = frame.frame if isinstance(frame, Probes) else frame
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"a {type(table).__name__} came; give analysis.fit_probes(features, layers)")
    rows = numbers(table.assign(name="probe"), "name", ("layer", "accuracy", "se", "floor", "floor_high"))
    with style():
        fig = figure(8.0, 3.6, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0.5, color="#555555", lw=1.0)
        ax.fill_between(
            rows.layer,
            rows.accuracy - 1.96 * rows.se,
            rows.accuracy + 1.96 * rows.se,
            color=COLOURS[0],
            alpha=0.15,
            lw=0,
        )
        ax.plot(
            rows.layer, rows.accuracy, color=COLOURS[0], marker="o", ms=4.5, label="probe, held-out (\u00b1 1.96 se)"
        )
        ax.plot(rows.layer, rows.floor, color=DRAW, marker="s", ms=4, label="shuffled labels, mean")
        ax.plot(rows.layer, rows.floor_high, color=DRAW, lw=1, ls=":", label="shuffled labels, largest draw")
        _layer_axis(ax)
        ax.set_ylabel("accuracy (share of sides)")
        ax.set_ylim(min(0.3, rows.floor.min() - 0.05), 1.03)
        fig.legend(loc="outside lower center", ncols=3)
        ax.set_title(title, parse_math=False)
    return fig


def plot_patching(frame: pd.DataFrame, *, value: str = "effect", title: str = "") -> Any:
    """Patching effects: a heatmap over layers and heads or positions, or bars over layers.

    Args:
        frame: from ``analysis.patch``; with a column ``head`` or ``pos`` it becomes a heatmap. Several tables by layer,
            concatenated, become groups of bars, one per ``component``.
        value: the column to show, ``"effect"`` (nats) or ``"share"`` (of the steering's effect).
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"component": ["mlp_out"] * 2, "layer": [19, 20], "effect": [-0.3, 0.2]}
        >>> fig = plot_patching(pd.DataFrame(rows), title="MLP outputs: effect, nats")
    """
    across = next((c for c in ("head", "pos") if c in frame.columns and frame[c].notna().all()), None)
    columns = ("layer", value) if across is None else ("layer", across, value)
    rows = numbers(frame, "component", columns)
    label = "effect on the margin, nats" if value == "effect" else "share of the steering's effect"
    if across is None:
        return _bars(rows, frame, value, label, title)
    wide = rows.pivot(index="layer", columns=across, values=value)
    return _heatmap(
        wide, {"head": "head", "pos": "position from the prompt's end (0 = its last token)"}[across], label, title
    )


def _heatmap(wide: pd.DataFrame, xlabel: str, label: str, title: str) -> Any:
    top = float(wide.abs().max().max()) or 1.0
    with style():
        fig = figure(
            min(9.5, max(6.5, 2.6 + 0.42 * wide.shape[1])), min(8.0, 1.6 + 0.3 * wide.shape[0]), constrained=True
        )
        ax = fig.add_subplot()
        ax.set_facecolor("#DDDDDD")  # sites that no record has
        image = ax.imshow(wide.to_numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
        for set_ticks, names in ((ax.set_xticks, wide.columns), (ax.set_yticks, wide.index)):
            step = -(-len(names) // 20)
            set_ticks(range(0, len(names), step), [f"{name:.0f}" for name in names[::step]])
        ax.set_xlabel(xlabel)
        ax.set_ylabel("layer")
        fig.colorbar(image, ax=ax, label=label)
        _title(fig, title)
    return fig


def _bars(rows: pd.DataFrame, frame: pd.DataFrame, value: str, label: str, title: str) -> Any:
    names = list(dict.fromkeys(rows.component))
    scale = frame["effect"] / frame[value] if value != "effect" else 1.0
    errors = (frame["se"] / scale).abs() if "se" in frame.columns else frame[value] * float("nan")
    rows = rows.assign(error=errors.to_numpy(dtype=float))
    width = 0.8 / len(names)
    with style():
        fig = figure(8.0, 3.6, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True, axis="y")
        ax.axhline(0, color="#555555", lw=1.0)
        for i, name in enumerate(names):
            own = rows[rows.component == name]
            x = own.layer + (i - (len(names) - 1) / 2) * width
            colour = CHOSEN if len(names) == 1 else COLOURS[i % len(COLOURS)]
            ax.bar(
                x, own[value], width=width, color=colour, label=name, yerr=own.error, ecolor=GREY, error_kw={"lw": 1}
            )
        _layer_axis(ax)
        ax.set_ylabel(label)
        if len(names) > 1:
            fig.legend(loc="outside lower center", ncols=len(names))
        ax.set_title(title, parse_math=False)
    return fig


def _layer_axis(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.margins(x=0.03)
    ax.set_xlabel("layer (counted from 0)")


def _numbers(ax: Any, values: Any) -> None:
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = f"{value:.2f}".replace("-", "\u2212")
            ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 else "black")


def _title(fig: Any, title: str) -> None:
    """Over the whole figure: a title can be wider than a small map."""
    if title:
        fig.suptitle(title, x=0.02, ha="left", fontsize=10.5, parse_math=False)


def _as_text(ax: Any) -> None:
    """Names are data: never read as math."""
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_parse_math(False)


def plot_layers(sweep_frame: pd.DataFrame, chosen_layer: int | None = None, *, label: str | None = None) -> Any:
    """Effect over layers, one line per vector, with bands of 1.96 standard errors.

    Args:
        sweep_frame: columns ``layer``, ``vector``, ``effect`` and ``se`` (nats; ``effect_se`` in a table of ``sweep``),
            one row per layer and vector; NaN leaves a gap.
        chosen_layer: marked by a dotted line.
        label: what ``effect`` is, with its unit; by default that of ``sweep`` where there is ``effect_se``, else that of
            ``evaluate.effects``.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns, no rows, or several rows for one layer and vector.

    Examples:
        >>> rows = {"layer": [21, 24], "vector": ["ours"] * 2, "effect": [1.9, 3.2], "se": [0.2, 0.2]}
        >>> fig = plot_layers(pd.DataFrame(rows), chosen_layer=24)
    """
    from matplotlib.ticker import MaxNLocator

    if isinstance(sweep_frame, pd.DataFrame) and "effect_se" in sweep_frame and "se" not in sweep_frame:
        sweep_frame, label = sweep_frame.rename(columns={"effect_se": "se"}), EFFECT if label is None else label
    frame = numbers(sweep_frame, "vector", ("layer", "effect", "se"))
    twice = frame[frame.duplicated(["layer", "vector"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"several rows for layer {row.layer:.0f} of {row.vector!r}; plot one alpha at a time")
    with style():
        fig = figure(8.0, 4.2, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
        lines: list[Any] = []
        for i, (name, rows) in enumerate(frame.groupby("vector", sort=False)):
            rows = rows.sort_values("layer")
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            line_style = ("-", "--", ":")[i // len(COLOURS) % 3]
            low, high = rows.effect - 1.96 * rows.se, rows.effect + 1.96 * rows.se
            ax.fill_between(rows.layer, low, high, color=colour, alpha=0.13, lw=0)
            lines += ax.plot(rows.layer, rows.effect, line_style, color=colour, marker=marker, ms=4.5, lw=1.8)
            lines[-1].set_label(shortened(name))
        if chosen_layer is not None:
            lines.append(ax.axvline(chosen_layer, color=GREY, lw=1.2, ls=":", zorder=1.4))
            lines[-1].set_label(f"chosen layer {chosen_layer}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.margins(x=0.03)
        ax.set_xlabel("layer (steered after this block, counted from 0)")
        ax.set_ylabel(EFFECT_LABEL if label is None else label)
        columns = max(1, min(4, int(7.6 / (0.65 + max(text_widths([line.get_label() for line in lines]))))))
        legend = fig.legend(
            handles=lines, loc="outside upper left", ncols=columns, title="bands: \u00b1 1.96 se over records"
        )
        legend._legend_box.align = "left"  # the title stands over the first entry
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig


def plot_controls(table_frame: pd.DataFrame | Comparison, draws: Mapping[str, Sequence[Any]] | None = None) -> Any:
    """Each vector's effect and interval on its own row, with the single draws as small dots behind.

    Args:
        table_frame: columns ``vector``, ``effect``, ``low`` and ``high`` (nats), one row per vector; or what
            ``compare_with_controls`` gave, which brings its draws.
        draws: effects of single draws by vector name, nats (None and NaN are left out); names without a row get one
            with the dots alone.

    Returns:
        A matplotlib ``Figure``; it grows with the number of rows.

    Raises:
        ValueError: missing columns, no rows, or a table without draws.

    Examples:
        >>> table = pd.DataFrame({"vector": ["ours"], "effect": [2.5], "low": [2.1], "high": [2.9]})
        >>> fig = plot_controls(table, {"ours": [2.4, 2.6], "random directions": [0.3, -0.2]})
    """
    from matplotlib.lines import Line2D

    if isinstance(table_frame, Comparison):
        table_frame, draws = table_frame.table, table_frame.draws if draws is None else draws
    frame = numbers(table_frame, "vector", ("effect", "low", "high"))
    if not isinstance(draws, Mapping):
        raise ValueError(
            f"draws={draws!r}; effects by name are needed: plot_controls(found.table, found.draws), or plot_controls(found)"
        )
    alone = [name for name in draws if name not in set(frame.vector)]
    names = [*frame.vector, *alone]
    with style():
        fig = figure(8.0, 1.35 + 0.42 * len(names), constrained=True)
        ax = fig.add_subplot()
        ax.grid(True, axis="x")
        ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
        for y, name in enumerate(names):
            values = [v for v in map(number, draws.get(name, ())) if math.isfinite(v)]
            # golden-ratio steps spread neighbours evenly without a random generator
            heights = [y + 0.5 * ((i * 0.6180339887 + 0.5) % 1 - 0.5) for i in range(len(values))]
            ax.scatter(values, heights, s=13, color=DRAW, alpha=0.65, lw=0, zorder=2)
        rows = range(len(frame))
        ax.hlines(rows, frame.low, frame.high, color=CHOSEN, lw=2.4, zorder=3)
        ax.scatter(frame.effect, rows, s=46, color=CHOSEN, edgecolor="white", lw=1.0, zorder=4)
        ax.set_yticks(range(len(names)), [textwrap.fill(shortened(name), 36) for name in names])
        for label in ax.get_yticklabels():
            label.set_parse_math(False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.06)
        ax.set_xlabel(EFFECT_LABEL.replace("\n", " "))
        values_axis = ax.secondary_yaxis("right")
        values_axis.set_yticks(list(rows), [signed(v) for v in frame.effect])
        values_axis.tick_params(length=0)
        values_axis.spines["right"].set_visible(False)
        entries = [
            Line2D([], [], color=CHOSEN, lw=2.4, marker="o", ms=7, mec="white", label="effect and its interval"),
            Line2D([], [], color=DRAW, lw=0, marker="o", ms=4, alpha=0.65, label="single draws"),
        ]
        fig.legend(handles=entries, loc="outside upper left", ncols=2)
    return fig
