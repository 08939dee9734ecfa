"""f and its gradient anywhere around the real inputs: the one place of attribution that runs a model with gradients.

Attribution methods ask a ``Field`` for values and gradients at points of their own; what the points mean (a path from a
baseline, noise, real tokens) is theirs. A test can hand them a plain function of embeddings instead of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.settings import current
from grains_tl.attribution.sharing import prompt_batches
from grains_tl.inference.batches import Batch, by_token_budget, scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import Objective
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.models.running import attribution_point
from grains_tl.models.state import autograd, require_gradient
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import FwdHooks, HookedModel

#: Makes the point to look at, ``[pos, d_model]``; made only when its batch runs, so that few are held at once.
MakePoint = Callable[[], Tensor]


def graph_tokens() -> int:
    """Tokens of a pass that keeps a graph: 3 / 8 of the budget, 192 of 512.

    Each token of SmolLM2 keeps 1 MB to go back through. Passes of 192 tokens are as fast as those of 256, and a build by
    gradients then needs about a quarter more memory than one forward pass.
    """
    return max(1, current().max_tokens * 3 // 8)


def fixed(point: Tensor) -> MakePoint:
    """A point that is there already."""
    return lambda: point


class Run(NamedTuple):
    """One evaluation: which record, and where (``None``: at its real input)."""

    record: int
    point: MakePoint | None


class Sample(NamedTuple):
    """What one run found.

    Attributes:
        run: index of the run.
        value: f there, nats.
        point: ``[pos, d_model]`` the prompt's activations there, float32 on the CPU.
        gradient: ``[pos, d_model]`` of f with respect to them; ``None`` if it was not asked for.
    """

    run: int
    value: float
    point: Tensor
    gradient: Tensor | None


@runtime_checkable
class Field(Protocol):
    """f of the prompt's embeddings of some records. ``lengths`` are their numbers of prompt tokens."""

    @property
    def lengths(self) -> list[int]: ...

    def sample(self, runs: Sequence[Run], *, gradient: bool) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class ModelField:
    """The contrastive log-likelihood of a model as a function of the prompt's activations at one hook point.

    Attributes:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        records: tokenized records.
        objective: how response tokens are combined.
        layer: ``None`` for the token embeddings (``attribution_point``), ``l`` for ``blocks.l.hook_resid_pre``: the
            blocks below run forward only.
        extra_hooks: makes hooks that run besides; a function because some hold state of one pass.
        shared: both responses in one row after their prompt (``sharing.shares_prompts`` says whether that is exact).
    """

    model: HookedModel
    records: Sequence[TokenizedPair]
    objective: Objective = "sum"
    layer: int | None = None
    extra_hooks: Callable[[], FwdHooks] = list
    shared: bool = False

    @property
    def lengths(self) -> list[int]:
        """Prompt tokens of each record."""
        return [len(record.prompt) for record in self.records]

    @property
    def entry(self) -> str:
        """The hook point where the points are."""
        return attribution_point(self.model) if self.layer is None else f"blocks.{self.layer}.hook_resid_pre"

    def sample(self, runs: Sequence[Run], *, gradient: bool) -> Iterator[Sample]:
        """Evaluate f (and its gradient) at every run, in full batches; the order is the batches'.

        Raises:
            ValueError: f or a gradient is not finite.
        """
        batches = prompt_batches if self.shared else run_batches
        budget = graph_tokens() if gradient else current().max_tokens
        plain = runs_plain(self.model)
        for part, batch in batches(self.model, self.records, [r.record for r in runs], self.objective, budget):
            held: dict[str, Tensor] = {}
            points = [runs[i].point for i in part]
            hooks = [
                (self.entry, _enter(batch, points, self.lengths_of(runs, part), gradient, held)),
                *self.extra_hooks(),
            ]
            with autograd(self.model) if gradient else torch.no_grad():
                logprobs = batch_logprobs(self.model, batch, hooks, plain=plain)
                values = logprobs[:, 0] - logprobs[:, 1]
                if gradient:
                    require_gradient(values)
                grads = torch.autograd.grad(values.sum(), held["entry"])[0] if gradient else None
            require_finite(values, "the log-likelihood")
            if grads is not None:
                require_finite(grads, "the gradient")
            yield from self._samples(runs, part, batch, values.detach(), held["entry"].detach(), grads)

    def lengths_of(self, runs: Sequence[Run], part: Sequence[int]) -> list[int]:
        """Prompt tokens of the runs of one batch."""
        return [len(self.records[runs[i].record].prompt) for i in part]

    def _samples(
        self,
        runs: Sequence[Run],
        part: Sequence[int],
        batch: Batch,
        values: Tensor,
        entry: Tensor,
        grads: Tensor | None,
    ) -> Iterator[Sample]:
        entry, grads = entry.float().cpu(), None if grads is None else grads.float().cpu()
        owners, offsets = batch.record.tolist(), batch.offset.tolist()
        for place, (run, length) in enumerate(zip(part, self.lengths_of(runs, part), strict=True)):
            rows = [row for row, owner in enumerate(owners) if owner == place]
            spans = [(row, slice(offsets[row], offsets[row] + length)) for row in rows]
            # a record with two rows has the same prompt in both: their gradients add up
            total = None if grads is None else torch.stack([grads[row, span] for row, span in spans]).sum(0)
            yield Sample(run, float(values[place]), entry[spans[0]].clone(), total)


def real_inputs(field: Field) -> tuple[list[Tensor], list[float]]:
    """The records' real activations ``[pos, d_model]`` and f(x), from forward passes."""
    found = in_order(field.sample([Run(i, None) for i in range(len(field.lengths))], gradient=False))
    return [s.point for s in found], [s.value for s in found]


def values_at(field: Field, points: Sequence[Tensor]) -> list[float]:
    """f of every record at one point each, from forward passes."""
    runs = [Run(i, fixed(p)) for i, p in enumerate(points)]
    return [s.value for s in in_order(field.sample(runs, gradient=False))]


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """Samples sorted by run."""
    return sorted(samples, key=lambda s: s.run)


def run_batches(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    runs: Sequence[int],
    objective: Objective,
    max_tokens: int | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """Runs, given as the record each is about, in batches under the token budget.

    Yields:
        ``(part, batch)``: indices of the runs, and a batch in which "record" i is run ``part[i]``.
    """
    lengths, n_rows = [records[r].longest for r in runs], [len(records[r].inputs) for r in runs]
    for part in by_token_budget(lengths, n_rows, max_tokens=max_tokens):
        yield part, scoring_batch(model, [records[runs[i]] for i in part], objective)


def require_finite(values: Tensor, name: str) -> None:
    """Raises ValueError for NaN or infinite entries."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{name} has NaN or infinite entries: the model's weights are broken, or its dtype is too small for them "
            "(float16 ends at 65504; use bfloat16 or float32)"
        )


def _enter(
    batch: Batch,
    points: Sequence[MakePoint | None],
    lengths: Sequence[int],
    gradient: bool,
    held: dict[str, Tensor],
) -> Any:
    """A hook that puts every run's point in the place of its prompt, as a leaf if gradients are wanted."""

    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        new = act.detach().clone()
        made = [None if make is None else make().to(new) for make in points]
        for row, (place, offset) in enumerate(zip(batch.record.tolist(), batch.offset.tolist(), strict=True)):
            point = made[place]
            if point is not None:
                new[row, offset : offset + lengths[place]] = point
        held["entry"] = new.requires_grad_(gradient)
        return new

    return hook_fn
