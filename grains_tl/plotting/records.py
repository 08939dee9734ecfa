"""Single records under steering: who is helped and who is hurt, and a response token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from grains_tl._util.stats import standard_error
from grains_tl.plotting.style import (
    CHOSEN,
    GREY,
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
from grains_tl.plotting.sweeps import no_repeats, one_value, one_vector

#: Up to so many records have their names under the bars.
MAX_NAMED = 30


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

    vector = one_vector(frame)
    for column in ("layer", "alpha"):
        one_value(frame, column)
    rows = numbers(frame, "record", ("change",))
    no_repeats(rows, ["record"])
    missing = int(rows.change.isna().sum())
    rows = rows.dropna().sort_values("change", ascending=False, kind="stable").reset_index(drop=True)
    if not len(rows):
        raise ValueError("no record has a finite change; nothing to draw")
    mean, se = rows.change.mean(), standard_error(rows.change.to_numpy())
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
