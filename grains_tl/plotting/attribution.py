"""Can scores be believed: completeness gaps against the gradients spent, deletion and insertion curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from grains_tl.curves import Curves
from grains_tl.plotting.style import COLOURS, MARKERS, figure, numbers, shortened, style


def plot_convergence(frame: pd.DataFrame, *, title: str = "") -> Any:
    """Completeness gap against the number of gradients: a thin line per record, a thick one for the median of each baseline.

    Args:
        frame: columns ``baseline``, ``record``, ``n_steps`` (gradients allowed) and ``gap`` (nats; its sign is dropped).
        title: of the figure.

    Returns:
        A matplotlib ``Figure`` with logarithmic axes.

    Raises:
        ValueError: missing columns, or no rows.

    Example:
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

    Example:
        >>> import torch
        >>> one = Curves(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.5, 2.0]]))
        >>> fig = plot_curves({"leave_one_out": one})
    """
    wanted = "pass {name: curves(model, tokenized, attributions)}"
    if isinstance(found, Curves):
        found = {"curves": found}
    if not isinstance(found, Mapping):
        raise ValueError(f"a {type(found).__name__} came; {wanted}")
    if not found:
        raise ValueError(f"no curves given; {wanted}")
    for name, c in found.items():
        if not isinstance(c, Curves):
            raise ValueError(f"{name!r} is a {type(c).__name__}, not curves; {wanted}")
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
