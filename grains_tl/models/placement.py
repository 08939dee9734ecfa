"""Where a model takes its inputs, also when its weights are kept elsewhere and come for each pass (accelerate)."""

from __future__ import annotations

from typing import Any

import torch

from grains_tl.types import HookedModel


def input_device(model: HookedModel) -> torch.device:
    """The device of the embedding; of one that is offloaded, the device that it comes to.

    Raises:
        ValueError: weights on the meta device that nothing brings in.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    inner: Any = getattr(model, "original_model", model)
    for module in inner.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    raise ValueError(
        "the model's weights are on the meta device, and nothing brings them in: load it with weights, or offload it with "
        "accelerate (from_pretrained(..., device_map=..., offload_folder=...), cpu_offload, disk_offload)"
    )
