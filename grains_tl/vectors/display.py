"""Steering vectors in a notebook: a row per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grains_tl._util import html
from grains_tl.hooks.operators import UNITLESS
from grains_tl.hooks.weights import Weighted
from grains_tl.vectors.directions import LayerDirections

#: What ``alpha`` is counted in.
UNITS = {"residual": "layer's typical residual norm", "raw": "vector's own length"}


def vectors_html(
    vectors: LayerDirections, tokens: Mapping[int, tuple[Sequence[str], Sequence[str]]] | None = None
) -> str:
    """The display of steering vectors.

    Args:
        vectors: to show.
        tokens: for a layer, the tokens its direction promotes and those it demotes, where a model was at hand to say.
    """
    norms, residuals = vectors.magnitudes.tolist(), vectors.resid_norms.tolist()
    shares = [norm / residual if residual else float("nan") for norm, residual in zip(norms, residuals, strict=True)]
    top = max((share for share in shares if share == share), default=0.0)
    heads = ["layer", "norm", "residual norm", "share"]
    rows, styles = [], []
    for layer, norm, residual, share in zip(vectors.layers, norms, residuals, shares, strict=True):
        row = [html.number(layer, "d"), html.number(norm), html.number(residual, ".1f"), html.percent(share)]
        style = ["", "", "", _bar(share, top)]
        if tokens is not None:
            row += [_words(side) for side in tokens.get(layer, ((), ()))]
            style += ["", ""]
        rows.append(row)
        styles.append(style)
    heads += [] if tokens is None else ["promotes", "demotes"]
    title = html.title("SteeringVectors", f"{html.count(len(rows), 'layer')}, d_model {vectors.directions.shape[1]}")
    made = ", ".join(made_from(vectors.info))
    note = "Norm: length of the mean difference in residual units; share: of the layer's typical residual norm."
    parts = [title, html.note(made) if made else "", html.table(heads, rows, numbers=range(4), styles=styles)]
    return html.frame(*parts, html.note(note))


def steering_html(steering: Any, places: Sequence[int]) -> str:
    """The display of a ``Steering``: at each layer the length of its step, and what else it does.

    Args:
        steering: the value.
        places: the rows of its layers in its vectors.
    """
    vectors, taken_out = steering.vectors, steering.operator in UNITLESS
    units = vectors.resid_norms if steering.scale == "residual" else vectors.magnitudes
    rows = [
        [
            html.number(layer, "d"),
            html.DASH if taken_out else html.signed(steering.alpha * float(units[row])),
            html.number(float(vectors.resid_norms[row]), ".1f"),
        ]
        for layer, row in zip(steering.layers, places, strict=True)
    ]
    other = "weighted" if isinstance(steering.positions, Weighted) else "masked"
    scope = steering.positions if isinstance(steering.positions, str) else other
    about = [f"operator {steering.operator}", f"positions {scope}", f"alpha in units of the {UNITS[steering.scale]}"]
    about += [] if steering.gate is None else ["gated"]
    table = html.table(["layer", "step", "residual norm"], rows, numbers=range(3))
    return html.frame(html.title("Steering", steering.label), table, html.note(", ".join(about)))


def made_from(info: Mapping[str, Any]) -> list[str]:
    """Method, model and number of records, as far as they are known."""
    made = [str(info["method"])] if "method" in info else []
    made += [str(info["model"].get("name"))] if isinstance(info.get("model"), Mapping) else []
    return [*made, f"{info['n_records']} records"] if "n_records" in info else made


def _bar(share: float, top: float) -> str:
    """A bar behind the number, as long as the share is of the largest."""
    if not (share == share and top > 0):
        return ""
    length = f"{100 * share / top:.0f}%"
    return f"background:linear-gradient(to right,#4477aa55 {length},transparent {length});min-width:6em"


def _words(tokens: Sequence[str]) -> str:
    return " ".join(html.element("code", html.text(repr(token)[1:-1].strip(), 24)) for token in tokens)
