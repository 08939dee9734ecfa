"""Can scores be believed: completeness gaps against the gradients spent, deletion and insertion curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from grains_tl.faithfulness.deletion import Curves
from grains_tl.plotting.style import CHOSEN, COLOURS, DRAW, GREY, MARKERS, figure, numbers, shortened, style

#: What each panel shows; those that the table lacks are left out.
PANELS = {
    "deletion_area": "deletion area, nats",
    "insertion_area": "insertion area, nats",
    "removed_chosen": "f falls without I+, nats",
    "effect": "effect of the vector, nats",
}


def plot_convergence(frame: pd.DataFrame, *, title: str = "") -> Any:
    """Completeness gap against the number of gradients: a thin line per record, a thick one for the median of each baseline.

    Args:
        frame: columns ``baseline``, ``record``, ``n_steps`` (gradients allowed) and ``gap`` (nats; its sign is dropped).
        title: of the figure.

    Returns:
        A matplotlib ``Figure`` with logarithmic axes.

    Raises:
        ValueError: missing columns, or no rows.

    Examples:
        >>> rows = {"baseline": ["zero"] * 2, "record": [0, 0], "n_steps": [9, 17], "gap": [2.0, -1.5]}
        >>> fig = plot_convergence(pd.DataFrame(rows))
    """
    rows = numbers(frame, "baseline", ("record", "n_steps", "gap"))
    rows["gap"] = rows.gap.abs().clip(lower=1e-4)  # a gap of 0 has no logarithm
    with style():
        fig = figure(8.0, 4.0, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        for i, (name, own) in enumerate(rows.groupby("baseline", sort=False)):
            colour = COLOURS[i % len(COLOURS)]
            for _, record in own.sort_values("n_steps").groupby("record"):
                ax.plot(record.n_steps, record.gap, color=colour, lw=0.9, alpha=0.5)
            median = own.groupby("n_steps").gap.median()
            ax.plot(median.index, median, color=colour, lw=2.4, marker=MARKERS[i % len(MARKERS)], ms=6,
                    label=f"{shortened(name, 40)}: median of {own.record.nunique()} records")  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        steps = sorted(rows.n_steps.unique())
        ax.set_xticks(steps, [f"{n:.0f}" for n in steps])
        ax.minorticks_off()
        ax.set_xlabel("gradients allowed per record (log scale)")
        ax.set_ylabel("|completeness gap|, nats (log scale)")
        _finish(fig, ax, title, "thin: single records")
    return fig


def plot_curves(found: Mapping[str, Curves] | Curves, *, title: str = "") -> Any:
    """Deletion and insertion: how far f falls, or rises, on average over records; higher is more faithful.

    Args:
        found: name of the method -> its ``curves``, all on the same records; or the curves of one method.
        title: of the figure.

    Returns:
        A matplotlib ``Figure`` of two panels; bands are one standard error over records.

    Raises:
        ValueError: nothing to draw, or something else than curves.

    Examples:
        >>> import torch
        >>> one = Curves(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.5, 2.0]]))
        >>> fig = plot_curves({"leave_one_out": one})
    """
    wanted = "pass {name: curves(model, tokenized, attributions)}"
    if isinstance(found, Curves):
        found = {"curves": found}
    if not isinstance(found, Mapping):
        raise ValueError(f"expected curves, got {type(found).__name__}; {wanted}")
    if not found:
        raise ValueError(f"no curves given; {wanted}")
    for name, c in found.items():
        if not isinstance(c, Curves):
            raise ValueError(f"{name!r}: expected curves, got {type(c).__name__}; {wanted}")
    with style():
        fig = figure(8.0, 4.0, constrained=True)
        axes = fig.subplots(1, 2)
        for i, (name, c) in enumerate(found.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            changes = (c.deleted[:, :1] - c.deleted, c.inserted - c.inserted[:, :1])
            for ax, change in zip(axes, changes, strict=True):
                mean, n = change.mean(0), len(change)
                se = change.std(0) / n**0.5 if n > 1 else 0 * mean
                ax.fill_between(c.shares, mean - se, mean + se, color=colour, alpha=0.1, lw=0)
                ax.plot(c.shares, mean, color=colour, marker=marker, ms=4.5, lw=1.8, label=shortened(name, 40))
        labels = (("deletion", "gone", "fall"), ("insertion", "back", "rise"))
        for ax, (name, word, way) in zip(axes, labels, strict=True):
            ax.grid(True)
            ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
            ax.set_title(f"{name}: {way} of f, nats")
            ax.set_xlabel(f"share of content tokens {word}")
        _finish(fig, axes[0], title, "bands: \u00b1 1 se over records")
    return fig


def _finish(fig: Any, ax: Any, title: str, note: str) -> None:
    lines, names = ax.get_legend_handles_labels()
    legend = fig.legend(lines, names, loc="outside lower left", ncols=3, title=note)
    legend._legend_box.align = "left"  # the title stands over the first entry
    for text in legend.get_texts():
        text.set_parse_math(False)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, parse_math=False)


def plot_comparison(
    frame: pd.DataFrame,
    *,
    panels: Mapping[str, str] | None = None,
    name: str = "method",
    reference: str = "random_tokens",
    title: str = "",
) -> Any:
    """One row per method, one panel per measure, with bars of 1.96 standard errors.

    The dotted line is the reference row, by default the random choice of tokens, where the table has one.

    Args:
        frame: measures with their ``_se``, one row per method; from ``compare_attributions`` for example.
        panels: measure -> what it is, with its unit; by default those of ``compare_attributions`` that the table has
            (nats, larger is better in all of them).
        name: the column with the rows' names.
        reference: the name of the row to draw in orange, with a dotted line.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: no rows, or none of the measures.

    Examples:
        >>> rows = pd.DataFrame({"method": ["one", "other"], "effect": [2.0, 0.1], "effect_se": [0.3, 0.2]})
        >>> fig = plot_comparison(rows)
    """
    known = PANELS if panels is None else panels
    shown = [measure for measure in known if {measure, f"{measure}_se"} <= set(frame.columns)]
    if not shown:
        raise ValueError(f"expected a table with one of {list(known)} (and _se), got the columns {list(frame.columns)}")
    data = numbers(frame, name, [column for measure in shown for column in (measure, f"{measure}_se")])
    with style():
        fig = figure(2.1 + 2.2 * len(shown), 1.3 + 0.34 * len(data) + 0.25 * bool(title), constrained=True)
        axes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        places = list(range(len(data)))[::-1]
        for ax, measure in zip(axes, shown, strict=True):
            _panel(ax, data, measure, known[measure], data[name] == reference, places)
        axes[0].set_yticks(places, [shortened(m, 32) for m in data[name]])
        for label in axes[0].get_yticklabels():
            label.set_parse_math(False)  # names are drawn as they stand
        axes[0].set_ylim(-0.6, len(data) - 0.4)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, parse_math=False)
    return fig


def _panel(ax: Any, data: pd.DataFrame, measure: str, label: str, is_reference: pd.Series, places: list[int]) -> None:
    ax.grid(True, axis="x")
    ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
    chance = data.loc[is_reference, measure]
    if len(chance) and math.isfinite(chance.iloc[0]):
        ax.axvline(chance.iloc[0], color=GREY, lw=1.2, ls=":", zorder=1.4)
    for place, value, se, marked in zip(places, data[measure], data[f"{measure}_se"], is_reference, strict=True):
        if math.isfinite(value):
            error = 1.96 * se if math.isfinite(se) else None
            ax.errorbar(value, place, xerr=error, fmt="o", ms=5, lw=1.6, color=DRAW if marked else CHOSEN)
    ax.set_title(label, parse_math=False)
    ax.tick_params(axis="y", length=0)
