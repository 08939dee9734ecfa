"""Tables of effects in a notebook."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains_tl._util import html

#: Grids of more vectors and scopes than this are left to the folded table.
MAX_GRIDS = 8


class EffectTable(pd.DataFrame):
    """A table of ``summarize`` or ``sweep``: an ordinary DataFrame that a notebook shows as layers x alphas.

    Whatever is made from it (a selection, a sorted copy) is a plain DataFrame again.

    Examples:
        >>> table = EffectTable({"vector": ["v"], "positions": ["all"], "layer": [3], "alpha": [0.2], "effect": [1.5]})
        >>> type(table[table.layer == 3]).__name__
        'DataFrame'
    """

    def _repr_html_(self) -> str | None:
        plain = pd.DataFrame(self)
        rest = plain._repr_html_()
        if not _is_grid(plain):
            return rest
        groups = list(plain.groupby(["vector", "positions"], sort=False))
        n = int(plain["n"].max()) if "n" in plain else None
        about = f"{html.count(len(plain), 'cell')}" + ("" if n is None else f", {html.count(n, 'record')}")
        parts = [html.title("effect on the margin, nats", about)]
        if len(groups) <= MAX_GRIDS:
            parts += [_grid(str(vector), str(scope), rows) for (vector, scope), rows in groups]
            parts.append(html.note("Bold: the interval excludes 0. Point at a cell for its interval and cost."))
        return html.frame(*parts, html.fold("all columns", rest or ""))


def _is_grid(table: pd.DataFrame) -> bool:
    key = ["vector", "positions", "layer", "alpha"]
    return bool(len(table)) and {*key, "effect"} <= set(table) and not table.duplicated(key).any()


def _grid(vector: str, scope: str, rows: pd.DataFrame) -> str:
    """Layers down, alphas across."""
    layers, alphas = sorted(set(rows["layer"])), sorted(set(rows["alpha"]))
    cells = {(row["layer"], row["alpha"]): row for row in rows.to_dict("records")}
    top = float(rows["effect"].abs().max())
    lines, styles = [], []
    for layer in layers:
        found = [cells.get((layer, alpha)) for alpha in alphas]
        lines.append([html.number(layer, "d"), *("" if row is None else _cell(row) for row in found)])
        styles.append(["", *("" if row is None else html.tint(row["effect"], top) for row in found)])
    heads = ["layer", *(f"alpha {html.number(alpha, '+g')}" for alpha in alphas)]
    name = html.title(vector, "" if scope == "all" else f"positions: {scope}")
    return name + html.table(heads, lines, numbers=range(len(heads)), styles=styles)


def _cell(row: dict[str, Any]) -> str:
    about = []
    if "low" in row:
        about.append(f"{html.signed(row['low'])} to {html.signed(row['high'])}")
    if row.get("verdict"):
        about.append(str(row["verdict"]))
    if "kl" in row:
        about.append(f"KL {html.number(row['kl'], '.3f')} nats per token")
    sure = row.get("verdict") in ("steers", "wrong way")
    return html.element("span", html.signed(row["effect"]), "font-weight:bold" if sure else "", title=", ".join(about))
