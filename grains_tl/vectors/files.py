"""Files of steering vectors: safetensors with a manifest and a checksum, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grains_tl._util.files import plain
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors

FORMAT = "grains_tl.steering_vectors"

#: 1: without a checksum; still read. 2: with ``sha256`` over manifest and tensors.
FORMAT_VERSION = 2


def file_content(vectors: SteeringVectors) -> bytes:
    """What ``SteeringVectors.save`` writes: tensors, and a header with the manifest and the checksum of both."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, such as one tensor given as both norms
    tensors = {
        "directions": vectors.directions.clone().contiguous(),
        "magnitudes": vectors.magnitudes.clone().contiguous(),
        "resid_norms": vectors.resid_norms.clone().contiguous(),
    }
    about = {**vectors.info, "layers": list(vectors.layers), "hook_point": "blocks.{layer}.hook_resid_post"}
    manifest = json.dumps(about, default=plain)
    header = {"format": FORMAT, "version": str(FORMAT_VERSION), "manifest": manifest}
    header["sha256"] = _digest(manifest, tensors)
    return save(tensors, metadata=header)


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
        sizes = {k: v if k == "directions" and v.dtype.itemsize == 2 else v.float() for k, v in tensors.items()}
        vectors = SteeringVectors(layers=layers, info=info, **sizes)
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
