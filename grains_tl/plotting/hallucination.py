"""Images with captions before and after, what is not there marked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from grains_tl.plotting.style import (
    COLOURS,
    GREY,
    MARKERS,
    REJECTED,
    figure,
    numbers,
    shortened,
    style,
    text_widths,
    wrapped,
)
from grains_tl.records.pictures import load_images


def plot_captions(
    images: Sequence[Any],
    captions: Mapping[str, Sequence[str]],
    absent: Sequence[Collection[str]],
    *,
    title: str = "",
    width: float = 9.0,
) -> Any:
    """Images with their captions, words for what is not there in red and underlined.

    Args:
        images: one per row.
        captions: by name (``"unsteered"``, ``"steered"``, ...), one text per image.
        absent: for every image the words that would be wrong; compared without case and punctuation.
        title: of the figure.
        width: of the figure, inches.

    Returns:
        A matplotlib ``Figure``; each name counts its marked captions.

    Raises:
        ValueError: nothing to draw, or lengths that do not agree.

    Examples:
        >>> fig = plot_captions([np.zeros((8, 8))], {"before": ["a cat and a dog ."]}, [{"dog"}])
    """
    pictures = [load_images(image)[0] for image in images]
    lengths = {"images": len(pictures), "absent": len(absent)} | {name: len(texts) for name, texts in captions.items()}
    if not pictures or not captions or len(set(lengths.values())) != 1:
        raise ValueError(f"expected one caption of each name and one set of absent words per image, got {lengths}")
    wrong = [{_bare(word) for word in words} for words in absent]
    side, margin, line, label = 0.95, 0.2, 0.24, 1.6
    with style():
        drawn = []
        for row in range(len(pictures)):
            texts = {name: texts[row].split() for name, texts in captions.items()}
            line_width = width - side - label - 4 * margin
            lines = {name: wrapped(words, text_widths(words), line_width) for name, words in texts.items()}
            drawn.append((texts, lines))
        heights = [max(side, sum(line * n + 0.08 for _, n in lines.values())) + margin for _, lines in drawn]
        head = 0.3 if title else 0.0
        height = head + sum(heights) + 2 * margin + 0.1
        fig = figure(width, height)
        page = fig.add_axes((0, 0, 1, 1))
        page.set(xlim=(0, width), ylim=(height, 0))
        page.axis("off")
        page.text(margin, 0.25, title, va="center", fontsize=10.5, parse_math=False)
        y = head + margin
        for row, (own, lines) in enumerate(drawn):
            ax = fig.add_axes((margin / width, 1 - (y + side) / height, side / width, side / height))
            ax.imshow(np.asarray(pictures[row]), interpolation="nearest")
            ax.axis("off")
            below = y
            for name, words in own.items():
                page.text(
                    2 * margin + side, below + line / 2, shortened(name, 22), va="center", color=GREY, parse_math=False
                )
                places, n_lines = lines[name]
                for word, (at, left, wide) in zip(words, places, strict=True):
                    spot = (3 * margin + side + label + left, below + at * line, wide)
                    _draw_caption_word(page, word, spot, line, _bare(word) in wrong[row])
                below += n_lines * line + 0.08
            y += heights[row]
        counts = []
        for name, given in captions.items():
            n = sum(any(_bare(w) in bad for w in text.split()) for text, bad in zip(given, wrong, strict=True))
            counts.append(f"{shortened(name, 22)}: {n} of {len(pictures)}")
        note = "captions that name something absent (red, underlined):  " + ",  ".join(counts)
        page.text(margin, height - 0.2, note, va="center", fontsize=8.5, color="#333333", parse_math=False)
    return fig


def _bare(word: str) -> str:
    return "".join(c for c in word.lower() if c.isalnum())


def _draw_caption_word(page: Any, word: str, spot: tuple[float, float, float], line: float, is_wrong: bool) -> None:
    x, y, wide = spot
    ink = REJECTED if is_wrong else "black"
    page.text(x + wide / 2, y + line / 2, word, ha="center", va="center_baseline", color=ink, parse_math=False,
              fontweight="bold" if is_wrong else "normal")  # fmt: skip
    if is_wrong:
        page.plot([x + 0.06, x + wide - 0.06], [y + line - 0.02] * 2, color=REJECTED, lw=1.4)


def plot_yes_no(frame: pd.DataFrame, *, reference: str = "constant bias", title: str = "") -> Any:
    """Recall against false yes: one line per vector as its strength grows, the constant bias as a thick grey curve.

    Above the grey curve an answer is better than any shift of the threshold can make it; the open circle is the unsteered
    model.

    Args:
        frame: columns ``vector``, ``strength``, ``false_yes``, ``recall`` (shares) and ``recall_se``, as
            ``tiny_vlm.yes_no_curves`` makes them. A row with strength 0 is the unsteered model.
        reference: the row name to draw as the grey curve.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``; bars are 1.96 standard errors of the recall over questions.

    Raises:
        ValueError: missing columns, or no rows.

    Examples:
        >>> rows = {"vector": ["CAA", "CAA"], "strength": [0.0, 0.4], "false_yes": [0.8, 0.4], "recall": [1.0, 0.9]}
        >>> fig = plot_yes_no(pd.DataFrame({**rows, "recall_se": [0.0, 0.03]}))
    """
    points = numbers(frame, "vector", ("strength", "false_yes", "recall", "recall_se"))
    with style():
        fig = figure(8.0, 4.8, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        names = [name for name in dict.fromkeys(points.vector) if name != reference]
        bias = points[points.vector == reference].sort_values(["false_yes", "recall"])
        if len(bias):
            ax.plot(bias.false_yes, bias.recall, color=GREY, lw=4.0, alpha=0.45, zorder=1.5, label=shortened(reference))
        for i, name in enumerate(names):
            rows = points[points.vector == name].sort_values("strength")
            rows = rows[rows.strength != 0]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.errorbar(
                rows.false_yes, rows.recall, yerr=1.96 * rows.recall_se, color=colour, marker=marker, ms=5, lw=1.8,
                elinewidth=0.9, label=shortened(name, 48),
            )  # fmt: skip
        plain = points[points.strength == 0].head(1)
        ax.plot(plain.false_yes, plain.recall, "o", ms=10, mfc="white", mec="black", mew=1.5, zorder=5, lw=0,
                label="unsteered")  # fmt: skip
        ax.set_xlabel("false yes: share of absent digits answered with yes")
        ax.set_ylabel("recall: share of shown digits\nanswered with yes")
        ax.margins(0.04)
        shown = points[points.vector != reference]
        if len(shown):  # the grey curve goes down to 0, where nobody steers: keep the part that is compared
            low = float((shown.recall - 1.96 * shown.recall_se.fillna(0)).min())
            ax.set_ylim(max(-0.02, 1.2 * low - 0.22), 1.01 if low > 0.8 else 1.03)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=10.5, parse_math=False)
        legend = fig.legend(loc="outside lower left", ncols=3, title="bars: \u00b1 1.96 se over questions")
        legend._legend_box.align = "left"  # the title stands over the first entry
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig
