"""Coloured tokens: as a widget and as a still picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from grains_tl._util.html import Html
from grains_tl.attribution.display import Template, tokens_html
from grains_tl.attribution.groups import Grouped
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.words import spaced
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

#: circuitsvis writes tokens into the page as markup and into a script as they are; these stand in for what could end
#: either. An ampersand is kept from starting an entity; a line break becomes visible.
NO_MARKUP = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "&\u200b", "\n": "\u21b5\n"})

Renderer = Literal["html", "circuitsvis"]


def show_tokens(
    attribution_or_tokens: Attribution | Grouped | Sequence[str],
    scores: Any = None,
    *,
    template: Template = "fold",
    renderer: Renderer = "html",
) -> Any:
    """Coloured tokens in a notebook: blue pushes toward chosen, red toward rejected; point at one for its score in nats.

    Args:
        attribution_or_tokens: an attribution, one grouped into words or phrases, or tokens as text.
        scores: ``[pos]``, nats, when tokens are given. Scores that are not finite count as 0.
        template: what to do with tokens of the chat template and special tokens: ``"fold"`` runs of them into a few words,
            ``"hide"`` them, or ``"show"`` them all. Plain tokens are always all shown.
        renderer: ``"html"``, a few kB that need no script, or ``"circuitsvis"``, its interactive widget (1.3 MB; it shows
            every token, and angle brackets as single guillemets, because it would take ``<b>`` in a token for markup).

    Returns:
        Something that a notebook shows: ``Html``, whose ``str`` is the markup; for circuitsvis its ``RenderedHTML``, whose
        ``.local_src`` is self-contained.

    Raises:
        ValueError: tokens without scores, not as many scores as tokens, or an unknown ``template`` or ``renderer``.

    Examples:
        >>> shown = show_tokens([" good", " film"], [1.2, 0.1])
        >>> len(str(shown)) < 1000
        True
    """
    if renderer not in get_args(Renderer):
        raise ValueError(f"renderer={renderer!r}; expected one of {get_args(Renderer)}")
    given = attribution_or_tokens
    if renderer == "html" and isinstance(given, (Attribution, Grouped)):
        return Html(given.as_html(template))
    if isinstance(given, Attribution):
        tokens, scores = given.tokens, given.scores
    elif isinstance(given, Grouped):
        tokens, scores = given.texts, given.scores
    else:
        tokens = list(given)
    if scores is None:
        raise ValueError("tokens need scores: show_tokens(tokens, scores), or show_tokens(attribution)")
    values = finite(scores)
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(values)} scores; expected one score per token")
    return Html(tokens_html(tokens, values)) if renderer == "html" else _circuitsvis(tokens, values)


def _circuitsvis(tokens: Sequence[str], values: Sequence[float]) -> Any:
    from circuitsvis.tokens import colored_tokens
    from circuitsvis.utils.render import RenderedHTML

    top = largest(values)
    shown = colored_tokens(
        [token.translate(NO_MARKUP) for token in tokens],
        values,
        min_value=-top,
        max_value=top,
        negative_color=REJECTED,
        positive_color=CHOSEN,
    )
    # "<div ... />" is not closed in HTML: whatever follows on the page would end up inside, and be wiped by the script
    return RenderedHTML(*(html.replace("/>", "></div>", 1) for html in (shown.local_src, shown.cdn_src)))


def plot_tokens(attribution: Attribution, *, width: float = 8.0, n_labels: int = 5) -> Any:
    """The same as a still picture: each token in a box, blue toward chosen, red toward rejected, white at 0.

    Tokens that continue a word touch it; special and template tokens have grey text and a dashed box.

    Args:
        attribution: scores of one record; scores that are not finite count as 0.
        width: of the figure, inches.
        n_labels: how many of the largest scores to print under their boxes.

    Returns:
        A matplotlib ``Figure`` with the colour bar in nats; the title has the method, f(x) and the completeness gap.

    Raises:
        ValueError: something else than one attribution.

    Examples:
        >>> import torch
        >>> a = Attribution(torch.tensor([0.5, -1.0]), [" good", " bad"], torch.tensor([True] * 2),
        ...                 torch.tensor([False] * 2), None, 1.5, None, "leave_one_out")
        >>> fig = plot_tokens(a)
    """
    if not isinstance(attribution, Attribution):
        raise ValueError(
            f"expected one Attribution, got {type(attribution).__name__}: plot_tokens(attributions[0]) for the first of "
            "several, show_tokens(tokens, scores) for plain tokens"
        )
    scores = finite(attribution.scores)
    top = largest(scores)
    labelled = sorted((i for i, s in enumerate(scores) if s != 0), key=lambda i: -abs(scores[i]))[:n_labels]
    with style():
        words = [visible(token) for token in attribution.tokens]
        texts = spaced(attribution.tokens, () if attribution.starts_word is None else attribution.starts_word.tolist())
        places, n_lines = wrapped(texts, text_widths(words), width - 2 * _MARGIN)
        height = _HEAD + n_lines * _PITCH + _FOOT
        fig = figure(width, height)
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        gap = "none" if attribution.gap is None else f"{signed(attribution.gap)} nats"
        method, objective = shortened(attribution.method, 40), signed(attribution.objective)
        title = f"{method}:  f(x) = {objective} nats,  completeness gap {gap}"
        ax.text(_MARGIN, _HEAD / 2, title, va="center", fontsize=10.5, parse_math=False)
        colours = _colours()
        taken: list[tuple[int, float]] = []  # labels written high; a neighbour too close to one goes lower
        for i, (word, place, score) in enumerate(zip(words, places, scores, strict=True)):
            face = colours(0.5 + 0.5 * score / top)
            middle = _box(ax, word, place, face, bool(attribution.content[i]))
            if i in labelled:
                line = place[0]
                close = any(line == other and abs(middle - x) < 0.4 for other, x in taken)
                down = _HEAD + line * _PITCH + _BOX + (0.165 if close else 0.07)
                ax.text(middle, down, signed(score), ha="center", va="center", fontsize=7, color=GREY)
                taken += [] if close else [(line, middle)]
        _colour_bar(fig, ax, width, height, top)
    return fig


#: Inches: around everything, a token's box, from line to line, over and under the lines.
_MARGIN, _BOX, _PITCH, _HEAD, _FOOT = 0.15, 0.27, 0.47, 0.42, 0.72


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tokens", [REJECTED, "white", CHOSEN])


def _box(ax: Any, word: str, place: tuple[int, float, float], face: Any, content: bool) -> float:
    """One token; where its middle is, in inches."""
    from matplotlib.patches import Rectangle

    line, left, width = place
    x, y = _MARGIN + left, _HEAD + line * _PITCH
    ax.add_patch(Rectangle((x, y), width, _BOX, fc=face, ec="#BBBBBB", lw=0.7, ls="-" if content else (0, (2, 2))))
    # white letters where the box is dark (relative luminance)
    dark = 0.2126 * face[0] + 0.7152 * face[1] + 0.0722 * face[2] < 0.45
    ink = "white" if dark else ("black" if content else GREY)
    middle = x + width / 2
    ax.text(middle, y + _BOX / 2, word, ha="center", va="center_baseline", color=ink, parse_math=False)
    return middle


def _colour_bar(fig: Any, ax: Any, width: float, height: float, top: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar_width = min(3.6, width - 2 * _MARGIN)
    bar = fig.add_axes((_MARGIN / width, 0.46 / height, bar_width / width, 0.12 / height))
    colorbar = fig.colorbar(
        ScalarMappable(Normalize(-top, top), _colours()), cax=bar, orientation="horizontal", ticks=[-top, 0, top]
    )
    colorbar.ax.set_xticklabels([signed(-top), "0", signed(top)], fontsize=8)
    for label, side in zip(colorbar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_ha(side)
    colorbar.outline.set_linewidth(0.5)
    note = "score, nats: blue toward chosen, red toward rejected"
    ax.text(_MARGIN + bar_width + 0.2, height - 0.52, note, va="center", fontsize=8.5, color="#333333")
