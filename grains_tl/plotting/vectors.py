"""Pictures for ``grains_tl.analysis``: cosine maps, probe accuracies, patching effects."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl._util.html import Html
from grains_tl.analysis.lens import logit_lens
from grains_tl.analysis.probes import Probes
from grains_tl.plotting.style import (
    CHOSEN,
    COLOURS,
    DRAW,
    GREY,
    figure,
    numbers,
    shortened,
    style,
)
from grains_tl.types import HookedModel
from grains_tl.vectors.display import vectors_html
from grains_tl.vectors.steering_vectors import SteeringVectors


def show_vectors(vectors: SteeringVectors, model: HookedModel | None = None, *, n_top: int = 4) -> Html:
    """Steering vectors as a table in a notebook; with the model also the tokens each direction promotes and demotes.

    Args:
        vectors: to show.
        model: the model they were made for: adds the top tokens of ``analysis.logit_lens``.
        n_top: tokens on either side.

    Returns:
        ``Html``, which a notebook shows: a row per layer with the vector's norm, the layer's typical residual norm (residual
        units) and the share of the one in the other.

    Raises:
        ValueError: vectors of another model.

    Examples:
        >>> import torch
        >>> show_vectors(SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))).html[:4]
        '<div'
    """
    if model is None:
        return Html(vectors_html(vectors))
    lens = logit_lens(model, vectors, n_top=n_top)
    tokens = {
        int(layer): (list(rows[rows.side == "up"].token), list(rows[rows.side == "down"].token))
        for layer, rows in lens.groupby("layer")
    }
    return Html(vectors_html(vectors, tokens))


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
        raise ValueError(f"expected a DataFrame from analysis.cosine_map(vectors), got {type(table).__name__}")
    n = len(table)
    if table.shape != (n, n) or not n:
        raise ValueError(f"expected a square table from analysis.cosine_map, got one of shape {table.shape}")
    names = [shortened(name, 24) for name in table.index]
    side, names_width = min(6.0, max(2.4, 0.6 * n)), 0.075 * max(len(name) for name in names)  # inches
    with style():
        fig = figure(side + names_width + 1.5, side + names_width + 0.5, constrained=True)
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
        raise ValueError(f"expected analysis.fit_probes(features, layers), got {type(table).__name__}")
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


def plot_writers(frame: pd.DataFrame, *, title: str = "") -> Any:
    """What each block writes along a vector: bars over layers, its MLP beside all of its attention heads.

    Args:
        frame: from ``analysis.writers``.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``; projections in residual units.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"kind": ["head", "head", "mlp"], "layer": [3, 3, 3], "projection": [0.2, 0.1, 0.5]}
        >>> fig = plot_writers(pd.DataFrame(rows))
    """
    rows = numbers(frame, "kind", ("layer", "projection"))
    rows = rows[rows["kind"].isin(["head", "mlp"])].groupby(["kind", "layer"], as_index=False)["projection"].sum()
    names = {"head": "attention heads", "mlp": "MLP"}
    bars = rows.assign(component=rows["kind"].map(names), effect=rows["projection"])
    return _bars(bars, bars, "effect", "projection onto the vector, residual units", title)


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
