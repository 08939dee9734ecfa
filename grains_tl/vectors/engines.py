"""A steering for lm-evaluation-harness' ``steered`` model, for EasySteer and for vllm-lens, as their own readers take it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grains_tl._util.errors import OptionError
from grains_tl._util.files import plain, write_atomically
from grains_tl.vectors.control_vectors import write_control_vector
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steps import amounts


def export_steered(steering: Steering, path: str | Path, model: Any = None) -> Path:
    """Write the ``.pt`` file of lm-evaluation-harness' ``steered`` model.

    Its hooks sit on the outputs of the decoder layers, as ours do, and steer every position. ``"add"`` and ``"clamp"`` mean
    the same there as here; taking a direction out altogether (``"ablate"``, alpha 1) is its clamp to 0.

    Args:
        steering: from ``vectors.steering``, or ``load_vectors(path).chosen``.
        path: the file, which must end in .pt or .pth.
        model: a ``TransformerBridge`` or Hugging Face model from which the layers' names are taken; default ``layers.12``,
            as in Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-NeoX (GPT-2 has ``h.12``).

    Returns:
        The path.

    Raises:
        OptionError: another operator, positions or gate, another suffix, a model whose layers are not found.

    Examples:
        >>> export_steered(vectors.steering(0.2, 21, operator="add"), "steered.pt", model)         # doctest: +SKIP
        >>> # lm_eval run --model steered --model_args pretrained=NAME,steer_path=steered.pt --tasks ...
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise OptionError(f"{path}: lm-evaluation-harness tells such files by their suffix; expected .pt or .pth")
    ablates = getattr(steering, "operator", None) == "ablate" and steering.alpha == 1
    known = ("add", "clamp", "ablate") if ablates else ("add", "clamp")
    rows = amounts(steering, known, "lm-evaluation-harness")  # type: ignore[arg-type]
    names = "layers.{}" if model is None else _layer_names(model)
    manifest = _manifest(steering)
    content = {
        names.format(layer): {
            "steering_vector": direction,
            "steering_coefficient": 0.0 if ablates else amount,
            "action": "add" if steering.operator == "add" else "clamp",
            "bias": None,
            "head_index": None,
            "manifest": manifest,
        }
        for layer, (direction, amount) in rows.items()
    }
    file = io.BytesIO()
    torch.save(content, file)
    return write_atomically(path, file.getvalue())


def _manifest(steering: Steering) -> str:
    """As JSON: what the vectors say of themselves, what was chosen, and the sizes (magnitude, residual norm) by layer."""
    vectors = steering.vectors
    sizes = {
        str(layer): [float(vectors.magnitudes[row]), float(vectors.resid_norms[row])]
        for row, layer in enumerate(vectors.layers)
        if layer in steering.layers
    }
    about = {**vectors.info, "chosen": steering.choice, "alpha": steering.alpha, "sizes": sizes}
    return json.dumps(about, default=plain)


def _layer_names(model: Any) -> str:
    """The name of a decoder layer under the base model, with ``{}`` for its number."""
    hf_model: Any = getattr(model, "original_model", model)
    if not hasattr(hf_model, "config") or not hasattr(hf_model, "base_model"):
        raise OptionError(f"model is a {type(model).__name__}; expected a TransformerBridge or a Hugging Face model")
    n_layers = getattr(hf_model.config.get_text_config(), "num_hidden_layers", None)
    found = {
        name.replace("._original_component", "")
        for name, part in hf_model.base_model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == n_layers and "vision" not in name
    }
    if len(found) != 1:
        raise OptionError(
            f"the decoder layers of {type(hf_model).__name__} were not found; leave model out, or name another"
        )
    return f"{found.pop()}.{{}}"


def export_easysteer(steering: Steering, path: str | Path, *, model_hint: str = "llama") -> dict[str, Any]:
    """Write a GGUF file that EasySteer reads, and say how to apply it.

    EasySteer counts layers as here, block 0 included. Its ``normalize`` gives each token its norm back after the step, so
    this is the one engine that can do ``"add_renorm"``; its ``erase`` is ``"ablate"`` with alpha 1.

    Args:
        steering: from ``vectors.steering``, or ``load_vectors(path).chosen``.
        path: the file, which must end in .gguf: EasySteer takes no other.
        model_hint: the architecture's name; kept in the file.

    Returns:
        The fields of its ``VectorSpec``: ``source``, ``algorithm``, ``scale``, ``layers``, ``normalize``. Where to apply it
        (``apply=``) is named by the caller, as every position of prompt and generation.

    Raises:
        ImportError: without the ``gguf`` package.
        OptionError: another operator or amount, positions or a gate, another suffix.

    Examples:
        >>> export_easysteer(vectors.steering(0.2, 21), "v.gguf")                                  # doctest: +SKIP
        {'source': 'v.gguf', 'algorithm': 'direct', 'scale': 1.0, 'layers': [21], 'normalize': True}
    """
    if Path(path).suffix.lower() != ".gguf":
        raise OptionError(f"{path}: EasySteer tells such files by their suffix; expected .gguf")
    rows = amounts(steering, ("add", "add_renorm", "ablate"), "EasySteer")
    erases = steering.operator == "ablate"
    if erases and steering.alpha != 1:
        raise OptionError(
            f"EasySteer takes a direction out altogether (alpha 1); the steering takes out {steering.alpha:g}"
        )
    # what its own writer stores; "hidden_states" says that these are outputs of blocks
    native = {"version": 1, "component": "hidden_states", "metadata": {"mapping": []}}
    texts = {
        "controlvector.model_hint": model_hint,
        "controlvector.method": str(steering.vectors.info.get("method", "unknown")),
        "controlvector.easysteer": json.dumps(native),
        "grains_tl.manifest": _manifest(steering),
    }
    tensors = {layer: direction if erases else amount * direction for layer, (direction, amount) in rows.items()}
    write_control_vector(path, tensors, texts)
    return {
        "source": str(path),
        "algorithm": "erase" if erases else "direct",
        "scale": 1.0,
        "layers": list(rows),
        "normalize": steering.operator == "add_renorm",
    }


def vllm_lens_vector(steering: Steering) -> dict[str, Any]:
    """The steering as vllm-lens' ``SteeringVector``, in the form that goes over HTTP or into a JSON file.

    Layers count as here; every position of prompt and generation is steered. Its ``norm_match`` is not ``"add_renorm"`` (it
    scales the vector to each token's norm, and restores nothing), so it stays off.

    Args:
        steering: with operator ``"add"``.

    Returns:
        What ``SteeringVector.model_validate`` reads: ``activations`` (float32, base64), ``layer_indices``, ``scale``,
        ``norm_match``, ``position_indices``.

    Raises:
        OptionError: another operator, positions or a gate.

    Examples:
        >>> from grains_tl.vectors import SteeringVectors
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> vllm_lens_vector(v.steering(0.5, 5, operator="add"))["layer_indices"]
        [5]
    """
    rows = amounts(steering, ("add",), "vllm-lens")
    stacked = torch.stack([amount * direction for direction, amount in rows.values()]).numpy()
    return {
        "activations": {
            "data": base64.b64encode(stacked.tobytes()).decode("ascii"),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(stacked.shape),
        },
        "layer_indices": list(rows),
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
