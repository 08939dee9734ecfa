"""Pictures of a sweep: layers and alphas, effect against cost, who is helped and who is hurt, token by token."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
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
    visible,
    wrapped,
)

EFFECT = "effect: change of the margin, nats"


KL = "KL(steered || base) per token, nats"

#: Up to so many cells a heatmap has its numbers written in, and up to so many records have their names under the bars.
MAX_WRITTEN, MAX_NAMED = 60, 30


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

    name = _one_vector(frame)
    cells = numbers(frame.assign(vector=name), "vector", ("layer", "alpha", value))
    _no_repeats(cells, ["layer", "alpha"])
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


def plot_cost(frame: pd.DataFrame, *, scale: Literal["linear", "log"] = "linear") -> Any:
    """Effect against what it costs: one line per vector (and layer), so that vectors can be compared at equal KL.

    Args:
        frame: columns ``vector``, ``layer``, ``alpha``, ``effect``, ``effect_se``, ``kl`` and ``kl_se`` (nats), one row
            per vector, layer and alpha (and ``positions``, where there is such a column), as ``summarize`` makes them.
            A row whose effect or KL is NaN is left out.
        scale: of the KL axis; ``"log"`` leaves out rows with a KL of 0.

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
        raise ValueError(f"scale={scale!r}; it is 'linear' or 'log'")
    columns = ("layer", "alpha", "effect", "effect_se", "kl", "kl_se")
    points = numbers(frame, "vector", columns)
    if "positions" in frame.columns and frame["positions"].nunique() > 1:
        points["vector"] += [f", {scope}" for scope in frame["positions"]]
    _no_repeats(points, ["vector", "layer", "alpha"])
    points = points[points.effect.notna() & points.kl.notna() & points.alpha.notna()]
    points = points[points.kl > 0] if scale == "log" else points
    if not len(points):
        raise ValueError(f"no row has an effect and a KL{' above 0' if scale == 'log' else ''}; nothing to draw")
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
                branch = rows[rows.alpha * sign >= 0].sort_values("kl")  # alpha 0 begins both
                band, reach = 1.96 * branch.effect_se.fillna(0), 1.96 * branch.kl_se.fillna(0)
                ax.fill_between(branch.kl, branch.effect - band, branch.effect + band, color=colour, alpha=0.13, lw=0)
                # a KL is never negative, whatever its standard error
                least = (branch.kl - reach).clip(lower=0.05 * branch.kl if scale == "log" else 0.0)
                ax.hlines(branch.effect, least, branch.kl + reach, color=colour, lw=0.8, alpha=0.7)
                if len(branch) == 1:  # a band of one point cannot be seen
                    ax.vlines(branch.kl, branch.effect - band, branch.effect + band, color=colour, lw=2.4, alpha=0.4)
                dashes, face = ("-", colour) if sign > 0 else ("--", "white")
                line = ax.plot(branch.kl, branch.effect, dashes, color=colour, marker=marker, mfc=face, ms=5, lw=1.8)
                line[0].set_label(shortened(name, 48) + (f", layer {layer:.0f}" if several else ""))
                if sign > 0 or not (rows.alpha >= 0).any():
                    lines += line
        ax.set_xlabel(KL + (" (log scale)" if scale == "log" else ""))
        ax.set_ylabel(EFFECT.replace("of the", "of\nthe"))
        dashed = ";  dashed: alpha < 0" if (points.alpha < 0).any() else ""
        _legend(fig, lines, f"bands and thin bars: \u00b1 1.96 se{dashed}")
    return fig


def plot_records(frame: pd.DataFrame, *, label: str = "change of the margin, nats") -> Any:
    """Who is helped and who is hurt: every record's change, sorted; blue up, red down, the mean as a dotted line.

    Args:
        frame: columns ``record`` (a name or number) and ``change`` (nats), one row per record; a NaN is left out and
            counted in the title. It is one setting of ``record_effects``: columns ``vector``, ``positions``, ``layer``
            and ``alpha``, where there are any, hold one value.
        label: what ``change`` is, with its unit.

    Returns:
        A matplotlib ``Figure``; up to 30 records have their names under the bars.

    Raises:
        ValueError: missing columns, no rows, no finite change, several vectors, or a record that occurs twice.

    Examples:
        >>> fig = plot_records(pd.DataFrame({"record": ["a", "b"], "change": [1.2, -0.3]}))
    """
    from matplotlib.ticker import MaxNLocator

    vector = _one_vector(frame)
    for column in ("layer", "alpha"):
        _one(frame, column)
    rows = numbers(frame, "record", ("change",))
    _no_repeats(rows, ["record"])
    missing = int(rows.change.isna().sum())
    rows = rows.dropna().sort_values("change", ascending=False, kind="stable").reset_index(drop=True)
    if not len(rows):
        raise ValueError("no record has a finite change; nothing to draw")
    mean, se = rows.change.mean(), rows.change.std() / len(rows) ** 0.5
    spread = f"{se:.2f}" if math.isfinite(se) else "\u2013"
    helped, hurt = int((rows.change > 0).sum()), int((rows.change < 0).sum())
    named = len(rows) <= MAX_NAMED
    with style():
        fig = figure(8.0, 4.6 if named else 3.8, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True, axis="y")
        colours = [CHOSEN if change > 0 else REJECTED for change in rows.change]
        ax.bar(range(1, len(rows) + 1), rows.change, width=0.85 if named else 1.0, color=colours, lw=0)
        ax.axhline(0, color="#555555", lw=1.0)
        ax.axhline(mean, color="black", lw=1.2, ls=":")
        reach = max(len(rows), 6) / 2 + 0.1
        ax.set_xlim((len(rows) + 1) / 2 - reach, (len(rows) + 1) / 2 + reach)
        if named:
            ax.set_xticks(range(1, len(rows) + 1), [visible(shortened(record, 24)) for record in rows.record])
            ax.tick_params(axis="x", length=0)
            for tick in ax.get_xticklabels():
                tick.set(
                    parse_math=False, rotation=90 if len(rows) > 8 or rows.record.str.len().max() > 6 else 0, fontsize=8
                )
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_xlabel("record" if named else "record, sorted by change")
        ax.set_ylabel(label, parse_math=False)
        title = [shortened(vector, 48)] if vector else []
        title += [f"{helped} helped, {hurt} hurt of {len(rows)}", f"mean {signed(mean)} \u00b1 {spread} (se, dotted)"]
        title += [f"{missing} missing"] if missing else []
        ax.set_title(";  ".join(title), fontsize=9.5, parse_math=False)
    return fig


def plot_token_logprobs(frame: pd.DataFrame, *, width: float = 8.0) -> Any:
    """A response token by token: log p before and after steering, and the change.

    Args:
        frame: columns ``token`` (text), ``before`` and ``after`` (log p of the token, nats), in the order of the
            response; ``response_logprobs`` makes it.
        width: of the figure, inches.

    Returns:
        A matplotlib ``Figure``: grey the likelier the lighter, blue where steering makes a token likelier, red where
        less so.

    Raises:
        ValueError: missing columns or no rows.

    Examples:
        >>> rows = {"token": [" a", " great"], "before": [-1.0, -4.0], "after": [-1.2, -2.0]}
        >>> fig = plot_token_logprobs(pd.DataFrame(rows))
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    rows = numbers(frame, "token", ("before", "after"))
    change = rows.after - rows.before
    top = largest([v for v in change if math.isfinite(v)])
    lowest = min([v for v in (*rows.before, *rows.after) if math.isfinite(v)], default=0.0) or -1.0
    changes = LinearSegmentedColormap.from_list("change", [REJECTED, "white", CHOSEN])
    greys = LinearSegmentedColormap.from_list("log p", ["#8C8C8C", "white"])
    paint = {"change": lambda v: changes(0.5 + 0.5 * v / top), "log p": lambda v: greys(1 - v / lowest)}
    strips: list[tuple[str, Sequence[float], str]] = [
        ("before", list(rows.before), "log p"),
        ("after", list(rows.after), "log p"),
        ("change", list(change), "change"),
    ]
    margin, names, cell, head = 0.15, 0.62, 0.23, 0.62  # inches
    pitch = cell * (len(strips) + 1) + 0.2
    with style():
        words = [visible(token) for token in rows.token]
        least = max(text_widths(["\u221200.00"])) * 0.75
        places, n_lines = wrapped(
            list(rows.token), [max(w, least) for w in text_widths(words)], width - 2 * margin - names
        )
        height = head + n_lines * pitch + 0.05
        fig = figure(width, height)
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        sums = ", ".join(f"{name} {signed(sum(values))}" for name, values, _ in strips)
        ax.text(margin, 0.2, f"log p of each token, nats; sum {sums}", va="center", fontsize=9.5)
        note = "dark: unlikely; blue: likelier after steering, red: less likely"
        ax.text(margin, 0.41, note, va="center", fontsize=8.5, color=GREY)
        for line in range(n_lines):
            for row, (name, _, _) in enumerate(strips, start=1):
                y = head + line * pitch + (row + 0.5) * cell
                ax.text(margin + names - 0.1, y, name, ha="right", va="center_baseline", fontsize=8.5, color=GREY)
        for i, (word, (line, left, box)) in enumerate(zip(words, places, strict=True)):
            x, y = margin + names + left, head + line * pitch
            ax.text(x + box / 2, y + cell / 2, word, ha="center", va="center_baseline", parse_math=False)
            for row, (_, values, kind) in enumerate(strips, start=1):
                finite = math.isfinite(values[i])
                face = paint[kind](values[i]) if finite else (0.93, 0.93, 0.93, 1.0)
                dark = 0.2126 * face[0] + 0.7152 * face[1] + 0.0722 * face[2] < 0.45
                ax.add_patch(Rectangle((x, y + row * cell), box, cell, fc=face, ec="#CCCCCC", lw=0.6))
                ink = "white" if dark else "black"
                at = y + (row + 0.5) * cell
                ax.text(x + box / 2, at, signed(values[i]), ha="center", va="center_baseline", fontsize=7.5, color=ink)
    return fig


def _one_vector(frame: pd.DataFrame) -> str:
    """The name in the column ``vector``, empty without one (ValueError for several vectors or scopes)."""
    _one(frame, "positions")
    return _one(frame, "vector")


def _one(frame: pd.DataFrame, column: str) -> str:
    """The only value of a column, empty without the column."""
    found = list(dict.fromkeys(frame[column])) if column in frame.columns else []
    if len(found) > 1:
        shown = ", ".join(str(value) for value in found[:4])
        only = found[0] if isinstance(found[0], str) else float(found[0])
        raise ValueError(
            f"the table holds {len(found)} values of {column!r} ({shown}); plot one: frame[frame.{column} == {only!r}]"
        )
    return str(found[0]) if found else ""


def _no_repeats(frame: pd.DataFrame, columns: list[str]) -> None:
    twice = frame[frame.duplicated(columns)]
    if len(twice):
        values = [(column, twice.iloc[0][column]) for column in columns]
        place = ", ".join(
            f"{name} {value!r}" if isinstance(value, str) else f"{name} {value:g}" for name, value in values
        )
        raise ValueError(f"several rows for {place}; give one row for each")


def _legend(fig: Any, lines: list[Any], title: str) -> None:
    columns = max(1, min(4, int(7.6 / (0.65 + max(text_widths([line.get_label() for line in lines]))))))
    legend = fig.legend(handles=lines, loc="outside upper left", ncols=columns, title=title)
    legend._legend_box.align = "left"  # the title stands over the first entry
    for text in legend.get_texts():
        text.set_parse_math(False)


def _alpha(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "\u2212") if alpha else "0"
