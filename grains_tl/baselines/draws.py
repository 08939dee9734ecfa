"""Baselines and controls by name: one vector of each, or several draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grains_tl.baselines import recipes
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.models.identity import model_identity
from grains_tl.models.running import require_layers
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.recipes import RECIPES, DirectRecipe, FunctionRecipe, RecipeFunction
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Every baseline and control by name: the recipes of ``RECIPES`` that are defined in ``baselines.recipes``.
BASELINES: dict[str, type[DirectRecipe]] = {
    name: getattr(recipes, place.partition(":")[2])
    for name, place in RECIPES.items()
    if place.startswith(f"{recipes.__name__}:")
}

#: Those that are drawn at random: one draw says little.
CONTROLS = tuple(name for name, kind in BASELINES.items() if kind.draws)


@dataclass(frozen=True)
class ControlOptions:
    """What some of the baselines need to know.

    Attributes:
        like: the vectors that ``orthogonal_direction`` is to be orthogonal to.
        differences: of the method whose labels ``shuffled_labels`` shuffles; without them CAA's.
        top_k: tokens that ``random_tokens`` masks on each side.
        mask: what ``random_tokens`` puts in their place.
    """

    like: SteeringVectors | None = None
    differences: Differences | None = None
    top_k: int = 2
    mask: Mask | Masker = "mean_embedding"

    def recipe(self, name: str) -> DirectRecipe:
        """The baseline of that name, told what it needs."""
        own = {
            "orthogonal_direction": {"like": self.like},
            "shuffled_labels": {"differences": self.differences},
            "random_tokens": {"top_k": self.top_k, "mask": self.mask},
        }
        return BASELINES[name](**own.get(name, {}))  # type: ignore[arg-type]


def baseline_draws(
    model: HookedModel,
    pairs: Iterable[PairLike],
    names: Sequence[str | RecipeFunction] | None = None,
    *,
    layers: Sequence[int],
    n_draws: int = 20,
    seed: int = 0,
    **options: Any,
) -> dict[str, list[SteeringVectors]]:
    """Several draws of controls (or of any baseline), as ``compare_with_controls`` takes them.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        names: keys of ``BASELINES``, or functions of your own, ``fn(records, generator) -> [layer, d_model]``; default the
            ``CONTROLS``, ``"orthogonal_direction"`` only where there is a ``like``.
        layers: which layers.
        n_draws: draws of each; the read-outs that draws share are run once.
        seed: of the draws; every baseline draws from a generator of its own, so that a result does not depend on its
            neighbours.
        options: fields of ``ControlOptions``: ``like``, ``differences``, ``top_k``, ``mask``.

    Returns:
        name -> vectors of unit length in the same ``alpha`` unit, so that one alpha is a step of one size for all.

    Raises:
        ValueError: before anything runs, for unknown names, bad records or layers, and missing or unfitting ``like``.

    Examples:
        >>> draws = baseline_draws(model, pairs, ["shuffled_labels"], layers=[12])     # doctest: +SKIP
        >>> len(draws["shuffled_labels"])                                              # doctest: +SKIP
        20
    """
    told = ControlOptions(**options)
    if names is None:
        names = [name for name in CONTROLS if name != "orthogonal_direction" or told.like is not None]
    wanted_recipes = _recipes(names, told)
    if n_draws < 1:
        raise ValueError(f"n_draws={n_draws}; expected at least one draw")
    wanted = tuple(require_layers(model, layers))
    records = BuildingRecords(model, tokenize_pairs(model, pairs), wanted)
    for recipe in wanted_recipes.values():
        recipe.check(records)
    made_for = model_identity(model, bare=True)
    drawn: dict[str, list[SteeringVectors]] = {}
    for name, recipe in wanted_recipes.items():
        generator = torch.Generator().manual_seed(seed)
        info = {"method": name, "seed": seed, "n_records": len(records.tokenized), "model": made_for}
        drawn[name] = [
            SteeringVectors.from_raw(
                recipe.raw(records, generator), wanted, records.resid_norms, {**info, "draw": draw}
            )
            for draw in range(n_draws)
        ]
    return drawn


def baseline_vectors(
    model: HookedModel,
    pairs: Iterable[PairLike],
    names: Sequence[str | RecipeFunction] = ("caa", "icv", "prompt_mean"),
    *,
    layers: Sequence[int],
    seed: int = 0,
    **options: Any,
) -> dict[str, SteeringVectors]:
    """Vectors of other recipes from the same records, and one draw of any control that is named.

    ``"caa"`` follows arXiv 2312.06681, ``"icv"`` 2311.06668, ``"prompt_mean"`` 2310.06824; the classes of
    ``baselines.recipes`` say where they differ.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        names: keys of ``BASELINES``, or functions with the same signature.
        layers: which layers.
        seed: seed of the draws.
        options: further attributes of ``BuildingRecords`` (see ``baseline_draws``).

    Returns:
        name -> vectors of unit length, in the same ``alpha`` unit.

    Raises:
        ValueError: see ``baseline_draws``.

    Examples:
        >>> def first_record(records, generator):                       # a baseline of one's own is one short function
        ...     return records.response_differences[0]
        >>> found = baseline_vectors(model, pairs, ["caa", first_record], layers=[12])  # doctest: +SKIP
        >>> found["caa"].cosine(found["first_record"])                                  # doctest: +SKIP
        tensor([0.6021])
    """
    drawn = baseline_draws(model, pairs, names, layers=layers, n_draws=1, seed=seed, **options)
    return {name: vectors[0] for name, vectors in drawn.items()}


def _recipes(names: Sequence[str | RecipeFunction], told: ControlOptions) -> dict[str, DirectRecipe]:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r}; expected a list of baselines, such as ['caa', 'icv']")
    unknown = [n for n in names if isinstance(n, str) and n not in BASELINES]
    if unknown:
        raise ValueError(f"no baselines called {unknown}; there are {list(BASELINES)}, or pass a function")
    made = [told.recipe(n) if isinstance(n, str) else FunctionRecipe(function=n) for n in names]
    twice = sorted({r.name for r in made if sum(other.name == r.name for other in made) > 1})
    if twice:
        raise ValueError(f"two recipes are called {', '.join(twice)}; give each function a name of its own")
    return {recipe.name: recipe for recipe in made}
