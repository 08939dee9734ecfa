"""Optimising one vector at one layer: the preference loss goes down while the KL on neutral text stays at a budget.

1. Start along the loss's own gradient (with a Fisher matrix: F^-1 times it), as long as the budget allows.
2. Each step takes a few records and texts: d = dL/dv + w dKL/dv, where the weight w of the KL makes d do nothing along v
   itself. Adam moves v along -d, and v is scaled back so that the measured KL tends to the budget.
3. Every few steps, records and texts that were held out say how far the margin moves at the budget. The best v is kept, and
   training stops when several such checks in a row bring nothing better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.rows import TensorRows
from grains_tl.attribution.field import require_finite
from grains_tl.models.state import require_gradient
from grains_tl.vectors.training_passes import Passes, TrainingLoss, preference_loss, signed_gain

#: Steps between two checks on held-out records.
CHECK_EVERY = 5

#: Checks without a better result after which training stops.
PATIENCE = 4

#: Adam's memory of past gradients and of their squares; the latter is short because runs are.
ADAM = (0.9, 0.95)

#: What is added to the root of the squares, as a share of its median over the coordinates.
FLOOR = 0.1

#: Of the residual norm: the first length that is tried for the budget.
FIRST_LENGTH = 0.05


@dataclass(frozen=True)
class State:
    """Where training is.

    Attributes:
        u: ``[d_model]``, the vector before preconditioning.
        first, second: Adam's moments.
        best: the best vector so far (as ``u``).
        step: steps that were taken.
        best_step: the step that ``best`` comes from.
        best_effect: its held-out effect at the budget, nats.
        history: one entry per check: ``step``, ``loss`` and ``kl`` (means since the last check), ``held_out_effect``.
        stopped: no further step is wanted.
    """

    u: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    step: int = 0
    best_step: int = 0
    best_effect: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False

    def save(self, rows: TensorRows, key: str) -> None:
        """Append to a checkpoint."""
        tensors = {name: getattr(self, name) for name in ("u", "first", "second", "best")}
        about = {name: getattr(self, name) for name in ("step", "best_step", "best_effect", "history", "stopped")}
        rows.append(key, tensors, **about)

    @classmethod
    def load(cls, rows: TensorRows, key: str) -> State | None:
        """The last state of a checkpoint; ``None`` if it has none."""
        tensors = rows.tensors(key)
        if set(tensors) != {"u", "first", "second", "best"}:
            return None
        about: dict[str, Any] = {
            name: rows.rows[key][name] for name in ("step", "best_step", "best_effect", "history", "stopped")
        }
        return cls(**about, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerTraining:
    """Everything that training at one layer needs.

    Attributes:
        layer: after which block the vector is added.
        records, texts: groups to train on.
        held_records, held_texts: groups for the checks; empty for none.
        loss: see ``TrainingLoss``.
        budget: KL on neutral text, nats per token.
        bidirectional: half of the records see -v, and are asked for the rejected response.
        n_steps: at most.
        learning_rate: the first step's length as a share of the vector's; it falls to 0 along a cosine.
        seed: of the order of the groups.
        precondition: from ``u`` to the vector that is added; symmetric.
    """

    layer: int
    records: Sequence[Passes]
    texts: Sequence[Passes]
    held_records: Sequence[Passes]
    held_texts: Sequence[Passes]
    loss: TrainingLoss
    budget: float
    bidirectional: bool
    n_steps: int
    learning_rate: float
    seed: int
    precondition: Callable[[Tensor], Tensor]

    def run(self, rows: TensorRows, key: str, progress: Any) -> State:
        """Train, going on from the checkpoint where it has this training; ``progress`` is a bar."""
        state = State.load(rows, key)
        if state is None:
            state = self._checked(self._started(), [], [])
            state.save(rows, key)
        progress.update(state.step)
        losses, kls = [], []
        while not state.stopped:
            state, loss, kl = self._step(state)
            progress.update(1)
            losses.append(loss)
            kls.append(kl)
            if state.step % CHECK_EVERY == 0 or state.step == self.n_steps:
                state = self._checked(state, losses, kls)
                losses, kls = [], []
                state.save(rows, key)
        progress.update(self.n_steps - state.step)
        return state

    # -- the start --

    def _started(self) -> State:
        u = self.precondition(-self._first_gradient())
        if not bool(u.any()):
            raise ValueError(
                f"the gradient at layer {self.layer} is zero: a step at these positions changes no response. Use another "
                "scope, or records with longer responses"
            )
        u = u / u.norm()
        size = torch.stack([p.restart.resid[self.layer].float().norm(dim=-1).median().cpu() for p in self.records])
        u = u * FIRST_LENGTH * float(size.mean()) / self.precondition(u).norm()
        for _ in range(8):  # one step is right where the KL is quadratic; far from there it takes some
            factor = (self.budget / max(self.kl(u, self.texts), 1e-30)) ** 0.5
            u = u * min(max(factor, 0.1), 10.0)
            if 0.95 < factor < 1.05:
                break
        return State(u, torch.zeros_like(u), torch.zeros_like(u), u)

    def _first_gradient(self) -> Float[Tensor, "d_model"]:
        total = torch.zeros(self._width)
        for group in self.records:
            for sign in self._signs:
                v = torch.zeros(self._width, requires_grad=True)
                loss = self._loss(group, v, torch.full((group.n,), sign))
                require_gradient(loss)
                total += torch.autograd.grad(loss, v)[0] * group.n
        require_finite(total, "the gradient")
        return total

    # -- a step --

    def _step(self, state: State) -> tuple[State, float, float]:
        """The next state, and loss and KL before the step."""
        t = state.step
        records, round_ = _turn(self.records, t, self.seed)
        texts, text_round = _turn(self.texts, t, self.seed + 1)
        signs = torch.ones(records.n)
        if self.bidirectional:  # each record sees +v and -v in turn
            signs = 1.0 - 2.0 * ((torch.arange(records.n) + round_) % 2)
        sign = -1.0 if self.bidirectional and text_round % 2 else 1.0
        v = self.precondition(state.u).requires_grad_()
        loss = self._loss(records, v, signs)
        (g,) = torch.autograd.grad(loss, v)
        kl = texts.kl(self.layer, v, torch.full((texts.n,), sign))
        (cost,) = torch.autograd.grad(kl, v)
        require_finite(torch.stack([g, cost]), "the gradient")
        along = float(v.detach() @ cost)
        weight = max(-float(v.detach() @ g) / along, 0.0) if along > 0 else 0.0
        d = self.precondition(g + weight * cost)
        first = ADAM[0] * state.first + (1 - ADAM[0]) * d
        second = ADAM[1] * state.second + (1 - ADAM[1]) * d * d
        size = state.u.norm()
        spread = (second / (1 - ADAM[1] ** (t + 1))).sqrt()
        # a coordinate that nothing depends on must not be moved as far as the others, as a tiny constant would let it
        ratio = first / (1 - ADAM[0] ** (t + 1)) / (spread + FLOOR * spread.median() + 1e-30)
        rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * t / self.n_steps))
        u = state.u - rate * size / len(ratio) ** 0.5 * ratio
        # a damped correction: one group of texts says little about the KL of all
        factor = min(max((self.budget / max(float(kl.detach()), 1e-30)) ** 0.25, 0.8), 1.25)
        u = u * (size * factor / u.norm().clamp(min=1e-30))
        return replace(state, u=u, first=first, second=second, step=t + 1), float(loss.detach()), float(kl.detach())

    def _loss(self, group: Passes, v: Tensor, signs: Tensor) -> Float[Tensor, ""]:
        return preference_loss(group.logprobs(self.layer, v, signs), group.restart.base, signs, self.loss)

    # -- checks --

    def _checked(self, state: State, losses: Sequence[float], kls: Sequence[float]) -> State:
        """The state with an entry in its history, and with the best vector so far."""
        entry: dict[str, Any] = {"step": state.step}
        if losses:
            entry |= {"loss": sum(losses) / len(losses), "kl": sum(kls) / len(kls)}
        done = state.step >= self.n_steps
        if not self.held_records:
            new = replace(state, best=state.u, best_step=state.step, stopped=done)
            return replace(new, history=[*state.history, entry])
        entry["held_out_effect"] = effect = self.effect(state.u)
        history = [*state.history, entry]
        if effect > state.best_effect:
            best: dict[str, Any] = {"best": state.u, "best_step": state.step, "best_effect": effect}
            return replace(state, history=history, stopped=done, **best)
        return replace(state, history=history, stopped=done or state.step - state.best_step >= PATIENCE * CHECK_EVERY)

    def effect(self, u: Float[Tensor, "d_model"]) -> float:
        """How far the held-out records' margin moves, scaled to the budget by the held-out texts' KL; nats."""
        v = self.precondition(u)
        with torch.no_grad():
            gains = [
                signed_gain(group.logprobs(self.layer, v, signs), group.restart.base, signs)
                for group in self.held_records
                for signs in (torch.full((group.n,), sign) for sign in self._signs)
            ]
        gain = float(torch.cat(gains).mean())
        return gain * (self.budget / max(self.kl(u, self.held_texts), 1e-30)) ** 0.5

    def kl(self, u: Float[Tensor, "d_model"], texts: Sequence[Passes]) -> float:
        """Mean KL over the tokens of some texts (over both signs, if both are trained), nats."""
        v, total, n = self.precondition(u), 0.0, 0
        with torch.no_grad():
            for group in texts:
                n_targets = len(group.restart.batch.target_id)
                for sign in self._signs:
                    total += float(group.kl(self.layer, v, torch.full((group.n,), sign))) * n_targets
                    n += n_targets
        return total / n

    @property
    def _signs(self) -> tuple[float, ...]:
        return (1.0, -1.0) if self.bidirectional else (1.0,)

    @property
    def _width(self) -> int:
        return int(self.records[0].restart.resid[self.layer].shape[-1])


def _turn(groups: Sequence[Passes], step: int, seed: int) -> tuple[Passes, int]:
    """The group whose turn it is, and how often all have had theirs; the order is drawn anew for every round.

    It depends on step and seed alone, so that a resumed run goes the same way.
    """
    round_, place = divmod(step, len(groups))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + round_) % 2**32)
    return groups[int(torch.randperm(len(groups), generator=generator)[place])], round_


def groups_of(indices: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int) -> Iterator[list[int]]:
    """The indices in their order, in groups of at most ``size`` and, padded, at most ``max_tokens`` (or of one).

    Examples:
        >>> list(groups_of([2, 0, 1], [5, 5, 9], 2, 100)), list(groups_of([0, 1], [5, 5], 2, 9))
        ([[2, 0], [1]], [[0], [1]])
    """
    group: list[int] = []
    for i in indices:
        longest = max([lengths[k] for k in [*group, i]])
        if group and (len(group) == size or longest * (len(group) + 1) > max_tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
