"""Gates that compare a number read off the residual stream with a threshold: a probe's log odds, a cosine.

They are fitted on two kinds of prompts. The threshold then comes from prompts that had no part in fitting, for a stated
rate of false fires (``calibrated``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl._util.files import short_hash
from grains_tl.hooks.gate_fitting import (
    Prompts,
    directions_apart,
    fitted_probe,
    listed_prompts,
    prompt_residuals,
    require_two_classes,
    threshold_at,
)
from grains_tl.hooks.layer_gates import Decide, LayerGate
from grains_tl.types import HookedModel

Own = TypeVar("Own", bound="ReadingGate")


@dataclass(frozen=True, eq=False)
class ReadingGate(LayerGate):
    """A gate that opens where a number read off the residual exceeds a threshold.

    Attributes:
        direction: ``[d_model]``, what is read.
        layer: where.
        threshold: what the reading has to exceed; -inf opens always, inf never.
        decide: ``"prompt_end"`` or ``"token"``.
        fitted_on: hashes of the prompts it was fitted on, which ``calibrated`` refuses.
    """

    direction: Float[Tensor, "d_model"]
    layer: int
    threshold: float = 0.0
    decide: Decide = "prompt_end"
    fitted_on: frozenset[str] = field(default=frozenset(), repr=False)
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._check()
        size = self.direction.float().norm() if self.direction.ndim == 1 else torch.tensor(math.nan)
        if not bool(torch.isfinite(size)) or size == 0:
            raise ValueError(
                f"the gate's direction has shape {tuple(self.direction.shape)} and norm {float(size):.3g}; expected one "
                "finite row [d_model] other than zero"
            )
        if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
            raise OptionError(f"threshold={self.threshold!r}; expected a number")
        object.__setattr__(self, "threshold", float(self.threshold))

    @abstractmethod
    def reading(self, resid: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """The number that is compared with the threshold."""

    def __call__(self, resid: Float[Tensor, "*shape d_model"]) -> Bool[Tensor, "*shape"]:
        """``[*shape]``, True where the reading exceeds the threshold."""
        if resid.shape[-1] != len(self.direction):
            raise ValueError(f"a gate of d_model {len(self.direction)} does not fit residuals {tuple(resid.shape)}")
        return self.reading(resid) > self.threshold

    def readings(self, model: HookedModel, prompts: Prompts) -> list[Float[Tensor, "place"]]:
        """The readings of each prompt: one at its end, or one for each of its tokens."""
        resid, counts, _ = prompt_residuals(model, prompts, self.layer, self.decide == "token")
        return list(self.reading(resid).split(counts))

    def calibrated(
        self: Own, model: HookedModel, neutral: Prompts, false_fire: float = 0.05, *, targets: Prompts = ()
    ) -> Own:
        """The same gate with the threshold that keeps false fires at a stated rate.

        Of n neutral readings the threshold is the ceil((n + 1)(1 - rate))-th in rising order. Then a further prompt of the
        same kind opens the gate with a probability of at most the rate (split conformal, arXiv 2107.07511, which counts
        prompts as exchangeable; tokens of one text are not quite).

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            neutral: prompts that are not to be steered, none of those it was fitted on; texts, conversations or records.
            false_fire: the share of such prompts (for ``decide="token"``: of their tokens) that may open it.
            targets: prompts that are to be steered; if given, it has to open for some of them.

        Returns:
            The gate with another ``threshold``.

        Raises:
            ValueError: prompts it was fitted on, a rate that so few prompts cannot support, or no target that opens it.

        Examples:
            >>> gate = ProbeGate.fit(model, targets[:40], neutral[:40], layer=8)                     # doctest: +SKIP
            >>> gate = gate.calibrated(model, neutral[40:80], 0.05, targets=targets[40:80])          # doctest: +SKIP
        """
        if not 0 < false_fire < 1:
            raise OptionError(f"false_fire={false_fire}; expected a share between 0 and 1, such as 0.05")
        resid, _, names = prompt_residuals(model, neutral, self.layer, self.decide == "token")
        shared = self.fitted_on & set(names)
        if shared:
            raise ValueError(
                f"{len(shared)} of the {len(names)} neutral prompts were used to fit the gate, so its false fires would "
                "look rarer than they are; calibrate on others"
            )
        unit = "neutral tokens" if self.decide == "token" else "neutral prompts"
        fitted = replace(self, threshold=threshold_at(self.reading(resid), false_fire, unit))
        asked = listed_prompts(targets)
        if asked and not any(bool((r > fitted.threshold).any()) for r in fitted.readings(model, asked)):
            raise ValueError(
                f"at a false-fire rate of {false_fire:g} the gate opens for none of the {len(asked)} targets: it cannot "
                "tell them from the neutral prompts; allow a higher rate, or read another layer"
            )
        return fitted

    @property
    def key(self) -> str:
        """What tells it apart in a checkpoint."""
        info = self.as_info()
        return short_hash([info[name] for name in sorted(info) if name != "fitted_on"])

    def as_info(self) -> dict[str, Any]:
        """The gate as plain data (``gate_from`` reads it)."""
        return {
            "kind": self.kind,
            "direction": self.direction.float().tolist(),
            "layer": self.layer,
            "threshold": str(self.threshold),
            "decide": self.decide,
            "fitted_on": sorted(self.fitted_on),
        }


@dataclass(frozen=True, eq=False)
class ProbeGate(ReadingGate):
    """Open where a logistic regression on the residual at a layer finds the targets.

    Attributes:
        direction: ``[d_model]``, the regression's weights.
        layer: the residual after this block is read.
        threshold: log odds that have to be exceeded; 0 is even odds, ``calibrated`` gives one for a rate of false fires.
        decide: ``"prompt_end"``: once per row; ``"token"``: at every position.
        fitted_on: hashes of the prompts it was fitted on.
        bias: of the regression.

    Raises:
        ValueError: a direction that is not one finite row, a negative layer, an unknown ``decide``.

    Examples:
        >>> gate = ProbeGate(torch.tensor([1.0, 0.0]), layer=3, bias=-2.0)
        >>> gate(torch.tensor([[3.0, 9.0], [1.0, 9.0]])).tolist()
        [True, False]
        >>> steering = vectors.steering(0.2, 12, gate=ProbeGate.fit(model, targets, neutral, 8))       # doctest: +SKIP
    """

    bias: float = 0.0
    kind: ClassVar[str] = "probe"

    def reading(self, resid: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """Log odds, ``[*shape]``."""
        # not a matrix product: autocast would round it
        return (resid.float() * self.direction.to(resid.device).float()).sum(-1) + self.bias

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        targets: Prompts,
        neutral: Prompts,
        layer: int,
        *,
        decide: Decide = "prompt_end",
        strength: float = 0.1,
    ) -> ProbeGate:
        """Fit scikit-learn's logistic regression (L2, both classes weighing the same) on standardised residuals.

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            targets: prompts that are to be steered: texts, conversations or records (their prompts, images included).
            neutral: prompts that are not.
            layer: where to read.
            decide: ``"prompt_end"`` or ``"token"``; for tokens every token of a prompt counts as its prompt does.
            strength: scikit-learn's ``C``, the inverse of the penalty.

        Returns:
            A gate at even odds; set its rate of false fires with ``calibrated`` on other prompts.

        Raises:
            ValueError: one class alone, a prompt in both, a layer that the model lacks.
        """
        yes, no, seen = require_two_classes(model, targets, neutral, layer, decide == "token")
        weights, bias = fitted_probe(yes, no, strength)
        return cls(weights, layer, 0.0, decide, seen, bias)

    def as_info(self) -> dict[str, Any]:
        """The gate as plain data."""
        return {**super().as_info(), "bias": self.bias}


@dataclass(frozen=True, eq=False)
class CosineGate(ReadingGate):
    """Open where the residual at a layer, less a centre, points along a direction.

    The condition of conditional activation steering (arXiv 2409.05907), with a difference of means as its direction.

    Attributes:
        direction: ``[d_model]``; only its direction counts.
        layer: the residual after this block is read.
        threshold: the cosine that has to be exceeded.
        decide: ``"prompt_end"``: once per row; ``"token"``: at every position.
        fitted_on: hashes of the prompts it was fitted on.
        centre: ``[d_model]``, taken off the residual first; ``None`` for nothing.

    Raises:
        ValueError: a direction or centre that is not one finite row, a negative layer, an unknown ``decide``.

    Examples:
        >>> gate = CosineGate(torch.tensor([2.0, 0.0]), layer=3, threshold=0.5)
        >>> gate(torch.tensor([[3.0, 1.0], [1.0, 9.0]])).tolist()
        [True, False]
    """

    centre: Float[Tensor, "d_model"] | None = None
    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centre is not None and (
            self.centre.shape != self.direction.shape or not bool(torch.isfinite(self.centre).all())
        ):
            raise ValueError(
                f"the gate's centre has shape {tuple(self.centre.shape)}; expected one finite row "
                f"{tuple(self.direction.shape)}"
            )

    def reading(self, resid: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """The cosine, ``[*shape]``; 0 for a residual that lies on the centre."""
        unit = self.direction.to(resid.device).float() / self.direction.float().norm()
        x = resid.float() if self.centre is None else resid.float() - self.centre.to(resid.device).float()
        return (x * unit).sum(-1) / x.norm(dim=-1).clamp_min(1e-12)

    @classmethod
    def fit(
        cls, model: HookedModel, targets: Prompts, neutral: Prompts, layer: int, *, decide: Decide = "prompt_end"
    ) -> CosineGate:
        """From the means of both kinds of prompts: their difference, and the point between them as the centre.

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            targets: prompts that are to be steered: texts, conversations or records (their prompts, images included).
            neutral: prompts that are not.
            layer: where to read.
            decide: ``"prompt_end"`` or ``"token"``.

        Returns:
            A gate at a cosine of 0; set its rate of false fires with ``calibrated`` on other prompts.

        Raises:
            ValueError: one class alone, a prompt in both, a layer that the model lacks.
        """
        yes, no, seen = require_two_classes(model, targets, neutral, layer, decide == "token")
        direction, centre = directions_apart(yes, no)
        return cls(direction, layer, 0.0, decide, seen, centre)

    def as_info(self) -> dict[str, Any]:
        """The gate as plain data."""
        return {**super().as_info(), "centre": None if self.centre is None else self.centre.float().tolist()}


def gate_from(info: Mapping[str, Any]) -> ProbeGate | CosineGate:
    """The gate that ``as_info`` wrote down.

    Raises:
        ValueError: something else.
    """
    try:
        direction, layer = torch.tensor(info["direction"]), int(info["layer"])
        shared = (direction, layer, float(info["threshold"]), info["decide"], frozenset(info["fitted_on"]))
        if info["kind"] == "probe":
            return ProbeGate(*shared, float(info["bias"]))
        if info["kind"] == "cosine":
            return CosineGate(*shared, None if info["centre"] is None else torch.tensor(info["centre"]))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the gate in the manifest is broken ({type(error).__name__}: {error})") from None
    raise ValueError(f"the manifest holds a gate of kind {info['kind']!r}; this package knows 'probe' and 'cosine'")
