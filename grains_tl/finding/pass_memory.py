"""Memory of one pass from shapes alone: the model runs on PyTorch's meta device, and every tensor it makes is added up."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grains_tl.inference.objectives import token_logprobs


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


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, those that are shared once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def pass_bytes(hf_model: Any, rows: int, length: int, unembedded: int, *, gradient: bool) -> int:
    """The most that one pass holds at a time besides the weights.

    Args:
        hf_model: a model of transformers on the meta device, with eager attention: the components of a bridge hold the
            attention scores too.
        rows: rows of the batch.
        length: tokens of a row, padding included.
        unembedded: positions whose logits are computed.
        gradient: go back to the input of the blocks, too.

    Returns:
        Bytes. What an allocator keeps for later and the workspaces of kernels come on top.
    """
    held: list[Tensor] = []

    def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().clone().requires_grad_(gradient))
        return held[0]

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0].reshape(-1, args[0].shape[-1])[:unembedded][None],)

    handles = [
        hf_model.get_input_embeddings().register_forward_hook(enter),
        hf_model.get_output_embeddings().register_forward_pre_hook(pick),
    ]
    try:
        with _Live() as memory, torch.inference_mode(False), torch.set_grad_enabled(gradient):
            logits = hf_model(**_inputs(hf_model, rows, length), use_cache=False).logits
            value = token_logprobs(logits[0], torch.zeros(unembedded, dtype=torch.long, device="meta")).sum()
            del logits
            if gradient:
                torch.autograd.grad(value, held[0])
    finally:
        for handle in handles:
            handle.remove()
    return memory.peak


def _inputs(hf_model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Mask and positions from outside: a meta tensor cannot be looked at to make them."""
    meta = torch.device("meta")
    positions = torch.zeros(rows, length, dtype=torch.long, device=meta)
    if "mrope_section" in str(getattr(hf_model.config.get_text_config(), "rope_parameters", "")):
        positions = positions.expand(3, -1, -1)
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.long, device=meta),
        "attention_mask": torch.zeros(rows, 1, length, length, dtype=hf_model.dtype, device=meta),
        "position_ids": positions,
    }


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of some tokens; sliding windows, which keep fewer, are not taken into account."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(width) * tokens * dtype.itemsize
