"""Pictures: coloured tokens, effects over layers, a vector beside its controls. Nothing global in matplotlib changes.

Figures are made without pyplot, so no window opens and nothing stays open; they show themselves in notebooks all the
same. Tokens and names are data: they are drawn as they stand, never read as math text or markup.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch

from grains_tl.types import Attribution

#: Paul Tol's "bright" scheme, told apart under every common colour blindness; grey is left for what is not data.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
MARKERS = ("o", "s", "^", "D", "v", "P")
CHOSEN, REJECTED, GREY, DRAW = "#2166AC", "#B2182B", "#666666", "#E08E45"
STYLE = {
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
#: circuitsvis writes tokens into the page as markup and into a script as they are; these stand in for what could end
#: either. An ampersand is kept from starting an entity; a line break becomes visible.
NO_MARKUP = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "&\u200b", "\n": "\u21b5\n"})
EFFECT_LABEL = "effect: half the change of the margin\nbetween +alpha and \u2212alpha, nats"


def show_tokens(attribution_or_tokens: Attribution | Sequence[str], scores: Any = None) -> Any:
    """Interactive coloured tokens: blue pushes toward chosen, red toward rejected; hover for the score in nats.

    Angle brackets are shown as single guillemets, because circuitsvis would take ``<b>`` in a token for markup.

    Args:
        attribution_or_tokens: an attribution, or tokens as text.
        scores: ``[pos]``, nats, when tokens are given. Scores that are not finite count as 0.

    Returns:
        circuitsvis' ``RenderedHTML``; a notebook shows it, ``.local_src`` is self-contained HTML (1.3 MB).

    Raises:
        ValueError: tokens without scores, or not as many scores as tokens.

    Example:
        >>> "circuits-vis" in show_tokens([" good", " film"], [1.2, 0.1]).local_src
        True
    """
    from circuitsvis.tokens import colored_tokens
    from circuitsvis.utils.render import RenderedHTML

    if isinstance(attribution_or_tokens, Attribution):
        tokens: Sequence[str] = attribution_or_tokens.tokens
        scores = attribution_or_tokens.scores
    else:
        tokens = attribution_or_tokens
    if scores is None:
        raise ValueError("tokens need scores: show_tokens(tokens, scores), or show_tokens(attribution)")
    values = _finite(scores)
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(values)} scores; one score per token is needed")
    top = _largest(values)
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
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    scores = _finite(attribution.scores)
    top = _largest(scores)
    labelled = sorted((i for i, s in enumerate(scores) if s != 0), key=lambda i: -abs(scores[i]))[:n_labels]
    margin, box_height, pitch, head, foot = 0.15, 0.27, 0.47, 0.42, 0.72  # inches
    with _style():
        words = [_visible(token) for token in attribution.tokens]
        places, n_lines = _wrap(attribution.tokens, _text_widths(words), width - 2 * margin)
        height = head + n_lines * pitch + foot
        fig = _figure(width, height)
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        gap = "none" if attribution.gap is None else f"{_signed(attribution.gap)} nats"
        method, objective = _shortened(attribution.method, 40), _signed(attribution.objective)
        title = f"{method}:  f(x) = {objective} nats,  completeness gap {gap}"
        ax.text(margin, head / 2, title, va="center", fontsize=10.5, parse_math=False)
        colours = LinearSegmentedColormap.from_list("tokens", [REJECTED, "white", CHOSEN])
        for i, (word, (line, left, box_width), score) in enumerate(zip(words, places, scores, strict=True)):
            x, y = margin + left, head + line * pitch
            face = colours(0.5 + 0.5 * score / top)
            content = bool(attribution.content[i])
            dashes = "-" if content else (0, (2, 2))
            ax.add_patch(Rectangle((x, y), box_width, box_height, fc=face, ec="#BBBBBB", lw=0.7, ls=dashes))
            # white letters where the box is dark (relative luminance)
            dark = 0.2126 * face[0] + 0.7152 * face[1] + 0.0722 * face[2] < 0.45
            ink = "white" if dark else ("black" if content else GREY)
            middle = x + box_width / 2
            ax.text(middle, y + box_height / 2, word, ha="center", va="center_baseline", color=ink, parse_math=False)
            if i in labelled:
                ax.text(
                    middle, y + box_height + 0.085, _signed(score), ha="center", va="center", fontsize=7, color=GREY
                )
        bar_width = min(3.6, width - 2 * margin)
        bar = fig.add_axes((margin / width, 0.46 / height, bar_width / width, 0.12 / height))
        colorbar = fig.colorbar(
            ScalarMappable(Normalize(-top, top), colours), cax=bar, orientation="horizontal", ticks=[-top, 0, top]
        )
        colorbar.ax.set_xticklabels([_signed(-top), "0", _signed(top)], fontsize=8)
        for label, side in zip(colorbar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_ha(side)
        colorbar.outline.set_linewidth(0.5)
        note = "score, nats: blue toward chosen, red toward rejected"
        ax.text(margin + bar_width + 0.2, height - 0.52, note, va="center", fontsize=8.5, color="#333333")
    return fig


def plot_layers(sweep_frame: pd.DataFrame, chosen_layer: int | None = None, *, label: str = EFFECT_LABEL) -> Any:
    """Effect over layers, one line per vector, with bands of 1.96 standard errors.

    Args:
        sweep_frame: columns ``layer``, ``vector``, ``effect`` and ``se`` (nats), one row per layer and vector; NaN
            leaves a gap.
        chosen_layer: marked by a dotted line.
        label: what ``effect`` is, with its unit; the default is the one of ``evaluate.effects``.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: missing columns, no rows, or several rows for one layer and vector.
    """
    from matplotlib.ticker import MaxNLocator

    frame = _numbers(sweep_frame, "vector", ("layer", "effect", "se"))
    twice = frame[frame.duplicated(["layer", "vector"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"several rows for layer {row.layer:.0f} of {row.vector!r}; plot one alpha at a time")
    with _style():
        fig = _figure(8.0, 4.2, constrained=True)
        ax = fig.add_subplot()
        ax.grid(True)
        ax.axhline(0, color="#555555", lw=1.0, zorder=1.5)
        lines: list[Any] = []
        for i, (name, rows) in enumerate(frame.groupby("vector", sort=False)):
            rows = rows.sort_values("layer")
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            low, high = rows.effect - 1.96 * rows.se, rows.effect + 1.96 * rows.se
            ax.fill_between(rows.layer, low, high, color=colour, alpha=0.13, lw=0)
            lines += ax.plot(rows.layer, rows.effect, style, color=colour, marker=marker, ms=4.5, lw=1.8)
            lines[-1].set_label(_shortened(name))
        if chosen_layer is not None:
            lines.append(ax.axvline(chosen_layer, color=GREY, lw=1.2, ls=":", zorder=1.4))
            lines[-1].set_label(f"chosen layer {chosen_layer}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.margins(x=0.03)
        ax.set_xlabel("layer (steered after this block, counted from 0)")
        ax.set_ylabel(label)
        columns = max(1, min(4, int(7.6 / (0.65 + max(_text_widths([line.get_label() for line in lines]))))))
        legend = fig.legend(
            handles=lines, loc="outside upper left", ncols=columns, title="bands: \u00b1 1.96 se over records"
        )
        legend._legend_box.align = "left"  # the title stands over the first entry
        for text in legend.get_texts():
            text.set_parse_math(False)
    return fig


def plot_controls(table_frame: pd.DataFrame, draws: Mapping[str, Sequence[Any]]) -> Any:
    """Each vector's effect and interval on its own row, with the single draws as small dots behind.

    Args:
        table_frame: columns ``vector``, ``effect``, ``low`` and ``high`` (nats), one row per vector.
        draws: effects of single draws by vector name, nats (None and NaN are left out); names without a row get one
            with the dots alone.

    Returns:
        A matplotlib ``Figure``; it grows with the number of rows.

    Raises:
        ValueError: missing columns or no rows.
    """
    from matplotlib.lines import Line2D

    frame = _numbers(table_frame, "vector", ("effect", "low", "high"))
    alone = [name for name in draws if name not in set(frame.vector)]
    names = [*frame.vector, *alone]
    with _style():
        fig = _figure(8.0, 1.35 + 0.42 * len(names), constrained=True)
        ax = fig.add_subplot()
        ax.grid(True, axis="x")
        ax.axvline(0, color="#555555", lw=1.0, zorder=1.5)
        for y, name in enumerate(names):
            values = [v for v in map(_number, draws.get(name, ())) if math.isfinite(v)]
            # golden-ratio steps spread neighbours evenly without a random generator
            heights = [y + 0.5 * ((i * 0.6180339887 + 0.5) % 1 - 0.5) for i in range(len(values))]
            ax.scatter(values, heights, s=13, color=DRAW, alpha=0.65, lw=0, zorder=2)
        rows = range(len(frame))
        ax.hlines(rows, frame.low, frame.high, color=CHOSEN, lw=2.4, zorder=3)
        ax.scatter(frame.effect, rows, s=46, color=CHOSEN, edgecolor="white", lw=1.0, zorder=4)
        ax.set_yticks(range(len(names)), [textwrap.fill(_shortened(name), 36) for name in names])
        for label in ax.get_yticklabels():
            label.set_parse_math(False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.06)
        ax.set_xlabel(EFFECT_LABEL.replace("\n", " "))
        values_axis = ax.secondary_yaxis("right")
        values_axis.set_yticks(list(rows), [_signed(v) for v in frame.effect])
        values_axis.tick_params(length=0)
        values_axis.spines["right"].set_visible(False)
        entries = [
            Line2D([], [], color=CHOSEN, lw=2.4, marker="o", ms=7, mec="white", label="effect and its interval"),
            Line2D([], [], color=DRAW, lw=0, marker="o", ms=4, alpha=0.65, label="single draws"),
        ]
        fig.legend(handles=entries, loc="outside upper left", ncols=2)
    return fig


def figure_png(fig: Any, dpi: int = 144) -> bytes:
    """A figure as PNG; characters that no font has are drawn as boxes, quietly."""
    out = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        fig.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    """Our style for artists made inside; the user's settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def _figure(width: float, height: float, *, constrained: bool = False) -> Any:
    """A figure that pyplot does not know, ``width`` x ``height`` inches, with its own notebook picture."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # pads in inches, so that nothing touches the rim
    fig = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08) if constrained else None)
    fig._repr_png_ = functools.partial(_notebook_png, fig)  # type: ignore[attr-defined]
    return fig


def _notebook_png(fig: Any) -> tuple[bytes, dict[str, float]]:
    width, height = fig.get_size_inches() * 96
    return figure_png(fig), {"width": float(width), "height": float(height)}


def _numbers(frame: pd.DataFrame, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """The columns needed: names as text, the rest as floats with None as NaN (ValueError if any is missing)."""
    missing = [column for column in (name, *columns) if column not in frame.columns]
    if missing or not len(frame):
        raise ValueError(
            f"a table with rows and the columns {[name, *columns]} is needed; missing: {missing or 'rows'}"
        )
    found = {column: pd.to_numeric(frame[column], errors="coerce").astype(float) for column in columns}
    return pd.DataFrame({name: frame[name].astype(str), **found}).reset_index(drop=True)


def _finite(scores: Any) -> list[float]:
    values = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    return torch.where(values.isfinite(), values, 0.0).tolist()


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _largest(values: Sequence[float]) -> float:
    return max((abs(v) for v in values), default=0.0) or 1.0


def _signed(value: float | None) -> str:
    """``+0.52`` with a real minus sign; an en dash for NaN and None."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:+.2f}".replace("-", "\u2212")


def _visible(token: str) -> str:
    """A token on one line: no leading space (the gap shows it), visible line breaks, control characters escaped."""
    text = token.removeprefix(" ") if token.strip(" ") else token.replace(" ", "\u2423")
    text = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _shortened(text, 40)


def _shortened(text: Any, longest: int = 72) -> str:
    return str(text) if len(str(text)) <= longest else str(text)[: longest - 1] + "\u2026"


def _text_widths(words: Sequence[str]) -> list[float]:
    """Width of each word in inches at the current font size."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, 72), FontProperties()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        return [renderer.get_text_width_height_descent(word, font, ismath=False)[0] / 72 for word in words]


def _wrap(
    tokens: Sequence[str], text_widths: Sequence[float], line_width: float
) -> tuple[list[tuple[int, float, float]], int]:
    """Boxes on lines: ``(line, left, width)`` per token in inches, and the number of lines."""
    padding, space = 0.07, 0.06
    places: list[tuple[int, float, float]] = []
    line, right, before = 0, 0.0, "\n"
    for token, text_width in zip(tokens, text_widths, strict=True):
        width = text_width + 2 * padding
        left = right + (space if right and (token[:1].isspace() or before[-1:].isspace()) else 0.0)
        if right and (left + width > line_width or "\n" in before):
            line, left = line + 1, 0.0
        places.append((line, left, width))
        right, before = left + width, token
    return places, line + 1
