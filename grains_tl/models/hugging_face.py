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
