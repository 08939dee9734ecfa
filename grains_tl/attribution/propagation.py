"""A model made linear around its input, by hooks: gradients then say where the output's value comes from.

After AttnLRP (arXiv 2402.05602). The scale of every norm is a constant. An attention pattern is a constant (there the
softmax is expanded instead; with the pattern frozen, queries and keys get no share, as in CP-LRP). An activation function
passes ``act(x) / x`` as a constant, and a product of gate and value gives each factor half.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grains_tl.types import FwdHooks, HookedModel

NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


def frozen_hooks(model: HookedModel, *, from_layer: int = 0) -> FwdHooks:
    """Hooks that keep every value and make every gradient that of the linearised model.

    On a model without biases f of the linearised model is linear in the prompt: for responses of one token, the scores of
    the prompt's tokens add up to f(x).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        from_layer: the first block to linearise.

    Raises:
        ValueError: the model lacks the hook points for its norms, attention patterns or MLPs.
    """
    known = model.hook_dict
    hooks: FwdHooks = []
    for layer in range(from_layer, int(model.cfg.n_layers)):
        block = f"blocks.{layer}"
        scales = [f"{block}.{norm}.hook_scale" for norm in NORMS if f"{block}.{norm}.hook_scale" in known]
        needed = [f"{block}.attn.hook_pattern", f"{block}.mlp.hook_pre", f"{block}.mlp.hook_post"]
        missing = [name for name in needed if name not in known] or ([] if scales else [f"{block}.ln1.hook_scale"])
        if missing:
            raise ValueError(
                f"attention_aware needs the hook points {missing}, which this model does not have; use another method"
            )
        hooks += [(name, _constant) for name in (*scales, needed[0])]
        hooks += _linear_mlp(block, gated=f"{block}.mlp.hook_pre_linear" in known)
    if "ln_final.hook_scale" in known:
        hooks.append(("ln_final.hook_scale", _constant))
    return hooks


@contextmanager
def checked(hooks: FwdHooks, *, fired: set[str] | None = None) -> Iterator[FwdHooks]:
    """The same hooks, with a check at the end that each ran: a hook that does not fire would leave a wrong gradient.

    Raises:
        ValueError: naming the hook points that never fired.
    """
    seen = set() if fired is None else fired

    def noting(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def hook_fn(act: Tensor, hook: Any) -> Any:
            seen.add(name)
            return fn(act, hook)

        return hook_fn

    with warnings.catch_warnings():
        # the bridge says at every norm that it now computes the norm itself; the values agree to rounding
        warnings.filterwarnings("ignore", message=".*hook_scale/hook_normalized.*")
        yield [(name, noting(name, fn)) for name, fn in hooks]
    silent = sorted({name for name, _ in hooks} - seen)
    if silent:
        raise ValueError(
            f"attention_aware does not work on this model: its hook points {silent[:4]} never ran "
            "(a fused kernel takes their place); use another method"
        )


def _constant(act: Tensor, hook: Any) -> Tensor:
    return act.detach()


def _linear_mlp(block: str, *, gated: bool) -> FwdHooks:
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook_fn(act: Tensor, hook: Any) -> None:
            held[name] = act

        return hook_fn

    def linear(act: Tensor, hook: Any) -> Tensor:
        pre, other = held.pop("pre"), held.pop("linear", None)
        value = act.detach()
        share = _ratio(value, pre.detach()) * pre
        if other is not None:
            share = (share + _ratio(value, other.detach()) * other) / 2
        return value + (share - share.detach())

    hooks: FwdHooks = [(f"{block}.mlp.hook_pre", keep("pre"))]
    if gated:
        hooks.append((f"{block}.mlp.hook_pre_linear", keep("linear")))
    return [*hooks, (f"{block}.mlp.hook_post", linear)]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0 (there is nothing to pass on)."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
