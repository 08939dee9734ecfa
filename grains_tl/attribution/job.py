"""What a gradient method works on: the records as functions of their input embeddings, and where its path begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from grains_tl.attribution import paths
from grains_tl.attribution.field import ModelField, real_inputs, values_at
from grains_tl.attribution.paths import Ends
from grains_tl.attribution.reference import Reference, References
from grains_tl.attribution.samples import record_generator
from grains_tl.attribution.sharing import shares_prompts
from grains_tl.hooks.mask import Mask
from grains_tl.inference.objectives import Objective
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: Positions that are taken out together, for every record.
Groups = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Job:
    """Records to attribute, and everything that is not the method's own choice.

    Attributes:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        records: the tokenized records.
        objective: how response tokens are combined.
        mask: what stands in for tokens and patches.
        content_only: leave special and template tokens where they are.
        groups: for the methods that take tokens out, what goes together; ``None`` for single tokens.
    """

    model: HookedModel
    records: Sequence[TokenizedPair]
    objective: Objective = "sum"
    mask: Mask = Mask()
    content_only: bool = False
    groups: Groups | None = None

    def units(self) -> list[Sequence[Sequence[int]]]:
        """What may be taken out of each record: its groups, or every (content) token by itself."""
        if self.groups is not None:
            return list(self.groups)
        return [single_tokens(record, content_only=self.content_only) for record in self.records]

    def generators(self, seed: int) -> list[torch.Generator]:
        """One generator per record, which does not depend on the batch the record is in."""
        return [record_generator(seed, r.prompt, r.chosen, r.rejected) for r in self.records]

    def at(self, layer: int | None, extra_hooks: Callable = list) -> GradientJob:
        """The records as functions of their embeddings, or of the residual stream before ``layer``."""
        # hooks of attention meet attention of one row per response, as they expect
        shared = extra_hooks is list and shares_prompts(self.model, self.records, self.objective)
        field = ModelField(self.model, self.records, self.objective, layer, extra_hooks, shared)
        return GradientJob(self, field)


@dataclass(frozen=True)
class GradientJob:
    """A job whose records are functions of their inputs at one hook point.

    Attributes:
        job: the records.
        field: f and its gradient at any input.
    """

    job: Job
    field: ModelField

    @cached_property
    def _real(self) -> tuple[list[Tensor], list[float]]:
        return real_inputs(self.field)

    @property
    def x(self) -> list[Tensor]:
        """Real inputs ``[pos, d_model]`` of every record."""
        return self._real[0]

    @property
    def values(self) -> list[float]:
        """f(x) of every record, nats."""
        return self._real[1]

    def ends(self, reference: Reference) -> Ends:
        """Both ends of every record's path."""
        return paths.ends_of(self.field, self.x, self.values, self.starts(reference))

    def starts(self, reference: Reference) -> list[Tensor]:
        """x' ``[pos, d_model]`` of every record at the field's entry.

        Raises:
            ValueError: several references where one is needed.
        """
        if not isinstance(reference, (str, Tensor)):
            raise ValueError(f"reference={reference!r}; this method expects a single reference, not a list")
        if self.field.layer is None or isinstance(reference, Tensor):
            return self._starts(reference, self.x)
        # inside the model the reference is what the layers below make of a reference prompt
        tokens = ModelField(self.job.model, self.job.records, self.job.objective)
        return activations_at(tokens, self._starts(reference, real_inputs(tokens)[0]), self.field.entry)

    def _starts(self, reference: str | Tensor, real: Sequence[Tensor]) -> list[Tensor]:
        references = References(self.job.model)
        pairs = list(zip(real, self.job.records, strict=True))
        starts = [references.of_record(reference, point, r, self.job.mask.image) for point, r in pairs]
        if not self.job.content_only:
            return starts
        kept = [torch.tensor(r.content)[:, None] for r in self.job.records]
        return [torch.where(k, start, point) for k, start, point in zip(kept, starts, real, strict=True)]


def single_tokens(record: TokenizedPair, *, content_only: bool) -> list[tuple[int, ...]]:
    """Every prompt token by itself."""
    return [(p,) for p in range(len(record.prompt)) if record.content[p] or not content_only]


def activations_at(field: ModelField, points: Sequence[Tensor], name: str) -> list[Tensor]:
    """``[pos, d_model]`` at the hook point ``name`` when the prompts' embeddings are ``points``."""
    found: list[Tensor] = []
    for record, point in zip(field.records, points, strict=True):
        held: list[Tensor] = []

        def keep(act: Tensor, hook: object, held: list[Tensor] = held) -> None:
            held.append(act.detach())

        values_at(replace(field, records=[record], extra_hooks=partial(list, [(name, keep)])), [point])
        found.append(held[0][0, : len(point)].float().cpu())
    return found
