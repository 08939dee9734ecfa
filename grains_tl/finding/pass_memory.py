"""Memory of one pass from shapes alone: the model runs on PyTorch's meta device, and every tensor it makes is added up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grains_tl.inference.objectives import token_logprobs
from grains_tl.models.running import attribution_point, hooked
from grains_tl.types import BridgeModel


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels do it, which hold no scores: what goes in, what comes out, a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        per_query = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, per_query)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    if options.get("enable_gqa"):
        n = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
    return _Fused.apply(query, key, value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, those that are shared once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def pass_bytes(model: BridgeModel, rows: int, length: int, unembedded: int, *, gradient: bool) -> int:
    """The most that one pass holds at a time besides the weights.

    Args:
        model: a bridge on the meta device.
        rows: rows of the batch.
        length: tokens of a row, padding included.
        unembedded: positions whose logits are computed.
        gradient: go back to the input of the blocks, too.

    Returns:
        Bytes. Attention is taken to be fused where the model asks for ``sdpa``; the caching of an allocator and the
        workspaces of kernels come on top.
    """
    held: list[Tensor] = []
    meta = torch.device("meta")
    config = model.original_model.config

    def enter(act: Tensor, hook: Any) -> Tensor:
        held.append(act.detach().clone().requires_grad_(gradient))
        return held[0]

    def pick(act: Tensor, hook: Any) -> Tensor:
        return act.reshape(-1, act.shape[-1])[:unembedded][None]

    with _Live() as memory, _fused_attention(), torch.inference_mode(False), torch.set_grad_enabled(gradient):
        ids = torch.zeros(rows, length, dtype=torch.long, device=meta)
        mask = torch.zeros(rows, 1, length, length, dtype=next(model.parameters()).dtype, device=meta)
        positions = torch.zeros(rows, length, dtype=torch.long, device=meta)
        if "mrope_section" in str(getattr(config.get_text_config(), "rope_parameters", "")):
            positions = positions.expand(3, -1, -1)
        with hooked(model, [(attribution_point(model), enter), ("unembed.hook_in", pick)]):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        value = token_logprobs(logits[0], torch.zeros(unembedded, dtype=torch.long, device=meta)).sum()
        del logits
        if gradient:
            torch.autograd.grad(value, held[0])
    return memory.peak


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of some tokens; sliding windows, which keep fewer, are not taken into account."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(width) * tokens * dtype.itemsize
