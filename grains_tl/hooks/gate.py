"""Deciding from the residual stream itself where to steer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.checks import finite
from grains_tl._util.files import short_hash


@dataclass(frozen=True, eq=False)
class ThresholdGate:
    """Open where a linear probe reads more than a threshold.

    The reading is the dot product of the residual with ``direction``, in the units of the residual stream: a fitted
    logistic regression with weights w and bias b opens at a share above one half with ``ThresholdGate(w, -b)``.

    Attributes:
        direction: ``[d_model]``, the probe's weights; their length counts.
        threshold: what the reading has to exceed.

    Raises:
        ValueError: a direction that is not one finite row, or a threshold that is no finite number.

    Examples:
        >>> gate = ThresholdGate(torch.tensor([1.0, 0.0]), 2.0)
        >>> gate(torch.tensor([[[3.0, 9.0], [1.0, 9.0]]])).tolist()
        [[True, False]]
    """

    direction: Float[Tensor, "d_model"]
    threshold: float

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not bool(torch.isfinite(self.direction).all()):
            raise ValueError(
                f"the gate's direction has the shape {tuple(self.direction.shape)}; expected one finite row [d_model]"
            )
        object.__setattr__(self, "threshold", finite("threshold", self.threshold))

    def __call__(self, act: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """``[batch, pos]``, True where the reading of ``act`` exceeds the threshold."""
        if act.shape[-1] != len(self.direction):
            raise ValueError(f"a gate of d_model {len(self.direction)} does not fit activations {tuple(act.shape)}")
        reading = (act.float() * self.direction.to(act.device).float()).sum(-1)  # autocast would round a product
        return reading > self.threshold

    @property
    def key(self) -> str:
        """What tells it apart in a checkpoint."""
        return short_hash([self.direction.tolist(), self.threshold])
