"""From differences to steering vectors: reduction, sign, size, arithmetic, files. No model is run here."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.checks import finite, layer_numbers
from grains_tl._util.files import plain, write_atomically
from grains_tl._util.tensors import lasting
from grains_tl.hooks.steer import Operator, Positions, steer_hook
from grains_tl.models.identity import model_identity, same_fingerprint
from grains_tl.tokens.rules import token_rules
from grains_tl.types import FwdHooks, HookedModel

FORMAT = "grains_tl.steering_vectors"

#: 1: without a checksum; still read. 2: with ``sha256`` over manifest and tensors.
FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors:
    """One direction per layer, with its size and the scale that ``alpha`` is measured in.

    Attributes:
        directions: ``[layer, d_model]``, unit length; +alpha pushes towards chosen.
        layers: the layer each row belongs to, counted from 0 (``blocks.{l}.hook_resid_post``).
        magnitudes: ``[layer]``, length of the mean difference along the direction, in residual units.
        resid_norms: ``[layer]``, typical residual norm: ``alpha=0.2`` is a step of 0.2 of it.
        info: how the vectors were made (model, method, seeds, versions, ...); saved as the manifest.

    Raises:
        ValueError: shapes that do not fit each other, non-finite or zero rows.

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
        norms = self.directions.norm(dim=-1)
        bad = [
            layer for layer, norm in zip(self.layers, norms.tolist(), strict=True) if not abs(norm - 1) <= 1e-3
        ]  # NaN too
        if bad:
            raise ValueError(f"directions at layers {bad} are not unit vectors; use SteeringVectors.from_raw")
        if len(set(self.layers)) < n or any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers {list(self.layers)}; each is a number from 0 and stands there once")
        for name, sizes in (("magnitudes", self.magnitudes), ("resid_norms", self.resid_norms)):
            if not bool(torch.isfinite(sizes).all()) or bool((sizes < 0).any()):
                raise ValueError(f"{name} are {sizes.tolist()}; finite lengths are needed")

    def __repr__(self) -> str:
        made = [str(self.info["method"])] if "method" in self.info else []
        made += [str(self.info["model"].get("name"))] if isinstance(self.info.get("model"), Mapping) else []
        made += [f"{self.info['n_records']} records"] if "n_records" in self.info else []
        what = f"layers {list(self.layers)}, d_model {self.directions.shape[1]}"
        return f"SteeringVectors({', '.join([what, *made])})"

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

    def hooks(
        self,
        alpha: float,
        layers: Sequence[int] | None = None,
        *,
        operator: Operator = "add_renorm",
        positions: Positions | Bool[Tensor, "batch pos"] = "all",
        prompt_len: int | Int[Tensor, "batch"] | None = None,
        scale: Literal["residual", "raw"] = "residual",
    ) -> FwdHooks:
        """Steering hooks for ``run_with_hooks``, ``model.hooks`` or ``grains_tl.generate``.

        Args:
            alpha: step as a fraction of the layer's typical residual norm; with ``scale="raw"`` a multiple of the
                vector's own length. For ``operator="ablate"`` the share of the component taken out.
            layers: at which of the stored layers; may be left out if there is only one.
            operator: ``"add_renorm"`` (the paper's), ``"add"``, ``"ablate"`` or ``"clamp"``.
            positions: ``"all"``, ``"prompt"``, ``"generated"``, ``"last"`` or a ``[batch, pos]`` mask.
            prompt_len: see ``steer_hook``.
            scale: unit of ``alpha``.

        Returns:
            ``[(hook name, fn)]``, one per layer.

        Raises:
            ValueError: a layer that is not stored or named twice, several stored layers and none named, a
                non-finite ``alpha``.
        """
        if scale not in ("residual", "raw"):
            raise ValueError(f"scale={scale!r}; it is 'residual' or 'raw'")
        alpha = finite("alpha", alpha)
        if layers is None and len(self.layers) > 1:
            raise ValueError(f"name the layers to steer: layers=[...]; stored are {list(self.layers)}")
        hooks: FwdHooks = []
        chosen = self.layers if layers is None else layer_numbers(layers)
        if not chosen:
            raise ValueError(f"no layers given, so nothing would be steered; stored are {list(self.layers)}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"layers {list(chosen)} steer one layer twice; name each once, and give a larger alpha")
        for layer in chosen:
            row = self._row(layer)
            unit = self.resid_norms[row] if scale == "residual" else self.magnitudes[row]
            amount = alpha if operator == "ablate" else alpha * float(unit)
            hooks += steer_hook(
                layer, self.directions[row], amount, operator=operator, positions=positions, prompt_len=prompt_len
            )
        return hooks

    def at(self, layers: Sequence[int]) -> SteeringVectors:
        """The same for some of the stored layers (ValueError: a layer that is not stored, or none)."""
        layers = layer_numbers(layers)
        if not layers:
            raise ValueError(f"layers=[]; name some of the stored ones, {list(self.layers)}")
        rows = [self._row(layer) for layer in layers]
        return replace(
            self,
            directions=self.directions[rows],
            layers=tuple(layers),
            magnitudes=self.magnitudes[rows],
            resid_norms=self.resid_norms[rows],
        )

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"no vector for layer {layer}; stored are {list(self.layers)}")
        return self.layers.index(layer)

    # -- arithmetic --

    @property
    def raw(self) -> Float[Tensor, "layer d_model"]:
        """Directions times magnitudes."""
        return self.directions * self.magnitudes[:, None]

    def __add__(self, other: SteeringVectors) -> SteeringVectors:
        """Sum of the raw vectors (directions times magnitudes)."""
        self._require_same_space(other)
        return self.from_raw(self.raw + other.raw, self.layers, self.resid_norms, _combined(self, "+", other))

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        self._require_same_space(other)
        return self.from_raw(self.raw - other.raw, self.layers, self.resid_norms, _combined(self, "-", other))

    def __mul__(self, factor: float) -> SteeringVectors:
        """Scale the magnitude; ``alpha`` counts residual norms, so only the factor's sign shows unless ``scale="raw"``."""
        return self.from_raw(self.raw * factor, self.layers, self.resid_norms, self.info)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVectors:
        return self * -1.0

    def cosine(self, other: SteeringVectors) -> Float[Tensor, "layer"]:
        """Cosine per layer with other vectors of the same layers."""
        self._require_same_space(other)
        return (self.directions * other.directions).sum(-1)

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
        """Write a safetensors file with the manifest in its header; complete or not at all.

        Args:
            path: where to write; the folder must exist.

        Returns:
            The path.

        Examples:
            >>> import pathlib, tempfile
            >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
            >>> path = v.save(pathlib.Path(tempfile.mkdtemp()) / "v.safetensors")
            >>> load_vectors(path).layers
            (4, 5)
        """
        from safetensors.torch import save

        # safetensors refuses tensors that share memory, such as one tensor given as both norms
        tensors = {
            "directions": self.directions.clone().contiguous(),
            "magnitudes": self.magnitudes.clone().contiguous(),
            "resid_norms": self.resid_norms.clone().contiguous(),
        }
        about = {**self.info, "layers": list(self.layers), "hook_point": "blocks.{layer}.hook_resid_post"}
        manifest = json.dumps(about, default=plain)
        header = {"format": FORMAT, "version": str(FORMAT_VERSION), "manifest": manifest}
        header["sha256"] = _digest(manifest, tensors)
        return write_atomically(path, save(tensors, metadata=header))

    def require_match(self, model: HookedModel) -> None:
        """Refuse a model these vectors were not made for.

        Args:
            model: the model to be steered.

        Raises:
            ValueError: naming what differs (model shape, or the weights' fingerprint).

        Warns:
            UserWarning: the same weights behind a tokenizer that treats BOS in another way.
        """
        made_for = self.info.get("model")
        have = model_identity(model, bare=True)
        if made_for is None:
            if self.directions.shape[1] != have["d_model"] or max(self.layers) >= have["n_layers"]:
                raise ValueError(
                    f"vectors of d_model {self.directions.shape[1]} up to layer {max(self.layers)} do not fit "
                    f"{have['name']} (d_model {have['d_model']}, {have['n_layers']} layers)"
                )
            return
        keys = ("d_model", "n_layers", "n_heads", "d_vocab")
        different = [f"{k}: {made_for.get(k)} -> {have[k]}" for k in keys if made_for.get(k) != have[k]]
        if not different and not same_fingerprint(made_for.get("fingerprint"), have["fingerprint"]):
            different = ["the weights (same shape, another fingerprint)"]
        if different:
            raise ValueError(
                f"these vectors were made for {made_for.get('name')}, the model is {have['name']}; different: "
                f"{'; '.join(different)}. Build vectors for this model, or load the one they belong to"
            )
        made, here = str(self.info.get("token_rules", "")).partition(";")[0], _bos_rule(model)
        if made and here and made != here:
            warnings.warn(
                f"the vectors were built with {made}, this model's tokenizer gives {here} (TransformerLens may reload "
                "one so that it adds BOS): prompts begin with another token. gr.load_model keeps the tokenizer's own rule",
                UserWarning,
                stacklevel=2,
            )


def _bos_rule(model: HookedModel) -> str | None:
    return None if getattr(model, "tokenizer", None) is None else token_rules(model).describe().partition(";")[0]


def load_vectors(path: str | Path, model: HookedModel | None = None) -> SteeringVectors:
    """Read vectors written by ``SteeringVectors.save``; nothing in the file is executed.

    Args:
        path: the file.
        model: if given, refuse vectors made for another model.

    Returns:
        ``SteeringVectors``: directions ``[layer, d_model]`` of unit length, norms in residual units.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a newer format version, a checksum that does not fit, broken shapes, numbers that are
            not finite, or vectors of another model.

    Examples:
        >>> vectors = load_vectors("vectors.safetensors", model)     # doctest: +SKIP
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; write one with vectors.save(path)")
    try:
        with safe_open(str(file), framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{file} holds {header.get('format')!r}, not {FORMAT!r}; write it with vectors.save(path)")
    version = header.get("version", "none")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}; this package reads up to {FORMAT_VERSION}")
    wanted = {"directions", "magnitudes", "resid_norms"}
    if set(tensors) != wanted:
        raise ValueError(f"{file} holds the tensors {sorted(tensors)}; {sorted(wanted)} are needed")
    if int(version) > 1 and header.get("sha256") != _digest(header.get("manifest", ""), tensors):
        raise ValueError(f"{file} is damaged (its checksum does not fit what it holds); take a copy, or build it again")
    try:
        info = json.loads(header["manifest"])
        if not isinstance(info.get("model", {}), dict):
            raise ValueError("model is no mapping")
        layers = tuple(int(layer) for layer in info.pop("layers"))
        info.pop("hook_point", None)
        vectors = SteeringVectors(layers=layers, info=info, **{k: v.float() for k, v in tensors.items()})
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} has a broken manifest or tensors ({type(error).__name__}: {error})") from None
    if model is not None:
        vectors.require_match(model)
    return vectors


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        one = tensors[name]
        found.update(f"{name}{one.dtype}{tuple(one.shape)}".encode())
        found.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _combined(a: SteeringVectors, sign: str, b: SteeringVectors) -> dict[str, Any]:
    return {**a.info, "combined": [a.info.get("method", "?"), sign, b.info.get("method", "?")]}
