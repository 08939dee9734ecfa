"""Pieces of HTML for the reports: one file that needs no network, in which everything that comes from data is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grains_tl._util.html import number, text
from grains_tl.plotting.style import figure_png

CSS = """
:root { color-scheme: light; }
body { max-width: 900px; margin: 2.5rem auto; padding: 0 1.2rem; background: #fff; color: #1a1a1a;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid #ddd; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p, ul, dl { margin: .5rem 0 1rem; }
a { color: #1f5a96; }
.verdicts { border-left: 4px solid #4477aa; background: #f5f7fa; padding: .7rem 1.1rem; margin: 1.2rem 0; }
.verdict, .verdicts p { white-space: pre-line; }
.verdicts p { margin: .35rem 0; font-size: 1.05rem; }
.note { color: #555; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; }
dt { font-weight: 600; } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0 1rem; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #999; font-weight: 600; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .number { white-space: normal; }
.controls th, .controls td { padding-left: .5rem; padding-right: .5rem; }
.controls td:nth-child(6) { min-width: 10rem; }
.settings td { overflow-wrap: anywhere; }
.continuations { width: 100%; table-layout: fixed; }
.continuations td { white-space: pre-wrap; overflow-wrap: anywhere; }
.continuations .prompt { background: #f5f7fa; font-weight: 600; }
figure { margin: 1rem 0 1.4rem; }
figcaption { color: #444; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
"""


def page(title: str, body: str, *, nonce: str | None = None, style: str = "") -> str:
    """A whole document; scripts run only with the nonce, and nothing is loaded from anywhere.

    Args:
        title: text of the window's title.
        body: HTML.
        nonce: of the scripts in ``body``; without it there are none.
        style: further CSS.
    """
    scripts = "" if nonce is None else f" script-src 'nonce-{nonce}';"
    policy = (
        f"default-src 'none';{scripts} style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{CSS}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), kind: str = "numbers"
) -> str:
    """A table of cells that are HTML already; the columns ``numbers`` are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"

    head = f"<thead>{line(heads, 'th')}</thead>" if any(heads) else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def settings_table(values: Mapping[str, Any]) -> str:
    """Names and values, as data."""
    cells = ((text(name), _value(value)) for name, value in values.items())
    return table(("", ""), cells, kind="settings") if values else ""


def image(figure: Any, description: str) -> str:
    """A matplotlib figure, inside the page."""
    width = round(figure.get_figwidth() * 96)
    data = base64.b64encode(figure_png(figure)).decode()
    return f'<img width="{width}" alt="{text(description)}" src="data:image/png;base64,{data}">'


def nothing(sentence: str) -> str:
    """Where a part is empty."""
    return f'<p class="note">{sentence}</p>'


def _value(value: Any) -> str:
    """A setting as it is; a dash where there is none."""
    return number(None) if value is None or value != value else text(value)  # NaN differs from itself
