"""Pieces of HTML: nothing from data becomes markup, and tints leave text legible on light and dark pages."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from grains_tl._util import html

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp;",
    "]]><!--",
    "</span></td></table>",
]


class Reader(HTMLParser):
    """What a parser makes of a page: tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.data += data


@pytest.mark.parametrize("hostile", HOSTILE)
def test_data_is_only_text(hostile: str) -> None:
    page = html.frame(
        html.title(hostile, hostile),
        html.element("span", html.text(hostile), html.tint(1.0, 2.0), title=hostile),
        html.table(["name"], [[html.text(hostile)]]),
        html.fold(hostile, html.note(hostile)),
    )
    found = Reader(page)
    known = {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    assert set(found.tags) <= known
    assert {name for name, _ in found.attributes} <= {"style", "title"}
    assert ("title", hostile) in found.attributes
    assert found.data.count(hostile) == 6


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\u2066", "\ufeff", "\ud800", "\x7f", "\u200b"])
def test_what_cannot_be_seen_or_turns_text_round_is_named(character: str) -> None:
    assert html.text(f"a{character}b") == f"a\\u{ord(character):04x}b"
    html.element("span", "x", title=character).encode()  # a lone surrogate would not be written at all


def test_what_scripts_are_written_with_stays() -> None:
    for kept in ("naïve", "日本語", "שלום", "👩\u200d🔬", "मि\u200cत्र", "a\tb\n"):
        assert html.text(kept) == kept


def luminance(rgb: tuple[float, ...]) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.01, 0.5, 1.0])
@pytest.mark.parametrize(("page", "ink"), [((1.0, 1.0, 1.0), (0.13,) * 3), ((0.07,) * 3, (0.88,) * 3)])
def test_text_on_every_tint_is_legible_on_light_and_dark_pages(
    value: float, page: tuple[float, ...], ink: tuple[float, ...]
) -> None:
    style = html.tint(value, 1.0)
    digits = style.partition("#")[2]
    colour, opacity = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)], int(digits[6:8] or "0", 16) / 255
    under = luminance(tuple(opacity * c + (1 - opacity) * p for c, p in zip(colour, page, strict=True)))
    light, dark = max(under, luminance(ink)), min(under, luminance(ink))
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_tints_of_nothing() -> None:
    assert html.tint(0.0, 1.0) == html.tint(float("nan"), 1.0) == html.tint(1.0, 0.0) == ""
