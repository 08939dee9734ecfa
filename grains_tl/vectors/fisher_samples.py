"""Samples of scores: one backward pass per sample and text, kept text by text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.files import hash_of
from grains_tl._util.progress import progress_bar
from grains_tl._util.rows import TensorRows
from grains_tl.attribution.field import graph_tokens
from grains_tl.hooks.steer import Positions
from grains_tl.inference.batches import Batch, by_token_budget, text_batch
from grains_tl.inference.logprobs import target_logits
from grains_tl.models.identity import model_identity
from grains_tl.models.precision import autocast_dtype
from grains_tl.models.state import autograd, require_gradient
from grains_tl.types import HookedModel
from grains_tl.vectors.zero_steps import StepOperator, check_step, zero_steps

#: Logits of one pass, in numbers: several tensors of that size are held at once, 64 MB each in float32.
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class FisherStep:
    """The step whose cost is asked for.

    Attributes:
        scope: where it acts.
        operator: how it is applied.

    Raises:
        OptionError: neither of these.
    """

    scope: Positions = "all"
    operator: StepOperator = "add"

    def __post_init__(self) -> None:
        check_step(self.scope, self.operator)


def score_samples(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    n_samples: int,
    *,
    step: FisherStep,
    seed: int,
    checkpoint: str | Path | None = None,
) -> Float[Tensor, "sample layer d_model"]:
    """Samples of the gradient of sum_t e_t log p(y_t) with drawn tokens y and signs e, text by text.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        rows: the texts' token ids.
        layers: which layers.
        n_samples: of each text.
        step: what the gradient is taken by.
        seed: of the draws; each text has draws of its own, whatever its batch.
        checkpoint: receives the samples of each text; those that it has are not drawn again.

    Returns:
        ``n_samples`` of the first text, then those of the next, and so on; nats per unit of the residual stream.
    """
    seeds = [seed * 1_000_003 + i for i in range(len(rows))]
    # everything is made inside, because autograd refuses tensors made in the caller's inference mode
    with autograd(model), progress_bar(total=n_samples * len(rows), desc="fisher", unit="sample") as bar:
        store = TensorRows.open(checkpoint)
        options = [model_identity(model), n_samples, step.scope, step.operator, autocast_dtype(model)]
        keys = [hash_of(["fisher", options, list(row), own]) for row, own in zip(rows, seeds, strict=True)]
        kept = {i: row for i, key in enumerate(keys) if (row := store.of_layers(key, layers)) is not None}
        bar.update(n_samples * len(kept))
        todo = [i for i in range(len(rows)) if i not in kept]
        budget = max(1, min(graph_tokens(), MAX_LOGITS // int(model.cfg.d_vocab)))
        for places in by_token_budget([len(rows[i]) for i in todo], max_tokens=budget):
            group = [todo[place] for place in places]
            drawn = []
            texts, draws = [rows[i] for i in group], [seeds[i] for i in group]
            for sample in _drawn(model, texts, layers, n_samples, step, draws):
                drawn.append(sample)
                bar.update(len(group))
            for i, own in zip(group, torch.stack(drawn, dim=1), strict=True):
                store.keep_layers(keys[i], own, layers)
                kept[i] = own
        return torch.cat([kept[i] for i in range(len(rows))])


def _drawn(
    model: HookedModel,
    texts: Sequence[Sequence[int]],
    layers: Sequence[int],
    n_samples: int,
    step: FisherStep,
    seeds: Sequence[int],
) -> Iterator[Float[Tensor, "text layer d_model"]]:
    """One sample of every text of a batch at a time."""
    batch = text_batch(model, texts)
    leaves, hooks = zero_steps(batch, layers, int(model.cfg.d_model), scope=step.scope, operator=step.operator)
    logits = target_logits(model, batch, hooks)
    require_gradient(logits)
    draws = _Draws(logits.detach(), batch, seeds)
    for n in range(n_samples):
        grads = torch.autograd.grad(logits, leaves, draws.score(), retain_graph=n + 1 < n_samples)
        yield torch.stack([g.cpu() for g in grads], dim=1)


class _Draws:
    """Tokens and signs for one batch, and the gradient of sum_t e_t log p(y_t) with respect to the logits."""

    def __init__(self, logits: Float[Tensor, "target vocab"], batch: Batch, seeds: Sequence[int]) -> None:
        self.dtype = logits.dtype
        self.p = logits.float().softmax(-1)
        self.cumulated = self.p.double().cumsum(-1)
        slots = batch.target_slot.cpu()
        self.own = [(slots == i).nonzero()[:, 0] for i in range(len(seeds))]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def score(self) -> Float[Tensor, "target vocab"]:
        place, sign = torch.zeros(len(self.p), dtype=torch.float64), torch.zeros(len(self.p))
        for own, generator in zip(self.own, self.generators, strict=True):
            place[own] = torch.rand(len(own), generator=generator, dtype=torch.float64)
            sign[own] = 2.0 * torch.randint(0, 2, (len(own),), generator=generator) - 1
        place, sign = place.to(self.p.device), sign.to(self.p.device)
        drawn = torch.searchsorted(self.cumulated, place[:, None] * self.cumulated[:, -1:])
        drawn = drawn.clamp(max=self.p.shape[1] - 1)
        return (-sign[:, None] * self.p).scatter_add(1, drawn, sign[:, None]).to(self.dtype)
