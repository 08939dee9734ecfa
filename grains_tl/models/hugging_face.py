"""The few things the package takes from transformers besides loading, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer; GPT-2's ``Conv1D`` is one."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


@contextmanager
def plain_decoding(hf_model: Any, eos: int, pad: int) -> Iterator[list[int]]:
    """Decode by likelihood alone: a checkpoint's own settings (penalties, suppressed tokens, ...) come back afterwards.

    Only its end-of-text ids are kept; they are what the ``with`` statement gives.
    """
    from transformers import GenerationConfig

    own = hf_model.generation_config
    ends = getattr(own, "eos_token_id", None)
    end_ids = sorted({eos, *(ends if isinstance(ends, list) else [] if ends is None else [ends])})
    hf_model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=pad)
    try:
        yield end_ids
    finally:
        hf_model.generation_config = own


def tile_grid(size: tuple[int, int], pinpoints: Any, image_size: int, side: int) -> tuple[int, int]:
    """Rows and columns of patches, padding taken off, that LLaVA-NeXT cuts an image of ``size`` into."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    high, wide = get_anyres_image_grid_shape(size, pinpoints, image_size)
    rows, cols = unpad_image(torch.empty(1, high * side, wide * side), size).shape[1:]
    return int(rows), int(cols)


def load_causal_lm(folder: str, dtype: torch.dtype) -> Any:
    """A text model from a folder, as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def decoder(hf_model: Any) -> tuple[Any, list[nn.Module]]:
    """The language model's stack of a plain Hugging Face model, and its decoder layers in order.

    Args:
        hf_model: a decoder-only language or vision-language model, or one with peft adapters around it.

    Returns:
        ``(stack, layers)``: the module whose forward runs the layers, and those.

    Raises:
        ValueError: a TransformerLens model, a model inside a bridge, an encoder-decoder, or no Hugging Face model whose
            layers can be found.
    """
    if hasattr(hf_model, "hook_dict"):
        raise ValueError(
            f"expected a plain Hugging Face model, got {type(hf_model).__name__}, which has hook points; use "
            "steering.applied(model) or steering.hooks()"
        )
    if not isinstance(hf_model, nn.Module) or not hasattr(hf_model, "config"):
        raise ValueError(f"expected a Hugging Face model, got {type(hf_model).__name__}")
    base: Any = hf_model  # past the adapters of peft
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(base).__name__} is an encoder-decoder; expected a decoder-only model")
    stack = base.get_decoder() if hasattr(base, "get_decoder") else base
    lists = [part for part in stack.children() if isinstance(part, nn.ModuleList)]
    n_layers = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    found = [list(part) for part in lists if len(part) == n_layers]
    if len(found) != 1:
        raise ValueError(
            f"the decoder layers of {type(base).__name__} were not found: of the lists of modules in "
            f"{type(stack).__name__}, {len(found)} have the {n_layers} layers of its configuration. Register hooks of "
            "your own on its layers, with gr.hooks.steer_hook for the step"
        )
    if any("_original_component" in layer._modules for layer in found[0]):
        raise ValueError("this model is inside a TransformerBridge; use steering.applied(bridge) or steering.hooks()")
    return stack, found[0]
