"""Which model this is: its shape and a fingerprint of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grains_tl.models.precision import full_precision
from grains_tl.models.running import device_of, embed_tokens, forward_logits, without_image_tokens
from grains_tl.models.state import require_hooked_model
from grains_tl.types import HookedModel


@contextmanager
def without_hooks(model: HookedModel) -> Iterator[None]:
    """The model as it is without any hook on its hook points; afterwards they are back, in their order."""
    points = model.hook_dict.values()
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
    require_hooked_model(model)
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
