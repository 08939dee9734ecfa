"""How many building records a vector needs: its effect over their number, beside random directions of equal KL.

1. From the building records several random subsets of each size are drawn.
2. Each subset gives a vector, and each vector the alpha at which it costs the same KL on neutral text.
3. All are measured on the same test records, and so are random directions at that KL.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError, RecordError
from grains_tl._util.stats import crossed_interval
from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Setting
from grains_tl.evaluate.store import Checkpoint, open_checkpoint
from grains_tl.inference.objectives import Objective, require_objective
from grains_tl.models.running import require_layers
from grains_tl.records.loading import neutral_texts, preference_pairs
from grains_tl.records.pairs import PairLike, PreferencePair
from grains_tl.records.splits import record_id
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords, record_file
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: What the placebo is called in the tables.
RANDOM = "random direction"

#: Where the search for the alpha of a given KL begins.
START = 0.1

#: Neutral texts on which the KL is measured.
N_TEXTS = 5


@dataclass(frozen=True)
class EqualCost:
    """Measures vectors of one layer at one KL on some records.

    Attributes:
        model: what is steered.
        layer: where.
        kl: nats per token of neutral text.
        objective: how response tokens are combined.
        store: finished results.
    """

    model: HookedModel
    layer: int
    kl: float
    objective: Objective
    store: Checkpoint

    @classmethod
    def of(
        cls, model: HookedModel, layer: int, kl: float, objective: Objective, checkpoint: str | Path | None
    ) -> EqualCost:
        """The same with everything checked."""
        if not finite("kl", kl) > 0:
            raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
        require_objective(objective)
        (layer,) = require_layers(model, [layer])
        return cls(model, layer, float(kl), objective, open_checkpoint(checkpoint, model))

    def steps(self, vectors: Sequence[SteeringVectors]) -> tuple[list[Steering], NDArray[np.float64]]:
        """Each vector's step at the KL, and what it costs."""
        begin = [one.steering(START, self.layer) for one in vectors]
        return at_kl(self.model, begin, self.kl, neutral_texts(N_TEXTS), checkpoint=self.store)

    def effects(self, steps: Sequence[Steering], records: Sequence[PreferencePair]) -> NDArray[np.float64]:
        """``[step, record]`` change of the margin, nats."""
        settings = [Setting.of(step, vector=str(i)) for i, step in enumerate(steps)]
        with warnings.catch_warnings():  # one file for costs and effects on purpose
            warnings.filterwarnings("ignore", message=".*none of these records and settings")
            frame = record_effects(self.model, records, settings, objective=self.objective, checkpoint=self.store)
        return frame["change"].to_numpy().reshape(len(steps), len(records))

    def random(self, like: SteeringVectors, n: int, seed: int) -> list[SteeringVectors]:
        """Random directions at the layer."""
        return random_direction_vectors(like.at([self.layer]), n_draws=n, seed=seed) if n else []


def learning_curve(
    model: HookedModel,
    pairs: Iterable[PairLike],
    test: Iterable[PairLike],
    *,
    layer: int,
    recipe: Recipe | str | RecipeFunction = "grains",
    sizes: Sequence[int] | None = None,
    n_draws: int = 5,
    kl: float = 0.05,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The effect of a recipe's vector over the number of building records, at equal KL.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records, of which subsets are drawn.
        test: the records that the effect is measured on; none of them may be a building record.
        layer: where is steered.
        recipe: a name in ``gr.vectors.RECIPES``, a recipe as a value, or a function.
        sizes: numbers of building records; default 2, 5, 10, 20, ... and all of them.
        n_draws: random subsets of each size; of all records there is one.
        kl: what every vector costs, nats per token of neutral text.
        checkpoint: a ``.jsonl`` file for finished measurements (attributions and gradients go beside it).
        options: ``n_random`` (5) random directions; ``seed`` (0) of the draws; ``objective`` (``"sum"``).

    Returns:
        One row per size, and one of size 0 for the random directions: ``vector`` (the recipe, or ``"random direction"``),
        ``size``, ``effect`` (mean change of the margin over draws and test records, nats), ``low``, ``high`` (95 % interval
        over draws and test records together), ``worst``, ``best`` (smallest and largest mean effect of a draw), ``cosine``
        (mean cosine of the draws to the vector of all records), ``kl`` (mean, nats per token), ``alpha``, ``n_draws``, ``n``
        test records. The interval at all records is over test records alone.

    Raises:
        ValueError: before anything runs: no records, test records among the building records, sizes that cannot be drawn,
            a layer the model lacks, unknown options.

    Examples:
        >>> table = learning_curve(model, build, test, layer=18, recipe="caa")                # doctest: +SKIP
        >>> gr.plotting.plot_learning_curve(table)                                            # doctest: +SKIP
    """
    given = curve_options(options)
    run = EqualCost.of(model, layer, kl, given["objective"], checkpoint)
    building, testing = preference_pairs(pairs), preference_pairs(test)
    require_apart(building, testing)
    chosen = recipe_of(recipe)
    numbers = _sizes(sizes, len(building), whole("n_draws", n_draws, 1))
    draws = _draws(numbers, len(building), n_draws, given["seed"])
    with record_file(beside(checkpoint)) as file:
        records = BuildingRecords(model, tokenize_pairs(model, building), (run.layer,), file)
        chosen.check(records)
        vectors = [built(chosen, records.part(places)) for _, places in draws]
        full = next((v for v, (size, _) in zip(vectors, draws, strict=True) if size == len(building)), None)
        full = built(chosen, records) if full is None else full
    placebo = run.random(full, given["n_random"], given["seed"])
    steps, spent = run.steps([*vectors, *placebo])
    effects = run.effects(steps, testing)
    of_size = [size for size, _ in draws] + [0] * len(placebo)
    cosines = [float(v.cosine(full)[0]) for v in [*vectors, *placebo]]
    alphas = [step.alpha for step in steps]
    rows = []
    for size in sorted(set(of_size)):
        own = [i for i, each in enumerate(of_size) if each == size]
        means = effects[own].mean(1)
        effect, low, high = crossed_interval(effects[own])
        rows.append(
            {
                "vector": chosen.name if size else RANDOM,
                "size": size,
                **{"effect": effect, "low": low, "high": high, "worst": means.min(), "best": means.max()},
                **{"cosine": np.mean([cosines[i] for i in own]), "kl": spent[own].mean()},
                **{"alpha": np.mean([alphas[i] for i in own]), "n_draws": len(own), "n": len(testing)},
            }
        )
    return pd.DataFrame(rows)


def curve_options(options: dict[str, Any]) -> dict[str, Any]:
    """``n_random``, ``seed`` and ``objective``, checked."""
    known = {"n_random": 5, "seed": 0, "objective": "sum"}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(f"no option {', '.join(unknown)}; expected some of {', '.join(known)}")
    given: dict[str, Any] = {**known, **options}
    for name in ("n_random", "seed"):
        given[name] = whole(name, given[name], 0)
    return given


def require_apart(building: Sequence[PreferencePair], testing: Sequence[PreferencePair]) -> None:
    """Refuse an empty side, and effects on the very records a vector was built from (RecordError)."""
    if not building or not testing:
        raise RecordError(f"{len(building)} building and {len(testing)} test records; expected some of each")
    shared = set(map(record_id, building)) & set(map(record_id, testing))
    if shared:
        raise RecordError(
            f"{len(shared)} of the test records are building records too; effects measured on them are too large. Split "
            "with gr.records.split_records"
        )


def built(recipe: Recipe, records: BuildingRecords) -> SteeringVectors:
    """The recipe's vector, with the unit of ``alpha`` that all parts of the records share."""
    return replace(recipe.build(records), resid_norms=records.resid_norms)


def beside(checkpoint: str | Path | None) -> Path | None:
    """The file for attributions and gradients beside that of the measurements."""
    return None if checkpoint is None else Path(f"{checkpoint}.attributions.jsonl")


def _sizes(sizes: Sequence[int] | None, n: int, n_draws: int) -> list[int]:
    if sizes is None:
        return sorted({size for size in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if size < n} | {n})
    numbers = sorted({whole("size", size, 1) for size in listed("sizes", sizes)})
    if not numbers or numbers[-1] > n:
        raise OptionError(f"sizes={list(sizes)}; expected numbers from 1 to {n}, the number of building records")
    return numbers


def _draws(sizes: Sequence[int], n: int, n_draws: int, seed: int) -> list[tuple[int, list[int]]]:
    """``(size, places)``; a size's draws do not depend on the other sizes."""
    draws = []
    for size in sizes:
        rng = np.random.default_rng([seed, size])
        for _ in range(1 if size == n else n_draws):
            draws.append((size, sorted(rng.permutation(n)[:size].tolist())))
    return draws
