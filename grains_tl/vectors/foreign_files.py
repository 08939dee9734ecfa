"""Vectors in other programs' files: the tensors in them, by the names they have there. Nothing in a file is executed.

Read are GGUF control vectors (llama.cpp, repeng), files of ``torch.save`` that hold tensors alone (steering-vectors'
``layer_activations``, lm-evaluation-harness' ``steered`` files, plain dictionaries), safetensors and NumPy files.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A file of vectors is a few megabytes; something this large is a model.
LARGEST = 2_000_000_000


@dataclass(frozen=True)
class FileContent:
    """What a file holds.

    Attributes:
        form: what kind of file it is, for messages and the manifest.
        tensors: by the file's own names.
        about: what else it says (operator, amount, the program's hint of the model, ...).
    """

    form: str
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: str | Path) -> FileContent:
    """The tensors of another program's file; its form is told by the content, not by the suffix.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a GGUF file without the gguf package.
        ValueError: a form that is not known, pickled objects, a damaged file, or one that holds a model.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{file} has {size / 1e9:.1f} GB; expected a file of vectors, which have a few MB at most")
    with file.open("rb") as handle:
        magic = handle.read(8)
    if magic[:4] == b"GGUF":
        return _gguf(file)
    if magic[:6] == b"\x93NUMPY":
        with _reading(file, "NumPy file of plain numbers"):
            return FileContent("NumPy array", {"array": _numpy(np.load(file, allow_pickle=False))})
    if magic[:2] == b"PK":
        return _zipped(file)
    if magic[:1] == b"\x80":  # torch.save before its files were zip archives
        return _torch(file)
    return _safetensors(file)


def _gguf(file: Path) -> FileContent:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise ImportError("reading a .gguf file needs the gguf package: pip install 'grains-tl[smollm2]'") from None

    class Reader(GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            # the reader goes on past the end of a cut file, for as long as a length in it says
            if count < 0 or int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    with _reading(file, "GGUF control vector"):
        reader = Reader(file)
        kind = _text_field(reader, "general.architecture")
        if kind not in ("controlvector", None):
            raise ValueError(f"it holds a model of architecture {kind!r}; gr.load_model(path=...) reads models")
        tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)).reshape(-1) for t in reader.tensors}
        about: dict[str, Any] = {"model_hint": _text_field(reader, "controlvector.model_hint")}
        manifest = _text_field(reader, "grains_tl.manifest")
    if manifest is not None:
        about["manifest"] = _mapping(manifest)
    return FileContent("GGUF control vector", tensors, {k: v for k, v in about.items() if v})


def _text_field(reader: Any, name: str) -> str | None:
    entry = reader.get_field(name)
    return None if entry is None else bytes(entry.parts[-1]).decode("utf-8", "replace")


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _zipped(file: Path) -> FileContent:
    """``torch.save`` and ``np.savez`` both write zip archives."""
    with _reading(file, "zip archive"), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(m.filename.endswith("data.pkl") for m in members):
        return _torch(file)
    if sum(m.file_size for m in members) > LARGEST:
        raise ValueError(f"{file} unpacks to more than {LARGEST / 1e9:.0f} GB; expected a file of vectors")
    with _reading(file, "NumPy archive of plain numbers"), np.load(file, allow_pickle=False) as arrays:
        return FileContent("NumPy archive", {name: _numpy(arrays[name]) for name in arrays.files})


def _numpy(array: Any) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"it holds an array of type {getattr(array, 'dtype', type(array))}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _torch(file: Path) -> FileContent:
    with _reading(file, "file of torch.save"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        try:
            with file.open("rb") as handle:  # given a path, torch goes by the suffix
                found = torch.load(handle, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                "it is damaged, or holds pickled Python objects besides tensors, which could run code. Where it was "
                "written, save the tensors alone, such as torch.save(vector.layer_activations, path)"
            ) from None
    return content_of(found, str(file))


@contextmanager
def _reading(file: Path, form: str) -> Iterator[None]:
    """One kind of error (ValueError) for whatever a damaged file makes of a reader."""
    try:
        yield
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file} is not a readable {form}: {said}") from None


def content_of(found: Any, name: str) -> FileContent:
    """Tensors of what another program holds in memory or in a file of ``torch.save``.

    Args:
        found: a tensor, a dictionary of tensors, steering-vectors' ``SteeringVector`` or its dictionary, repeng's
            ``ControlVector``, or the dictionary or list of lm-evaluation-harness' ``steered`` model.
        name: what it is called in messages.

    Raises:
        ValueError: something else.
    """
    for attribute, form in (("layer_activations", "steering-vectors"), ("directions", "repeng")):
        rows = found.get(attribute) if isinstance(found, Mapping) else getattr(found, attribute, None)
        if isinstance(rows, Mapping):
            kind = found.get("layer_type") if isinstance(found, Mapping) else getattr(found, "layer_type", None)
            if kind not in (None, "decoder_block"):
                raise ValueError(
                    f"{name} holds vectors for layer_type {kind!r}; only those for the output of blocks (decoder_block) can "
                    "be used here"
                )
            return FileContent(form, dict(_tensors(rows, name)))
    if isinstance(found, Mapping) and found and all(_is_steered(value) for value in found.values()):
        return _steered([{**value, "hookpoint": key} for key, value in found.items()], name)
    if isinstance(found, (list, tuple)) and found and all(_is_steered(value) for value in found):
        return _steered(list(found), name)
    if isinstance(found, Mapping):
        return FileContent("tensors by name", dict(_tensors(found, name)))
    if isinstance(found, (Tensor, np.ndarray)):
        return FileContent("tensor", dict(_tensors({"array": found}, name)))
    raise ValueError(f"{name} holds a {type(found).__name__}; expected tensors by layer, or one tensor")


def _tensors(rows: Mapping[Any, Any], name: str) -> Iterator[tuple[str, Tensor]]:
    if not rows:
        raise ValueError(f"{name} holds no vectors")
    for key, value in rows.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            raise ValueError(f"{name}: {key!r} is a {type(value).__name__}; expected a tensor")
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name}: {key!r} has dtype {tensor.dtype}; expected real numbers")
        yield str(key), tensor.detach().float().cpu()


def _is_steered(value: Any) -> bool:
    return isinstance(value, Mapping) and "steering_vector" in value


def _steered(entries: list[Mapping[str, Any]], name: str) -> FileContent:
    """lm-evaluation-harness: a vector times its coefficient is what is added."""
    rows, actions = {}, set()
    about: dict[str, Any] = {}
    for entry in entries:
        action, bias = entry.get("action", "add"), entry.get("bias")
        if isinstance(bias, Tensor) and bool(bias.any()) and action == "clamp":
            raise ValueError(
                f"{name}: {entry.get('hookpoint')!r} clamps relative to a bias, which no operator here does; take the bias "
                "away, or use action 'add'"
            )
        actions.add(str(action))
        own = _mapping(entry["manifest"]) if isinstance(entry.get("manifest"), str) else {}
        if isinstance(own.get("sizes"), dict):  # of this package: what was exported, whatever the coefficient
            about["manifest"] = own
        vector = dict(_tensors({entry.get("hookpoint"): entry["steering_vector"]}, name))
        try:
            coefficient = float(entry.get("steering_coefficient", 1.0))
        except (TypeError, ValueError, RuntimeError):
            said = entry["steering_coefficient"]
            raise ValueError(f"{name}: steering_coefficient is {said!r}; expected a number") from None
        for key, row in vector.items():
            unit = row / row.norm() if action == "clamp" else row
            rows[key] = (coefficient or 1.0 if about else coefficient) * unit
    if len(actions) > 1 or not actions <= {"add", "clamp"}:
        raise ValueError(f"{name} steers by {sorted(actions)}; expected 'add' or 'clamp' for all of its vectors")
    return FileContent("lm-evaluation-harness steered", rows, {"operator": actions.pop(), **about})


def _safetensors(file: Path) -> FileContent:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            header = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}), nor does it begin as a file of GGUF, torch.save or NumPy"
        ) from None
    return FileContent("safetensors", dict(_tensors(tensors, str(file))), header)
