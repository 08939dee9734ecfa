"""Vectors that other programs made, as ``SteeringVectors``: layer numbers, lengths and the unit of ``alpha``.

Every program here adds to the output of a block, and counts blocks from 0 (GGUF control vectors have none for block 0).
Negative numbers count from the last block. Files do not say how large the model's residuals are, so the unit of ``alpha``
is measured on the user's model; without one, ``scale="raw"`` steers by multiples of the vector as it was stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import layer_numbers
from grains_tl.models.running import device_of, hooked, require_layers, resid_post, run_blocks
from grains_tl.records.loading import neutral_texts
from grains_tl.tokens.prompts import prompt_inputs
from grains_tl.types import HookedModel
from grains_tl.vectors.foreign_files import FileContent, content_of, read_file
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Texts on which the residual norms of a model are measured.
N_TEXTS = 12

#: ``direction.12``, ``layers.12``, ``model.layers.12``, ``blocks.12.hook_resid_post``, ``layer_12``, ``12``, ``-1``.
NAME = re.compile(
    r"(?:[A-Za-z_]+\.)*(?:(?:layers?|blocks?|h|directions?|vectors?)[._])?(?P<layer>-?\d+)(?:\.(?P<point>[A-Za-z_.]+))?"
)

#: Names of a block's output, and of its input, which is the output of the block before.
OUTPUTS = {None, "hook_resid_post", "hook_out", "resid_post", "output", "steering_vector"}
INPUTS = {"hook_resid_pre", "hook_in", "resid_pre"}


def read_foreign(
    path: str | Path, model: HookedModel | None = None, layers: int | Sequence[int] | None = None
) -> SteeringVectors:
    """Another program's file as vectors; see ``load_vectors``."""
    return _assembled(read_file(path), str(path), model, layers)


def vectors_from(
    tensors: Any, model: HookedModel | None = None, *, layers: int | Sequence[int] | None = None
) -> SteeringVectors:
    """Vectors that another program holds in memory.

    Args:
        tensors: a mapping from layers (numbers, or names such as ``"model.layers.12"``) to ``[d_model]`` tensors or
            arrays; one ``[layer, d_model]`` or ``[d_model]`` tensor, with ``layers``; steering-vectors' ``SteeringVector``;
            repeng's ``ControlVector``.
        model: on which the unit of ``alpha`` is measured. Without it only ``scale="raw"`` steers.
        layers: of the rows, where the tensors do not say.

    Returns:
        The vectors, with the lengths that they came with as ``magnitudes``.

    Raises:
        ValueError: names without a layer or for another place than a block's output, rows of different widths, NaN, rows
            that are all zero, or vectors that do not fit the model.

    Examples:
        >>> vectors = vectors_from({3: torch.tensor([3.0, 4.0])})
        >>> vectors.magnitudes.tolist()
        [5.0]
        >>> vectors.hooks(1.0, 3, operator="add", scale="raw")      # doctest: +ELLIPSIS
        [('blocks.3.hook_resid_post', ...)]
    """
    return _assembled(content_of(tensors, "tensors"), "tensors", model, layers)


def _assembled(
    content: FileContent, name: str, model: HookedModel | None, layers: int | Sequence[int] | None
) -> SteeringVectors:
    n_layers = None if model is None else int(model.cfg.n_layers)
    rows = _rows(content.tensors, name, layers, n_layers)
    widths = {len(row) for row in rows.values()}
    if len(widths) > 1:
        raise ValueError(f"{name} holds vectors of different widths {sorted(widths)}; expected one d_model")
    bad = [layer for layer, row in rows.items() if not bool(torch.isfinite(row).all())]
    if bad:
        raise ValueError(f"{name}: the vectors at layers {sorted(bad)} have NaN or infinite entries")
    kept = sorted(layer for layer, row in rows.items() if bool(row.any()))
    if not kept:
        raise ValueError(f"{name}: every vector is zero, so there is no direction to steer along")
    raw = torch.stack([rows[layer] for layer in kept])
    vectors = _own(content, kept, raw)
    if vectors is None:
        info, norms = _info(content, kept, raw)
        if "chosen" in info and content.about["manifest"]["alpha"] < 0:
            raw = -raw  # the choice is for the vectors as they were before this alpha
        vectors = SteeringVectors.from_raw(raw, kept, norms, info)
    if model is None:
        return vectors
    vectors.require_match(model)
    return vectors if bool(vectors.resid_norms.all()) else with_resid_norms(vectors, model)


def _rows(
    tensors: Mapping[str, Tensor], name: str, layers: int | Sequence[int] | None, n_layers: int | None
) -> dict[int, Float[Tensor, "d_model"]]:
    if len(tensors) == 1:
        ((key, only),) = tensors.items()
        if (only.ndim == 2 and min(only.shape) > 1) or NAME.fullmatch(key) is None:
            return _unnamed(only, name, layers, n_layers)
    if layers is not None:
        raise ValueError(f"{name} says which layers its vectors are for ({', '.join(tensors)}); leave layers out")
    rows: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        row = tensor.squeeze()
        if row.ndim != 1:
            raise ValueError(f"{name}: {key} has shape {list(tensor.shape)}; expected one vector [d_model]")
        layer = _from_the_end(_layer(key, name), n_layers, name)
        if layer in rows:
            raise ValueError(f"{name} holds two vectors for layer {layer}; expected one per layer")
        rows[layer] = row
    return rows


def _unnamed(
    tensor: Tensor, name: str, layers: int | Sequence[int] | None, n_layers: int | None
) -> dict[int, Float[Tensor, "d_model"]]:
    """One tensor, whose rows need their layers."""
    rows = tensor if tensor.ndim == 2 else tensor.squeeze().reshape(1, -1)
    if layers is None:
        raise ValueError(
            f"{name} holds one tensor {list(tensor.shape)} and does not say for which layers; give layers=, such as "
            "layers=[12]"
        )
    numbers = layer_numbers([layers] if isinstance(layers, int) else layers)
    if tensor.ndim > 2 or len(numbers) != len(rows) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{name} holds a tensor {list(tensor.shape)}, given were layers {numbers}; expected a different layer per row"
        )
    return {_from_the_end(layer, n_layers, name): row for layer, row in zip(numbers, rows, strict=True)}


def _layer(key: str, name: str) -> int:
    """The block whose output a name stands for."""
    found = NAME.fullmatch(key)
    if found is None:
        raise ValueError(
            f"{name}: {key!r} names no layer; expected names such as 12, layers.12 or blocks.12.hook_resid_post"
        )
    layer, point = int(found.group("layer")), found.group("point")
    if point in INPUTS and layer > 0:
        return layer - 1
    if point not in OUTPUTS:
        raise ValueError(
            f"{name}: {key!r} is for another place than a block's output, the only one that can be steered here"
        )
    return layer


def _from_the_end(layer: int, n_layers: int | None, name: str) -> int:
    if layer >= 0:
        return layer
    if n_layers is None:
        raise ValueError(f"{name}: layer {layer} counts from the model's last layer; give the model")
    if layer + n_layers < 0:
        raise ValueError(f"{name}: layer {layer} of a model with {n_layers} layers")
    return layer + n_layers


def _own(content: FileContent, layers: Sequence[int], raw: Float[Tensor, "layer d_model"]) -> SteeringVectors | None:
    """The vectors as they were exported, from a manifest that has their sizes; ``None`` for other files."""
    own = content.about.get("manifest")
    sizes, alpha = (own.get("sizes"), own.get("alpha")) if isinstance(own, Mapping) else (None, None)
    try:
        lengths = torch.tensor([[float(x) for x in sizes[str(layer)]] for layer in layers])  # type: ignore[index]
        sign = -1.0 if float(alpha) < 0 else 1.0  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None
    if lengths.shape != (len(layers), 2) or not bool(torch.isfinite(lengths).all()) or bool((lengths < 0).any()):
        return None
    assert isinstance(own, Mapping)
    info = {key: value for key, value in own.items() if key not in ("sizes", "alpha")}
    if not isinstance(info.get("model", {}), Mapping):
        info.pop("model")
    unit = sign * raw / raw.norm(dim=-1, keepdim=True)
    magnitudes = torch.where(lengths[:, 0] > 0, lengths[:, 0], 1.0)
    return SteeringVectors(unit, tuple(layers), magnitudes, lengths[:, 1], {**info, "read_from": content.form})


def _info(
    content: FileContent, layers: Sequence[int], raw: Float[Tensor, "layer d_model"]
) -> tuple[dict[str, Any], Float[Tensor, "layer"]]:
    """The manifest, and the residual norms where the file was written by this package; else zeros for "not known"."""
    unknown = torch.zeros(len(layers))
    own = content.about.get("manifest")
    about = {key: value for key, value in content.about.items() if key != "manifest"}
    if isinstance(own, Mapping) and isinstance(own.get("alpha"), (int, float)) and own["alpha"]:
        kept = {key: value for key, value in own.items() if key != "alpha"}
        if not isinstance(kept.get("model", {}), Mapping):
            kept.pop("model")
        return {**kept, "read_from": content.form}, raw.norm(dim=-1) / abs(float(own["alpha"]))
    return {"method": f"read from {content.form}", "read_from": content.form, **about}, unknown


def with_resid_norms(
    vectors: SteeringVectors, model: HookedModel, texts: Sequence[str] | None = None
) -> SteeringVectors:
    """The same vectors with the residual norms of a model, so that ``alpha`` is a fraction of them.

    Args:
        vectors: of a model of this shape.
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        texts: on which to measure; default the first bundled neutral texts. The median over their tokens without the
            first is taken, as the first token's norm is of another order in many models.

    Returns:
        ``SteeringVectors`` with ``resid_norms`` ``[layer]``, the rest unchanged.

    Raises:
        ValueError: vectors of another width or for layers the model lacks.

    Examples:
        >>> vectors = with_resid_norms(load_vectors("foreign.gguf"), model)        # doctest: +SKIP
    """
    layers = require_layers(model, list(vectors.layers))
    vectors.require_match(model)
    norms: list[Tensor] = []
    with torch.no_grad():
        for text in neutral_texts(N_TEXTS) if texts is None else texts:
            ids = torch.tensor([prompt_inputs(model, text)[0]], device=device_of(model))
            store = torch.zeros(len(layers), ids.shape[1])
            with hooked(model, [(resid_post(layer), _keep(store, row)) for row, layer in enumerate(layers)]):
                run_blocks(model, ids, torch.ones_like(ids), max(layers) + 1, None)
            norms.append(store[:, 1:])
    return replace(vectors, resid_norms=torch.cat(norms, dim=1).median(dim=1).values)


def _keep(store: Tensor, row: int) -> Any:
    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        store[row] = act.detach()[0].float().norm(dim=-1).cpu()

    return hook_fn
