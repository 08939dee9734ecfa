"""Mixed precision: ``torch.autocast`` around any call of the package, and what stays exact inside it.

Under autocast the matrix products of the blocks run in half precision. Weights, residual stream, hooks, unembedding and
sums keep the precision of the weights, because a difference of two log-likelihoods would not survive the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grains_tl.models.placement import input_device
from grains_tl.types import FwdHooks, HookedModel

#: Largest difference of a fast path from the plain run, nats: float32 round-off of a reordered sum is some 1e-5; a missing
#: soft-cap or extra input shows as 1e-2 and more.
EXACT = 1e-3

#: The same in half precision, whose own round-off is that large; smaller faults are not seen there.
ROUGH = 0.5


def _of(model: HookedModel) -> tuple[str, torch.dtype]:
    return input_device(model).type, next(model.parameters()).dtype


def autocast_dtype(model: HookedModel) -> str | None:
    """``"bfloat16"`` or ``"float16"`` inside ``torch.autocast`` for the model's device, else ``None``."""
    device, _ = _of(model)
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else None


def full_precision(model: HookedModel) -> torch.autocast:
    """A context without autocast, inside or outside one."""
    return torch.autocast(_of(model)[0], enabled=False)


def exactness(model: HookedModel) -> float:
    """How far a fast path may be from the plain run before it counts as wrong, nats."""
    half = autocast_dtype(model) is not None or _of(model)[1] not in (torch.float32, torch.float64)
    return ROUGH if half else EXACT


def agrees(model: HookedModel, found: Tensor, plain: Tensor) -> bool:
    """Whether a fast path's log-likelihoods are those of the plain run; NaN never is."""
    return bool((found - plain).abs().max() < exactness(model))


#: What two orders of the same sums may differ by, by dtype: logits and log-probabilities in nats, and a residual activation
#: as a share of its norm. float32: some tens of layers; a wrong hook or a lost mask shows as 1e-1 and more. Half precision:
#: twice to ten times what SmolLM2, Gemma-3-270M and Qwen2.5-0.5B show; there a small fault cannot be told from rounding.
ROUND_OFF = {"float32": (2e-3, 2e-3), "float64": (2e-3, 2e-3), "bfloat16": (0.5, 0.02), "float16": (0.2, 0.005)}


def round_off(model: HookedModel) -> tuple[float, float]:
    """``ROUND_OFF`` for the dtype that the blocks of a model compute in."""
    return ROUND_OFF.get(autocast_dtype(model) or str(_of(model)[1]).removeprefix("torch."), ROUND_OFF["float32"])


def residual_exactness(model: HookedModel) -> float:
    """The same for a residual activation, as a share of its largest entry."""
    return 1e-3 if exactness(model) == EXACT else 0.05


@contextmanager
def exact_unembedding(model: HookedModel) -> Iterator[None]:
    """Runs inside unembed in full precision: a bfloat16 logit between 16 and 32 is rounded to eighths."""
    if autocast_dtype(model) is None:
        yield
        return
    off, dtype = full_precision(model), _of(model)[1]

    def enter(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        off.__enter__()
        return tuple(arg.to(dtype) for arg in args)

    def leave(*_: Any) -> None:
        off.__exit__(None, None, None)

    unembed = model.unembed
    handles = [unembed.register_forward_pre_hook(enter), unembed.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def precision_hint(model: HookedModel) -> str:
    """What to do about NaN or inf, by the dtype they came up in."""
    dtype = autocast_dtype(model) or str(_of(model)[1]).removeprefix("torch.")
    if dtype == "float16":
        return (
            "float16 holds numbers up to 65504 only, which activations and attention scores of many models exceed: use "
            "bfloat16 or float32"
        )
    return f"in {dtype} that means broken weights, or a step that is too large"


def finite_hook(name: str) -> FwdHooks:
    """A hook that stops a run whose last position has NaN or inf; greedy decoding would go on with made-up tokens.

    Raises:
        ValueError: during the run.
    """

    def hook_fn(act: Tensor, hook: Any) -> None:
        if not bool(torch.isfinite(act[:, -1]).all()):  # the last position is never padding here
            raise ValueError(
                f"the model gives NaN or inf at {name} ({act.dtype}); its weights are broken, or a step is too large for "
                "this precision: use a smaller alpha, or load the model in float32 or bfloat16"
            )

    return [(name, hook_fn)]
