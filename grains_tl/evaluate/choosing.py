"""Choose a cell of a sweep on one split and report it on another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from typing_extensions import Unpack

from grains_tl._util import html
from grains_tl._util.errors import OptionError
from grains_tl._util.settings import RunOptions, with_settings
from grains_tl._util.warn import warn_caller
from grains_tl.evaluate.costs import text_costs
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Vectors, grid
from grains_tl.evaluate.summary import summarize
from grains_tl.hooks.operators import Operator
from grains_tl.hooks.steer import Positions
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.objectives import Objective
from grains_tl.records.loading import neutral_texts
from grains_tl.records.splits import Record, record_id
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True, repr=False)
class Choice:
    """A cell of a sweep, and the records it was chosen on.

    Attributes:
        vector: name of the chosen vector.
        layer: its layer.
        alpha: its step size.
        positions: where it steers.
        operator: how the step is applied.
        objective: how response tokens were combined.
        why: how it was chosen, in a sentence.
        records: hashes of the records used for choosing; ``report_choice`` refuses them.

    Examples:
        >>> picked = choose(frame, max_kl=0.1)                             # doctest: +SKIP
        >>> generate(model, "The film was", picked.steering(vectors))      # doctest: +SKIP
    """

    vector: str
    layer: int
    alpha: float
    positions: Positions
    operator: Operator
    objective: Objective
    why: str
    records: frozenset[str]

    def __repr__(self) -> str:
        return f"Choice({self})"

    def _repr_html_(self) -> str:
        cells = {
            "layer": html.number(self.layer, "d"),
            "alpha": html.number(self.alpha, "+g"),
            "positions": html.text(self.positions),
            "operator": html.text(self.operator),
            "objective": html.text(self.objective),
            "chosen on": html.count(len(self.records), "record"),
        }
        table = html.table(list(cells), [list(cells.values())])
        return html.frame(html.title("Choice", self.vector), table, html.note(self.why))

    def __str__(self) -> str:
        return f"{self.vector}, layer {self.layer}, alpha {self.alpha:+g}, positions {self.positions}: {self.why}"

    def steering(self, vectors: Vectors) -> Steering:
        """The chosen cell as steering, with its operator and positions.

        Args:
            vectors: what was swept: one, or several by name.

        Returns:
            ``Steering``, for whatever takes ``fwd_hooks``.

        Raises:
            ValueError: the chosen vector or layer is not among them.
        """
        chosen = _named(vectors, self.vector)
        return chosen.steering(self.alpha, self.layer, operator=self.operator, positions=self.positions)


def _named(vectors: Vectors, name: str) -> SteeringVectors:
    if isinstance(vectors, SteeringVectors):
        return vectors
    if name not in vectors:
        raise ValueError(f"no vector {name!r}, which was chosen; there are {sorted(vectors)}")
    return vectors[name]


def choose(
    frame: pd.DataFrame,
    *,
    max_kl: float | None = None,
    budget: Literal["neutral", "generated"] | None = None,
    vector: str | None = None,
    records: Iterable[Record] | None = None,
    operator: Operator | None = None,
    objective: Objective | None = None,
) -> Choice:
    """The cell with the largest effect that does not cost too much.

    The effect is the ``change`` of the margin, at alpha minus at 0, whatever other alphas were swept. Where the chosen
    cell's interval contains 0 there is a warning, and the choice's ``why`` says so.

    Cells with negative alpha are not chosen: a vector that only works backwards is found out, not turned round.

    Args:
        frame: from ``sweep``, with ``neutral`` texts if there is a budget.
        max_kl: budget, nats per token of KL(steered || base) on the neutral texts, or along generated ones where the sweep
            measured that (``neutral=inference.Continuations(...)``); ``None`` for none.
        budget: say which of the two ``max_kl`` is meant for, and a frame with the other is refused; ``None`` takes either.
        vector: choose among the cells of this one only.
        records: what the sweep was measured on; needed only where the frame has lost its ``attrs`` (read from a csv).
        operator: of the sweep, for a frame without this column; default ``"add_renorm"``.
        objective: of the sweep, for a frame without this column; default ``"sum"``.

    Returns:
        ``Choice``: the setting, and the records that it was chosen on.

    Raises:
        ValueError: no cell fits, no costs to compare with the budget, cells of different objectives, or a frame that does
            not say on which records it was measured.

    Warns:
        UserWarning: the interval of the chosen cell contains 0.

    Examples:
        >>> frame = pd.DataFrame({"vector": "v", "positions": "all", "layer": [3, 4, 5], "alpha": 0.2, "n": 8,
        ...                       "effect": [1.0, 2.0, 3.0], "effect_se": 0.1, "kl": [0.01, 0.02, 0.5]})
        >>> frame.attrs["records"] = ["a", "b"]
        >>> choose(frame, max_kl=0.1).layer
        4
    """
    _require_budget(frame, budget)
    used = frame.attrs.get("records") if records is None else [record_id(r) for r in records]
    if not used:
        raise ValueError(
            "the frame does not say which records it was measured on; pass them: choose(frame, records=pairs)"
        )
    cells = frame[frame["alpha"] > 0]
    if vector is not None:
        cells = cells[cells["vector"] == vector]
    cells = cells[np.isfinite(cells["effect"])]
    if "objective" in cells and cells["objective"].nunique() > 1:
        raise ValueError(
            f"cells of the objectives {sorted(set(cells['objective']))}: nats of the one are not those of the other; choose "
            "among one: choose(frame[frame.objective == 'sum'])"
        )
    if cells.empty:
        raise ValueError(
            f"no cell with a positive alpha{f' of vector {vector!r}' if vector else ''}; there are vectors "
            f"{sorted(set(frame['vector']))} and alphas {sorted(set(frame['alpha']))}"
        )
    n_cells = len(cells)
    if max_kl is not None:
        if "kl" not in cells:
            raise ValueError("max_kl needs the cost; measure it with sweep(..., neutral=10)")
        lowest = cells["kl"].min()
        cells = cells[cells["kl"] <= max_kl]
        if cells.empty:
            raise ValueError(
                f"no cell costs {max_kl} nats per token or less, the cheapest {lowest:.4g}; add smaller alphas"
            )
    best = cells.iloc[int(cells["effect"].to_numpy().argmax())]  # an index may repeat in joined tables
    why = f"largest effect ({best['effect']:+.3f} +- {best['effect_se']:.3f} nats, {int(best['n'])} records)"
    if max_kl is None:
        why += f" of {n_cells} cells, whatever they cost"
    else:
        why += f" of the {len(cells)} of {n_cells} cells within {max_kl:g} nats per token (this one {best['kl']:.3g})"
        why += f", {best['budget']}" if "budget" in cells else ""
    if best["effect"] <= 0:
        why += "; no cell moves the margin up: expect no effect, or the wrong way"
    elif best.get("low", 1.0) <= 0 <= best.get("high", 1.0):
        unsure = f"its interval, {best['low']:+.3f} to {best['high']:+.3f} nats, contains 0"
        why += f"; {unsure}: not told apart from no effect"
        warn_caller(f"the chosen cell may do nothing: {unsure}; measure more records, or larger alphas")
    return Choice(
        vector=str(best["vector"]),
        layer=int(best["layer"]),
        alpha=float(best["alpha"]),
        positions=best["positions"],
        operator=best.get("operator") or operator or "add_renorm",
        objective=best.get("objective") or objective or "sum",
        why=why,
        records=frozenset(used),
    )


def _require_budget(frame: pd.DataFrame, budget: str | None) -> None:
    """Refuse costs of another kind than the budget is meant for (ValueError)."""
    if budget not in ("neutral", "generated", None):
        raise OptionError(f"budget={budget!r}; expected 'neutral', 'generated' or None")
    kind = "generated" if "budget" in frame else "neutral"
    if budget is not None and budget != kind:
        wanted = "Continuations(prompts)" if budget == "generated" else "10"
        raise OptionError(f"budget={budget!r}, but the KL of this frame is {kind}; measure it with neutral={wanted}")


@with_settings
def report_choice(
    model: HookedModel,
    vectors: Vectors,
    choice: Choice,
    test_pairs: Iterable[Record],
    *,
    draws: Sequence[SteeringVectors] = (),
    neutral: Sequence[str] | int | Continuations | None = None,
    level: float = 0.95,
    **run: Unpack[RunOptions],
) -> pd.DataFrame:
    """The chosen cell on records that had no part in choosing it.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: what was swept.
        choice: from ``choose``.
        test_pairs: other records.
        draws: the vector built from resampled records (``bootstrap_vectors``): adds the uncertainty over building.
        neutral: texts to measure the cost on, or how many of the bundled ones, or ``inference.Continuations``.
        level: of the intervals.
        run: ``max_tokens`` (token budget of one pass) and ``progress`` (show bars), as in ``settings``.

    Returns:
        One row, the columns of ``summarize`` (nats); its ``verdict`` is ``"steers"``, ``"no effect"`` or ``"wrong way"``.
        Since the cell was chosen elsewhere, a vector that does nothing is called "no effect" in 95 % of cases, however many
        cells were tried.

    Raises:
        ValueError: a record that was used for choosing (swapping its responses does not make it another one).

    Examples:
        >>> choice = choose(sweep(model, vectors, choosing, neutral=10), max_kl=0.1)   # doctest: +SKIP
        >>> report_choice(model, vectors, choice, testing).T                                  # doctest: +SKIP
    """
    records = list(test_pairs)
    seen = [i for i, r in enumerate(records, start=1) if record_id(r) in choice.records]
    if seen:
        raise ValueError(
            f"{len(seen)} of {len(records)} records were used for choosing (the first is record {seen[0]}); their effect "
            "is biased upwards, report on others"
        )
    chosen = _named(vectors, choice.vector)
    chosen.require_match(model)
    settings = grid(
        {choice.vector: chosen},
        [choice.layer],
        [choice.alpha],
        operator=choice.operator,
        positions=choice.positions,
        draws={choice.vector: draws},
    )
    found = record_effects(model, records, settings, objective=choice.objective)
    texts = neutral_texts(neutral) if isinstance(neutral, int) else neutral
    costs = None if texts is None else text_costs(model, settings[:1], texts)
    return summarize(found, costs, level=level)
