"""A model and a steering from the flat arguments that evaluation harnesses pass on."""

from __future__ import annotations

from typing import Any

import torch

from grains_tl._util.errors import OptionError
from grains_tl.models.loading import load_model
from grains_tl.types import HookedModel
from grains_tl.vectors.files import load_vectors
from grains_tl.vectors.steering import Steering

#: What may be given besides the model's name.
KNOWN = ("vectors", "alpha", "layer", "operator", "positions", "kind", "path", "device", "dtype")


def steered_model(name: str | None, given: dict[str, Any]) -> tuple[HookedModel, Steering | None]:
    """The model, and the steering of a file of vectors.

    Args:
        name: as ``load_model`` takes it.
        given: ``vectors`` (file, or ``hf://owner/name``); ``alpha`` and ``layer`` (``12``, or ``"12+18"`` for several) where
            the file names no choice or another is wanted, ``operator``, ``positions``; ``kind``, ``path``, ``device`` and
            ``dtype`` of the model.

    Raises:
        OptionError: an argument that is not known, alpha or layer without vectors, vectors without a choice.
        ValueError: what ``load_model`` and ``load_vectors`` refuse.
    """
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise OptionError(f"model arguments {unknown} are not known; there are pretrained, {', '.join(KNOWN)}")
    steps = {key: given[key] for key in ("alpha", "layer", "operator", "positions") if given.get(key) is not None}
    if given.get("vectors") is None and steps:
        raise OptionError(f"{', '.join(steps)} without vectors; give vectors=FILE or vectors=hf://owner/name")
    dtype = getattr(torch, str(given.get("dtype") or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"dtype={given.get('dtype')!r}; expected float32, bfloat16 or float16")
    model = load_model(
        name,
        kind=str(given.get("kind") or "bridge"),
        path=given.get("path"),
        device=str(given.get("device") or "cpu"),
        dtype=dtype,
    )
    if given.get("vectors") is None:
        return model, None
    vectors = load_vectors(str(given["vectors"]), model)
    if not steps:
        if vectors.chosen is None:
            raise OptionError(f"{given['vectors']} names no steering; give alpha=... and layer=... (12, or 12+18)")
        return model, vectors.chosen
    if "alpha" not in steps:
        raise OptionError(f"{', '.join(steps)} without alpha; give alpha=... and layer=... (12, or 12+18)")
    layers = [int(part) for part in str(steps["layer"]).split("+")] if "layer" in steps else None
    options = {key: steps[key] for key in ("operator", "positions") if key in steps}
    return model, vectors.steering(float(steps["alpha"]), layers, **options)
