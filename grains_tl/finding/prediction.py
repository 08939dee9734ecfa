"""Will it steer? An effect predicted from the building records alone, with an interval from many sets that were measured.

1. Halve the building records at random and build a vector from each half.
2. Take the other half's margin gradients along it: what the vector does to records it has not seen, to first order.
3. Multiply by the step that costs the KL: the first-order effect, in nats.
4. Look up what such effects came to on the calibration sets (``studies/will_it_steer.py``): a factor and an interval.

That agreement of the records predicts steering is the finding of arXiv 2505.22637 and 2602.17881, for the cosines of
activation differences; along the gradient the agreement has the unit of the effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import tails
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.finding.agreement import agreement_table, halves, record_gradients, require_enough
from grains_tl.models.running import require_layers
from grains_tl.models.state import require_ready
from grains_tl.records.loading import neutral_texts
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords, record_file
from grains_tl.vectors.gradients import mean_cosine
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of
from grains_tl.vectors.steering_vectors import SteeringVectors

#: How much of the calibration sets lies in the interval.
LEVEL = 0.8

#: Nats that every interval has at least in its unit: about the standard error of a measured effect.
FLOOR = 0.25


@dataclass(frozen=True)
class Calibration:
    """What first-order effects came to on sets that were measured.

    Attributes:
        factor: effect over first-order effect.
        low: lower end of the interval, in units of the first-order effect's size and the floor.
        high: upper end.
        n: cells (set, recipe, layer) behind it.
    """

    factor: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, table: pd.DataFrame, level: float = LEVEL) -> Calibration:
        """From a table with ``linear``, ``effect`` and ``family``.

        Least squares through the origin. The interval is that of the residuals of each family of sets from the factor of all
        the others: new records are another family.
        """
        linear, effect = (table[name].to_numpy(float) for name in ("linear", "effect"))
        unit = FLOOR + np.abs(linear)

        def factor(rows: NDArray[np.bool_]) -> float:
            return float((linear[rows] * effect[rows]).sum() / (linear[rows] ** 2).sum())

        families = table["family"].to_numpy()
        residuals = np.zeros(len(table))
        for family in set(families) if len(set(families)) > 1 else ():
            own = families == family
            residuals[own] = (effect[own] - factor(~own) * linear[own]) / unit[own]
        low, high = np.quantile(residuals, tails(level))
        return cls(factor(np.ones(len(table), dtype=bool)), float(low), float(high), len(table))

    def predict(
        self, linear: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """``(effect, low, high)``, nats."""
        middle, unit = self.factor * linear, FLOOR + np.abs(linear)
        return middle, middle + self.low * unit, middle + self.high * unit


@lru_cache(maxsize=1)
def calibration_table() -> pd.DataFrame:
    """The measured sets that the package ships, a row per set, recipe and layer, with ``linear`` and ``effect``."""
    text = (resources.files("grains_tl") / "data_files" / "steerability.json").read_text(encoding="utf-8")
    content = json.loads(text)
    return pd.DataFrame(content["rows"], columns=content["columns"])


def predict_effect(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    layers: Sequence[int],
    recipe: Recipe | str | RecipeFunction = "caa",
    kl: float = 0.05,
    n_splits: int = 4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """What a vector from these records will do to others, predicted before anything is steered on any record.

    The building records' gradients are run (one pass forward and back each serves all layers), vectors are built from their
    halves, and the KL of the vector is measured on five neutral texts.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records, at least four.
        layers: at which to predict.
        recipe: a name in ``gr.vectors.RECIPES``, a recipe as a value, or a function.
        kl: what steering may cost, nats per token of neutral text.
        n_splits: random halvings; each builds two vectors.
        seed: of the halvings.
        checkpoint: a ``.jsonl`` file for the records' attributions and gradients.

    Returns:
        One row per layer: ``layer``; ``predicted`` (mean change of the margin of new records of the same kind, nats),
        ``low``, ``high`` (80 % of the cells of the calibration sets lie in such an interval); what it comes from: ``linear``
        (first-order effect, nats), ``slope`` (nats per residual unit), ``split_half`` (cosine of the vectors of two halves),
        ``mean_cosine`` (of two records' gradients), ``agree`` (share of left-out records whose margin rises), ``separation``
        (mean over standard deviation of their gradients along the vector); ``alpha``, ``kl``, ``n``. The calibration sets
        were measured on SmolLM2-135M-Instruct at a KL of 0.05; on other models the interval is a guess.

    Raises:
        ValueError: before anything runs: fewer than four records, layers the model lacks, unknown options.

    Examples:
        >>> predict_effect(model, pairs, layers=[12, 18], recipe="caa")         # doctest: +SKIP
    """
    if not finite("kl", kl) > 0:
        raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
    wanted = tuple(require_layers(model, layers))
    chosen = recipe_of(recipe)
    with record_file(checkpoint) as file:
        records = BuildingRecords(model, tokenize_pairs(model, pairs), wanted, file)
        require_enough(records)
        chosen.check(records)
        require_ready(model)
        vectors = chosen.build(records)
        table = agreement_table(records, chosen, n_splits=n_splits, seed=seed)
    begin = [vectors.at([layer]).steering(0.1, layer) for layer in vectors.layers]
    steps, spent = at_kl(model, begin, kl, neutral_texts(5))
    sizes = [step.alpha * float(norm) for step, norm in zip(steps, vectors.resid_norms, strict=True)]
    return with_prediction(table.assign(linear=table["slope"] * sizes, alpha=[s.alpha for s in steps], kl=spent))


def promise(records: BuildingRecords, layer: int, kl: float, texts: Sequence[str]) -> str:
    """One sentence: what the building records alone predict at a layer, for the vector along their mean gradient.

    That vector costs no building. Empty where the model gives no gradients or the records are too few.
    """
    row = records.layers.index(layer)
    try:
        gradients = record_gradients(records)[:, [row]]
        found = halves(records, gradients, None)
    except ValueError:
        return ""
    norms = records.resid_norms[[row]]
    vectors = SteeringVectors.from_raw(gradients.mean(0).float(), [layer], norms, {"method": "margin_gradient"})
    (step,), _ = at_kl(records.model, [vectors.steering(0.1, layer)], kl, texts)
    linear = np.array([float(found.slope[0]) * step.alpha * float(norms[0])])
    ((middle,), (low,), (high,)) = calibration().predict(linear)
    cosine = float(mean_cosine(gradients)[0])
    return (
        f"Predicted from the {len(gradients)} building records alone: {middle:+.2f} nats at layer {layer} and this KL "
        f"({LEVEL:.0%} interval {low:+.2f} to {high:+.2f}), for a vector along their mean gradient; the gradients of two "
        f"records have a mean cosine of {cosine:.2f}."
    )


@lru_cache(maxsize=1)
def calibration() -> Calibration:
    """Of all sets that ship."""
    return Calibration.of(calibration_table())


def with_prediction(table: pd.DataFrame) -> pd.DataFrame:
    """A table of agreement with the columns ``predicted``, ``low`` and ``high`` from its ``linear``."""
    predicted, low, high = calibration().predict(table["linear"].to_numpy(float))
    columns = [
        "layer",
        "predicted",
        "low",
        "high",
        "linear",
        "slope",
        "split_half",
        "mean_cosine",
        "agree",
        "separation",
    ]
    return table.assign(predicted=predicted, low=low, high=high)[[*columns, "alpha", "kl", "n"]]
