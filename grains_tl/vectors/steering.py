"""Steering as a value: which vectors, how far, at which layers and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from jaxtyping import Bool, Int
from torch import Tensor

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of, write_atomically
from grains_tl._util.warn import warn_caller
from grains_tl.hooks.gate_run import GateRun
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.operators import UNITLESS, Operator
from grains_tl.hooks.row_gates import for_rows
from grains_tl.hooks.sites import site_point
from grains_tl.hooks.steer import Gate, Positions, require_border, require_step, steer_hook
from grains_tl.hooks.weights import PromptKey, Weighted
from grains_tl.models.running import resid_post
from grains_tl.types import FwdHooks
from grains_tl.vectors.combined import Steps
from grains_tl.vectors.directions import LayerDirections
from grains_tl.vectors.display import steering_html
from grains_tl.vectors.means import target_of
from grains_tl.vectors.tensor_files import vectors_content

#: No step on the residual stream is this many times its norm; such an alpha was meant in per cent.
HUGE = 10

#: The unit of ``alpha``: the layer's typical residual norm, or the vector's own length.
Scale = Literal["residual", "raw"]


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Steps):
    """A step along steering vectors; whatever takes ``fwd_hooks`` takes it. ``a + b`` takes two at once.

    Scoring, generation and sweeps tell it where each prompt ends, so scopes such as ``"generated"`` need nothing else.

    Attributes:
        vectors: ``SteeringVectors``.
        alpha: the step, see ``SteeringVectors.hooks``.
        layers: the steered layers, counted from 0.
        operator: how the step is applied.
        positions: where: a scope, a boolean ``[batch, pos]`` mask, or ``Weighted`` for more at some positions.
        gate: steer only rows or positions where it is True, see ``steer_hook``; ``ProbeGate`` and its like read at a layer
            of their own, at most the lowest steered one.
        scale: the unit of ``alpha``.

    Raises:
        ValueError: an option that cannot be meant, no layer, or one that is not stored or is named twice.

    Examples:
        >>> import torch
        >>> from grains_tl.vectors import SteeringVectors
        >>> vectors = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> steering = vectors.steering(0.2, 5, positions="generated")
        >>> steering.label
        'vector, alpha +0.2, layer 5, generated'
        >>> with steering.applied(model):                             # doctest: +SKIP
        ...     model.generate("The film was")
    """

    vectors: LayerDirections
    alpha: float | int
    layers: tuple[int, ...]
    operator: Operator = "add_renorm"
    positions: Positions | Bool[Tensor, "batch pos"] | Weighted = "all"
    gate: Gate | None = None
    scale: Scale = "residual"

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, LayerDirections):
            raise ValueError(f"vectors are a {type(self.vectors).__name__}; expected SteeringVectors")
        if self.scale not in ("residual", "raw"):
            raise ValueError(f"scale={self.scale!r}; expected 'residual' or 'raw'")
        object.__setattr__(self, "alpha", finite("alpha", self.alpha))
        layers, stored = self.vectors.layer_list(self.layers), list(self.vectors.layers)
        if not layers:
            raise ValueError(f"no layers given, so nothing would be steered; stored are {stored}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers {layers} steer one layer twice; name each once, and give a larger alpha")
        object.__setattr__(self, "layers", tuple(layers))
        require_step(self.operator, self.positions, self.gate)
        if self.scale == "residual" and self.operator in ("add", "add_renorm", "clip") and abs(self.alpha) >= HUGE:
            warn_caller(
                f"alpha={self.alpha:g} is a step of {abs(self.alpha):g} times the layer's residual norm; alpha is a "
                "fraction, 0.2 for 20 %"
            )
        if isinstance(self.gate, LayerGate):
            inside = self.vectors.site != "resid_post"
            self.gate.require_below([layer - inside for layer in layers])
        if self.operator == "match" and self.alpha != 0:
            self._targets()
        unknown = [r for r in self._rows if self.vectors.resid_norms[r] == 0 and bool(self.vectors.directions[r].any())]
        if unknown and self.scale == "residual" and self.operator not in UNITLESS and self.alpha != 0:
            raise ValueError(
                "alpha is a fraction of the residual norm, and these vectors do not say how large that is: read them with "
                "load_vectors(path, model), which measures it, or steer by their own length with scale='raw'"
            )

    @property
    def label(self) -> str:
        """A name for tables and plots: vector, alpha, layers, and whatever differs from the defaults."""
        layers = ", ".join(map(str, self.layers))
        parts = [str(self.vectors.info.get("method", "vector")), f"alpha {self.alpha:+g}"]
        parts += [f"layer{'s' if len(self.layers) > 1 else ''} {layers}"]
        parts += [] if self.vectors.site == "resid_post" else [self.vectors.site]
        parts += [] if self.operator == "add_renorm" else [self.operator]
        if not isinstance(self.positions, str):
            parts.append("weighted positions" if isinstance(self.positions, Weighted) else "masked positions")
        elif self.positions != "all":
            parts.append(self.positions)
        return ", ".join(parts + (["gated"] if self.gate is not None else []))

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"Steering({self.label})"

    def _repr_html_(self) -> str:
        return steering_html(self, self._rows)

    @property
    def key(self) -> str:
        """What the hooks do, for checkpoints; empty for gates or weights without a ``key``, which cannot be resumed."""
        gate, where = _key_part(self.gate), _key_part(self.positions)
        if "" in (gate, where):
            return ""
        more: list[Any] = [] if gate is None else [["gate", gate]]
        more += [["targets", self._targets()]] if self.operator == "match" and self.alpha != 0 else []
        more += (
            [] if self.scale == "residual" else [self.scale, [float(self.vectors.magnitudes[r]) for r in self._rows]]
        )
        more += [] if self.vectors.site == "resid_post" else [["site", self.vectors.site]]
        keys = [
            hash_of(
                [
                    [self.vectors.directions[row].tolist(), float(self.vectors.resid_norms[row])],
                    self.alpha,
                    layer,
                    self.operator,
                    where,
                    *more,
                ]
            )
            for row, layer in zip(self._rows, self.layers, strict=True)
        ]
        return keys[0] if len(keys) == 1 else hash_of(keys)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing: a step of length 0, or vectors without a direction."""
        empty = not bool(self.vectors.directions[self._rows].any())
        return empty or (self.alpha == 0 and self.operator != "clamp")

    @property
    def needs_prompt(self) -> bool:
        """Whether it acts differently before and after the end of the prompt."""
        by_row = isinstance(self.gate, LayerGate) and self.gate.decide == "prompt_end"
        weighted = isinstance(self.positions, Weighted) and not callable(self.positions.weights)
        return by_row or weighted or (isinstance(self.positions, str) and self.positions != "all")

    @property
    def needs_ids(self) -> bool:
        """Whether ``for_prompt`` has to be told the prompts' tokens."""
        return isinstance(self.positions, Weighted) and self.positions.needs_ids

    def for_prompt(
        self, prompt_len: int | Int[Tensor, "batch"] | None, prompts: Sequence[PromptKey] | None = None
    ) -> FwdHooks:
        """The hooks for runs whose prompts end at ``prompt_len`` (padding in front included; one number, or one a row).

        ``prompts``: a tuple of each row's token ids, for weights that belong to prompts.
        """
        hooks: FwdHooks = []
        run = GateRun(self.gate, require_border(prompt_len)) if isinstance(self.gate, LayerGate) else None
        if run is not None and not self.idle:
            hooks.append((resid_post(run.gate.layer), run))
        for layer, row in zip(self.layers, self._rows, strict=True):
            direction = self.vectors.directions[row]
            if not bool(direction.any()):
                hooks.append((site_point(self.vectors.site, layer), _unchanged))
                continue
            unit = self.vectors.resid_norms[row] if self.scale == "residual" else self.vectors.magnitudes[row]
            amount = self.alpha if self.operator in UNITLESS else self.alpha * float(unit)
            hooks += steer_hook(
                layer,
                direction,
                # the class mean has the sign
                (abs(amount), self._targets()[layer]) if self.operator == "match" else amount,
                operator=self.operator,
                positions=self.positions,
                prompt_len=prompt_len,
                gate=self.gate if run is None else run.opener(),
                site=self.vectors.site,
                prompts=prompts,
            )
        return hooks

    def scaled(self, factor: float | int) -> Steering:
        """The same with alpha multiplied, rounded to six digits so that a resumed search asks for the very same step."""
        return replace(self, alpha=float(f"{self.alpha * finite('factor', factor):.6g}"))

    def at_rows(self, rows: Sequence[bool] | Bool[Tensor, "batch"]) -> Steering:
        """The same for some rows of a batch alone, next to whatever gate it has.

        Args:
            rows: one boolean for each row; batches of other sizes are refused when they run.

        Returns:
            Steering with a gate on these rows; sums of such are several requests in one batch
            (``CombinedSteering.per_row``).

        Raises:
            ValueError: something else than booleans.

        Examples:
            >>> both = warm.at_rows([True, False]) + cold.at_rows([False, True])      # doctest: +SKIP
        """
        return replace(self, gate=for_rows(self.gate, rows))

    def save(self, path: str | Path) -> Path:
        """Write the vectors of the steered layers with this choice in the manifest; ``load_vectors(path).chosen`` has it.

        Args:
            path: the file to write.

        Returns:
            The path.

        Raises:
            ValueError: a mask or weights of positions, or a gate that runs a function, which a file cannot hold.

        Examples:
            >>> vectors.steering(0.2, 12).save("v.safetensors")             # doctest: +SKIP
            >>> load_vectors("v.safetensors", model).chosen.hooks()         # doctest: +SKIP
        """
        choice, part = self.choice, self.vectors.at(list(self.layers))
        gate = {} if self.gate is None else {"gate": cast("LayerGate", self.gate).as_info()}
        return write_atomically(path, vectors_content(replace(part, info={**part.info, **gate, "chosen": choice})))

    @property
    def choice(self) -> dict[str, Any]:
        """What a manifest says; OptionError for a mask or weights of positions, or a gate without a layer of its own."""
        if not isinstance(self.positions, str) or not (self.gate is None or isinstance(self.gate, LayerGate)):
            raise OptionError(
                f"the steering is {self.label}; a file holds no mask or weights of positions, and only gates that read a "
                "layer (ProbeGate, CosineGate). Save its vectors (steering.vectors.save) and give positions or gate again "
                "after loading, or save the steering without them"
            )
        named = {name: getattr(self, name) for name in ("alpha", "operator", "positions", "scale")}
        return {"layers": list(self.layers), **named, **({} if self.gate is None else {"gated": True})}

    def _targets(self) -> dict[int, float]:
        """By layer, the component that ``"match"`` moves to; any number does where nothing moves."""
        return {layer: target_of(self.vectors, layer, self.alpha) if self.alpha else 0.0 for layer in self.layers}

    @property
    def _rows(self) -> list[int]:
        return [self.vectors.layers.index(layer) for layer in self.layers]


def _unchanged(act: Tensor, hook: Any) -> Tensor:
    return act


def _key_part(value: Any) -> Any:
    """A name as it is, a tensor as a list, anything else by its key."""
    if value is None or isinstance(value, str):
        return value
    return value.tolist() if isinstance(value, Tensor) else str(getattr(value, "key", ""))
