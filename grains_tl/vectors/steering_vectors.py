"""From differences to steering vectors: reduction, sign, size, arithmetic. No model is run here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.checks import finite, layer_numbers, listed, whole
from grains_tl._util.files import write_atomically
from grains_tl._util.tensors import lasting
from grains_tl.hooks.steer import Gate, Operator, Positions
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.matching import require_match
from grains_tl.vectors.steering import Scale, Steering
from grains_tl.vectors.torch_hooks import TorchHooks

#: A sum this much shorter than its terms is float32 round-off.
CANCELLED = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors:
    """One direction per layer, with its size and the scale that ``alpha`` is measured in.

    Attributes:
        directions: ``[layer, d_model]``, unit length; +alpha pushes towards chosen. A row of zeros (with magnitude 0,
            as ``v * 0`` or ``v - v`` give it) has no direction, and steering there changes nothing.
        layers: the layer each row belongs to, counted from 0 (``blocks.{l}.hook_resid_post``).
        magnitudes: ``[layer]``, length of the mean difference along the direction, in residual units.
        resid_norms: ``[layer]``, typical residual norm: ``alpha=0.2`` is a step of 0.2 of it.
        info: how the vectors were made (model, method, seeds, versions, ...); saved as the manifest.

    Raises:
        ValueError: shapes that do not fit each other, rows that are neither of unit length nor empty, bad sizes.

    Examples:
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> [name for name, _ in v.hooks(alpha=0.2, layers=[5])]
        ['blocks.5.hook_resid_post']
        >>> v.cosine(v + v).tolist()
        [1.0, 1.0]
    """

    directions: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    magnitudes: Float[Tensor, "layer"]
    resid_norms: Float[Tensor, "layer"]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("directions", "magnitudes", "resid_norms"):
            object.__setattr__(self, name, lasting(getattr(self, name)))
        n = len(self.layers)
        shapes = (tuple(self.directions.shape[:1]), tuple(self.magnitudes.shape), tuple(self.resid_norms.shape))
        if self.directions.ndim != 2 or shapes != ((n,), (n,), (n,)):
            raise ValueError(
                f"{n} layers need directions [{n}, d_model], magnitudes [{n}] and resid_norms [{n}]; got "
                f"{tuple(self.directions.shape)}, {tuple(self.magnitudes.shape)}, {tuple(self.resid_norms.shape)}"
            )
        norms, dtype = self.directions.float().norm(dim=-1), self.directions.dtype
        near = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2  # half precision rounds every entry
        bad = [
            layer
            for layer, norm, size in zip(self.layers, norms.tolist(), self.magnitudes.tolist(), strict=True)
            if not (abs(norm - 1) <= near or norm == size == 0)  # NaN is neither
        ]
        if bad:
            raise ValueError(f"directions at layers {bad} are not unit vectors; use SteeringVectors.from_raw")
        if len(set(self.layers)) < n or any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers {list(self.layers)}; expected different whole numbers from 0")
        for name, sizes in (("magnitudes", self.magnitudes), ("resid_norms", self.resid_norms)):
            if not bool(torch.isfinite(sizes).all()) or bool((sizes < 0).any()):
                raise ValueError(f"{name} are {sizes.tolist()}; finite lengths are needed")

    def __repr__(self) -> str:
        what = f"layers {list(self.layers)}, d_model {self.directions.shape[1]}"
        return f"SteeringVectors({', '.join([what, *made_from(self.info)])})"

    def _repr_html_(self) -> str:
        from grains_tl.vectors.display import vectors_html  # which imports this module

        return vectors_html(self)

    @classmethod
    def from_raw(
        cls,
        raw: Float[Tensor, "layer d_model"],
        layers: Sequence[int],
        resid_norms: Float[Tensor, "layer"],
        info: Mapping[str, Any] | None = None,
    ) -> SteeringVectors:
        """Split vectors of any length into unit directions and magnitudes.

        Args:
            raw: ``[layer, d_model]`` vectors, residual units.
            layers: the layer of each row.
            resid_norms: ``[layer]`` typical residual norm of each layer, the unit of ``alpha``.
            info: what is to be stored with them.

        Returns:
            ``SteeringVectors`` with unit directions and the norms of ``raw``.

        Raises:
            ValueError: a zero or non-finite row, named by its layer; arrays that do not fit each other.
        """
        layers = layer_numbers(layers)
        raw, resid_norms = torch.as_tensor(raw), torch.as_tensor(resid_norms)
        if raw.ndim != 2 or not len(layers) or raw.shape[0] != len(layers) or resid_norms.shape != raw.shape[:1]:
            raise ValueError(
                f"vectors {list(raw.shape)} and norms {list(resid_norms.shape)} for layers {layers}; a [layer, d_model] "
                "array, one norm and one number per layer are needed"
            )
        size = raw.float().norm(dim=-1)
        bad = [layer for layer, s in zip(layers, size.tolist(), strict=True) if not (math.isfinite(s) and s > 0)]
        if bad:
            raise ValueError(f"the vector at layers {bad} is zero or not finite: there is no direction to steer along")
        return cls(raw.float() / size[:, None], tuple(layers), size, resid_norms.float(), dict(info or {}))

    # -- use --

    def steering(
        self,
        alpha: float | int,
        layers: int | Sequence[int] | None = None,
        *,
        operator: Operator = "add_renorm",
        positions: Positions | Bool[Tensor, "batch pos"] = "all",
        gate: Gate | None = None,
        scale: Scale = "residual",
    ) -> Steering:
        """Steering as a value, for everything that takes ``fwd_hooks``: ``generate``, ``score_pairs``, sweeps, ...

        Args:
            alpha: step as a fraction of the layer's typical residual norm; with ``scale="raw"`` a multiple of the
                vector's own length. For ``operator="ablate"`` the share of the component taken out.
            layers: one or several of the stored layers; may be left out if there is only one. -1 is the model's last.
            operator: ``"add_renorm"`` (the paper's), ``"add"``, ``"ablate"`` or ``"clamp"``.
            positions: ``"all"``, ``"prompt"``, ``"generated"``, ``"last"`` or a ``[batch, pos]`` mask.
            gate: steer only rows or positions where it is True (``hooks.ThresholdGate``).
            scale: unit of ``alpha``.

        Returns:
            ``Steering``, with ``.hooks()``, ``.applied(model)``, ``.label`` and ``.key``.

        Raises:
            ValueError: a layer that is not stored or named twice, several stored layers and none named, a non-finite
                ``alpha``, an unknown option.

        Examples:
            >>> generate(model, "The film was", vectors.steering(0.2, 12, positions="generated"))    # doctest: +SKIP
        """
        if layers is None and len(self.layers) > 1:
            raise ValueError(f"name the layers to steer: layers=[...]; stored are {list(self.layers)}")
        return Steering(self, alpha, tuple(self.layer_list(layers)), operator, positions, gate, scale)

    def hooks(
        self,
        alpha: float | int,
        layers: int | Sequence[int] | None = None,
        *,
        operator: Operator = "add_renorm",
        positions: Positions | Bool[Tensor, "batch pos"] = "all",
        prompt_len: int | Int[Tensor, "batch"] | None = None,
        gate: Gate | None = None,
        scale: Scale = "residual",
    ) -> FwdHooks:
        """``steering(...)`` as plain hooks for ``run_with_hooks`` or ``model.hooks``.

        Args:
            alpha: see ``steering``, as for all but ``prompt_len``.
            layers: at which of the stored layers.
            operator: how the step is applied.
            positions: where.
            prompt_len: see ``steer_hook``.
            gate: at which rows or positions of these.
            scale: unit of ``alpha``.

        Returns:
            ``[(hook name, fn)]``, one per layer.

        Raises:
            ValueError: as ``steering``.
        """
        made = self.steering(alpha, layers, operator=operator, positions=positions, gate=gate, scale=scale)
        return made.for_prompt(prompt_len)

    def torch_hooks(
        self,
        hf_model: Any,
        alpha: float | int,
        layers: int | Sequence[int] | None = None,
        *,
        operator: Operator = "add_renorm",
        positions: Positions | Bool[Tensor, "batch pos"] = "all",
        prompt_len: int | Int[Tensor, "batch"] | None = None,
        gate: Gate | None = None,
        scale: Scale = "residual",
    ) -> TorchHooks:
        """``steering(...)`` on a plain Hugging Face model, see ``Steering.torch_hooks``.

        Args:
            hf_model: a decoder-only model of transformers.
            alpha: see ``steering``, as for all but ``prompt_len``.
            layers: at which of the stored layers.
            operator: how the step is applied.
            positions: where.
            prompt_len: where the prompts end, padding in front included.
            gate: at which rows or positions of these.
            scale: unit of ``alpha``.

        Returns:
            The hooks, registered until ``remove()`` or the end of a ``with`` block.

        Raises:
            ValueError: as ``Steering.torch_hooks``.

        Examples:
            >>> with vectors.torch_hooks(hf_model, 0.2, 12):          # doctest: +SKIP
            ...     hf_model.generate(**tokenizer("The film was", return_tensors="pt"))
        """
        made = self.steering(alpha, layers, operator=operator, positions=positions, gate=gate, scale=scale)
        return made.torch_hooks(hf_model, prompt_len=prompt_len)

    def layer_list(self, layers: int | Sequence[int] | None) -> list[int]:
        """Stored layers as numbers from 0.

        Args:
            layers: one, several, or ``None`` for all. Negative ones count from the model's last layer, where the vectors
                say how many it has or hold all from 0 on.

        Returns:
            The layers in the order given.

        Raises:
            ValueError: a layer that is not stored, or a negative one that cannot be counted.
        """
        if layers is None:
            return list(self.layers)
        alone = not hasattr(layers, "__iter__") or getattr(layers, "ndim", 1) == 0
        return [self._numbered(whole("layer", x)) for x in ([layers] if alone else listed("layers", layers))]

    def _numbered(self, layer: int) -> int:
        number = layer
        if layer < 0:
            about = self.info.get("model")
            known = about.get("n_layers") if isinstance(about, Mapping) else None
            if known is None and sorted(self.layers) != list(range(len(self.layers))):
                raise ValueError(
                    f"layer {layer}: these vectors do not say how many layers the model has; name one of {list(self.layers)}"
                )
            number += len(self.layers) if known is None else int(known)
        if number not in self.layers:
            asked = f"{layer}" if number == layer or number < 0 else f"{number} (given as {layer})"
            raise ValueError(f"no vector for layer {asked}; stored are {list(self.layers)}")
        return number

    def at(self, layers: int | Sequence[int]) -> SteeringVectors:
        """The same for some of the stored layers (ValueError: a layer that is not stored, or none)."""
        chosen = self.layer_list(layers)
        if not chosen:
            raise ValueError(f"layers=[]; name some of the stored ones, {list(self.layers)}")
        rows = [self.layers.index(layer) for layer in chosen]
        return replace(
            self,
            directions=self.directions[rows],
            layers=tuple(chosen),
            magnitudes=self.magnitudes[rows],
            resid_norms=self.resid_norms[rows],
        )

    def __getitem__(self, layers: int | Sequence[int]) -> SteeringVectors:
        """``vectors[20]`` or ``vectors[[12, 20]]``: as ``at``, by layer and not by row."""
        return self.at(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[SteeringVectors]:
        """The vector of each layer."""
        return (self.at([layer]) for layer in self.layers)

    def to(self, target: torch.device | torch.dtype | str) -> SteeringVectors:
        """The same on another device, or with directions of another dtype (sizes stay in float32)."""
        if isinstance(target, torch.dtype):
            return replace(self, directions=self.directions.to(target))
        return replace(
            self, **{name: getattr(self, name).to(target) for name in ("directions", "magnitudes", "resid_norms")}
        )

    # -- arithmetic --

    @property
    def raw(self) -> Float[Tensor, "layer d_model"]:
        """Directions times magnitudes, float32."""
        return self.directions.float() * self.magnitudes[:, None]

    def __add__(self, other: SteeringVectors) -> SteeringVectors:
        """Sum of the raw vectors (directions times magnitudes)."""
        return self._plus(other, "+")

    def __radd__(self, other: Any) -> SteeringVectors:
        """``sum([v, w])`` begins with the number 0."""
        return self if isinstance(other, (int, float)) and other == 0 else self._plus(other, "+")

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        return self._plus(other, "-")

    def _plus(self, other: SteeringVectors, sign: Literal["+", "-"]) -> SteeringVectors:
        self._require_same_space(other)
        own, term = self.raw, other.raw.to(self.directions.device)
        raw = own + term if sign == "+" else own - term
        # what is left of a sum that cancels is round-off, and no direction to steer along
        largest = torch.maximum(self.magnitudes, other.magnitudes.to(own.device))
        return self._with_raw(raw, CANCELLED * largest, _combined(self, sign, other))

    def __mul__(self, factor: float | int) -> SteeringVectors:
        """Scale the magnitude; ``alpha`` counts residual norms, so only the factor's sign shows unless ``scale="raw"``."""
        raw = self.raw * finite("factor", factor)
        return self._with_raw(raw, torch.zeros_like(self.magnitudes), self.info)

    __rmul__ = __mul__

    def __truediv__(self, factor: float | int) -> SteeringVectors:
        divisor = finite("divisor", factor)
        if divisor == 0:
            raise ValueError("vectors cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> SteeringVectors:
        return self * -1.0

    def _with_raw(
        self, raw: Float[Tensor, "layer d_model"], nothing: Float[Tensor, "layer"], info: Mapping[str, Any]
    ) -> SteeringVectors:
        """The same with other vectors; up to the length ``nothing`` a row counts as empty."""
        size = raw.norm(dim=-1)
        size = torch.where(size <= nothing, 0.0, size)
        directions = torch.where(size[:, None] > 0, raw / size[:, None], 0.0)
        return replace(self, directions=directions, magnitudes=size, info=dict(info))

    def cosine(self, other: SteeringVectors) -> Float[Tensor, "layer"]:
        """Cosine per layer with other vectors of the same layers; 0 where one of them has no direction."""
        self._require_same_space(other)
        return (self.directions.float() * other.directions.to(self.directions.device).float()).sum(-1)

    def _require_same_space(self, other: SteeringVectors) -> None:
        if not isinstance(other, SteeringVectors):
            raise ValueError(f"{other!r} is no SteeringVectors; vectors are added to vectors and multiplied by numbers")
        if self.layers != other.layers or self.directions.shape != other.directions.shape:
            raise ValueError(
                f"vectors of different spaces: layers {list(self.layers)} x d_model {self.directions.shape[1]} and "
                f"layers {list(other.layers)} x d_model {other.directions.shape[1]}; use .at(layers) to align them"
            )

    # -- files --

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the manifest in its header; complete or not at all. ``load`` reads it.

        Args:
            path: where to write; the folder must exist.

        Returns:
            The path.

        Examples:
            >>> import pathlib, tempfile
            >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
            >>> path = v.save(pathlib.Path(tempfile.mkdtemp()) / "v.safetensors")
            >>> SteeringVectors.load(path).layers
            (4, 5)
        """
        from grains_tl.vectors.files import file_content

        return write_atomically(path, file_content(self))

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> SteeringVectors:
        """``load_vectors``: read a file that ``save`` wrote."""
        from grains_tl.vectors.files import load_vectors

        return load_vectors(path, model)

    def require_match(self, model: HookedModel) -> None:
        """Refuse a model these vectors were not made for.

        Args:
            model: the model to be steered.

        Raises:
            ValueError: naming what differs (model shape, or the weights' fingerprint).

        Warns:
            UserWarning: the same weights behind a tokenizer that treats BOS in another way.
        """
        require_match(self.info, self.layers, self.directions.shape[1], model)


def _combined(a: SteeringVectors, sign: str, b: SteeringVectors) -> dict[str, Any]:
    return {**a.info, "combined": [a.info.get("method", "?"), sign, b.info.get("method", "?")]}


def made_from(info: Mapping[str, Any]) -> list[str]:
    """Method, model and number of records, as far as they are known."""
    made = [str(info["method"])] if "method" in info else []
    made += [str(info["model"].get("name"))] if isinstance(info.get("model"), Mapping) else []
    return [*made, f"{info['n_records']} records"] if "n_records" in info else made
