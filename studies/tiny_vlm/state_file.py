"""A training state in one safetensors file: tensors as they are, the rest as JSON in the header. Nothing runs on load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from grains_tl._util.files import write_atomically


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists, numbers, texts and tensors; complete or not at all. Tuples come back as lists."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_packed(state, tensors))
    write_atomically(path, save(tensors, metadata={"outline": outline}))


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        ValueError: the file is something else, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            outline = json.loads((handle.metadata() or {})["outline"])
            return _unpacked(outline, {name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no training state ({type(error).__name__}: {error}); use another folder") from None


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that keeps the keys of dicts (an optimizer's are numbers) and names tensors by their place."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone().contiguous()  # tied weights share memory, which the format refuses
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(one, tensors)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_packed(one, tensors) for one in value]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpacked(one, tensors) for key, one in value["dict"]}
    return [_unpacked(one, tensors) for one in value] if isinstance(value, list) else value
