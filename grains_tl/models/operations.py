"""Counting what runs: tokens through blocks, with and without a graph, and positions that were unembedded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from grains_tl.models.running import is_bridge
from grains_tl.types import HookedModel


@dataclass
class Operations:
    """Work that a run did, padding included.

    Attributes:
        forward: token-layers that ran forward (tokens times blocks).
        backward: token-layers of runs that kept a graph to go back through.
        unembedded: positions whose logits were computed.
        patches: rows of pixels that went through a vision tower.
        largest: rows and length of the largest pass without a graph, and of the largest with one.
        most_unembedded: positions whose logits were computed in one pass, without a graph and with one.
    """

    forward: int = 0
    backward: int = 0
    unembedded: int = 0
    patches: int = field(default=0, compare=False)
    largest: dict[bool, tuple[int, int]] = field(default_factory=dict, compare=False)
    most_unembedded: dict[bool, int] = field(default_factory=dict, compare=False)


@contextmanager
def count_operations(model: HookedModel) -> Iterator[Operations]:
    """Count with PyTorch hooks on the modules that do the work, however they are called.

    Of a bridge these are the Hugging Face modules inside its components, which run with and without them
    (``plain_blocks``), and in a plain loop over the same weights too.
    """
    counts = Operations()

    def block(module: Any, args: Any, output: Any) -> None:
        act = output[0] if isinstance(output, tuple) else output
        rows, length = act.shape[:2]
        counts.forward += rows * length
        counts.backward += rows * length * act.requires_grad
        before = counts.largest.get(act.requires_grad, (0, 0))
        counts.largest[act.requires_grad] = max(before, (rows, length), key=lambda shape: shape[0] * shape[1])

    def unembed(module: Any, args: Any, output: Tensor) -> None:
        counts.unembedded += output.shape[0] * output.shape[1]
        before = counts.most_unembedded.get(output.requires_grad, 0)
        counts.most_unembedded[output.requires_grad] = max(before, output.shape[0] * output.shape[1])

    def pixels(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("pixel_values")
        counts.patches += 0 if given is None else given.shape[0]

    handles = [_inner(b).register_forward_hook(block) for b in model.blocks]
    handles.append(_inner(model.unembed).register_forward_hook(unembed))
    if is_bridge(model):
        handles.append(model.original_model.register_forward_pre_hook(pixels, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _inner(module: Any) -> Any:
    return module._modules.get("_original_component") or module


def block_parameters(hf_model: Any) -> int:
    """Weights of one block's matrix products, the mean over the blocks; of a mixture of experts, all of them."""
    n_layers = int(hf_model.config.get_text_config().num_hidden_layers)
    lists = [m for m in hf_model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    seen = {id(p): p.numel() for p in lists[0].parameters() if p.ndim >= 2}
    return sum(seen.values()) // n_layers


def floating_point_operations(hf_model: Any, counts: Operations) -> float:
    """Multiplications and additions in the matrix products of these runs; attention's own products are left out."""
    table = hf_model.get_output_embeddings().weight.numel()
    # going back to the activations costs one product per weight, like going forward: weights get no gradient
    share_back = counts.backward / max(counts.forward, 1)
    tower = getattr(getattr(hf_model, "model", None), "visual", None)
    seeing = 0 if tower is None else sum(p.numel() for p in tower.parameters() if p.ndim >= 2)
    return 2 * (
        block_parameters(hf_model) * (counts.forward + counts.backward)
        + table * counts.unembedded * (1 + share_back)
        + seeing * counts.patches
    )
