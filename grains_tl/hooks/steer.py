"""Changing the residual stream: pure hook functions, no model needed to make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.checks import finite, whole
from grains_tl._util.tensors import lasting
from grains_tl.hooks.gate_run import GateRun
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.operators import Operator, moved, require_operator
from grains_tl.hooks.sites import Site, edit_hooks, flat, require_site
from grains_tl.hooks.weights import PromptKey, Weighted
from grains_tl.models.running import resid_post
from grains_tl.types import FwdHooks

#: Which positions are steered. ``"generated"`` are the tokens after the prompt, ``"last"`` those that predict a token
#: of the response: the prompt's last and all after it.
Positions = Literal["all", "prompt", "generated", "last"]

#: Which rows ``[batch]`` or positions ``[batch, pos]`` are steered, beside the scope: booleans, or a function of the
#: activation ``[batch, pos, d_model]`` that gives them (``ThresholdGate``), or a gate that reads at a layer of its own
#: (``ProbeGate``, ``CosineGate``, ``FunctionGate``).
Gate = Callable[[Tensor], Tensor] | Tensor | LayerGate


def steer_hook(
    layer: int,
    direction: Float[Tensor, "d_model"],
    amount: float | tuple[float, float],
    *,
    operator: Operator = "add_renorm",
    positions: Positions | Bool[Tensor, "batch pos"] | Weighted = "all",
    prompt_len: int | Int[Tensor, "batch"] | None = None,
    gate: Gate | None = None,
    site: Site = "resid_post",
    prompts: Sequence[PromptKey] | None = None,
) -> FwdHooks:
    """Steer the residual stream after one block, or another site of it.

    ``"add_renorm"`` is the paper's step (arXiv 2507.18043, section 3): add, then scale back to the norm there was.

    Args:
        layer: counted from 0; the hook point is ``blocks.{layer}.hook_resid_post`` unless ``site`` says otherwise.
        direction: ``[d_model]`` (``"z"``: ``[n_heads * d_head]``); only its direction counts, it is normalised here.
        amount: for ``"add"`` and ``"add_renorm"`` the length of the step in residual units; for ``"clip"`` the same, and
            the component that is not exceeded; for ``"rotate"`` an angle in radians; for ``"ablate"`` the share of the
            component to take out (1 = all); for ``"clamp"`` the value of the component afterwards; for ``"match"`` two
            numbers, the share of the way and the component at its end. ``SteeringVectors.hooks`` gives these from
            ``alpha``.
        operator: see ``hooks.operators``. With all but ``"clamp"`` an amount of 0 changes no bit.
        positions: all, a named scope, a ``[batch, pos]`` mask (positions decoded one by one are then left alone), or
            ``Weighted``, which multiplies the amount at each position.
        prompt_len: where the prompt ends, an int or one per row, counted from the row's first position, padding
            included (rows padded on the left end their prompts at one place: an int). Named scopes use it in runs over
            whole sequences. Without it a run over several positions is taken as the prompt. Decoding with a key-value
            cache hands over one position at a time: that is a generated one, unless ``prompt_len`` is 1.
        gate: steer only the rows ``[batch]`` or positions ``[batch, pos]`` where it is True: a boolean tensor, or a
            function that gives one from the activation ``[batch, pos, d_model]`` before the step (``ThresholdGate``).
            While decoding the function sees the new position alone; a ``[batch, pos]`` tensor leaves that one alone.
            ``ProbeGate``, ``CosineGate`` and ``FunctionGate`` read at their own layer, by a hook in front of this one; what
            they decide at the prompt's end holds for the tokens decoded afterwards.
        site: which activation of the block is changed. At ``"z"`` the heads count as one vector; ``"add_renorm"``
            restores the norm of each head's own output, so heads without a part in the direction stay as they are.
        prompts: token ids of each row's prompt, for weights that belong to prompts.

    Returns:
        ``[(name, fn)]`` for ``run_with_hooks`` or ``model.hooks``, next to any other hooks; three at ``"resid_mid"``.

    Raises:
        ValueError: zero or non-finite direction, non-finite amount, unknown operator or scope, ``"match"`` without its
            two numbers; during the run, a ``d_model``, mask shape, ``prompt_len`` or gate that does not fit.

    Examples:
        >>> hooks = steer_hook(0, torch.tensor([3.0, 4.0]), amount=5.0, operator="add")
        >>> hooks[0][0], hooks[0][1](torch.zeros(1, 1, 2), hook=None)
        ('blocks.0.hook_resid_post', tensor([[[3., 4.]]]))
    """
    layer = whole("layer", layer)
    amount, target = _amounts(amount, operator)
    if layer < 0:
        raise ValueError(f"layer={layer}; layers count from 0")
    require_step(operator, positions, gate)
    require_site(site)
    weights = positions.of_batch(require_border(prompt_len), prompts) if isinstance(positions, Weighted) else None
    prompt_len = require_border(prompt_len)
    size = direction.float().norm()
    if not torch.isfinite(size) or size == 0:
        raise ValueError(f"the direction at layer {layer} has norm {size:.3g}; expected a finite, non-zero vector")
    unit = lasting(direction.float() / size)
    reading: FwdHooks = []
    if isinstance(gate, LayerGate):
        gate.require_below(
            [layer if site == "resid_post" else layer - 1]
        )  # what is changed inside a block comes before
        run = GateRun(gate, prompt_len)
        reading, gate = [(resid_post(gate.layer), run)], run.opener()

    def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> Float[Tensor, "batch pos *shape"]:
        if act.shape[2:].numel() != unit.shape[0] or (site == "z") != (act.ndim == 4):
            raise ValueError(
                f"a direction of d_model {unit.shape[0]} at {site} does not fit activations {tuple(act.shape)}"
            )
        if amount == 0 and operator != "clamp":
            return act
        # of heads, the renormalising step keeps each one's norm; a component is along all of them together
        inner = act.shape[2:] if operator == "add_renorm" else unit.shape
        step: float | Tensor = amount
        if weights is None:
            assert not isinstance(positions, Weighted)
            scope = _scope(flat(act), positions, prompt_len)
        else:
            each = weights(flat(act))
            scope, step = (each != 0).to(act.device), amount * each.view(*each.shape, *[1] * len(inner))
        if gate is not None:
            opened = _opened(flat(act), gate)
            scope = opened if scope is None else scope & opened
        if scope is not None and not bool(scope.any()):
            return act
        new = moved(act.reshape(*act.shape[:2], *inner), unit.to(act.device).view(inner), step, operator, target)
        new = new.view(act.shape)
        return new if scope is None else torch.where(scope.view(*scope.shape, *[1] * (act.ndim - 2)), new, act)

    return [*reading, *edit_hooks(site, layer, hook_fn)]


def _amounts(amount: Any, operator: Any) -> tuple[float, float]:
    """The amount, and where ``"match"`` ends (ValueError: not as many numbers as the operator needs)."""
    pair = isinstance(amount, tuple)
    if pair != (operator == "match") or (pair and len(amount) != 2):
        raise ValueError(
            f"operator={operator!r} with amount={amount!r}; 'match' needs two numbers, the share of the way and where it "
            "ends, and any other operator one"
        )
    first, second = amount if pair else (amount, 0.0)
    return finite("amount", first), finite("target", second)


def require_step(operator: Any, positions: Any, gate: Any = None) -> None:
    """Refuse an operator, scope or gate that cannot be meant (ValueError), without a model or a direction."""
    require_operator(operator)
    if isinstance(positions, str) and positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r}; expected one of {get_args(Positions)} or a [batch, pos] mask")
    if isinstance(positions, Weighted) and operator == "clamp":
        raise ValueError(
            "operator='clamp' sets a value, which weights cannot multiply; use 'add', 'add_renorm' or 'ablate'"
        )
    if not isinstance(positions, (str, torch.Tensor, Weighted)) or (
        isinstance(positions, torch.Tensor) and (positions.ndim != 2 or positions.dtype != torch.bool)
    ):
        raise ValueError(
            f"positions={positions!r}; expected one of {get_args(Positions)} or a boolean [batch, pos] tensor, "
            "True where to "
            "steer (not a list of places)"
        )
    is_mask = isinstance(gate, torch.Tensor) and gate.dtype == torch.bool and gate.ndim in (1, 2)
    if gate is not None and not is_mask and (isinstance(gate, torch.Tensor) or not callable(gate)):
        raise ValueError(
            f"gate={gate!r}; expected a boolean tensor [batch] or [batch, pos], or a function of the activation that "
            "gives one, such as hooks.ThresholdGate(direction, threshold) or hooks.ProbeGate.fit(...)"
        )


def _opened(act: Float[Tensor, "batch pos d_model"], gate: Gate) -> Bool[Tensor, "rows positions"]:
    """What a gate says of an activation, as ``[batch or 1, pos or 1]``."""
    batch, n_pos = act.shape[:2]
    opened = gate if isinstance(gate, Tensor) else gate(act)
    if not isinstance(opened, Tensor) or opened.dtype != torch.bool:
        kind = f"{opened.dtype} tensor" if isinstance(opened, Tensor) else type(opened).__name__
        raise ValueError(f"the gate gave a {kind}; expected booleans [batch] or [batch, pos], True where to steer")
    rows = opened[:, None] if opened.ndim == 1 else opened
    if isinstance(gate, Tensor) and n_pos == 1 and rows.ndim == 2 and rows.shape[1] > 1:
        return torch.zeros(batch, 1, dtype=torch.bool, device=act.device)
    if rows.ndim != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] not in (1, n_pos):
        raise ValueError(
            f"the gate gave {tuple(opened.shape)} for activations {tuple(act.shape)}; expected [batch] or [batch, pos]"
        )
    return rows.to(act.device)


def require_border(prompt_len: Any) -> int | Int[Tensor, "batch"] | None:
    """Where prompts end, as an int, one number per row or ``None``; ValueError for anything else."""
    if prompt_len is None:
        return None
    if not isinstance(prompt_len, torch.Tensor) or prompt_len.ndim == 0:
        return whole("prompt_len", prompt_len, 1)
    if prompt_len.ndim != 1 or prompt_len.is_floating_point() or prompt_len.numel() == 0 or int(prompt_len.min()) < 1:
        raise ValueError(f"prompt_len={prompt_len.tolist()}; expected a whole number from 1 on, or one per row")
    return prompt_len


def _scope(
    act: Float[Tensor, "batch pos d_model"],
    positions: Positions | Bool[Tensor, "mask_batch mask_pos"],
    prompt_len: int | Int[Tensor, "given"] | None,
) -> Bool[Tensor, "rows pos"] | None:
    """True where to steer; ``None`` for everywhere."""
    if isinstance(positions, str) and positions == "all":
        return None
    batch, n_pos = act.shape[:2]
    if not isinstance(positions, str):
        if n_pos == 1 and positions.shape[1] != 1:
            return torch.zeros(batch, 1, dtype=torch.bool, device=act.device)
        if positions.shape[1] != n_pos or positions.shape[0] not in (1, batch):
            raise ValueError(f"a mask of shape {tuple(positions.shape)} does not fit activations {tuple(act.shape)}")
        return positions.to(act.device)
    place = torch.arange(n_pos, device=act.device)[None]
    if prompt_len is None:
        border = torch.full((1, 1), n_pos if n_pos > 1 else 0, device=act.device)
    else:
        border = torch.as_tensor(prompt_len, device=act.device).reshape(-1, 1)
        if len(border) not in (1, batch):
            raise ValueError(f"prompt_len has {len(border)} rows, the run has {batch}; give one number for each row")
        if n_pos > 1 and int(border.max()) > n_pos:
            raise ValueError(f"prompt_len={int(border.max())} is beyond the {n_pos} positions of this run")
        if n_pos == 1:  # a decoding step, except for the only token of a one-token prompt
            border = (border == 1).long()
    if positions == "prompt":
        return place < border
    if positions == "generated":
        return place >= border
    return place >= border - 1
