"""Names and types that a model cannot be loaded by, said in words before anything is read."""

from __future__ import annotations

import difflib
from typing import Any

import torch

#: Names that ``load_model`` knows beside those of the Hugging Face hub.
KNOWN = ("smollm2", "gemma3-270m", "tiny-vlm", "smol-vlm-scenes")


def config_of(source: str) -> Any:
    """The configuration of a folder, or of a name on the hub.

    Raises:
        OSError: there is no such model, or none that can be reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        close = difflib.get_close_matches(source.lower(), KNOWN, 1, 0.7)
        meant = f"did you mean {close[0]!r}? Otherwise" if close else "expected"
        raise OSError(
            f"no model {source!r} could be loaded; {meant} {', '.join(map(repr, KNOWN))}, the folder of a model, or its "
            f"name on the Hugging Face hub such as 'HuggingFaceTB/SmolLM2-135M-Instruct' ({str(error).splitlines()[0]})"
        ) from error


def require_dtype(dtype: Any) -> None:
    """Refuse names of types (ValueError)."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r}; expected a torch dtype such as torch.float32 or torch.bfloat16")
