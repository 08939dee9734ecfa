"""Vectors for other engines: GGUF control vectors, a Hugging Face checkpoint with biases, specs for vLLM, and others.

Most can only *add* a vector at every position. The paper's operator also restores each token's norm, which only EasySteer
can; elsewhere it is refused. ``gr.finding.as_add`` finds the ``"add"`` of the same KL and says what is lost.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_tl._util.files import plain
from grains_tl.hooks.operators import Operator
from grains_tl.models.hugging_face import load_causal_lm
from grains_tl.models.running import device_of, forward_logits, hugging_face_model
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.control_vectors import write_control_vector
from grains_tl.vectors.engines import export_easysteer as export_easysteer
from grains_tl.vectors.engines import export_steered as export_steered
from grains_tl.vectors.engines import vllm_lens_vector as vllm_lens_vector
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.steps import steps

#: The projection that writes a block's MLP output into the residual stream, by architecture family.
MLP_OUT = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "fc2")


def export_gguf(
    vectors: SteeringVectors,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    alpha: float = 1.0,
    operator: Operator = "add",
    model_hint: str = "llama",
) -> Path:
    """Write a control vector that llama.cpp reads (``--control-vector-scaled FILE SCALE``).

    llama.cpp adds ``SCALE * direction.{l}`` to the output of block ``l``, counted from 0 as here, at every position. With
    the default ``alpha=1`` its SCALE is our alpha. It has no tensor for block 0.

    Args:
        vectors: from ``build_vectors``.
        path: the file to write.
        layers: at which of the stored layers; all of them act at once.
        alpha: fraction of the residual norm that SCALE 1 stands for.
        operator: only ``"add"``.
        model_hint: the architecture's name in llama.cpp; kept in the file, not checked by it.

    Raises:
        ImportError: without the ``gguf`` package.
        ValueError: layer 0, or whatever ``steps`` refuses.

    Examples:
        >>> export_gguf(vectors, "v.gguf", layers=[21])      # doctest: +SKIP
        >>> # llama-cli -m model.gguf --control-vector-scaled v.gguf 0.3
    """
    rows = steps(vectors, alpha, layers, operator=operator)
    if 0 in rows:
        raise ValueError("llama.cpp has no control vector for block 0; export layers from 1 on")
    texts = {
        "controlvector.model_hint": model_hint,
        "grains_tl.manifest": json.dumps({**vectors.info, "alpha": alpha}, default=plain),
    }
    return write_control_vector(path, rows, texts)


def vllm_interventions(
    vectors: SteeringVectors,
    *,
    layers: Sequence[int] | None = None,
    alpha: float,
    operator: Operator = "add",
) -> dict[str, dict[str, Any]]:
    """The ``intervene=`` argument of TransformerLens 4's vLLM bridge (``RemoteBridge.boot_vllm``).

    Plain lists, so that it can be kept as JSON. The bridge adds the value to the residual stream after the block, at every
    position of the prompt and of the tokens generated.

    Args:
        vectors: from ``build_vectors``.
        layers: layers to steer; default all that are stored.
        alpha: step size, a fraction of the layer's typical residual norm.
        operator: only ``"add"`` can be exported.

    Raises:
        ValueError: whatever ``steps`` refuses.

    Examples:
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> vllm_interventions(v, layers=[5], alpha=0.5)
        {'blocks.5.hook_out': {'op': 'add', 'value': [0.0, 25.0]}}
    """
    rows = steps(vectors, alpha, layers, operator=operator)
    return {f"blocks.{layer}.hook_out": {"op": "add", "value": row.tolist()} for layer, row in rows.items()}


def export_hf(
    model: HookedModel,
    vectors: SteeringVectors,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    alpha: float,
    operator: Operator = "add",
) -> Path:
    """Write a Hugging Face checkpoint with the steering in its weights; plain ``from_pretrained`` loads it.

    The step becomes the bias of the projection that writes the MLP's output. Where a family has such biases already (gpt2,
    neox, opt, phi, ...) it is added to them; where the configuration can switch them on (``mlp_bias``: llama, granite,
    smollm3, nemotron, ...) they are zero except for this one. What was written is loaded again and its logits are compared
    with the hook's on a short run.

    Args:
        model: a ``TransformerBridge`` (it holds the Hugging Face model).
        vectors: made for this model.
        folder: a new or empty folder; the tokenizer goes there too. Nothing is left in it if the export is refused.
        layers: layers to steer; default all that are stored.
        alpha: step size, a fraction of the layer's typical residual norm.
        operator: only ``"add"`` can be exported.

    Raises:
        ValueError: a ``HookedTransformer``, a vision-language model, vectors of another model, an architecture without such
            a bias, logits that differ (a norm after the MLP, a scaled residual), or whatever ``steps`` refuses.

    Examples:
        >>> export_hf(model, vectors, "steered", layers=[21], alpha=0.2)             # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("steered")                          # doctest: +SKIP
    """
    rows = steps(vectors, alpha, layers, operator=operator)
    source = hugging_face_model(model)
    if getattr(model.cfg, "is_multimodal", False):
        raise ValueError("only text models can be exported as a checkpoint; export gguf or vllm, or use hooks")
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder")
    vectors.require_match(model)
    weights = _hugging_face_names(source)
    config = type(source.config).from_dict(source.config.to_dict())
    names = _bias_names(source, config, weights, list(rows))
    with torch.device("meta"):
        steered = type(source)(config)  # the shapes alone: the weights are those of the model itself
    for name, parameter in steered.state_dict().items():
        if name not in weights:
            if not name.endswith(".bias"):
                raise ValueError(f"{type(source).__name__}: weight {name} was not found in the model")
            weights[name] = torch.zeros(parameter.shape, dtype=source.dtype, device=device_of(model))
    for layer, row in rows.items():
        bias = weights[names[layer]]
        weights[names[layer]] = bias + row.to(bias)
    steered.load_state_dict({name: weights[name] for name in steered.state_dict()}, assign=True)
    steered.tie_weights()
    steered.generation_config = source.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        steered.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        _require_equal_logits(model, vectors.hooks(alpha, list(rows), operator="add"), temporary)
        shutil.copytree(temporary, target, dirs_exist_ok=True)
    return target


def _hugging_face_names(source: Any) -> dict[str, Tensor]:
    """The weights under the names a checkpoint has; the bridge's wrappers lengthen them, and list some twice."""
    return {name.replace("._original_component", ""): weight for name, weight in source.state_dict().items()}


def _bias_names(source: Any, config: Any, weights: dict[str, Tensor], layers: Sequence[int]) -> dict[int, str]:
    """The bias that takes each layer's step; switches ``mlp_bias`` on in ``config`` where that makes one."""
    found: dict[int, str] = {}
    ends = "|".join(re.escape(end) for end in MLP_OUT)
    for name in weights:
        match = re.search(rf"\.(\d+)\.(?:{ends})\.weight$", name)
        if match and int(match[1]) in layers:
            found[int(match[1])] = name.removesuffix("weight") + "bias"
    missing = [layer for layer in layers if found.get(layer) not in weights]
    if not missing:
        return found
    if len(found) == len(layers) and getattr(config, "mlp_bias", None) is False:
        config.mlp_bias = True
        return found
    raise ValueError(
        f"{type(source).__name__}: its blocks have no bias after the MLP and its configuration cannot switch one on, so "
        "the vector cannot go into a checkpoint that plain from_pretrained loads. Export gguf or vllm, or use hooks"
    )


def _require_equal_logits(model: HookedModel, hooks: FwdHooks, folder: str) -> None:
    dtype = hugging_face_model(model).dtype
    written = load_causal_lm(folder, dtype).to(device_of(model)).eval()
    ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, 12).long()[None].to(device_of(model))
    with torch.no_grad():
        ours = forward_logits(model, ids, torch.ones_like(ids), torch.arange(12, device=ids.device), hooks).float()
        theirs = written(ids).logits.float()
    worst, size = float((ours - theirs).abs().max()), float(ours.abs().max())
    # float32: the two add in another order; half precision rounds the residual stream in another place
    allowed = (1e-5 if dtype == torch.float32 else 3e-2) * max(size, 1.0)
    if not worst <= allowed:
        raise ValueError(
            f"{type(written).__name__}: a checkpoint with this bias gives other logits than the hook (largest difference "
            f"{worst:.2g} of {size:.3g}): something stands between the MLP and the residual stream. Nothing was "
            "written; export gguf or vllm, or use hooks"
        )
