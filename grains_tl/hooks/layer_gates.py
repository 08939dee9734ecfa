"""Gates that read the residual stream at one layer and open for the steering at that layer or above.

1. The gate reads the residual after its layer: at the prompt's last position, or at every position.
2. It opens where the reading exceeds its threshold.
3. At ``decide="prompt_end"`` the decision holds for the whole row, the tokens decoded afterwards included; at
   ``decide="token"`` each position has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl._util.files import short_hash

#: When a gate decides: once for each row, at its prompt's last position, or at every position for itself.
Decide = Literal["prompt_end", "token"]


class LayerGate(ABC):
    """A gate with a layer of its own; ``vectors.steering(alpha, layers, gate=...)`` puts its reading hook there.

    Attributes:
        layer: the residual after this block is read; at most the lowest steered layer.
        decide: ``"prompt_end"`` or ``"token"``.
    """

    layer: int
    decide: Decide

    @abstractmethod
    def __call__(self, resid: Float[Tensor, "*shape d_model"]) -> Bool[Tensor, "*shape"]:
        """True where it opens."""

    @property
    def key(self) -> str:
        """What tells it apart in a checkpoint; empty if that is not known."""
        return ""

    def as_info(self) -> dict[str, Any]:
        """The gate as plain data, for the manifest of a file of vectors.

        Raises:
            ValueError: a gate that runs a function, which cannot be written down.
        """
        raise ValueError(
            f"a {type(self).__name__} runs a function, which cannot be saved with vectors; save a ProbeGate or a "
            "CosineGate, or make the gate again after loading"
        )

    def require_below(self, layers: Iterable[int]) -> None:
        """Refuse steering below the gate's layer, which would change what the gate reads (ValueError)."""
        below = sorted(layer for layer in layers if layer < self.layer)
        if below:
            raise ValueError(
                f"the gate reads layer {self.layer}, but layers {below} below it are steered, so it would read what it "
                f"decides about; give a gate at layer {below[0]} or lower"
            )

    def _check(self) -> None:
        object.__setattr__(self, "layer", whole("layer", self.layer))
        if self.layer < 0:
            raise OptionError(f"layer={self.layer}; layers count from 0")
        if self.decide not in get_args(Decide):
            raise OptionError(
                f"decide={self.decide!r}; expected 'prompt_end' (once per row) or 'token' (each position)"
            )


@dataclass(frozen=True, eq=False)
class FunctionGate(LayerGate):
    """Any function of the residual at a layer, as a gate.

    Attributes:
        fn: from residuals to booleans: ``[batch, d_model]`` to ``[batch]`` at the prompts' ends; for ``decide="token"``
            ``[batch, pos, d_model]`` to ``[batch, pos]``.
        layer: where to read, at most the lowest steered layer.
        decide: ``"prompt_end"`` or ``"token"``.
        name: tells it apart in a checkpoint; without one its results cannot be resumed.

    Raises:
        ValueError: no function, a negative layer, an unknown ``decide``.

    Examples:
        >>> gate = FunctionGate(lambda resid: resid.norm(dim=-1) > 1, layer=3)
        >>> gate(torch.tensor([[3.0, 4.0], [0.0, 0.5]])).tolist()
        [True, False]
    """

    fn: Callable[[Tensor], Tensor]
    layer: int
    decide: Decide = "prompt_end"
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise OptionError(f"fn is a {type(self.fn).__name__}; expected a function from residuals to booleans")
        self._check()

    def __call__(self, resid: Float[Tensor, "*shape d_model"]) -> Bool[Tensor, "*shape"]:
        """``[*shape]``, what the function says of each residual."""
        opened = self.fn(resid)
        if not isinstance(opened, Tensor) or opened.dtype != torch.bool or opened.shape != resid.shape[:-1]:
            kind = f"{tuple(opened.shape)} {opened.dtype}" if isinstance(opened, Tensor) else type(opened).__name__
            raise ValueError(
                f"the gate's function gave {kind} for residuals {tuple(resid.shape)}; expected booleans "
                f"{tuple(resid.shape[:-1])}"
            )
        return opened

    @property
    def key(self) -> str:
        """From its name, layer and ``decide``; empty without a name."""
        return short_hash(["function", self.name, self.layer, self.decide]) if self.name else ""
