"""Is it the behaviour that a vector moves, or the words it was built from? Four measurements at equal KL, and a verdict.

1. The effect on the test records' own responses.
2. The effect on other wordings of the same responses.
3. The effect on the own responses of the vector without the response words' directions in the unembedding.
4. What the model writes, judged by a rule, with the step of 1 and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.costs import text_costs
from grains_tl.evaluate.equal_cost import effect_at_kl
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import grid
from grains_tl.finding.text_rules import praise
from grains_tl.hooks.operators import Operator
from grains_tl.hooks.steer import Positions
from grains_tl.inference.generation import generate
from grains_tl.records.loading import COST_TEXTS, neutral_texts, preference_pairs
from grains_tl.records.pairs import PairLike
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.words import without_words

#: What the verdict says.
BEHAVIOUR, PARTLY, WORDING, UNCLEAR, NOTHING = (
    "behaviour",
    "partly wording",
    "wording",
    "unclear",
    "does not steer",
)

#: The share of its effect that a vector must keep on other wordings to count as moving the behaviour.
KEPT = 0.5


@dataclass(frozen=True)
class WordingTest:
    """How wordings are compared.

    Attributes:
        kl: the budget, nats per token of neutral text.
        alphas: steps between which the one that spends the budget is interpolated.
        operator: how the step is applied.
        positions: where.
        texts: neutral texts for the KL; ``None``: the bundled ones that no recipe builds with.
        judge: a rule from text to a number, such as ``praise`` (default) or ``refuses``.
        n_prompts: test prompts that are continued; 0 for none.
        max_new_tokens: of a continuation.

    Raises:
        OptionError: a budget or alphas that are not positive.

    Examples:
        >>> WordingTest(kl=0.2).alphas
        (0.05, 0.1, 0.2, 0.4)
    """

    kl: float | int = 0.05
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    operator: Operator = "add_renorm"
    positions: Positions = "all"
    texts: tuple[str, ...] | None = None
    judge: Callable[[str], float] | None = None
    n_prompts: int = 8
    max_new_tokens: int = 30

    def __post_init__(self) -> None:
        if not finite("kl", self.kl) > 0 or not all(finite("alpha", a) > 0 for a in listed("alphas", self.alphas)):
            raise OptionError(f"kl={self.kl}, alphas={self.alphas}; expected a budget and steps above 0")
        whole("n_prompts", self.n_prompts, 0)
        whole("max_new_tokens", self.max_new_tokens, 1)


def wording_table(
    model: HookedModel,
    vectors: Mapping[str, SteeringVectors],
    own: Sequence[PairLike],
    other: Sequence[PairLike],
    *,
    layer: int,
    words_of: Sequence[PairLike] | None = None,
    test: WordingTest | None = None,
) -> pd.DataFrame:
    """What each vector does to own words, to other words, and without its words; at equal KL.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: by name.
        own: test records, worded like the building records.
        other: the same prompts in the same order, with both responses in other words
            (``load_bundled(name, "test", wording="other")``).
        layer: where.
        words_of: whose responses' words are taken out of the vectors; default ``own``, better the building records.
        test: budget, steps and the rest.

    Returns:
        One row per vector: ``vector``, ``layer``, ``kl``, ``alpha``, then ``own``, ``other``, ``without_words`` (effects in
        nats; each with ``_low`` and ``_high``, intervals over test records and neutral texts, not over building records),
        ``kept`` (``other`` over ``own``), ``generated`` (how far the rule's mean moves; ``generated_low`` and ``_high`` over
        prompts), ``verdict``: ``"behaviour"`` (the other wordings move, by at least half as much), ``"partly wording"``
        (they move, by less), ``"wording"`` (they do not, or by less than half at the interval's upper end), ``"unclear"``,
        ``"does not steer"`` (own words do not move).

    Raises:
        ValueError: records that do not belong together, no vectors, a layer that is not stored.

    Examples:
        >>> own, other = (gr.load_bundled("sentiment", "test", wording=w)[:16] for w in ("own", "other"))   # doctest: +SKIP
        >>> wording_table(model, {"caa": caa, "ours": v}, own, other, layer=18)["verdict"]                 # doctest: +SKIP
    """
    test = WordingTest() if test is None else test
    first, second = preference_pairs(own), preference_pairs(other)
    _require_same_prompts(first, second)
    named = {name: v.at([layer]) for name, v in vectors.items()}
    bare = {
        f"{name}, without words": without_words(model, v, first if words_of is None else words_of)
        for name, v in named.items()
    }
    settings = grid({**named, **bare}, [layer], list(test.alphas), operator=test.operator, positions=test.positions)
    texts = neutral_texts(COST_TEXTS) if test.texts is None else list(test.texts)
    costs = text_costs(model, settings, texts)
    tables = [
        effect_at_kl(record_effects(model, records, settings), costs, test.kl).set_index("vector")
        for records in (first, second)
    ]
    rows = []
    for name, v in named.items():
        row = {"vector": name, "layer": layer, "kl": float(test.kl), "alpha": tables[0].loc[name, "alpha"]}
        parts = (
            ("own", tables[0], name),
            ("other", tables[1], name),
            ("without_words", tables[0], f"{name}, without words"),
        )
        for column, table, key in parts:
            row |= {column: table.loc[key, "effect"]}
            row |= {f"{column}_{end}": table.loc[key, end] for end in ("low", "high")}
        row["kept"] = row["other"] / row["own"] if row["own"] > 0 else np.nan
        row |= _generated(model, v, layer, float(row["alpha"]), [p.prompt for p in first], test)
        rows.append({**row, "verdict": verdict_of(row)})
    return pd.DataFrame(rows)


def verdict_of(row: Mapping[str, Any]) -> str:
    """The word for one row of ``wording_table``.

    Examples:
        >>> verdict_of({"own": 3.0, "own_low": 2.5, "other": 2.5, "other_low": 2.0, "other_high": 3.0})
        'behaviour'
        >>> verdict_of({"own": 3.0, "own_low": 2.5, "other": 0.1, "other_low": -0.2, "other_high": 0.4})
        'wording'
    """
    if not row["own_low"] > 0:
        return NOTHING
    if row["other_low"] > 0:
        return BEHAVIOUR if row["other"] >= KEPT * row["own"] else PARTLY
    return WORDING if row["other_high"] < KEPT * row["own"] else UNCLEAR


def _require_same_prompts(own: Sequence[Any], other: Sequence[Any]) -> None:
    if not own or len(own) != len(other):
        raise ValueError(f"{len(own)} records and {len(other)} other wordings; expected one of the other kind for each")
    for number, (a, b) in enumerate(zip(own, other, strict=True), start=1):
        if a.prompt != b.prompt:
            raise ValueError(f"record {number}: the other wording has another prompt; give both in the same order")
        if {a.chosen, a.rejected} & {b.chosen, b.rejected}:
            raise ValueError(f"record {number}: the other wording repeats a response word for word")


def _generated(
    model: HookedModel, vectors: SteeringVectors, layer: int, alpha: float, prompts: Sequence[Any], test: WordingTest
) -> dict[str, float]:
    columns = ("generated", "generated_low", "generated_high")
    if not test.n_prompts or not np.isfinite(alpha):
        return dict.fromkeys(columns, np.nan)
    judge = praise if test.judge is None else test.judge
    asked = list(dict.fromkeys(prompts))[: test.n_prompts] if isinstance(prompts[0], str) else prompts[: test.n_prompts]
    steering = vectors.steering(alpha, layer, operator=test.operator, positions=test.positions)
    base, steered = (
        np.array([judge(text) for text in generate(model, list(asked), hooks, max_new_tokens=test.max_new_tokens)])
        for hooks in (None, steering)
    )
    mean, _, low, high = mean_interval(steered - base)
    return dict(zip(columns, (mean, low, high), strict=True))
