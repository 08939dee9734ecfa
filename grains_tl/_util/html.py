"""Small pieces of HTML for notebooks and reports: elements with inline styles, no scripts, everything from data escaped.

Colours are translucent tints over whatever background the page has, and text keeps the page's own colour. So one piece is
legible on a light and on a dark page, without knowing which of them it is on.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

DASH = "\N{EN DASH}"

#: Blue pushes toward chosen, red toward rejected, as in the figures.
TOWARD_CHOSEN, TOWARD_REJECTED = "#2166ac", "#b2182b"

#: The strongest tint: at 60 % black text on white keeps a contrast above 5, and so does white text on black.
_STRONGEST = 0.6

_FAINT = "opacity:.65"


@dataclass(frozen=True, repr=False)
class Html:
    """A piece of HTML that a notebook shows.

    Attributes:
        html: the markup; also what ``str`` gives.
    """

    html: str

    def __str__(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Html({len(self.html)} characters)"

    def _repr_html_(self) -> str:
        return self.html


def text(value: Any, longest: int | None = None) -> str:
    """Data as HTML text: markup is escaped, and characters that are invisible or change the text's direction are named.

    Args:
        value: anything; ``str(value)`` is shown.
        longest: cut to so many characters, with an ellipsis.

    Examples:
        >>> text("<b>&")
        '&lt;b&gt;&amp;'
        >>> text("a film", longest=4)
        'a f…'
    """
    shown = str(value)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return escape(revealed(shown))


def revealed(value: str) -> str:
    """The text with characters named that are invisible or change its direction; markup is left as it is.

    Examples:
        >>> len(revealed("a" + chr(0x202E))), revealed("<b>")
        (7, '<b>')
    """
    return "".join(c if c in "\n\t" or not _hidden(c) else f"\\u{ord(c):04x}" for c in value)


def _hidden(character: str) -> bool:
    """Control, format and surrogate characters; joiners stay, since scripts and emoji are written with them."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"


def number(value: Any, spec: str = ".2f") -> str:
    """A number with a real minus sign; a dash for ``None``, NaN and infinities.

    Examples:
        >>> number(-0.5, "+.2f"), number(None), number(3, "d")
        ('−0.50', '–', '3')
        >>> number(-0.001)
        '0.00'
    """
    if value is None or not math.isfinite(float(value)):
        return DASH
    shown = format(int(value) if spec == "d" else float(value), spec)
    if not any(c in "123456789" for c in shown):
        shown = shown.replace("-", "+" if "+" in spec else "")  # no minus zero
    return shown.replace("-", "\N{MINUS SIGN}")


def signed(value: Any) -> str:
    """A number with two decimals that always has its sign."""
    return number(value, "+.2f")


def percent(value: Any) -> str:
    """A share as a percentage."""
    return DASH if value is None or not math.isfinite(float(value)) else f"{100 * float(value):.0f} %"


def count(n: int, noun: str) -> str:
    """So many of a thing.

    Examples:
        >>> count(1, "record"), count(2, "record")
        ('1 record', '2 records')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def tint(value: float, largest: float) -> str:
    """The CSS background of a signed value: blue above 0, red below, none at 0; stronger the closer to ``largest``.

    Examples:
        >>> tint(1.0, 2.0), tint(-2.0, 2.0), tint(0.0, 2.0)
        ('background:#2166ac4c', 'background:#b2182b99', '')
    """
    if not math.isfinite(value) or not largest > 0:
        return ""
    opacity = int(255 * _STRONGEST * min(1.0, abs(value) / largest))
    return f"background:{TOWARD_CHOSEN if value > 0 else TOWARD_REJECTED}{opacity:02x}" if opacity else ""


def element(tag: str, content: str, style: str = "", **attributes: str) -> str:
    """An element around HTML; the attributes' values are data and are escaped.

    Examples:
        >>> element("span", "film", "color:red", title='"a"')
        '<span style="color:red" title="&quot;a&quot;">film</span>'
    """
    named = {"style": style, **attributes}
    written = "".join(f' {name}="{text(value)}"' for name, value in named.items() if value)
    return f"<{tag}{written}>{content}</{tag}>"


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    marked: Collection[int] = (),
    styles: Sequence[Sequence[str]] | None = None,
) -> str:
    """A table of cells that are HTML already.

    Args:
        heads: one per column; no head row if all are empty.
        rows: cells of HTML.
        numbers: columns that are aligned to the right.
        marked: rows in bold, such as a chosen setting.
        styles: CSS of every cell, such as ``tint`` gives.
    """
    side = ["right" if i in numbers else "left" for i in range(len(heads))]

    def line(cells: Sequence[str], own: Sequence[str], tag: str) -> str:
        made = (
            element(tag, cell, f"padding:.15em .7em;text-align:{align};{style}".rstrip(";"))
            for cell, align, style in zip(cells, side, own, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    blank = [""] * len(heads)
    head = f"<thead>{line(heads, blank, 'th')}</thead>" if any(heads) else ""
    body = []
    for i, cells in enumerate(rows):
        own = list(blank if styles is None else styles[i])
        body.append(line(cells, [f"font-weight:bold;{style}" for style in own] if i in marked else own, "td"))
    inner = f"{head}<tbody>{''.join(body)}</tbody>"
    return element("div", element("table", inner, "border-collapse:collapse;margin:.3em 0"), "overflow-x:auto")


def title(name: str, about: str = "") -> str:
    """A line that says what is shown: the name in bold, the rest in a fainter colour; both are data."""
    rest = element("span", text(about), _FAINT) if about else ""
    return element("div", f"<b>{text(name)}</b> {rest}".rstrip(), "margin:.2em 0")


def note(sentence: str) -> str:
    """A small, fainter line beneath; data."""
    return element("div", text(sentence), f"{_FAINT};font-size:.9em;margin:.2em 0")


def fold(summary: str, content: str) -> str:
    """HTML that opens on a click; ``summary`` is data."""
    return f"<details><summary>{element('span', text(summary), _FAINT)}</summary>{content}</details>"


def frame(*parts: str) -> str:
    """The parts of one display, in the page's own font and colours."""
    return element("div", "".join(parts), "line-height:1.5;max-width:60em")
