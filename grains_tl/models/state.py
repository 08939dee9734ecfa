"""The state a model must be in for its numbers to count, and autograd inside any mode of the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grains_tl.types import HookedModel

#: What to do where gradients do not pass.
WITHOUT = (
    "load the model in float32 or bfloat16, or use what needs no gradients: leave_one_out, recipes 'caa' and 'grains'"
)

#: What draws random numbers in train mode without being a dropout layer, by the attribute that says how much.
RANDOM_IN_TRAINING = ("attention_dropout", "layerdrop", "router_jitter_noise", "jitter_noise")


def require_hooked_model(model: Any) -> None:
    """Refuse a Hugging Face model as it is, saying how to wrap it.

    Raises:
        ValueError: no TransformerLens model.
    """
    if hasattr(model, "hook_dict"):
        return
    if isinstance(model, str):
        said = f"load it first: model = gr.load_model({model!r})"
    elif isinstance(model, (list, tuple, dict)):
        said = "the model comes first, then the records"
    else:
        said = "wrap a Hugging Face model first: model = gr.wrap_model(hf_model, tokenizer)"
    raise ValueError(f"expected a model with TransformerLens hook points, got {type(model).__name__}; {said}")


def require_ready(model: HookedModel) -> None:
    """Refuse a model in a state that changes its numbers, or that TransformerLens cannot run.

    A model in train mode without dropout computes the same as in eval mode and passes, unless it recomputes its
    activations (gradient checkpointing): it then keeps no key-value cache and runs every hook twice.

    Raises:
        ValueError: no TransformerLens model, or what to call: ``model.eval()``, ``set_attn_implementation``, ...
    """
    require_hooked_model(model)
    inner: Any = getattr(model, "original_model", model)
    _require_usual_outputs(getattr(inner, "config", None))
    # the modules are walked only if something is in train mode: this runs before every forward pass
    if any(part.training for part in (model, inner, *model.blocks)):
        _require_nothing_random(inner)


def _require_usual_outputs(config: Any) -> None:
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ValueError(
            "attention implementation 'flex_attention' does not work with TransformerLens' hooks; call "
            "model.original_model.set_attn_implementation('sdpa') (or 'eager'), or load the model that way"
        )
    if config is not None and not getattr(config, "return_dict", True):
        raise ValueError(
            "the model's configuration has return_dict=False, and TransformerLens needs named outputs; set "
            "model.original_model.config.return_dict = True"
        )


def _require_nothing_random(inner: Any) -> None:
    for name, module in inner.named_modules():
        if not module.training:
            continue
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                "the model is in train mode with gradient checkpointing, which keeps no key-value cache and runs hooks "
                "twice; call model.eval() (or model.original_model.gradient_checkpointing_disable()) first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"the model is in train mode and {name} normalises over the batch; call model.eval() first"
            )
        shares = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        shares += [getattr(module, attribute, 0) for attribute in RANDOM_IN_TRAINING]
        p = max((p for p in shares if isinstance(p, (int, float))), default=0)
        if p > 0:
            raise ValueError(
                f"the model is in train mode and {name or 'it'} drops out {p:.0%} at random, so results could not be "
                "repeated; call model.eval() first"
            )


@contextmanager
def autograd(model: HookedModel) -> Iterator[None]:
    """Autograd for the length of the block, whatever mode the caller is in (``no_grad``, ``inference_mode``).

    Tensors that enter the graph must be made inside, or outside of ``torch.inference_mode``.

    Raises:
        ValueError: the model's weights were made inside ``torch.inference_mode``, or are quantised in a way that no gradient
            passes.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model's weights were made inside torch.inference_mode(), so autograd cannot use them; load the model "
            "outside of it, or use a method without gradients (leave_one_out)"
        )
    _require_differentiable(getattr(model, "original_model", model))
    with torch.inference_mode(False), torch.enable_grad():
        yield


def require_gradient(value: Tensor) -> None:
    """Refuse the result of a model through which no gradient passes.

    Raises:
        ValueError: ``value`` does not depend on anything that takes gradients.
    """
    if not value.requires_grad:
        raise ValueError(
            f"no gradient passes through the model's upper blocks, as with quantised weights that only run "
            f"forward; {WITHOUT}"
        )


def _require_differentiable(inner: Any) -> None:
    """Refuse quantised layers that only run forward: gradients would go round them along the residual stream, silently."""
    seen: set[Any] = set()
    for name, module in inner.named_modules() if isinstance(inner, nn.Module) else ():
        weight, n_in = getattr(module, "weight", None), getattr(module, "in_features", None)
        plain = isinstance(weight, Tensor) and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
        kind = (type(module), type(weight))
        if weight is None or plain or n_in is None or kind in seen or "_original_component" in module._modules:
            continue
        seen.add(kind)
        own = [p.dtype for p in inner.parameters() if type(p) is nn.Parameter and p.is_floating_point()]
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        if not _passes_gradients(module, n_in, own[0] if own else torch.float32, device):
            raise ValueError(
                f"no gradient passes through {name} ({type(module).__name__}, weights {type(weight).__name__}): it is "
                f"quantised and only runs forward; {WITHOUT}"
            )


def _passes_gradients(module: nn.Module, n_in: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gradient of a linear layer is that of the function it computes.

    Run without a graph first: bitsandbytes then packs 4-bit weights for the processor, and gives no gradient from there on.
    """
    point = torch.randn(1, 1, n_in, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode(False), torch.no_grad():
        change = (module(point) - module(torch.zeros_like(point))).float()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = point.clone().requires_grad_(True)
        value = (module(leaf).float() * change).sum()
        grad = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    size = change.square().sum()
    # 8-bit activations round by a percent or two
    return grad is not None and bool(((grad.float() * point.float()).sum() - size).abs() <= 0.2 * size)
