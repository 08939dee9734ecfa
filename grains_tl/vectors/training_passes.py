"""The passes of training: losses of a step at one layer, from residuals that were cached there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl.attribution.field import graph_tokens
from grains_tl.hooks.steer import Positions
from grains_tl.inference.batches import by_token_budget, scoring_batch, text_batch
from grains_tl.inference.logprobs import gather_logprobs
from grains_tl.inference.objectives import Objective, kl_divergence
from grains_tl.inference.restart import Restart, prepare_restart, restart_logits
from grains_tl.models.running import resid_post
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors.zero_steps import StepOperator, in_scope

#: What training minimises, on the building records: ``"margin"`` is that of BiPO (arXiv 2406.00045), ``"reps"`` that of RePS
#: (arXiv 2505.20809), ``"likelihood"`` that of one-shot optimised vectors (arXiv 2502.18862).
TrainingLoss = Literal["margin", "reps", "likelihood"]

#: Temperature of the margin loss, as in BiPO.
BETA = 0.1

#: Logits of one pass, in numbers: several tensors of that size are held at once, 64 MB each in float32.
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class Passes:
    """Runs from a cached residual, for one group of records or texts.

    Attributes:
        model: what is steered.
        restart: the batch with its residuals at every trained layer and, for texts, after the last block.
        where: ``[batch, pos]``, True at the positions that are steered.
        operator: how the step is applied.
    """

    model: HookedModel
    restart: Restart
    where: Bool[Tensor, "batch pos"]
    operator: StepOperator

    @property
    def n(self) -> int:
        """How many records (or texts, each a "record" of its own) there are."""
        return int(self.restart.batch.record.max()) + 1

    def logits(
        self, layer: int, step: Float[Tensor, "d_model"] | None, signs: Float[Tensor, "owner"] | None = None
    ) -> Float[Tensor, "target vocab"]:
        """Logits of the scored tokens with the step added after a block, times one sign per record; differentiable."""
        if step is None:
            return restart_logits(self.model, self.restart, max(self.restart.resid), [[]])[0]
        batch = self.restart.batch
        sign = torch.ones(self.n) if signs is None else signs

        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
            owner = sign.to(act.device)[batch.record.to(act.device)]
            return moved(act, owner[:, None, None] * step.to(act.device), self.where.to(act.device), self.operator)

        return restart_logits(self.model, self.restart, layer, [[(resid_post(layer), hook_fn)]])[0]

    def logprobs(
        self, layer: int, step: Float[Tensor, "d_model"], signs: Float[Tensor, "owner"]
    ) -> Float[Tensor, "record 2"]:
        """Log-likelihoods of both responses, with the step; differentiable."""
        return gather_logprobs(self.logits(layer, step, signs), self.restart.batch)

    def kl(
        self, layer: int, step: Float[Tensor, "d_model"], signs: Float[Tensor, "owner"] | None = None
    ) -> Float[Tensor, ""]:
        """KL(steered || base), mean over the predicted tokens of the group's texts, nats; differentiable."""
        with torch.no_grad():
            base = self.logits(layer, None).float().log_softmax(-1)
        steered = self.logits(layer, step, signs).float().log_softmax(-1)
        return kl_divergence(steered, base).mean()


def moved(
    act: Float[Tensor, "batch pos d_model"],
    step: Float[Tensor, "#batch 1 d_model"],
    where: Bool[Tensor, "batch pos"],
    operator: StepOperator,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual after a step of any size, as ``steer_hook`` makes it, differentiable by the step.

    Args:
        act: the residual.
        step: what is added to every steered position of a row.
        where: the steered positions.
        operator: ``"add"`` or ``"add_renorm"``.
    """
    h = act.detach().float()
    new = h + step
    if operator == "add_renorm":
        new = new * (h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-30))
    return torch.where(where[..., None], new, h).to(act.dtype)


def record_passes(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    layers: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    scope: Positions,
    operator: StepOperator,
    objective: Objective,
) -> list[Passes]:
    """One ``Passes`` per group of records (given by their places)."""
    made = []
    for group in groups:
        batch = scoring_batch(model, [tokenized[i] for i in group], objective)
        made.append(Passes(model, prepare_restart(model, batch, layers), in_scope(batch, scope), operator))
    return made


def text_passes(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    scope: Positions,
    operator: StepOperator,
) -> list[Passes]:
    """Texts, given as token ids, in groups whose logits fit in memory; the first half of a text counts as its prompt."""
    budget = max(1, min(graph_tokens(), MAX_LOGITS // int(model.cfg.d_vocab)))
    with_last = [*layers, int(model.cfg.n_layers) - 1]  # where the unsteered logits are read again and again
    made = []
    for group in by_token_budget([len(row) for row in rows], max_tokens=budget):
        batch = text_batch(model, [rows[i] for i in group])
        made.append(Passes(model, prepare_restart(model, batch, with_last), in_scope(batch, scope), operator))
    return made


def preference_loss(
    logprobs: Float[Tensor, "record 2"],
    base: Float[Tensor, "record 2"],
    signs: Float[Tensor, "record"],
    loss: TrainingLoss,
) -> Float[Tensor, ""]:
    """The mean loss of some records under a step; where ``signs`` is -1, the step was turned round and rejected is wanted.

    Args:
        logprobs: with the step.
        base: without it.
        signs: the sign of each record's step.
        loss: which; see ``TrainingLoss``.
    """
    up = (signs > 0).to(logprobs.device)
    wanted, other = torch.where(up, logprobs[:, 0], logprobs[:, 1]), torch.where(up, logprobs[:, 1], logprobs[:, 0])
    wanted0, other0 = torch.where(up, base[:, 0], base[:, 1]), torch.where(up, base[:, 1], base[:, 0])
    if loss == "likelihood":
        return -wanted.mean()
    if loss == "reps":  # what the model finds unlikely counts more
        return -torch.nn.functional.logsigmoid((other0 - wanted0).clamp(min=1) * wanted - other).mean()
    return -torch.nn.functional.logsigmoid(BETA * ((wanted - wanted0) - (other - other0))).mean()


def signed_gain(
    logprobs: Float[Tensor, "record 2"], base: Float[Tensor, "record 2"], signs: Float[Tensor, "record"]
) -> Float[Tensor, "record"]:
    """How far the margin moved the way the step should move it, nats."""
    change = (logprobs[:, 0] - logprobs[:, 1]) - (base[:, 0] - base[:, 1])
    return change * signs.to(change.device)
