"""From differences to steering vectors: sign, size, use and files. No model is run here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.checks import layer_numbers
from grains_tl._util.files import write_atomically
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.operators import Operator
from grains_tl.hooks.reading_gates import CosineGate, ProbeGate, gate_from
from grains_tl.hooks.sites import Site
from grains_tl.hooks.steer import Gate, Positions
from grains_tl.hooks.weights import Weighted
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.chosen import chosen_of
from grains_tl.vectors.directions import LayerDirections
from grains_tl.vectors.display import made_from, vectors_html
from grains_tl.vectors.hub import OnHub
from grains_tl.vectors.matching import require_match
from grains_tl.vectors.means import WithMeans
from grains_tl.vectors.steering import Scale, Steering
from grains_tl.vectors.tensor_files import fields_of, read_vectors, vectors_content
from grains_tl.vectors.torch_hooks import TorchHooks


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors(LayerDirections, WithMeans, OnHub):
    """One direction per layer, with its size and the scale that ``alpha`` is measured in.

    Attributes:
        directions: ``[layer, d_model]``, unit length; +alpha pushes towards chosen. A row of zeros (with magnitude 0,
            as ``v * 0`` or ``v - v`` give it) has no direction, and steering there changes nothing.
        layers: the layer each row belongs to, counted from 0 (``blocks.{l}.hook_resid_post`` or another ``site``).
        magnitudes: ``[layer]``, length of the mean difference along the direction, in residual units.
        resid_norms: ``[layer]``, typical residual norm (norm of the site's activation): ``alpha=0.2`` is 0.2 of it.
        info: how the vectors were made (model, method, seeds, versions, ...); saved as the manifest.
        site: which activation of the block they are added to (see ``build_vectors``).

    Raises:
        ValueError: shapes that do not fit each other, rows that are neither of unit length nor empty, bad sizes.

    Examples:
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> [name for name, _ in v.hooks(alpha=0.2, layers=[5])]
        ['blocks.5.hook_resid_post']
        >>> v.cosine(v + v).tolist()
        [1.0, 1.0]
    """

    def __repr__(self) -> str:
        what = f"layers {list(self.layers)}, d_model {self.directions.shape[1]}"
        what += "" if self.site == "resid_post" else f", site {self.site}"
        return f"SteeringVectors({', '.join([what, *made_from(self.info)])})"

    def _repr_html_(self) -> str:
        return vectors_html(self)

    @classmethod
    def from_raw(
        cls,
        raw: Float[Tensor, "layer d_model"],
        layers: Sequence[int],
        resid_norms: Float[Tensor, "layer"],
        info: Mapping[str, Any] | None = None,
        *,
        site: Site = "resid_post",
    ) -> SteeringVectors:
        """Split vectors of any length into unit directions and magnitudes.

        Args:
            raw: ``[layer, d_model]`` vectors, residual units.
            layers: the layer of each row.
            resid_norms: ``[layer]`` typical residual norm of each layer, the unit of ``alpha``.
            info: what is to be stored with them.
            site: which activation of the block they are added to.

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
        return cls(raw.float() / size[:, None], tuple(layers), size, resid_norms.float(), dict(info or {}), site)

    # -- use --

    def steering(
        self,
        alpha: float | int,
        layers: int | Sequence[int] | None = None,
        *,
        operator: Operator = "add_renorm",
        positions: Positions | Bool[Tensor, "batch pos"] | Weighted = "all",
        gate: Gate | None = None,
        scale: Scale = "residual",
    ) -> Steering:
        """Steering as a value, for everything that takes ``fwd_hooks``: ``generate``, ``score_pairs``, sweeps, ...

        Args:
            alpha: step as a fraction of the layer's typical residual norm; with ``scale="raw"`` a multiple of the
                vector's own length. For ``"rotate"`` an angle in radians, for ``"ablate"`` the share of the component taken
                out, for ``"match"`` the share of the way to the mean of chosen (negative: of rejected).
            layers: one or several of the stored layers; may be left out if there is only one. -1 is the model's last.
            operator: ``"add_renorm"`` (the paper's), ``"add"``, ``"rotate"``, ``"clip"``, ``"ablate"``, ``"match"`` (needs
                ``with_means``) or ``"clamp"``; ``hooks.operators`` has the formulas.
            positions: ``"all"``, ``"prompt"``, ``"generated"``, ``"last"``, a ``[batch, pos]`` mask, or
                ``hooks.Weighted`` for more at some positions than at others.
            gate: steer only rows or positions where it is True: ``hooks.ProbeGate``, ``CosineGate``, ``FunctionGate``,
                ``ThresholdGate``, a function of the activation or a boolean tensor.
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
        positions: Positions | Bool[Tensor, "batch pos"] | Weighted = "all",
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
        positions: Positions | Bool[Tensor, "batch pos"] | Weighted = "all",
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

    # -- files --

    def with_gate(self, gate: LayerGate) -> SteeringVectors:
        """The same vectors with a gate in their manifest, so that ``save`` keeps it.

        Args:
            gate: a ``ProbeGate`` or ``CosineGate``.

        Returns:
            Vectors whose ``gate`` is this one; ``steering(alpha, layers, gate=vectors.gate)`` uses it.

        Raises:
            ValueError: a gate that runs a function, which cannot be saved.
        """
        if not isinstance(gate, LayerGate):
            raise ValueError(f"a {type(gate).__name__} cannot be saved with vectors; give a ProbeGate or a CosineGate")
        return replace(self, info={**self.info, "gate": gate.as_info()})

    @property
    def gate(self) -> ProbeGate | CosineGate | None:
        """The gate that the manifest holds, ``None`` without one (ValueError: a broken one)."""
        return gate_from(self.info["gate"]) if "gate" in self.info else None

    @property
    def chosen(self) -> Steering | None:
        """The steering that whoever saved these vectors had chosen; ``None`` where the file names none."""
        return chosen_of(self)

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
        return write_atomically(path, vectors_content(self))

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> SteeringVectors:
        """Read a file that ``save`` wrote; ``load_vectors`` reads those of other programs too.

        Args:
            path: the file.
            model: if given, refuse vectors made for another model.

        Returns:
            The vectors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, a newer version, damaged content, or vectors of another model.
        """
        header, tensors = read_vectors(path)
        try:
            vectors = cls(**fields_of(header, tensors))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} has a broken manifest or tensors ({type(error).__name__}: {error})") from None
        if model is not None:
            vectors.require_match(model)
        return vectors

    def require_match(self, model: HookedModel) -> None:
        """Refuse a model these vectors were not made for.

        Args:
            model: the model to be steered.

        Raises:
            ValueError: naming what differs (model shape, or the weights' fingerprint).

        Warns:
            UserWarning: the same weights behind a tokenizer that treats BOS in another way.
        """
        require_match(self.info, self.layers, self.directions.shape[1], model, site=self.site)
