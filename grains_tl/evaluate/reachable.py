"""What share of the possible a vector reaches: its effect over the best known at its layer, at one KL. No model here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from grains_tl.vectors.steering_vectors import SteeringVectors

#: The KL at which manifests of ``kl_optimal`` state what is possible; it grows with the root of the KL.
STATED_KL = 0.05

#: Where a manifest says it, by the column of ``with_share`` that uses it.
STATED = {"share": "predicted_effect_kl_0.05", "share_low": "linear_ceiling_kl_0.05"}


def with_share(table: pd.DataFrame, vectors: Iterable[SteeringVectors] = ()) -> pd.DataFrame:
    """Add the columns ``share`` and ``share_low`` to a table of effects.

    Effects are compared per root of the KL. The best that is known at a layer and scope is the largest of

    - the effects in the table, a trained vector's among them: what has been reached, so a lower bound of the possible. A
      share of it alone says how far a vector is behind the best measured one, and no more;
    - what ``kl_optimal`` states about the layer, if such vectors are given. For ``share``: its prediction for held-out texts
      and records, an estimate that errs on the low side, since the direction it is made for is itself estimated. For
      ``share_low``: the first-order ceiling sqrt(2 KL g'F^-1 g) with F and g as estimated, which errs on the high side,
      since their noise looks like something to gain. The truth, to first order, lies between them as far as the building
      records are like the test records. Neither is a bound for steps of finite size.

    Args:
        table: columns ``layer``, ``effect`` and ``kl`` of each row, and ``positions`` and ``control`` where there are any.
        vectors: among them those of ``kl_optimal``; the others are left aside, and those of another scope too.

    Raises:
        ValueError: vectors that are only some layers of those that a manifest is about.

    Returns:
        The table with both columns last; NaN for controls, and where nothing but the row itself is known.

    Examples:
        >>> table = pd.DataFrame({"layer": [3, 3], "effect": [2.0, 1.0], "kl": [0.05, 0.05]})
        >>> with_share(table)["share"].tolist()
        [1.0, 0.5]
    """
    stated = list(_stated(vectors))
    rows = table.to_dict("records")
    columns: dict[str, list[float]] = {name: [] for name in STATED}
    for row in rows:
        measured = [_rate(other) for other in rows if _place(other) == _place(row) and not other.get("control", False)]
        measured = [rate for rate in measured if np.isfinite(rate)]
        for name in STATED:
            # a ceiling that lies below the held-out prediction is none
            used = ("share",) if name == "share" else tuple(STATED)
            known = [rate for column, place, rate in stated if column in used and place == _place(row)]
            alone = row.get("control", False) or (not known and len(measured) < 2)
            best = max([*measured, *known], default=0.0)
            columns[name].append(_rate(row) / best if best > 0 and not alone else np.nan)
    return table.assign(**columns)


def _place(row: dict[Any, Any]) -> tuple[int, str]:
    return int(row["layer"]), str(row.get("positions", "all"))


def _rate(row: dict[Any, Any]) -> float:
    """Nats per root of the KL."""
    return float(row["effect"]) / row["kl"] ** 0.5 if row["kl"] > 0 else np.nan


def _stated(vectors: Iterable[SteeringVectors]) -> Iterator[tuple[str, tuple[int, str], float]]:
    """Column, layer and scope, and nats per root of the KL, of what manifests state."""
    for one in vectors:
        for column, key in STATED.items():
            values = one.info.get(key)
            values = values.get("chosen") if isinstance(values, dict) else values
            if not values:
                continue
            if len(values) != len(one.layers):
                raise ValueError(
                    f"the manifest states {key} for {len(values)} layers, these vectors have {len(one.layers)}; give the "
                    "kl_optimal vectors as they were built, with all their layers"
                )
            for layer, value in zip(one.layers, values, strict=True):
                if value is not None and np.isfinite(value):
                    yield column, (layer, str(one.info.get("scope", "all"))), float(value) / STATED_KL**0.5
