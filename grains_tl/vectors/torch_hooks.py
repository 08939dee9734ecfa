"""Steering a plain Hugging Face model with PyTorch forward hooks, without TransformerLens around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from grains_tl.hooks.gate_run import decided_at
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.hooks.steer import require_border
from grains_tl.hooks.weights import Weighted
from grains_tl.models.hugging_face import decoder
from grains_tl.models.prompt_cache import cache_of
from grains_tl.types import HookFn


class TorchHooks:
    """Registered hooks; like a handle of PyTorch's, they stay until ``remove()`` or the end of a ``with`` block.

    Made by ``Steering.torch_hooks``; ``steering`` is such a value.
    """

    def __init__(self, steering: Any, hf_model: Any, prompt_len: int | Int[Tensor, "batch"] | None) -> None:
        stack, layers = decoder(hf_model)
        for part in steering.parts:
            residual_stream_only("torch_hooks", part.vectors.site)
            _require_fit(part, hf_model, len(layers))
        follows = [_Follow(part, require_border(prompt_len)) for part in steering.parts]
        self._handles: list[Any] = [
            stack.register_forward_pre_hook(follow.enter, with_kwargs=True) for follow in follows if not follow.alike
        ]
        for part, follow in zip(steering.parts, follows, strict=True):
            if isinstance(part.gate, LayerGate):  # in front of all steering, which may be at the same layer
                self._handles.append(layers[part.gate.layer].register_forward_hook(follow.read))
        for part, follow in zip(steering.parts, follows, strict=True):
            for number, layer in enumerate(part.layers):
                self._handles.append(layers[layer].register_forward_hook(follow.hook_of(number)))

    def remove(self) -> None:
        """Take the hooks off the model; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> TorchHooks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def _require_fit(steering: Any, hf_model: Any, n_layers: int) -> None:
    d_model = int(hf_model.config.get_text_config().hidden_size)
    width = steering.vectors.directions.shape[1]
    if width != d_model or max(steering.layers) >= n_layers:
        raise ValueError(
            f"vectors of d_model {width} at layers {list(steering.layers)} do not fit {type(hf_model).__name__} "
            f"(d_model {d_model}, {n_layers} layers)"
        )
    made_for = steering.vectors.info.get("model")
    known = made_for.get("n_layers") if isinstance(made_for, Mapping) else None
    if known is not None and int(known) != n_layers:
        raise ValueError(f"these vectors were made for a model of {known} layers; this one has {n_layers}")


@dataclass
class _Run:
    """What is known of a forward pass before its layers run.

    Attributes:
        past: positions in the key-value cache, which come before this run's.
        growing: whether the whole text runs again at every step of a generation, as without a cache.
        ids: the tokens, where the decoder is called with tokens.
        real: True where they are no padding; ``None`` if all are.
    """

    past: int = 0
    growing: bool = False
    ids: Int[Tensor, "batch pos"] | None = None
    real: Bool[Tensor, "batch all_pos"] | None = None


class _Follow:
    """Follows the runs of a model, so that each position is known by its place in the whole text.

    Attributes:
        alike: whether all positions are treated alike, so that no run needs to be followed.
    """

    def __init__(self, steering: Any, prompt_len: int | Int[Tensor, "batch"] | None) -> None:
        self.steering, self.prompt_len = steering, prompt_len
        self.gate = steering.gate if isinstance(steering.gate, Tensor) and steering.gate.ndim == 2 else None
        where = steering.positions
        self.alike = where == "all" if isinstance(where, str) else isinstance(where, Weighted) and where.by_function
        self.alike = self.alike and self.gate is None and not isinstance(steering.gate, LayerGate)
        self.opened: Tensor | None = None
        self.run = _Run()
        self.fns: list[HookFn] = [fn for _, fn in steering.for_prompt(None)] if self.alike else []
        self.made_for: tuple[Any, ...] | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read off the call of the decoder how many positions are behind it."""
        given = dict(kwargs)
        with suppress(TypeError):
            given |= inspect.signature(module.forward).bind_partial(*args).arguments
        if any(name.startswith("cu_seq") and value is not None for name, value in kwargs.items()):
            raise ValueError(
                "several texts are packed into one row (cu_seq_lens), so where each prompt ends is unknown; use "
                "positions='all', or run them as a padded batch"
            )
        past = cache_of(given)
        mask, growing = given.get("attention_mask"), given.get("use_cache") is False
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.run = _Run(0 if past is None else int(past.get_seq_length()), growing, given.get("input_ids"), real)
        self.made_for = None

    def read(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of a gate's own layer: decide for a new text, or for each position."""
        gate: LayerGate = self.steering.gate
        act = (output[0] if isinstance(output, tuple) else output).detach()
        if gate.decide == "token":
            self.opened = gate(act)
        elif self.run.past == 0:
            self.opened = decided_at(gate, act, self._border(*act.shape[:2]).flatten().to(act.device))
        elif self.opened is None or len(self.opened) != len(act):
            raise ValueError(
                "the gate decides at the prompt's end, but this run goes on from a cache of another one; run the prompt "
                "under the same hooks, or use decide='token'"
            )

    def hook_of(self, number: int) -> Callable[..., Any]:
        """The forward hook of the ``number``-th steered layer."""

        def hook_fn(module: nn.Module, args: Any, output: Any) -> Any:
            act = output[0] if isinstance(output, tuple) else output
            new = self._fns(act)[number](act, hook=None)
            if new is act:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook_fn

    def _fns(self, act: Tensor) -> list[HookFn]:
        shape = (*act.shape[:2], act.device)
        if not self.alike and self.made_for != shape:
            batch, n_pos = act.shape[:2]
            weights = self.steering.positions if isinstance(self.steering.positions, Weighted) else None
            where = self._where(batch, n_pos).to(act.device) if weights is None else self._weights(weights, act)
            gate = self.steering.gate if self.gate is None else self._part("the gate", self.gate, batch, n_pos)
            if isinstance(gate, LayerGate):
                gate = self._said
            self.fns = [fn for _, fn in replace(self.steering, positions=where, gate=gate).for_prompt(None)]
            self.made_for = shape
        return self.fns

    def _said(self, act: Tensor) -> Tensor:
        """What the gate decided."""
        assert self.opened is not None, "its layer runs first"
        return self.opened

    def _weights(self, given: Weighted, act: Tensor) -> Weighted:
        """The part of the weights that this run is about; those behind the prompt have ``after``."""
        batch, n_pos = act.shape[:2]
        if given.by_function:
            return given
        if isinstance(given.weights, Tensor):
            rows = given.weights[:, self.run.past :]
            if self.run.past == 0 and rows.shape[1] > n_pos:
                raise ValueError(f"weights of shape {list(rows.shape)} for a run of {batch} rows and {n_pos} positions")
            rows = torch.nn.functional.pad(rows[:, :n_pos].double(), (0, n_pos - rows.shape[1]), value=given.after)
        elif self.run.past == 0:
            border = self._border(batch, n_pos)
            rows = given.of_batch(border.flatten(), self._prompts(border.expand(batch, 1)))(act)
        elif n_pos == 1:
            rows = torch.full((1, 1), given.after, dtype=torch.float64)
        else:
            raise ValueError(
                f"weights by prompt for {n_pos} positions behind a cache of {self.run.past}, which may be part of a prompt; "
                "run each prompt at once, or give the weights as a [batch, pos] tensor"
            )
        return Weighted(rows, given.after)

    def _prompts(self, border: Int[Tensor, "batch 1"]) -> list[tuple[int, ...]]:
        """The tokens of each row in front of its border, padding left out."""
        ids = self.run.ids
        if ids is None:
            raise ValueError(
                "weights by prompt, but the decoder is called with embeddings, so which prompts run is not known; give the "
                "weights as a [batch, pos] tensor, or steer a TransformerLens model (gr.wrap_model)"
            )
        real = torch.ones_like(ids, dtype=torch.bool) if self.run.real is None else self.run.real[:, : ids.shape[1]]
        keep = (real.cpu() & (torch.arange(ids.shape[1])[None] < border)).tolist()
        return [
            tuple(one for one, kept in zip(row, here, strict=True) if kept)
            for row, here in zip(ids.tolist(), keep, strict=True)
        ]

    def _where(self, batch: int, n_pos: int) -> Bool[Tensor, "rows pos"]:
        """True at the steered positions of this run."""
        positions = self.steering.positions
        if isinstance(positions, Tensor):
            return self._part("positions", positions, batch, n_pos)
        place = self.run.past + torch.arange(n_pos)[None]
        if positions == "all":
            return place >= 0
        border = self._border(batch, n_pos)
        if positions == "prompt":
            return place < border
        return place >= (border if positions == "generated" else border - 1)

    def _border(self, batch: int, n_pos: int) -> Int[Tensor, "rows 1"]:
        """Where the prompts end, counted from the first position of the text."""
        past = self.run.past
        if self.prompt_len is not None:
            border = torch.as_tensor(self.prompt_len).cpu().reshape(-1, 1)
            if len(border) not in (1, batch):
                raise ValueError(
                    f"prompt_len has {len(border)} rows, the run has {batch}; give one number for each row"
                )
            if past == 0 and int(border.max()) > n_pos:
                raise ValueError(f"prompt_len={int(border.max())} is beyond the {n_pos} positions of the first run")
            return border
        if past == 0 and self.run.growing:
            what = "a gate" if self.steering.gate is not None else f"positions={self.steering.positions!r}"
            raise ValueError(
                f"{what} without a key-value cache: every step runs over prompt and "
                "generated tokens alike, so where the prompt ends is unknown; give prompt_len, or leave use_cache=False out"
            )
        if past > 0 and n_pos > 1:
            raise ValueError(
                f"{n_pos} positions behind a cache of {past} may be prompt or generated tokens (speculative decoding, a "
                "prompt in chunks, a second turn); give prompt_len"
            )
        return torch.tensor([[n_pos if past == 0 else past]])

    def _part(
        self, name: str, mask: Bool[Tensor, "rows all_pos"], batch: int, n_pos: int
    ) -> Bool[Tensor, "rows run_pos"]:
        """The part of a mask over the whole text that this run is about; False behind its end."""
        past, width = self.run.past, mask.shape[1]
        fits = width == n_pos or (self.run.growing and width < n_pos) if past == 0 else width <= past + n_pos
        if mask.shape[0] not in (1, batch) or not fits:
            raise ValueError(
                f"{name} of shape {list(mask.shape)} for a run of {batch} rows and {n_pos} positions "
                f"behind {past} in the cache"
            )
        part = mask[:, past : past + n_pos]
        return torch.nn.functional.pad(part, (0, n_pos - part.shape[1]))
