"""Gates that open for some rows of a batch alone, whatever gate there is beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl._util.files import short_hash
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.steer import Gate


@dataclass(frozen=True, eq=False)
class RowsGate(LayerGate):
    """A gate with a layer of its own, for some rows.

    Attributes:
        gate: what decides in these rows.
        rows: ``[batch]``, True where it may open.
    """

    gate: LayerGate
    rows: Bool[Tensor, "batch"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", self.gate.layer)
        object.__setattr__(self, "decide", self.gate.decide)

    def __call__(self, resid: Float[Tensor, "batch *pos d_model"]) -> Bool[Tensor, "batch *pos"]:
        """What the gate says, and False in the other rows."""
        return _and_rows(self.gate(resid), self.rows)

    @property
    def key(self) -> str:
        """From the gate's own; empty where that is."""
        return short_hash([self.gate.key, self.rows.tolist()]) if self.gate.key else ""


def for_rows(gate: Gate | None, rows: Sequence[bool] | Bool[Tensor, "batch"]) -> Gate:
    """A gate that opens where another does, in some rows of a batch.

    Args:
        gate: ``None`` for one that is always open.
        rows: one boolean for each row of the batch.

    Raises:
        ValueError: something else than booleans, or no row at all.
    """
    given = torch.zeros(0) if isinstance(rows, str) else torch.as_tensor(rows)
    if given.dtype != torch.bool or given.ndim != 1 or not len(given):
        raise OptionError(f"rows={rows!r}; expected a boolean for each row of the batch, such as [True, False]")
    if gate is None:
        return given
    if isinstance(gate, LayerGate):
        return RowsGate(gate, given)
    if isinstance(gate, Tensor):
        return _and_rows(gate, given)
    inner = gate
    return lambda act: _and_rows(inner(act), given)


def _and_rows(opened: Tensor, rows: Bool[Tensor, "batch"]) -> Tensor:
    if opened.shape[0] not in (1, len(rows)):
        raise ValueError(
            f"the steering names {len(rows)} rows, and the gate decided for {opened.shape[0]}; run a batch of as many rows"
        )
    return opened & rows.to(opened.device).reshape(-1, *[1] * (opened.ndim - 1))
