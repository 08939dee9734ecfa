"""One look for every figure: colours, sizes, and text that is drawn literally."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch

#: Paul Tol's "bright" scheme, told apart under every common colour blindness; grey is left for what is not data.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")


MARKERS = ("o", "s", "^", "D", "v", "P")


CHOSEN, REJECTED, GREY, DRAW = "#2166AC", "#B2182B", "#666666", "#E08E45"


STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "figure.facecolor": "white",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "black",
    "axes.titlesize": 10.5,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "grid.linestyle": "-",
    "text.color": "black",
    "text.usetex": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
}


def figure_png(fig: Any, dpi: int = 144) -> bytes:
    r"""A figure as PNG; characters that no font has are drawn as boxes, quietly.

    Args:
        fig: a matplotlib ``Figure``.
        dpi: dots per inch.

    Returns:
        The file's bytes.

    Examples:
        >>> figure_png(figure(2.0, 1.0))[:4]
        b'\x89PNG'
    """
    out = io.BytesIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        fig.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Our style for artists made inside; the user's settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def figure(width: float, height: float, *, constrained: bool = False) -> Any:
    """A figure that pyplot does not know, ``width`` x ``height`` inches, with its own notebook picture."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # pads in inches, so that nothing touches the rim
    fig = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08) if constrained else None)
    fig._repr_png_ = functools.partial(_notebook_png, fig)  # type: ignore[attr-defined]
    return fig


def _notebook_png(fig: Any) -> tuple[bytes, dict[str, float]]:
    """The figure in at most 256 colours: a notebook keeps every picture, and this takes a third of the space."""
    from PIL import Image

    width, height = fig.get_size_inches() * 96
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(figure_png(fig))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue(), {"width": float(width), "height": float(height)}


def numbers(frame: pd.DataFrame, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """The columns needed: names as text, the rest as floats with None as NaN (ValueError if any is missing).

    A number as a name that pandas has made a float (as it does where a row is added) is written without ``.0``.
    """
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"expected a table with the columns {[name, *columns]}, got {type(frame).__name__}")
    missing = [column for column in (name, *columns) if column not in frame.columns]
    if missing or not len(frame):
        raise ValueError(f"expected a table with rows and the columns {[name, *columns]}; missing: {missing or 'rows'}")
    found = {column: pd.to_numeric(frame[column], errors="coerce").astype(float) for column in columns}
    names = frame[name].map(lambda v: f"{v:.0f}" if isinstance(v, float) and v.is_integer() else v, na_action="ignore")
    return pd.DataFrame({name: names.astype(str), **found}).reset_index(drop=True)


def finite(scores: Any) -> list[float]:
    """The scores as floats, 0 for those that are not finite."""
    values = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    return torch.where(values.isfinite(), values, 0.0).tolist()


def number(value: Any) -> float:
    """The value as a float; NaN for ``None``."""
    return math.nan if value is None else float(value)


def largest(values: Sequence[float]) -> float:
    """The largest absolute value, to scale colours with; 1 if all are 0."""
    return max((abs(v) for v in values), default=0.0) or 1.0


def signed(value: float | None) -> str:
    """``+0.52`` with a real minus sign; an en dash for NaN and None."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:+.2f}".replace("-", "\u2212")


def visible(token: str) -> str:
    """A token on one line: no leading space (the gap shows it), visible line breaks, control characters escaped."""
    text = token.removeprefix(" ") if token.strip(" ") else token.replace(" ", "\u2423")
    text = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shortened(text, 40)


def shortened(text: Any, longest: int = 72) -> str:
    """The text, cut to ``longest`` characters."""
    return str(text) if len(str(text)) <= longest else str(text)[: longest - 1] + "\u2026"


def text_widths(words: Sequence[str]) -> list[float]:
    """Width of each word in inches at the current font size."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, 72), FontProperties()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        return [renderer.get_text_width_height_descent(word, font, ismath=False)[0] / 72 for word in words]


def wrapped(
    tokens: Sequence[str], widths: Sequence[float], line_width: float
) -> tuple[list[tuple[int, float, float]], int]:
    """Boxes on lines: ``(line, left, width)`` per token in inches, and the number of lines."""
    padding, space = 0.07, 0.06
    places: list[tuple[int, float, float]] = []
    line, right, before = 0, 0.0, "\n"
    for token, text_width in zip(tokens, widths, strict=True):
        width = text_width + 2 * padding
        left = right + (space if right and (token[:1].isspace() or before[-1:].isspace()) else 0.0)
        if right and (left + width > line_width or "\n" in before):
            line, left = line + 1, 0.0
        places.append((line, left, width))
        right, before = left + width, token
    return places, line + 1


def effects_with_band(ax: Any, rows: pd.DataFrame, x: str, colour: str, label: str) -> None:
    """Column ``effect`` over column ``x``, from ``low`` to ``high`` a band."""
    ax.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
    ax.plot(rows[x], rows["effect"], "o-", color=colour, markersize=5, label=label)


def log_ticks(ax: Any, labels: Mapping[float, str]) -> None:
    """A logarithmic x axis with these ticks alone."""
    ax.set_xscale("log")
    ax.set_xticks(list(labels), list(labels.values()))
    ax.minorticks_off()
