"""Files of steering vectors: safetensors with a manifest and a checksum, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_tl._util.files import plain
from grains_tl.types import HookedModel
from grains_tl.vectors.foreign import read_foreign
from grains_tl.vectors.steering_vectors import SteeringVectors

FORMAT = "grains_tl.steering_vectors"

#: 1: without a checksum; still read. 2: with ``sha256`` over manifest and tensors.
FORMAT_VERSION = 2


def file_content(vectors: SteeringVectors) -> bytes:
    """What ``SteeringVectors.save`` writes: tensors, and a header with the manifest and the checksum of both."""
    tensors = {name: getattr(vectors, name) for name in ("directions", "magnitudes", "resid_norms")}
    about = {**vectors.info, "layers": list(vectors.layers), "hook_point": "blocks.{layer}.hook_resid_post"}
    return with_checksum(FORMAT, FORMAT_VERSION, about, tensors)


def with_checksum(kind: str, version: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file: tensors, and a header with a manifest and the checksum of both."""
    from safetensors.torch import save

    manifest = json.dumps(about, default=plain)
    # safetensors refuses tensors that share memory, such as one tensor given as both norms
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    header = {"format": kind, "version": str(version), "manifest": manifest, "sha256": digest(manifest, own)}
    return save(own, metadata=header)


def read_tensors(path: str | Path, write_with: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, neither checked yet.

    Args:
        path: the file.
        write_with: the call that writes such files, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; write one with {write_with}")
    try:
        with safe_open(str(file), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return handle.metadata() or {}, tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from None


def load_vectors(
    path: str | Path, model: HookedModel | None = None, *, layers: int | Sequence[int] | None = None
) -> SteeringVectors:
    """Read vectors written by ``SteeringVectors.save`` or by another program; nothing in the file is executed.

    Of other programs it reads GGUF control vectors (llama.cpp, repeng), files of ``torch.save`` with tensors alone
    (steering-vectors' ``layer_activations``, lm-evaluation-harness' ``steered``), safetensors and NumPy files with a tensor
    per layer. Such files do not say how large the model's residuals are: give the model, on which that is measured, or
    steer with ``scale="raw"``.

    Args:
        path: the file.
        model: if given, refuse vectors made for another model.
        layers: of the rows, for a file that holds a single tensor without layer numbers.

    Returns:
        ``SteeringVectors``: directions ``[layer, d_model]`` of unit length, norms in residual units.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a newer format version, a checksum that does not fit, broken shapes, numbers that are
            not finite, pickled objects, layers that cannot be told, or vectors of another model.

    Examples:
        >>> vectors = load_vectors("vectors.safetensors", model)     # doctest: +SKIP
        >>> vectors = load_vectors("happy.gguf", model)              # doctest: +SKIP
    """
    file = Path(path)
    if not _is_own(file):
        return read_foreign(file, model, layers)
    if layers is not None:
        raise ValueError(f"{file} says which layers its vectors are for; leave layers out, and use vectors.at(layers)")
    header, tensors = read_tensors(file, "vectors.save(path)")
    if header.get("format") != FORMAT:
        raise ValueError(f"{file} holds {header.get('format')!r}, not {FORMAT!r}; write it with vectors.save(path)")
    version = header.get("version", "none")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}; this package reads up to {FORMAT_VERSION}")
    wanted = {"directions", "magnitudes", "resid_norms"}
    if set(tensors) != wanted:
        raise ValueError(f"{file} holds the tensors {sorted(tensors)}; {sorted(wanted)} are needed")
    if int(version) > 1 and header.get("sha256") != digest(header.get("manifest", ""), tensors):
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


def _is_own(file: Path) -> bool:
    """Whether a file is one that ``SteeringVectors.save`` wrote, or not there at all."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return True
    try:
        with safe_open(str(file), framework="pt") as handle:
            return "format" in (handle.metadata() or {}) and "resid_norms" in handle.keys()  # noqa: SIM118 (not a dict)
    except SafetensorError:
        return False


def digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a manifest and tensors."""
    found = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        one = tensors[name]
        found.update(f"{name}{one.dtype}{tuple(one.shape)}".encode())
        found.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
