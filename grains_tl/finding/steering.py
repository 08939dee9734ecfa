"""A chosen step along a vector."""

from __future__ import annotations

from dataclasses import dataclass

from grains_tl.hooks.steer import Positions
from grains_tl.types import FwdHooks
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True, eq=False)
class Steering:
    """Vectors, how far, and where.

    Attributes:
        vectors: of the steered layers.
        alpha: the step, see ``SteeringVectors.hooks``.
        layers: the steered layers.
        positions: the scope.
    """

    vectors: SteeringVectors
    alpha: float
    layers: tuple[int, ...]
    positions: Positions = "all"

    @property
    def label(self) -> str:
        """Vector, alpha and layers in words."""
        layers = ", ".join(map(str, self.layers))
        return f"{self.vectors.info.get('method', 'vector')}, alpha {self.alpha:+g}, layer {layers}"

    def hooks(self) -> FwdHooks:
        """Hooks for a whole forward pass or, with ``positions="all"``, for anything."""
        return self.vectors.hooks(self.alpha, self.layers, positions=self.positions)

    def __call__(self, prompt_len: int) -> FwdHooks:
        """Hooks for ``generate``, which says how long the prompt is."""
        return self.vectors.hooks(self.alpha, self.layers, positions=self.positions, prompt_len=prompt_len)
