"""Recipes: how records become vectors. One registry of names for all of them, baselines and controls included.

A recipe is a frozen value with ``build(records)``. To add one, write a subclass of ``Recipe`` and name its place in
``RECIPES``; ``build_vectors(recipe="its_name")``, ``find_vector`` and the shell then know it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from grains_tl._util.errors import OptionError
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Where each recipe is defined. Those of packages above this one are named as text, so that imports go down only.
RECIPES = {
    "grains": "grains_tl.vectors.grains:Grains",
    "margin_gradient": "grains_tl.vectors.gradients:MarginGradient",
    "kl_optimal": "grains_tl.vectors.kl_optimal:KLOptimal",
    "trained": "grains_tl.vectors.trained:Trained",
    "caa": "grains_tl.baselines.recipes:CAA",
    "icv": "grains_tl.baselines.recipes:ICV",
    "prompt_mean": "grains_tl.baselines.recipes:PromptMean",
    "random_direction": "grains_tl.baselines.recipes:RandomDirection",
    "orthogonal_direction": "grains_tl.baselines.recipes:OrthogonalDirection",
    "shuffled_labels": "grains_tl.baselines.recipes:ShuffledLabels",
    "random_tokens": "grains_tl.baselines.recipes:RandomTokens",
}


@dataclass(frozen=True)
class Recipe:
    """What every recipe has.

    Attributes:
        name: its short name, the key in ``RECIPES``.
        draws: it draws at random, so that one draw says little.
        any_site: it can build at other sites than the residual stream after a block.

    Examples:
        >>> recipe_of("caa").name
        'caa'
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = False
    any_site: ClassVar[bool] = False

    def check_site(self, records: BuildingRecords) -> None:
        """Refuse another site than the residual stream after a block, if the recipe knows no other (OptionError)."""
        if not self.any_site:
            residual_stream_only(f"recipe {self.name!r}", records.site)

    def check(self, records: BuildingRecords) -> None:
        """Refuse records, layers or options that cannot work (ValueError), before anything long runs."""

    def texts_used(self, records: BuildingRecords) -> frozenset[str]:
        """Hashes of the neutral texts that it builds with, on which its cost must not be measured."""
        return frozenset()

    def build(self, records: BuildingRecords) -> SteeringVectors:
        """One direction per layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class DirectRecipe(Recipe):
    """A recipe that gives its vectors directly; what it draws comes from a generator.

    Attributes:
        seed: of the draws.
    """

    any_site: ClassVar[bool] = True
    seed: int = 0

    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        """One vector per layer, of any length."""
        raise NotImplementedError

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        generator = torch.Generator().manual_seed(self.seed)
        settings = {"method": self.name, "seed": self.seed if self.draws else None}
        info = manifest(records.model, records.tokenized, settings)
        raw = self.raw(records, generator)
        return SteeringVectors.from_raw(raw, records.layers, records.resid_norms, info, site=records.site)


#: A recipe as a function: one vector per layer, of any length, from building records and a generator.
RecipeFunction = Callable[[BuildingRecords, torch.Generator], Float[Tensor, "layer d_model"]]


@dataclass(frozen=True)
class FunctionRecipe(DirectRecipe):
    """A function of one's own as a recipe.

    Attributes:
        function: ``fn(records, generator) -> [layer, d_model]``.
    """

    function: RecipeFunction | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The function's name."""
        return str(getattr(self.function, "__name__", "function"))

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        assert self.function is not None
        return self.function(records, generator)

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        generator = torch.Generator().manual_seed(self.seed)
        before = generator.get_state()
        raw = self.raw(records, generator)
        drew = not torch.equal(before, generator.get_state())  # only the function knows whether it draws
        info = manifest(records.model, records.tokenized, {"method": self.name, "seed": self.seed if drew else None})
        return SteeringVectors.from_raw(raw, records.layers, records.resid_norms, info)


def recipe_of(recipe: Recipe | str | RecipeFunction, **given: Any) -> Recipe:
    """A recipe from its name and fields, or from a function.

    Fields that are ``None`` keep their defaults.

    Raises:
        ValueError: an unknown name, a field the recipe does not have, or fields beside a recipe that is a value already.

    Examples:
        >>> recipe_of("grains", top_k=1).top_k
        TopK(k=1, image=None, group_by=None, spare_end=False)
    """
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(recipe, Recipe) or callable(recipe):
        if given:
            raise OptionError(f"{', '.join(given)} cannot be given beside a recipe value; set them on it")
        return recipe if isinstance(recipe, Recipe) else FunctionRecipe(function=recipe)
    if recipe not in RECIPES:
        raise OptionError(f"recipe={recipe!r} is not known; expected one of {', '.join(RECIPES)}")
    module, _, name = RECIPES[recipe].partition(":")
    kind: Any = getattr(importlib.import_module(module), name)
    if hasattr(kind, "of"):
        return kind.of(**given)
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = f"it takes {', '.join(known)}" if known else "it takes none"
        raise OptionError(f"recipe {recipe!r} takes no {', '.join(unknown)}; {has}")
    return kind(**given)
