"""From differences to one direction per layer: mean, singular vector or the paper's centred PCA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.vectors.differences import Differences
from grains_tl.vectors.steering_vectors import SteeringVectors

#: ``"mean"``: mean(d+) - mean(d-). ``"svd"``: first right singular vector of the per-record differences d+ - d-.
#: ``"pca"``: the paper's PC(d+) - PC(d-), each on centred data.
Reduce = Literal["mean", "svd", "pca"]

#: Both sides, or only the tokens toward chosen (the paper's setting for vision-language models).
Side = Literal["both", "toward_chosen"]


def reduce_vectors(
    differences: Differences,
    *,
    reduce: Reduce = "mean",
    side: Side = "both",
    info: Mapping[str, Any] | None = None,
) -> SteeringVectors:
    """One direction per layer from the differences of all records.

    The sign is fixed for the final vector: its inner product with the mean difference is not negative (the principal
    components of the paper, arXiv 2507.18043, have an arbitrary sign, and fixing each of the two before subtracting can
    leave the result pointing the wrong way).

    Args:
        differences: from ``collect_differences``.
        reduce: ``"mean"``, ``"svd"`` or ``"pca"``.
        side: ``"both"``, or ``"toward_chosen"`` for d+ alone.
        info: manifest entries.

    Returns:
        ``SteeringVectors``: directions ``[layer, d_model]`` of unit length, their norms in residual units.

    Raises:
        ValueError: unknown ``reduce`` or ``side``, fewer than two records for ``"pca"``, or a zero difference.

    Examples:
        >>> from grains_tl.vectors.differences import Differences
        >>> d = Differences(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), (12,), torch.tensor([140.0]))
        >>> reduce_vectors(d).directions.shape
        torch.Size([1, 3])
    """
    check_reduction(reduce, side, len(differences.toward_chosen))
    up = differences.toward_chosen.double()
    down = differences.toward_rejected.double() if side == "both" else torch.zeros_like(up)
    mean = (up - down).mean(0)
    if reduce == "mean":
        raw = mean
    elif reduce == "svd":
        raw = torch.stack([first_singular(m) for m in (up - down).unbind(1)])
    else:
        raw = torch.stack([_principal(m) for m in up.unbind(1)])
        if side == "both":
            raw = raw - torch.stack([_principal(m) for m in down.unbind(1)])
    # a decomposition of zeros gives an arbitrary axis: no difference must stay no direction
    raw = torch.where(mean.norm(dim=-1, keepdim=True) > 0, raw, torch.zeros_like(raw))
    sign = torch.where((raw * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    given = (differences.layers, differences.resid_norms, info)
    vectors = SteeringVectors.from_raw(sign * raw, *given, site=differences.site)
    along = (vectors.directions * mean.float()).sum(-1)
    return replace(vectors, magnitudes=along.clamp(min=1e-12))


def check_reduction(reduce: str, side: str, n_records: int) -> None:
    """Refuse an unknown reduction, or too few records for it (ValueError)."""
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce={reduce!r}; expected one of {get_args(Reduce)}")
    if side not in get_args(Side):
        raise ValueError(f"side={side!r}; expected one of {get_args(Side)}")
    if reduce == "pca" and n_records < 2:
        raise ValueError(f"reduce='pca' needs at least 2 records, {n_records} given; use reduce='mean'")


def first_singular(matrix: Float[Tensor, "record d_model"]) -> Float[Tensor, "d_model"]:
    """First right singular vector, of either sign; the matrix is not centred."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[0]


def _principal(matrix: Float[Tensor, "record d_model"]) -> Float[Tensor, "d_model"]:
    """First principal component of centred data, oriented to the data's mean."""
    component = first_singular(matrix - matrix.mean(0))
    return component * (-1.0 if component @ matrix.mean(0) < 0 else 1.0)
