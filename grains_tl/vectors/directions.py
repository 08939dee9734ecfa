"""Directions at layers, with their sizes: which layers there are, and arithmetic. No model is run here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.tensors import lasting
from grains_tl.hooks.sites import Site, require_site

#: A sum this much shorter than its terms is float32 round-off.
CANCELLED = 1e-6

#: A subclass gives its own kind back.
Own = TypeVar("Own", bound="LayerDirections")


@dataclass(frozen=True, eq=False, repr=False)
class LayerDirections:
    """What ``SteeringVectors`` are as numbers; see there for the attributes."""

    directions: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    magnitudes: Float[Tensor, "layer"]
    resid_norms: Float[Tensor, "layer"]
    info: Mapping[str, Any] = field(default_factory=dict)
    site: Site = "resid_post"

    def __post_init__(self) -> None:
        for name in ("directions", "magnitudes", "resid_norms"):
            object.__setattr__(self, name, lasting(getattr(self, name)))
        require_site(self.site)
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
                raise ValueError(f"{name} are {sizes.tolist()}; expected finite lengths")

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

    def at(self: Own, layers: int | Sequence[int]) -> Own:
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

    def heads(self: Own, heads: Iterable[tuple[int, int]], n_heads: int | None = None) -> Own:
        """Vectors of ``site="z"`` with the parts of some attention heads alone, the others being left as they are.

        Args:
            heads: (layer, head) of each, counted from 0; layers without a head are left out.
            n_heads: heads of a layer, if the vectors do not say for which model they were made.

        Returns:
            The same kind of vectors: directions of unit length, magnitudes of what was kept.

        Raises:
            ValueError: another site, a head or layer that is not there, or a number of heads that is not known.

        Examples:
            >>> v = LayerDirections(torch.tensor([[0.6, 0.8]]), (4,), torch.ones(1), torch.ones(1), site="z")
            >>> v.heads([(4, 1)], n_heads=2).directions.tolist()
            [[0.0, 1.0]]
        """
        about = self.info.get("model")
        n_heads = n_heads or (int(about.get("n_heads") or 0) if isinstance(about, Mapping) else 0)
        width = self.directions.shape[1]
        if self.site != "z" or not n_heads or width % n_heads:
            raise ValueError(
                f"heads of vectors at site={self.site!r}, width {width}, {n_heads or 'unknown'} heads; expected site='z' "
                "and a number of heads (n_heads=) that divides the width"
            )
        wanted = sorted({(whole("layer", layer), whole("head", head, 0)) for layer, head in heads})
        bad = [head for _, head in wanted if head >= n_heads]
        if bad or not wanted:
            raise ValueError(f"heads {bad or 'none'}; name some of 0 to {n_heads - 1} as (layer, head)")
        part = self.at(sorted({layer for layer, _ in wanted}))
        keep = torch.zeros(len(part.layers), n_heads, dtype=torch.bool)
        for layer, head in wanted:
            keep[part.layers.index(layer), head] = True
        mask = keep.repeat_interleave(width // n_heads, dim=1).to(part.directions.device)
        info = {**self.info, "heads": [list(pair) for pair in wanted]}
        return part._with_raw(part.raw * mask, torch.zeros_like(part.magnitudes), info)

    def __getitem__(self: Own, layers: int | Sequence[int]) -> Own:
        """``vectors[20]`` or ``vectors[[12, 20]]``: as ``at``, by layer and not by row."""
        return self.at(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self: Own) -> Iterator[Own]:
        """The vector of each layer."""
        return (self.at([layer]) for layer in self.layers)

    def to(self: Own, target: torch.device | torch.dtype | str) -> Own:
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

    def __add__(self: Own, other: LayerDirections) -> Own:
        """Sum of the raw vectors (directions times magnitudes)."""
        return self._plus(other, "+")

    def __radd__(self: Own, other: Any) -> Own:
        """``sum([v, w])`` begins with the number 0."""
        return self if isinstance(other, (int, float)) and other == 0 else self._plus(other, "+")

    def __sub__(self: Own, other: LayerDirections) -> Own:
        return self._plus(other, "-")

    def _plus(self: Own, other: LayerDirections, sign: Literal["+", "-"]) -> Own:
        self._require_same_space(other)
        own, term = self.raw, other.raw.to(self.directions.device)
        raw = own + term if sign == "+" else own - term
        # what is left of a sum that cancels is round-off, and no direction to steer along
        largest = torch.maximum(self.magnitudes, other.magnitudes.to(own.device))
        return self._with_raw(raw, CANCELLED * largest, _combined(self, sign, other))

    def __mul__(self: Own, factor: float | int) -> Own:
        """Scale the magnitude; ``alpha`` counts residual norms, so only the factor's sign shows unless ``scale="raw"``."""
        raw = self.raw * finite("factor", factor)
        return self._with_raw(raw, torch.zeros_like(self.magnitudes), _without_choice(self.info))

    __rmul__ = __mul__

    def __truediv__(self: Own, factor: float | int) -> Own:
        divisor = finite("divisor", factor)
        if divisor == 0:
            raise ValueError("vectors cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self: Own) -> Own:
        return self * -1.0

    def _with_raw(
        self: Own, raw: Float[Tensor, "layer d_model"], nothing: Float[Tensor, "layer"], info: Mapping[str, Any]
    ) -> Own:
        """The same with other vectors; up to the length ``nothing`` a row counts as empty."""
        size = raw.norm(dim=-1)
        size = torch.where(size <= nothing, 0.0, size)
        directions = torch.where(size[:, None] > 0, raw / size[:, None], 0.0)
        return replace(self, directions=directions, magnitudes=size, info=dict(info))

    def cosine(self, other: LayerDirections) -> Float[Tensor, "layer"]:
        """Cosine per layer with other vectors of the same layers; 0 where one of them has no direction."""
        self._require_same_space(other)
        return (self.directions.float() * other.directions.to(self.directions.device).float()).sum(-1)

    def _require_same_space(self, other: LayerDirections) -> None:
        if not isinstance(other, LayerDirections):
            raise ValueError(
                f"expected SteeringVectors, got {other!r}; vectors can be added to vectors and multiplied by numbers"
            )
        if self.site != other.site:
            raise ValueError(f"vectors of different sites, {self.site!r} and {other.site!r}, have nothing in common")
        if self.layers != other.layers or self.directions.shape != other.directions.shape:
            raise ValueError(
                f"vectors of different layers or widths: layers {list(self.layers)} x d_model "
                f"{self.directions.shape[1]} and "
                f"layers {list(other.layers)} x d_model {other.directions.shape[1]}; use .at(layers) to align them"
            )


def _combined(a: LayerDirections, sign: str, b: LayerDirections) -> dict[str, Any]:
    return {**_without_choice(a.info), "combined": [a.info.get("method", "?"), sign, b.info.get("method", "?")]}


def _without_choice(info: Mapping[str, Any]) -> dict[str, Any]:
    """An alpha, its evidence and class means were found for the vectors as they were, and say nothing of others."""
    return {key: value for key, value in info.items() if key not in ("chosen", "found", "evidence", "means")}
