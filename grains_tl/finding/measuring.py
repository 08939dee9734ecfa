"""What a search measures: KL and effect of every recipe, layer by layer, then of the chosen ones and their controls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.stats import standard_error
from grains_tl.evaluate.costs import cost_table, kl_per_token
from grains_tl.evaluate.equal_cost import crossing
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Setting, grid
from grains_tl.evaluate.store import Checkpoint
from grains_tl.hooks.steer import Positions
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.objectives import Objective
from grains_tl.records.pairs import PreferencePair
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.recipes import Recipe
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass
class Run:
    """The options of a search, and where its results are kept.

    Attributes:
        model: what is steered.
        texts: neutral texts, or what each step writes.
        kl: the budget, nats per token.
        alphas: where the KL is measured, in rising order.
        seed: of split and draws.
        n_draws: draws of each control.
        objective: how response tokens are combined.
        positions: where is steered.
        level: of the intervals.
        n_examples: prompts to continue.
        max_new_tokens: of a continuation.
        budget: ``"neutral"`` or ``"generated"``.
        quantile: of the generated tokens; ``None`` for their mean.
        store: finished results.
    """

    model: HookedModel
    texts: Sequence[str] | Continuations
    kl: float
    alphas: tuple[float, ...]
    seed: int
    n_draws: int
    objective: Objective
    positions: Positions
    level: float
    n_examples: int
    max_new_tokens: int
    budget: str = "neutral"
    quantile: float | None = None
    store: Checkpoint = field(default_factory=Checkpoint)

    @property
    def kl_of(self) -> str:
        """What the KL is counted on, for a sentence."""
        if isinstance(self.texts, Continuations):
            return f"nats ({self.texts.label})"
        return "nats per token of neutral text"

    def costs(self, settings: Sequence[Setting]) -> NDArray[np.float64]:
        """``[setting]`` KL per token of the neutral texts (or of what the step writes), nats."""
        return kl_per_token(cost_table(self.model, settings, self.texts, checkpoint=self.store), len(settings))

    def effects(self, settings: Sequence[Setting], records: Sequence[PreferencePair]) -> NDArray[np.float64]:
        """``[setting, record]`` change of the margin, nats."""
        with _shared_store():
            frame = record_effects(self.model, records, settings, objective=self.objective, checkpoint=self.store)
        return frame["change"].to_numpy().reshape(len(settings), len(records))

    def setting(self, vectors: SteeringVectors, layer: int, alpha: float) -> Setting:
        """One cell."""
        return grid({"vector": vectors}, [layer], [alpha], positions=self.positions)[0]

    def spending(self, cells: Sequence[tuple[SteeringVectors, int]]) -> NDArray[np.float64]:
        """``[cell]`` the alpha at which each spends the budget; the largest alpha where that is never reached."""
        settings = [self.setting(v, layer, alpha) for v, layer in cells for alpha in self.alphas]
        spent = self.costs(settings).reshape(len(cells), len(self.alphas))
        return np.array([alpha_at(self.alphas, row.tolist(), self.kl) for row in spent])

    def spending_as_much(
        self, draws: Sequence[SteeringVectors], layer: int, alpha: float, kl: float
    ) -> NDArray[np.float64]:
        """``[draw]`` the alpha at which each spends a KL, from its KL at one alpha (the KL grows with alpha squared)."""
        spent = self.costs([self.setting(one, layer, alpha) for one in draws])
        factor = np.sqrt(kl / np.maximum(np.nan_to_num(spent, nan=np.inf), 1e-12))
        return np.round(alpha * np.clip(factor, 0.25, 4), 6)


@dataclass(frozen=True)
class Chosen:
    """What a recipe came to.

    Attributes:
        vectors: at all layers that were tried.
        layer: with the largest effect on the choosing records.
        alpha: the step.
        effect: on the choosing records, nats.
    """

    vectors: SteeringVectors
    layer: int
    alpha: float
    effect: float

    def steering(self, positions: Positions) -> Steering:
        """The choice as a value."""
        return Steering(self.vectors.at([self.layer]), self.alpha, (self.layer,), positions=positions)


@contextmanager
def _shared_store() -> Iterator[None]:
    """Several measurements share one file on purpose, so that it holds results of other settings is no surprise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*none of these records and settings")
        yield


def alpha_at(alphas: Sequence[float], kls: Sequence[float], budget: float) -> float:
    """Where the KL first reaches the budget, between the alphas that were measured; NaN counts as too much.

    Examples:
        >>> alpha_at([0.1, 0.2], [0.01, 0.04], 0.0225)
        0.15
        >>> alpha_at([0.1, 0.2], [0.01, 0.04], 1.0)
        0.2
    """
    steps = [0.0, *alphas]
    crossed = crossing(np.array([0.0, *np.nan_to_num(kls, nan=np.inf)]), budget)
    if crossed is None:
        return float(steps[-1])
    i, share = crossed
    alpha = steps[i - 1] + share * (steps[i] - steps[i - 1])
    return float(round(alpha, 6)) or steps[1] / 2  # a smallest step that breaks the model


def search(
    run: Run, vectors: Mapping[str, SteeringVectors], records: Sequence[PreferencePair]
) -> tuple[dict[str, Chosen], pd.DataFrame]:
    """Each recipe's layer and alpha, and the table of all that were tried.

    Returns:
        The choices by recipe; columns ``recipe``, ``layer``, ``alpha``, ``effect`` (mean over the choosing records) and
        ``se``, nats.
    """
    cells = [(name, one, layer) for name, one in vectors.items() for layer in one.layers]
    alphas = run.spending([(one, layer) for _, one, layer in cells])
    tried = [(*cell, float(alpha) * part) for cell, alpha in zip(cells, alphas, strict=True) for part in (0.5, 1.0)]
    effects = run.effects([run.setting(one, layer, alpha) for _, one, layer, alpha in tried], records)
    table = pd.DataFrame(
        {
            "recipe": [name for name, *_ in tried],
            "layer": [layer for *_, layer, _ in tried],
            "alpha": [alpha for *_, alpha in tried],
            "effect": effects.mean(1),
            "se": [standard_error(one) for one in effects],
            "n": len(records),
        }
    )
    choices = {}
    for name in vectors:
        own = table[(table["recipe"] == name) & np.isfinite(table["effect"])]
        if own.empty:
            raise ValueError(
                f"every step of recipe {name!r} gives NaN or infinite log-likelihoods; give smaller alphas"
            )
        row = own.loc[own["effect"].idxmax()]
        choices[name] = Chosen(vectors[name], int(row["layer"]), float(row["alpha"]), float(row["effect"]))
    return choices, table


def report(
    run: Run,
    choices: Mapping[str, Chosen],
    controls: Sequence[Recipe],
    building: BuildingRecords,
    records: Sequence[PreferencePair],
) -> tuple[pd.DataFrame, dict[tuple[str, int], NDArray[np.float64]]]:
    """The choices and the draws of the controls on the report records.

    Returns:
        A row per choice, and per control and chosen layer, with ``kl``; effects by recipe and layer: ``[record]``, of
        controls ``[draw, record]``, nats.
    """
    rows: list[dict[str, Any]] = []
    effects: dict[tuple[str, int], NDArray[np.float64]] = {}
    settings = [run.setting(c.vectors, c.layer, c.alpha) for c in choices.values()]
    spent = run.costs(settings)
    for (name, c), kl, change in zip(choices.items(), spent, run.effects(settings, records), strict=True):
        effects[name, c.layer] = change
        rows.append({"recipe": name, "layer": c.layer, "alpha": c.alpha, "kl": kl, "control": False})
    for layer in sorted({c.layer for c in choices.values()}):
        here = {name: c for name, c in choices.items() if c.layer == layer}
        like = max(here.values(), key=lambda c: c.effect)
        allowed = max(row["kl"] for row in rows if row["layer"] == layer and not row["control"])
        for control in controls:
            draws = _draws(run, control, building, like)
            alphas = run.spending_as_much(draws, layer, like.alpha, allowed)
            settings = [run.setting(one, layer, alpha) for one, alpha in zip(draws, alphas, strict=True)]
            effects[control.name, layer] = run.effects(settings, records)
            kl = run.costs(settings).mean()
            row = {"recipe": control.name, "layer": layer, "alpha": alphas.mean(), "kl": kl, "control": True}
            rows.append({**row, "n_draws": len(draws)})
    return pd.DataFrame(rows), effects


def _draws(run: Run, control: Recipe, building: BuildingRecords, like: Chosen) -> list[SteeringVectors]:
    """Draws of a control at the chosen layer, each with a seed of its own."""
    # a control at right angles to a vector needs to know which
    given: dict[str, Any] = {"like": like.vectors} if getattr(control, "like", like) is None else {}
    seeds = [run.seed * 100_003 + 1 + draw for draw in range(run.n_draws)]
    return [replace(control, **{**given, "seed": seed}).build(building).at([like.layer]) for seed in seeds]
