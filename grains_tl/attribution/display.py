"""Attributions in a notebook: the prompt as text with a tint on every token, a few kB of HTML without scripts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from grains_tl._util import html
from grains_tl.tokens.patches import ImageSpan

#: What to do with tokens of the chat template and special tokens: leave them out, fold runs of them, or show them all.
Template = Literal["hide", "fold", "show"]

#: The user's words, the template's (special tokens too), or a part of an image.
Kind = Literal["content", "template", "image"]

#: Grids with more patches than this are told in words; ``plot_image_attribution`` draws them.
MAX_PATCHES = 324

_FAINT = "opacity:.55"
_TEXT = (
    "white-space:pre-wrap;overflow-wrap:anywhere;margin:.4em 0;padding:.5em .7em;border:1px solid #8886;line-height:1.9"
)
_ROUND = "border-radius:.2em"


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt with one score.

    Attributes:
        text: as it is read, with the space before it.
        score: nats.
        kind: what it belongs to.
    """

    text: str
    score: float
    kind: Kind = "content"


@dataclass(frozen=True)
class Shown:
    """A prompt with its scores, as it is displayed.

    Attributes:
        title: what the scores are.
        about: what is said beside it.
        pieces: the prompt in order.
        grids: the patch grids of its images, each with its scores ``[row, col]``, nats.
        responses: texts of the chosen and the rejected response, where they are known.
    """

    title: str
    about: str
    pieces: Sequence[Piece]
    grids: Sequence[tuple[ImageSpan, Tensor]] = ()
    responses: tuple[str, str] | None = None


def kind_of(content: bool, is_image: bool) -> Kind:
    """The kind of a piece."""
    return "image" if is_image else "content" if content else "template"


def prompt_html(shown: Shown, template: Template = "fold") -> str:
    """The display of a prompt.

    Args:
        shown: the prompt with its scores.
        template: what to do with the tokens of the chat template and special tokens.

    Raises:
        ValueError: ``template`` is something else.
    """
    if template not in get_args(Template):
        raise ValueError(f"template={template!r}; expected one of {get_args(Template)}")
    top = _largest(shown.pieces)
    parts = [html.title(shown.title, shown.about)]
    parts += [_image(number, span, scores) for number, (span, scores) in enumerate(shown.grids, start=1)]
    parts.append(_text(shown.pieces, top, template))
    if shown.responses is not None:
        colours = (html.TOWARD_CHOSEN, html.TOWARD_REJECTED)
        parts += [_response(*one) for one in zip(("chosen", "rejected"), shown.responses, colours, strict=True)]
    parts.append(html.note(_scale(top)))
    return html.frame(*parts)


def tokens_html(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """Plain tokens with their scores."""
    pieces = [Piece(token, score) for token, score in zip(tokens, scores, strict=True)]
    top = _largest(pieces)
    return html.frame(_text(pieces, top, "show"), html.note(_scale(top)))


def _largest(pieces: Iterable[Piece]) -> float:
    """What the strongest tint means; template tokens often score highest and mean little, so they do not set it."""
    pieces = list(pieces)
    content = [abs(p.score) for p in pieces if p.kind == "content"]
    return max(content or [abs(p.score) for p in pieces], default=0.0)


def _scale(top: float) -> str:
    return f"Blue pushes toward chosen, red toward rejected; the strongest tint is {html.number(top)} nats."


def _text(pieces: Sequence[Piece], top: float, template: Template) -> str:
    parts = []
    for kind, run in itertools.groupby(pieces, key=lambda piece: piece.kind):
        same = list(run)
        if kind == "image":
            parts.append(_folded(same, "patch", "patches"))
        elif kind == "template" and template == "hide":
            continue
        elif kind == "template" and template == "fold":
            parts.append(_folded(same, "template token", "template tokens"))
        else:
            parts += [_token(piece, top) for piece in same]
    return html.element("div", "".join(parts), _TEXT)


def _token(piece: Piece, top: float) -> str:
    """A space before a word is left without a tint, so that words can be told apart."""
    bare = piece.text.lstrip(" ") or piece.text
    gap = " " * (len(piece.text) - len(bare))
    shown = html.text(bare.replace("\n", "\u21b5\n").replace("\t", "\u2192\t"))
    colour = html.tint(piece.score, top)
    border = "margin:0 .2em;border-bottom:1px dashed #8889;" if piece.kind == "template" else ""
    style = f"{border}{_ROUND};{colour}" if colour else border.rstrip(";")
    return gap + html.element("span", shown, style, title=f"{html.signed(piece.score)} nats")


def _folded(run: Sequence[Piece], one: str, several: str) -> str:
    """A run of tokens as a few words; pointing at it shows the tokens and the sum of their scores."""
    total = sum(piece.score for piece in run)
    content = "".join(piece.text for piece in run).strip()
    label = f"[{len(run)} {one if len(run) == 1 else several}]"
    title = f"sum {html.signed(total)} nats" + (f": {content[:200]}" if one != "patch" else "")
    return " " + html.element("span", label, f"{_FAINT};font-size:.85em", title=title) + " "


def _image(number: int, span: ImageSpan, scores: Float[Tensor, "row col"]) -> str:
    top = float(scores.abs().max())
    total = f"sum {html.signed(scores.sum())} nats, strongest patch {html.number(top)}"
    about = html.note(f"image {span.image + 1}, {span.rows} x {span.cols} patches: {total}")
    if scores.numel() > MAX_PATCHES:
        return about
    side = max(5, min(18, 180 // span.cols))
    cells = "".join(f'<i style="{html.tint(score, top)}"></i>' for score in scores.flatten().tolist())
    grid = f"display:inline-grid;grid:auto-flow {side}px/repeat({span.cols},{side}px);gap:1px;border:1px solid #8886"
    return html.element("div", cells, grid, title=f"patches of image {number}") + about


def _response(name: str, words: str, colour: str) -> str:
    label = html.element("b", name, f"border-left:.3em solid {colour};padding-left:.5em")
    return html.element("div", f"{label} {html.text(words.strip(), 400)}", "margin:.15em 0;overflow-wrap:anywhere")
