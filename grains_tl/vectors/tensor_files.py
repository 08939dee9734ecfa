"""Files of tensors: safetensors with a manifest and a checksum, no pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_tl._util.files import plain
from grains_tl.hooks.sites import site_of_point, site_point
from grains_tl.vectors.directions import LayerDirections

FORMAT = "grains_tl.steering_vectors"

#: 1: without a checksum; still read. 2: with ``sha256`` over manifest and tensors. 3: of another site than the residual
#: stream after the block, which readers of 2 would take them for; other vectors are written as 2.
FORMAT_VERSION = 3

#: A path that is more likely a repository of the hub.
OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w-]+")


def vectors_content(vectors: LayerDirections) -> bytes:
    """What ``SteeringVectors.save`` writes: tensors, and a header with the manifest and the checksum of both."""
    tensors = {name: getattr(vectors, name) for name in ("directions", "magnitudes", "resid_norms")}
    about = {**vectors.info, "layers": list(vectors.layers), "hook_point": site_point(vectors.site, "{layer}")}
    return with_checksum(FORMAT, 2 if vectors.site == "resid_post" else FORMAT_VERSION, about, tensors)


def read_vectors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of such a file, with the right names and checksum.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else, a newer version, or a checksum that does not fit.
    """
    file = Path(path)
    hub = f", or read one of the hub: load_vectors('hf://{path}')" if OWNER_AND_NAME.fullmatch(str(path)) else ""
    header, tensors = read_tensors(file, f"vectors.save(path){hub}")
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
    return header, tensors


def fields_of(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ``SteeringVectors`` that a file holds; whatever a broken manifest raises is for the caller."""
    info = json.loads(header["manifest"])
    if not isinstance(info.get("model", {}), dict):
        raise ValueError("model is not a mapping")
    layers = tuple(int(layer) for layer in info.pop("layers"))
    site = site_of_point(str(info.pop("hook_point", site_point("resid_post", "{layer}"))))
    sizes = {k: v if k == "directions" and v.dtype.itemsize == 2 else v.float() for k, v in tensors.items()}
    return {"layers": layers, "info": info, "site": site, **sizes}


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


def digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a manifest and tensors."""
    found = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        one = tensors[name]
        found.update(f"{name}{one.dtype}{tuple(one.shape)}".encode())
        found.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
