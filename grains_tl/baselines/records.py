"""What baselines are made from: the building records, and what is read from the model on them, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.hooks.mask import Masker
from grains_tl.inference.logprobs import score_pairs
from grains_tl.inference.objectives import margins
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.readout import read_out, read_out_responses
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class BuildingRecords:
    """The building records, and what baselines read from the model on them: each quantity is run once, when first used.

    Attributes:
        model: the model.
        tokenized: its records, from ``tokenize_pairs``.
        layers: which layers, in increasing order.
        like: the vectors that ``orthogonal_direction`` is to be orthogonal to.
        differences: of the method whose labels ``shuffled_labels`` shuffles; without them CAA's.
        top_k: how many tokens ``random_tokens`` masks on each side.
        masker: what ``random_tokens`` replaces them with.

    Examples:
        >>> records = BuildingRecords(model, tokenize_pairs(model, pairs), (12,))     # doctest: +SKIP
        >>> BASELINES["caa"](records, seed=0).directions.shape                       # doctest: +SKIP
    """

    model: HookedModel
    tokenized: Sequence[TokenizedPair]
    layers: tuple[int, ...]
    like: SteeringVectors | None = None
    differences: Differences | None = None
    top_k: int = 2
    masker: Masker = "mean_embedding"

    @cached_property
    def _prompts(self) -> tuple[Float[Tensor, "record layer d_model"], Float[Tensor, "layer"]]:
        norms: list[Tensor] = []
        ends = read_out(self.model, self.tokenized, layers=self.layers, norms=norms)
        return ends, torch.cat(norms, dim=1).median(dim=1).values

    @property
    def prompt_ends(self) -> Float[Tensor, "record layer d_model"]:
        """Residuals at the last prompt token."""
        return self._prompts[0]

    @property
    def resid_norms(self) -> Float[Tensor, "layer"]:
        """Median residual norm over the prompts' content tokens, the unit of ``alpha``."""
        # every pass over the prompts shows them
        return self._responses[1] if "_responses" in self.__dict__ else self._prompts[1]

    @cached_property
    def _responses(self) -> tuple[Float[Tensor, "record 2 layer d_model"], Float[Tensor, "layer"]]:
        norms: list[Tensor] = []
        ends = read_out_responses(self.model, self.tokenized, layers=self.layers, norms=norms)
        return ends, torch.cat(norms, dim=1).median(dim=1).values

    @property
    def response_differences(self) -> Float[Tensor, "record layer d_model"]:
        """h(prompt + chosen) - h(prompt + rejected) at the last response token."""
        ends = self._responses[0]
        return ends[:, 0] - ends[:, 1]

    @cached_property
    def margins(self) -> Float[Tensor, "record"]:
        """log p(chosen) - log p(rejected) of the unsteered model, nats."""
        return margins(score_pairs(self.model, self.tokenized))


#: One vector per layer, of any length, from building records; what is drawn at random is drawn from the generator.
Baseline = Callable[[BuildingRecords, torch.Generator], Float[Tensor, "layer d_model"]]
