"""Steering vectors in a notebook: a row per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grains_tl._util import html
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors, made_from


def vectors_html(
    vectors: SteeringVectors, tokens: Mapping[int, tuple[Sequence[str], Sequence[str]]] | None = None
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


def steering_html(steering: Steering) -> str:
    """The display of a step along steering vectors: how long it is at each layer."""
    vectors = steering.vectors
    rows = []
    for layer in steering.layers:
        row = list(vectors.layers).index(layer)
        residual, length = float(vectors.resid_norms[row]), float(vectors.magnitudes[row])
        step = steering.alpha * (residual if steering.scale == "residual" else length)
        removed = steering.operator == "ablate"
        rows.append(
            [html.number(layer, "d"), html.DASH if removed else html.signed(step), html.number(residual, ".1f")]
        )
    scope = steering.positions if isinstance(steering.positions, str) else "masked"
    about = [f"operator {steering.operator}", f"positions {scope}", f"alpha in units of the {_UNITS[steering.scale]}"]
    about += [] if steering.gate is None else ["gated"]
    title = html.title("Steering", steering.label)
    return html.frame(
        title, html.table(["layer", "step", "residual norm"], rows, numbers=range(3)), html.note(", ".join(about))
    )


_UNITS = {"residual": "layer's typical residual norm", "raw": "vector's own length"}


def _bar(share: float, top: float) -> str:
    """A bar behind the number, as long as the share is of the largest."""
    if not (share == share and top > 0):
        return ""
    length = f"{100 * share / top:.0f}%"
    return f"background:linear-gradient(to right,#4477aa55 {length},transparent {length});min-width:6em"


def _words(tokens: Sequence[str]) -> str:
    return " ".join(html.element("code", html.text(repr(token)[1:-1].strip(), 24)) for token in tokens)
