"""Patches over their image beside the words of the prompt, on one scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from grains_tl.attribution.result import Attribution
from grains_tl.plotting.style import (
    CHOSEN,
    GREY,
    REJECTED,
    figure,
    finite,
    largest,
    shortened,
    signed,
    style,
    text_widths,
    visible,
    wrapped,
)
from grains_tl.records.pictures import load_images
from grains_tl.tokens.patches import WHOLE, ImageSpan

#: How opaque the largest score is, on patches and words alike: the picture stays visible under its heat.
OPAQUE = 0.8


def attribution_share(attribution: Attribution) -> dict[str, float]:
    """How much of the attribution lies on the image, and how much on the text.

    Args:
        attribution: of a prompt with or without images.

    Returns:
        ``image`` and ``text``: shares of the sum of absolute scores (they add up to 1); ``image_sum`` and ``text_sum``:
        the signed sums, nats. Scores that are not finite count as 0.

    Examples:
        >>> a = Attribution(torch.tensor([3.0, -1.0]), ["<image>", " cat"], torch.tensor([True, True]),
        ...                 torch.tensor([True, False]), None, 2.0, None, "leave_one_out")
        >>> attribution_share(a)
        {'image': 0.75, 'text': 0.25, 'image_sum': 3.0, 'text_sum': -1.0}
    """
    scores = torch.tensor(finite(attribution.scores))
    sums = [scores[attribution.is_image], scores[~attribution.is_image]]
    image, text = (float(s.abs().sum()) for s in sums)
    whole = (image + text) or 1.0
    return {
        "image": image / whole,
        "text": text / whole,
        "image_sum": float(sums[0].sum()),
        "text_sum": float(sums[1].sum()),
    }


def plot_image_attribution(attribution: Attribution, image: Any, *, width: float = 9.0, n_labels: int = 4) -> Any:
    """Patch heatmap over the image, beside the coloured words of the prompt; both on one scale.

    Blue pushes toward chosen, red toward rejected, no colour is 0. Every grid of patches has a panel (LLaVA-NeXT reads an
    overview and a large grid); crops that lie side by side share one.

    Args:
        attribution: scores of a record with an image; scores that are not finite count as 0.
        image: the record's image or list of images (as in ``PreferencePair``).
        width: of the figure, inches.
        n_labels: how many of the largest scores to print, among patches and among words.

    Returns:
        A matplotlib ``Figure``: panels, words, the share of image and text, and the colour bar in nats.

    Raises:
        ValueError: an attribution without image, or images that are not as many as the record's.

    Examples:
        >>> fig = plot_image_attribution(attribute(model, pair), pair.image)     # doctest: +SKIP
    """
    panels = _panels(attribution)
    pictures = load_images(image)
    n_images = 1 + max(span.image for panel in panels for span in panel)
    if len(pictures) != n_images:
        raise ValueError(f"got {len(pictures)} image(s), expected {n_images} as in the record")
    scores = finite(attribution.scores)
    top = largest(scores)
    margin, head, foot, gutter = 0.2, 0.62, 0.75, 0.3  # inches
    text = _words_shown(attribution)
    with style():
        boxes, bottom = _layout([pictures[panel[0].image].size for panel in panels], margin, head, gutter)
        left = max(x + wide for x, _, wide, _ in boxes) + gutter
        width = max(width, left + 2.2)
        tokens = [attribution.tokens[i] for i in text]
        words = [visible(token) for token in tokens]
        places, n_lines = wrapped(tokens, text_widths(words), width - left - margin)
        height = max(bottom, head + 0.47 * n_lines) + foot
        fig = figure(width, height)
        page = fig.add_axes((0, 0, 1, 1))
        page.set(xlim=(0, width), ylim=(height, 0))
        page.axis("off")
        gap = "none" if attribution.gap is None else f"{signed(attribution.gap)} nats"
        value = signed(attribution.objective)
        title = f"{shortened(attribution.method, 40)}:  f(x) = {value} nats,  completeness gap {gap}"
        page.text(margin, 0.25, title, va="center", fontsize=10.5, parse_math=False)
        patches = [p for panel in panels for span in panel for p in span.positions.flatten().tolist()]
        marked = _strongest(scores, patches, n_labels) | _strongest(scores, text, n_labels)
        for panel, (x, y, wide, high) in zip(panels, boxes, strict=True):
            ax = fig.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
            _draw_panel(ax, panel, pictures[panel[0].image], scores, top, marked)
            page.text(x, y - 0.1, _panel_title(panel, n_images), va="center", fontsize=8.5, color=GREY)
        for word, (at, x, wide), i in zip(words, places, text, strict=True):
            spot = (left + x, head + 0.47 * at, wide)
            _draw_word(page, word, spot, scores[i], top, marked=i in marked, content=bool(attribution.content[i]))
        _draw_share(page, attribution_share(attribution), left, height - 0.46, width - left - margin)
        _draw_scale(fig, top, margin, height)
    return fig


def _words_shown(attribution: Attribution) -> list[int]:
    """Text tokens, without the markers that stand between image tokens (tile tags, frames)."""
    images = attribution.is_image.nonzero().flatten().tolist()
    inside = range(images[0], images[-1]) if images else range(0)
    kept = ~attribution.is_image & (
        attribution.content | torch.tensor([i not in inside for i in range(len(attribution.tokens))])
    )
    return kept.nonzero().flatten().tolist()


def _layout(
    sizes: Sequence[tuple[int, int]], margin: float, head: float, gutter: float, side: float = 2.6
) -> tuple[list[tuple[float, float, float, float]], float]:
    """(x, y, width, height) of every panel in inches, two in a row, and where the last one ends."""
    columns = 1 if len(sizes) == 1 else 2
    boxes, y = [], head
    for start in range(0, len(sizes), columns):
        row = sizes[start : start + columns]
        highs = [side * min(1.0, high / wide) for wide, high in row]
        boxes += [
            (margin + i * (side + gutter), y, side * min(1.0, wide / high), tall)
            for i, ((wide, high), tall) in enumerate(zip(row, highs, strict=True))
        ]
        y += max(highs) + gutter
    return boxes, y


def _panels(attribution: Attribution) -> list[list[ImageSpan]]:
    """Spans drawn over one picture: each grid over the whole image alone, crops of an image together."""
    if not attribution.spans:
        raise ValueError("the attribution has no image; use plot_tokens for a prompt of text only")
    panels: list[list[ImageSpan]] = []
    for span in attribution.spans:
        last = panels[-1][-1] if panels else None
        crops = last is not None and last.image == span.image and None not in (last.box, span.box)
        if crops and last is not None and WHOLE not in (last.box, span.box):
            panels[-1].append(span)
        else:
            panels.append([span])
    return panels


def _panel_title(panel: Sequence[ImageSpan], n_images: int) -> str:
    grid = f"{panel[0].rows} x {panel[0].cols} patches"
    name = f"image {panel[0].image + 1}, " if n_images > 1 else ""
    return f"{name}{len(panel)} crops of {grid}" if len(panel) > 1 else f"{name}{grid}"


def _strongest(scores: Sequence[float], positions: Sequence[int], n: int) -> set[int]:
    return set(sorted((p for p in positions if scores[p]), key=lambda p: -abs(scores[p]))[:n])


def _draw_panel(
    ax: Any, panel: Sequence[ImageSpan], picture: Any, scores: Sequence[float], top: float, marked: Collection[int]
) -> None:
    from matplotlib.patches import Rectangle

    wide, high = picture.size
    # a washed-out picture: its own colours must not be read as scores
    pixels = np.asarray(picture.convert("L").convert("RGB"), dtype=float) / 255
    ax.imshow(0.5 + 0.5 * pixels, extent=(0, wide, high, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    for span in panel:
        drawn = span if span.box is not None else ImageSpan(span.start, span.length, span.rows, span.cols, box=WHOLE)
        for row in range(span.rows):
            for col in range(span.cols):
                position = int(span.positions[row, col])
                box = drawn.patch_box(row, col) or WHOLE
                x, y, right, bottom = (f * s for f, s in zip(box, (wide, high) * 2, strict=True))
                face = _colour(scores[position], top)
                ax.add_patch(Rectangle((x, y), right - x, bottom - y, fc=face, ec=(1, 1, 1, 0.35), lw=0.4))
                if position in marked:
                    ax.text(
                        (x + right) / 2, (y + bottom) / 2, signed(scores[position]), ha="center", va="center",
                        fontsize=7, color="black", bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1},
                    )  # fmt: skip
    boxes = [s.box or WHOLE for s in panel]
    ax.set_xlim(min(0, *(b[0] for b in boxes), 0) * wide, max(1, *(b[2] for b in boxes), 1) * wide)
    ax.set_ylim(max(1, *(b[3] for b in boxes), 1) * high, min(0, *(b[1] for b in boxes), 0) * high)
    ax.set_aspect("equal", anchor="NW")


def _colour(score: float, top: float) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgb

    return (*to_rgb(CHOSEN if score > 0 else REJECTED), OPAQUE * abs(score) / top)


def _draw_word(
    page: Any, word: str, place: tuple[float, float, float], score: float, top: float, marked: bool, content: bool
) -> None:
    from matplotlib.patches import Rectangle

    x, y, wide = place
    dashes = "-" if content else (0, (2, 2))
    page.add_patch(Rectangle((x, y), wide, 0.27, fc=_colour(score, top), ec="#BBBBBB", lw=0.7, ls=dashes))
    ink = "white" if abs(score) > 0.75 * top else ("black" if content else GREY)
    page.text(x + wide / 2, y + 0.135, word, ha="center", va="center_baseline", color=ink, parse_math=False)
    if marked:
        page.text(x + wide / 2, y + 0.355, signed(score), ha="center", va="center", fontsize=7, color=GREY)


def _draw_share(page: Any, share: Mapping[str, float], x: float, y: float, wide: float) -> None:
    """A bar: image and text share of the absolute scores."""
    from matplotlib.patches import Rectangle

    page.text(x, y - 0.1, "share of |score|", va="bottom", fontsize=8.5, color="#333333")
    page.add_patch(Rectangle((x, y), wide, 0.14, fc="#DDDDDD", ec="none"))
    page.add_patch(Rectangle((x, y), wide * share["image"], 0.14, fc="#777777", ec="none"))
    for side, name in (("left", "image"), ("right", "text")):
        label = f"{name} {share[name]:.0%} ({signed(share[name + '_sum'])} nats)"
        page.text(x if side == "left" else x + wide, y + 0.26, label, ha=side, va="center", fontsize=8, color="#333333")


def _draw_scale(fig: Any, top: float, margin: float, height: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    width = fig.get_size_inches()[0]
    # the same mixing with white as on patches and words
    ends: list[Any] = [tuple(1 - OPAQUE * (1 - c) for c in _colour(s, 1.0)[:3]) for s in (-1.0, 1.0)]
    colours = LinearSegmentedColormap.from_list("scores", [ends[0], "white", ends[1]])
    bar = fig.add_axes((margin / width, 0.4 / height, 2.4 / width, 0.12 / height))
    colorbar = fig.colorbar(ScalarMappable(Normalize(-top, top), colours), cax=bar, orientation="horizontal")
    colorbar.set_ticks([-top, 0, top], labels=[signed(-top), "0", signed(top)])
    colorbar.ax.tick_params(labelsize=8)
    for label, side in zip(colorbar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_ha(side)
    colorbar.outline.set_linewidth(0.5)
    note = "nats: blue toward chosen, red toward rejected"
    fig.text(margin / width, 0.64 / height, note, fontsize=7.5, va="center", color="#333333")
