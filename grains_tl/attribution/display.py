"""Attributions in a notebook: the prompt as text with a tint on every token, a few kB of HTML without scripts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from grains_tl._util import html
from grains_tl.attribution.groups import Grouped, spaced
from grains_tl.attribution.result import Attribution
from grains_tl.tokens.patches import ImageSpan

#: What to do with tokens of the chat template and special tokens: leave them out, fold runs of them, or show them all.
Template = Literal["hide", "fold", "show"]

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
        kind: whether it is the user's words, the template's (special tokens too), or a part of an image.
    """

    text: str
    score: float
    kind: Literal["content", "template", "image"] = "content"


def attribution_html(attribution: Attribution, template: Template = "fold") -> str:
    """The display of one attribution.

    Args:
        attribution: from ``attribute``.
        template: what to do with the tokens of the chat template and special tokens.

    Raises:
        ValueError: ``template`` is something else.
    """
    a = attribution
    flags = zip(a.content.tolist(), a.is_image.tolist(), strict=True)
    kinds: list[Literal["content", "template", "image"]] = [
        "image" if is_image else "content" if content else "template" for content, is_image in flags
    ]
    texts = spaced(a.tokens, () if a.starts_word is None else a.starts_word.tolist())
    scores = a.scores.nan_to_num(0.0).tolist()
    pieces = [Piece(*one) for one in zip(texts, scores, kinds, strict=True)]
    return _display(a, "", pieces, template)


def grouped_html(grouped: Grouped, template: Template = "fold") -> str:
    """The display of scores of words, sentences or phrases: one tint for each of them."""
    a = grouped.attribution
    pieces = []
    for text, score, own in zip(grouped.texts, grouped.scores.tolist(), grouped.positions, strict=True):
        positions = list(own)
        content, is_image = bool(a.content[positions].any()), bool(a.is_image[positions].any())
        kind: Literal["content", "template", "image"] = "image" if is_image else "content" if content else "template"
        pieces.append(Piece(text, score, kind))
    return _display(a, f", {html.count(len(pieces), 'group')}", pieces, template)


def tokens_html(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """Plain tokens with their scores."""
    pieces = [Piece(token, score) for token, score in zip(tokens, scores, strict=True)]
    top = _largest(pieces)
    return html.frame(_text(pieces, top, "show"), html.note(_scale(top)))


def _display(a: Attribution, about: str, pieces: Sequence[Piece], template: Template) -> str:
    if template not in get_args(Template):
        raise ValueError(f"template={template!r}; expected one of {get_args(Template)}")
    gap = "" if a.gap is None else f", completeness gap {html.signed(a.gap)} nats"
    top = _largest(pieces)
    parts = [html.title(a.method, f"f(x) = {html.signed(a.objective)} nats{gap}{about}")]
    parts += [_image(a, i, span) for i, span in enumerate(a.spans)]
    parts.append(_text(pieces, top, template))
    if a.chosen is not None and a.rejected is not None:
        sides = (("chosen", a.chosen, html.TOWARD_CHOSEN), ("rejected", a.rejected, html.TOWARD_REJECTED))
        parts += [_response(*side) for side in sides]
    parts.append(html.note(_scale(top)))
    return html.frame(*parts)


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


def _image(a: Attribution, index: int, span: ImageSpan) -> str:
    scores = a.scores.nan_to_num(0.0)[span.positions]
    top = float(scores.abs().max())
    total = f"sum {html.signed(scores.sum())} nats, strongest patch {html.number(top)}"
    about = html.note(f"image {span.image + 1}, {span.rows} x {span.cols} patches: {total}")
    if scores.numel() > MAX_PATCHES:
        return about
    side = max(5, min(18, 180 // span.cols))
    cells = "".join(f'<i style="{html.tint(score, top)}"></i>' for score in scores.flatten().tolist())
    grid = f"display:inline-grid;grid:auto-flow {side}px/repeat({span.cols},{side}px);gap:1px;border:1px solid #8886"
    return html.element("div", cells, grid, title=f"patches of image {index + 1}") + about


def _response(name: str, words: str, colour: str) -> str:
    label = html.element("b", name, f"border-left:.3em solid {colour};padding-left:.5em")
    return html.element("div", f"{label} {html.text(words.strip(), 400)}", "margin:.15em 0;overflow-wrap:anywhere")
