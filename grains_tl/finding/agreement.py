"""How much building records agree on what raises their margins: what can be known of a vector before it steers anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import RecordError
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.gradients import MarginGradient, mean_cosine
from grains_tl.vectors.recipes import Recipe

#: Fewer records cannot be halved into two that are more than one record each.
FEWEST = 4


@dataclass(frozen=True)
class Halves:
    """What vectors from one half of the records do to first order on the other half.

    Attributes:
        cosine: ``[layer]`` mean cosine of the two halves' vectors.
        slope: ``[layer]`` mean margin gradient of the records left out along the vector, nats per residual unit.
        agree: ``[layer]`` share of the records left out whose margin rises along it.
        separation: ``[layer]`` mean over standard deviation of the left-out records' gradients along it.
    """

    cosine: Float[Tensor, "layer"]
    slope: Float[Tensor, "layer"]
    agree: Float[Tensor, "layer"]
    separation: Float[Tensor, "layer"]


def record_gradients(records: BuildingRecords) -> Float[Tensor, "record layer d_model"]:
    """Each record's gradient of the margin at a vector added after each layer, as ``add_renorm`` lets it act."""
    return MarginGradient(operator="add_renorm").per_record(records)


def require_enough(records: BuildingRecords) -> None:
    """Refuse records that cannot be halved (RecordError)."""
    n = len(records.tokenized)
    if n < FEWEST:
        raise RecordError(f"{n} building records; expected at least {FEWEST} to set two halves against each other")


def halves(
    records: BuildingRecords,
    gradients: Float[Tensor, "record layer d_model"],
    recipe: Recipe | None,
    *,
    n_splits: int = 4,
    seed: int = 0,
) -> Halves:
    """Vectors from random halves of the records, judged on the gradients of the other half.

    Args:
        records: the building records.
        gradients: from ``record_gradients``.
        recipe: what builds the vectors; ``None`` for the mean gradient itself, which runs nothing.
        n_splits: random halvings.
        seed: of these.
    """
    require_enough(records)
    n = len(records.tokenized)
    rng = np.random.default_rng(seed)
    cosines, along = [], []
    for _ in range(n_splits):
        order = rng.permutation(n).tolist()
        sides = [sorted(order[: n // 2]), sorted(order[n // 2 :])]
        units = [_directions(records, gradients, recipe, own) for own in sides]
        cosines.append((units[0] * units[1]).sum(-1))
        for unit, left_out in zip(units, sides[::-1], strict=True):
            along.append((gradients[left_out].double() * unit).sum(-1))
    each = torch.cat(along)
    return Halves(
        torch.stack(cosines).mean(0).float(),
        each.mean(0).float(),
        (each > 0).double().mean(0).float(),
        (each.mean(0) / each.std(0).clamp(min=1e-12)).float(),
    )


def _directions(
    records: BuildingRecords, gradients: Tensor, recipe: Recipe | None, own: list[int]
) -> Float[Tensor, "layer d_model"]:
    if recipe is not None:
        return recipe.build(records.part(own)).directions.double()
    return torch.nn.functional.normalize(gradients[own].double().mean(0), dim=-1)


def agreement_table(
    records: BuildingRecords, recipe: Recipe | None = None, *, n_splits: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Agreement of the records layer by layer.

    Args:
        records: the building records.
        recipe: whose vectors; ``None`` for the mean gradient.
        n_splits: random halvings.
        seed: of these.

    Returns:
        One row per layer: ``layer``, ``mean_cosine`` (of two records' gradients), ``split_half`` (cosine of two halves'
        vectors), ``agree``, ``separation`` and ``slope`` (see ``Halves``), ``n`` records.
    """
    gradients = record_gradients(records)
    found = halves(records, gradients, recipe, n_splits=n_splits, seed=seed)
    return pd.DataFrame(
        {
            "layer": list(records.layers),
            "mean_cosine": mean_cosine(gradients).tolist(),
            "split_half": found.cosine.tolist(),
            "agree": found.agree.tolist(),
            "separation": found.separation.tolist(),
            "slope": found.slope.tolist(),
            "n": len(records.tokenized),
        }
    )
