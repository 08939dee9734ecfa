"""From the paper's operator to one that other engines have: the addition of the same KL, and what is lost by it.

1. Measure the KL of the steering on neutral text.
2. Find the alpha at which ``operator="add"`` costs as much: the KL of a step grows about with its square, so each try is
   scaled by the root of what is missing, and kept between the last that was too small and the last that was too large.
3. Measure the margins of records under both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from grains_tl._util import html
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.costs import kl_per_token, text_costs
from grains_tl.evaluate.records import record_effects
from grains_tl.records.loading import COST_TEXTS, neutral_texts, preference_pairs
from grains_tl.records.pairs import PairLike
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering

#: How near the KL must come, as a share of it, and how often it is tried.
TOLERANCE, TRIES = 0.01, 12


@dataclass(frozen=True, eq=False, repr=False)
class AsAdd:
    """The result of ``as_add``.

    Attributes:
        steering: with ``operator="add"``, for ``gr.export`` and ``save``.
        table: rows ``as chosen``, ``same alpha`` (the addition without a fit) and ``same KL``: ``operator``, ``alpha``,
            ``kl`` (nats per token of neutral text), and with records ``effect``, ``low``, ``high`` (change of the margin,
            nats), ``n``, and ``lost``, ``lost_low``, ``lost_high`` (effect less that of the first row, record by record).
        verdict: the same in sentences.

    Examples:
        >>> found = as_add(model, vectors.steering(0.2, 21), pairs)            # doctest: +SKIP
        >>> gr.export.export_steered(found.steering, "steered.pt")             # doctest: +SKIP
    """

    steering: Steering
    table: pd.DataFrame
    verdict: str

    def __repr__(self) -> str:
        return f"AsAdd({self.steering.label})"

    def _repr_html_(self) -> str:
        first, *more = self.verdict.splitlines()
        rows = [
            [html.text(f"{x:.3g}" if isinstance(x, float) else x) for x in row]
            for row in self.table.to_numpy().tolist()
        ]
        return html.frame(html.title(first), html.table(list(self.table.columns), rows), *(html.note(x) for x in more))


def as_add(
    model: HookedModel,
    steering: Steering,
    pairs: Iterable[PairLike] | None = None,
    *,
    texts: Sequence[str] | None = None,
    level: float = 0.95,
) -> AsAdd:
    """The same steering by plain addition, at an alpha that costs the same KL, and what is lost.

    Other engines add a vector; the paper's ``"add_renorm"`` also gives each token its norm back. At equal alpha the addition
    turns the residual stream less and lengthens it, so its effect and its price differ.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: with operator ``"add_renorm"`` and an alpha other than 0.
        pairs: records to compare the effects on, best none that the vectors were built or chosen on; without them the KL
            alone is compared.
        texts: neutral texts on which the KL is measured; default the first bundled ones.
        level: of the intervals.

    Returns:
        ``AsAdd``: ``steering``, ``table``, ``verdict``.

    Raises:
        OptionError: another operator, a step that does nothing, a KL that no alpha reaches.
        ValueError: vectors of another model, bad records.

    Examples:
        >>> print(as_add(model, vectors.steering(0.2, 21), pairs).verdict)     # doctest: +SKIP
    """
    if not isinstance(steering, Steering) or steering.operator != "add_renorm" or steering.idle:
        raise OptionError(
            f"steering is {steering}; expected a Steering with operator 'add_renorm' and an alpha other than 0 "
            "(other operators have no addition that stands for them)"
        )
    records = None if pairs is None else preference_pairs(pairs)
    if records is not None and len(records) < 2:
        raise OptionError(f"{len(records)} records; expected at least 2 for an interval")
    neutral = neutral_texts(COST_TEXTS) if texts is None else list(texts)
    same_alpha = replace(steering, operator="add")
    spent, first = (float(x) for x in kl_per_token(text_costs(model, [steering, same_alpha], neutral), 2))
    fitted, kl = _fitted(model, same_alpha, first, spent, neutral)
    steps = {"as chosen": (steering, spent), "same alpha": (same_alpha, first), "same KL": (fitted, kl)}
    rows: list[dict[str, Any]] = [
        {"steering": name, "operator": one.operator, "alpha": one.alpha, "kl": cost}
        for name, (one, cost) in steps.items()
    ]
    if records is not None:
        frame = record_effects(model, records, [one for one, _ in steps.values()])
        changes = frame["change"].to_numpy().reshape(len(steps), -1)
        for row, change in zip(rows, changes, strict=True):
            effect, _, low, high = mean_interval(change, level)
            lost, _, lost_low, lost_high = mean_interval(change - changes[0], level)
            row.update(
                effect=effect, low=low, high=high, n=len(change), lost=lost, lost_low=lost_low, lost_high=lost_high
            )
    table = pd.DataFrame(rows)
    return AsAdd(fitted, table, "\n".join(_sentences(rows)))


def _fitted(
    model: HookedModel, start: Steering, kl: float, target: float, texts: Sequence[str]
) -> tuple[Steering, float]:
    """The steering whose KL is the target's to ``TOLERANCE``, and that KL."""
    one, below, above = start, 0.0, math.inf
    for _ in range(TRIES):
        if abs(kl - target) <= TOLERANCE * target:
            return one, kl
        size = abs(float(one.alpha))
        below, above = (max(below, size), above) if kl < target else (below, min(above, size))
        guess = size * float(np.clip(math.sqrt(target / max(kl, 1e-12)), 0.2, 5.0))
        if not below < guess < above:
            guess = (below + above) / 2 if math.isfinite(above) else 2 * size
        one = replace(one, alpha=math.copysign(guess, float(one.alpha)))
        kl = float(kl_per_token(text_costs(model, [one], texts), 1)[0])
    raise OptionError(
        f"no alpha of operator 'add' was found with the steering's KL of {target:.3g} nats per token (last: alpha "
        f"{one.alpha:.3g}, KL {kl:.3g}); choose a smaller step"
    )


def _sentences(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    chosen, same_alpha, fitted = rows
    yield (
        f"Adding with alpha {fitted['alpha']:+.3g} costs as much as add_renorm with {chosen['alpha']:+.3g}: "
        f"{fitted['kl']:.4f} and {chosen['kl']:.4f} nats per token of neutral text (with the same alpha it would be "
        f"{same_alpha['kl']:.4f})."
    )
    if "effect" not in chosen:
        yield "Without records nothing is known of its effect: give pairs."
        return
    yield (
        f"On {chosen['n']} records the margin moves by {fitted['effect']:+.2f} nats ({fitted['low']:+.2f} to "
        f"{fitted['high']:+.2f}), with add_renorm by {chosen['effect']:+.2f} ({chosen['low']:+.2f} to "
        f"{chosen['high']:+.2f})."
    )
    sure = fitted["lost_low"] > 0 or fitted["lost_high"] < 0
    change = f"{fitted['lost']:+.2f} nats ({fitted['lost_low']:+.2f} to {fitted['lost_high']:+.2f})"
    yield f"Record by record the difference is {change}{'.' if sure else ', which may be chance.'}"
