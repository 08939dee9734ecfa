"""The state of a gate between its own layer and the steered ones, within a run and from the prompt to decoded tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.types import FwdHooks


class GateRun:
    """The reading hook of a gate, and what it decided last; made anew for every list of hooks.

    A run over several positions begins a new text: the decision is made anew. A single position is a decoded token, for
    which a decision at the prompt's end still holds.

    Attributes:
        opened: ``[batch, 1]`` for a decision per row, ``[batch, pos]`` per position; ``None`` before the first run.
    """

    def __init__(self, gate: LayerGate, prompt_len: int | Int[Tensor, "batch"] | None) -> None:
        self.gate, self.prompt_len = gate, prompt_len
        self.opened: Bool[Tensor, "batch pos_or_1"] | None = None
        self._n_readings = 0

    def __call__(self, act: Float[Tensor, "batch pos d_model"], hook: Any = None) -> None:
        """Read and decide; the activation stays as it is."""
        self.opened = self.gate(act.detach()) if self.gate.decide == "token" else self._of_rows(act.detach())
        self._n_readings += 1

    def opener(self) -> Callable[[Tensor], Tensor]:
        """A gate for ``steer_hook`` at one layer: what was read in this run."""
        used = 0

        def opened(act: Float[Tensor, "batch pos d_model"]) -> Tensor:
            nonlocal used
            if self.opened is None or used == self._n_readings:
                raise ValueError(
                    f"the gate's reading hook at layer {self.gate.layer} did not run before the steered layer; keep all "
                    "hooks of the list together, and run the model from that layer or below"
                )
            used = self._n_readings
            return self.opened

        return opened

    def _of_rows(self, act: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch 1"]:
        batch, n_pos = act.shape[:2]
        if n_pos == 1 and not self._one_token_prompts:
            if self.opened is None:
                raise ValueError(
                    "the gate decides at the prompt's end, but the first run it sees has one position, as when a token is "
                    "decoded: run the prompt under the same hooks, give prompt_len=1 for a prompt of one token, or use "
                    "decide='token'"
                )
            if len(self.opened) != batch:
                raise ValueError(
                    f"the gate decided for {len(self.opened)} rows, and {batch} are decoded now; run their prompts under "
                    "the same hooks first"
                )
            return self.opened
        ends = torch.as_tensor(n_pos if self.prompt_len is None else self.prompt_len, device=act.device).reshape(-1)
        return decided_at(self.gate, act, ends)

    @property
    def _one_token_prompts(self) -> bool:
        return self.prompt_len is not None and bool((torch.as_tensor(self.prompt_len) == 1).all())


def decided_at(
    gate: LayerGate, act: Float[Tensor, "batch pos d_model"], ends: Int[Tensor, "rows"]
) -> Bool[Tensor, "batch 1"]:
    """What a gate says of each row, read at the last position of its prompt.

    Args:
        gate: the gate.
        act: residuals of rows that hold their prompts.
        ends: where the prompts end, one number or one per row, padding in front included.

    Raises:
        ValueError: not as many numbers as rows, or an end behind the run.
    """
    batch, n_pos = act.shape[:2]
    if len(ends) not in (1, batch):
        raise ValueError(f"prompt_len has {len(ends)} rows, the run has {batch}; give one number for each row")
    if int(ends.max()) > n_pos:
        raise ValueError(f"prompt_len={int(ends.max())} is beyond the {n_pos} positions of this run")
    return gate(act[torch.arange(batch, device=act.device), (ends - 1).expand(batch)])[:, None]


def after_reading(fwd_hooks: FwdHooks, layer: int, resid: Mapping[int, Float[Tensor, "batch pos d_model"]]) -> FwdHooks:
    """Let the gates below a layer read residuals that are there already, for a run that begins at that layer.

    Args:
        fwd_hooks: hooks, reading ones among them.
        layer: where the run begins.
        resid: layer -> residuals of the same batch.

    Returns:
        The other hooks.
    """
    below = [fn for _, fn in fwd_hooks if isinstance(fn, GateRun) and fn.gate.layer < layer]
    for run in below:
        run(resid[run.gate.layer])
    return [(name, fn) for name, fn in fwd_hooks if fn not in below]
