"""Baselines and controls on the residual stream as recipes: other ways to make a vector, and chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from grains_tl.attribution.selection import Selection
from grains_tl.baselines.controls import mask_at_random, orthogonal_directions, shuffle_labels
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.recipes import DirectRecipe
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class CAA(DirectRecipe):
    """Contrastive activation addition (arXiv 2312.06681): the mean of h(prompt + chosen) - h(prompt + rejected).

    Examples:
        >>> build_vectors(model, pairs, recipe="caa", layers=[12])           # doctest: +SKIP
    """

    name: ClassVar[str] = "caa"

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        return records.response_differences.mean(0)


@dataclass(frozen=True)
class ICV(DirectRecipe):
    """In-context vector (arXiv 2311.06668, section 3): one principal direction for all layers together.

    The response-end differences of a record are concatenated over the layers; the direction h that maximises the mean
    of (h . difference)^2 is cut into its layers again. Not centred, so that the mean shift is kept; its arbitrary sign is
    the mean difference's. We differ from the paper in that each layer's part is steered with at unit length, and in that
    the two texts share a prompt here.

    Examples:
        >>> build_vectors(model, pairs, recipe=ICV())                        # doctest: +SKIP
    """

    name: ClassVar[str] = "icv"

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        flat = rearrange(records.response_differences, "record layer d_model -> record (layer d_model)").double()
        first = torch.linalg.svd(flat, full_matrices=False).Vh[0]
        joint = first * (first @ flat.mean(0))
        return rearrange(joint, "(layer d_model) -> layer d_model", layer=len(records.layers)).float()


@dataclass(frozen=True)
class PromptMean(DirectRecipe):
    """Difference of means over *prompts*: those after which the model leans to chosen, minus the others.

    A mass-mean direction (arXiv 2310.06824, section 5) at the last prompt token, with the label "unsteered margin above
    the records' median". It sees neither the response tokens, as CAA does, nor masked prompts, as GrAInS does: what is
    left is how prompts differ. A median split, because the sign of the margin says more of the two responses' lengths
    and word frequencies than of the prompt, and can be the same for all records.

    Raises:
        ValueError: fewer than two records, or all margins equal.
    """

    name: ClassVar[str] = "prompt_mean"

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        high = records.margins > records.margins.median()
        if not bool(high.any()):
            raise ValueError(
                f"prompt_mean splits the records at their median margin, and none of the {len(high)} lies above it; "
                "give at least two records with different margins"
            )
        return records.prompt_ends[high].mean(0) - records.prompt_ends[~high].mean(0)


@dataclass(frozen=True)
class RandomDirection(DirectRecipe):
    """A direction drawn uniformly from the sphere."""

    name: ClassVar[str] = "random_direction"
    draws: ClassVar[bool] = True

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        return torch.randn(len(records.layers), records.width, generator=generator)


@dataclass(frozen=True)
class OrthogonalDirection(DirectRecipe):
    """A direction drawn uniformly from those at right angles to ``like`` (arXiv 2602.06801).

    Attributes:
        like: the vectors it is to be at right angles to.

    Raises:
        ValueError: no ``like``, or not all layers in it.
    """

    name: ClassVar[str] = "orthogonal_direction"
    draws: ClassVar[bool] = True
    like: SteeringVectors | None = None

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse to begin without vectors to be orthogonal to (ValueError)."""
        self.raw(records, torch.Generator())

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        if self.like is None:
            raise ValueError("orthogonal_direction needs the vectors it is to be orthogonal to: pass like=vectors")
        return orthogonal_directions(self.like.at(records.layers).directions, generator)


@dataclass(frozen=True)
class ShuffledLabels(DirectRecipe):
    """Chosen and rejected swapped in a random half of the records: of ``differences``, or of CAA.

    Attributes:
        differences: whose labels are shuffled; default CAA's.
    """

    name: ClassVar[str] = "shuffled_labels"
    draws: ClassVar[bool] = True
    differences: Differences | None = None

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse differences of other records or layers (ValueError)."""
        if self.differences is None:
            return
        missing = sorted(set(records.layers) - set(self.differences.layers))
        if missing or len(self.differences.toward_chosen) != len(records.tokenized):
            raise ValueError(
                f"differences of {len(self.differences.toward_chosen)} records at layers {list(self.differences.layers)} do "
                f"not fit {len(records.tokenized)} records at {list(records.layers)}"
            )

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        if self.differences is None:
            up = records.response_differences
            given = Differences(up, torch.zeros_like(up), records.layers, records.resid_norms, records.site)
        else:
            given = self.differences.at(records.layers)
        return reduce_vectors(shuffle_labels(given, generator)).raw


@dataclass(frozen=True)
class RandomTokens(DirectRecipe):
    """The method with its attribution replaced by chance: ``top_k`` random content tokens masked on each side.

    Attributes:
        top_k: tokens masked on each side, or half of a short prompt.
        mask: what replaces them.

    Raises:
        ValueError: a prompt with fewer than two content tokens.
    """

    name: ClassVar[str] = "random_tokens"
    draws: ClassVar[bool] = True
    top_k: int = 2
    mask: Mask | Masker = "mean_embedding"

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        short = [number for number, t in enumerate(records.tokenized, start=1) if t.n_content < 2]
        if short:
            raise ValueError(f"random_tokens needs two content tokens in each prompt; record {short[0]} has fewer")
        like = [_as_many(t, self.top_k) for t in records.tokenized]
        up, down = mask_at_random(
            records.model,
            records.tokenized,
            like,
            records.prompt_ends,
            generator,
            layers=records.layers,
            mask=self.mask,
            site=records.site,
        )
        return (up - down).mean(0)


def _as_many(pair: TokenizedPair, top_k: int) -> Selection:
    """A selection that masks ``top_k`` tokens on each side, or half of a short prompt."""
    k = tuple(range(min(top_k, pair.n_content // 2)))
    return Selection(k, k)
