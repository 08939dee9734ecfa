"""Tensors that are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def lasting(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it was made inside ``torch.inference_mode`` and autograd would refuse it later.

    Examples:
        >>> with torch.inference_mode():
        ...     made = torch.ones(2)
        >>> lasting(made).is_inference()
        False
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
