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
from grains_tl.finding.agreement import agreement_table
from grains_tl.models.running import require_layers
from grains_tl.records.loading import neutral_texts
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of

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
    def of(cls, linear: NDArray[np.float64], effect: NDArray[np.float64], level: float = LEVEL) -> Calibration:
        """Least squares through the origin, weighted so that large effects do not decide alone, and its residuals."""
        unit = FLOOR + np.abs(linear)
        factor = float((linear * effect / unit**2).sum() / (linear**2 / unit**2).sum())
        low, high = np.quantile((effect - factor * linear) / unit, tails(level))
        return cls(factor, float(low), float(high), len(linear))

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
        were measured on the models in ``docs/how-to/inside.md``; on others the interval is a guess.

    Raises:
        ValueError: before anything runs: fewer than four records, layers the model lacks, unknown options.

    Examples:
        >>> predict_effect(model, pairs, layers=[12, 18], recipe="caa")         # doctest: +SKIP
    """
    if not finite("kl", kl) > 0:
        raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
    wanted = tuple(require_layers(model, layers))
    chosen = recipe_of(recipe)
    file = None if checkpoint is None else Path(checkpoint)
    records = BuildingRecords(model, tokenize_pairs(model, pairs), wanted, file)
    chosen.check(records)
    table = agreement_table(records, chosen, n_splits=n_splits, seed=seed)
    vectors = chosen.build(records)
    begin = [vectors.at([layer]).steering(0.1, layer) for layer in vectors.layers]
    steps, spent = at_kl(model, begin, kl, neutral_texts(5))
    sizes = [step.alpha * float(norm) for step, norm in zip(steps, vectors.resid_norms, strict=True)]
    return with_prediction(table.assign(linear=table["slope"] * sizes, alpha=[s.alpha for s in steps], kl=spent))


def with_prediction(table: pd.DataFrame) -> pd.DataFrame:
    """A table of agreement with the columns ``predicted``, ``low`` and ``high`` from its ``linear``."""
    known = calibration_table()
    calibration = Calibration.of(known["linear"].to_numpy(float), known["effect"].to_numpy(float))
    predicted, low, high = calibration.predict(table["linear"].to_numpy(float))
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
