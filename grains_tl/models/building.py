"""A Hugging Face model as one of TransformerLens' own objects, with its tokenizer left as it is."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from typing import Any


def keep_tokenizer_as_is(tokenizer: Any, label: str) -> None:
    """TransformerLens reloads a tokenizer by name to switch BOS on unless it finds these two entries."""
    tokenizer.init_kwargs.setdefault("name_or_path", label)
    tokenizer.init_kwargs["add_bos_token"] = True


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer itself puts BOS before a text."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def with_prompts_of_the_tokenizer(model: Any) -> Any:
    """``model.to_tokens("text")`` gives the ids that the whole package uses: BOS exactly if the tokenizer adds it."""
    model.cfg.default_prepend_bos = adds_bos(model.tokenizer)
    return model


def transformer_lens_major() -> int:
    """The installed major version of TransformerLens."""
    return int(metadata.version("transformer-lens").split(".")[0])


def _require_usable_unembedding(hf_model: Any) -> None:
    """TransformerLens 3 gives the unembedding a bias, which nothing brings in where its weights are offloaded."""
    table: Any = hf_model.get_output_embeddings() if hasattr(hf_model, "get_output_embeddings") else None
    offloaded = hasattr(table, "_hf_hook") and table.weight.device.type == "meta"  # accelerate brings it in
    if offloaded and getattr(table, "bias", None) is None and transformer_lens_major() < 4:
        raise ValueError(
            "the model's unembedding (lm_head) is offloaded, which TransformerLens 3 cannot run; keep it in memory "
            "(device_map={..., 'lm_head': 'cpu'}), or use TransformerLens 4"
        )


def bridge_of(hf_model: Any, tokenizer: Any, label: str) -> Any:
    """A Hugging Face model as a ``TransformerBridge``, wrapped in place."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    _require_usable_unembedding(hf_model)
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


def require_hooked_transformer() -> None:
    """Refuse a TransformerLens that has no ``HookedTransformer`` (ImportError)."""
    version = metadata.version("transformer-lens")
    if transformer_lens_major() >= 4:
        raise ImportError(
            f"TransformerLens {version} has no HookedTransformer (removed in 4.0). Use kind='bridge', or install the "
            "last 3.x: pip install 'grains-tl[hooked]'"
        )


def hooked_of(hf_model: Any, tokenizer: Any, label: str) -> Any:
    """A Hugging Face model as a ``HookedTransformer``, without any weight folding."""
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
