"""The inverse of a shrunken covariance, for any number of shrinkages from one decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ShrunkenInverse:
    """((1 - s) F + s m I)^-1 with F = X'X and m its mean eigenvalue.

    Attributes:
        values: ``[k]`` eigenvalues of F.
        basis: ``[d, k]`` their eigenvectors; where X has fewer rows than columns, those in the span of its rows.

    Examples:
        >>> ShrunkenInverse.of(2 * torch.eye(2)).times(torch.ones(2), 0.5).tolist()
        [0.25, 0.25]
    """

    values: Float[Tensor, "k"]
    basis: Float[Tensor, "d k"]

    @classmethod
    def of(cls, x: Float[Tensor, "n d"]) -> ShrunkenInverse:
        """Decompose X'X, or XX' where that is smaller."""
        x = x.double()
        if x.shape[0] >= x.shape[1]:
            values, basis = torch.linalg.eigh(x.T @ x)
            return cls(values.clamp(min=0), basis)
        values, left = torch.linalg.eigh(x @ x.T)
        kept = values > 1e-12 * values[-1]
        values = values[kept]
        return cls(values, x.T @ left[:, kept] / values.sqrt())

    def times(self, vector: Float[Tensor, "d"], shrinkage: float, power: float = 1.0) -> Float[Tensor, "d"]:
        """The inverse (or another negative power: 0.5 for the inverse root) times a vector, in float64."""
        v, floor = vector.double(), shrinkage * float(self.values.sum()) / len(self.basis)
        inside = self.basis.T @ v
        rest = v - self.basis @ inside  # what no row of X sees has eigenvalue 0
        shrunk = (1 - shrinkage) * self.values + floor
        return self.basis @ (inside / shrunk**power) + rest / floor**power
