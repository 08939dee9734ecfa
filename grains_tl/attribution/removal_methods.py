"""Attribution by taking tokens out, one or several at a time: forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from grains_tl.attribution.job import Job
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.paths import Scores
from grains_tl.attribution.removal import leave_k_out_scores, leave_out_scores
from grains_tl.attribution.words import GroupBy
from grains_tl.tokens.pairs import TokenizedPair


@dataclass(frozen=True)
class LeaveOneOut(Method):
    """f(x) - f(x without the token): one forward pass per token.

    Attributes:
        group_by: take out whole ``"word"``s, ``"sentence"``s or given spans; the tokens share the score.

    Examples:
        >>> attribute(model, pair, method=LeaveOneOut(group_by="word"))      # doctest: +SKIP
    """

    name: ClassVar[str] = "leave_one_out"
    removes: ClassVar[bool] = True
    group_by: GroupBy | None = None

    @override
    def n_runs(self, record: TokenizedPair) -> int:
        return len(record.prompt)

    @override
    def scores(self, job: Job) -> list[Scores]:
        units = job.units()
        scores, values = leave_out_scores(job.model, job.records, units, objective=job.objective, mask=job.mask)
        return [Scores(s, v, None, None, len(u)) for s, v, u in zip(scores, values, units, strict=True)]


@dataclass(frozen=True)
class LeaveKOut(Method):
    """The least-squares share of each token when ``k`` go at a time.

    Words that stand in for each other look useless one by one; taken out together they show.

    Attributes:
        n_steps: forward passes per record.
        k: tokens (or groups) taken out together.
        seed: of the draws; a record's draws do not depend on its batch.
        group_by: as in ``LeaveOneOut``.

    Examples:
        >>> attribute(model, pair, method=LeaveKOut(n_steps=128, k=4))        # doctest: +SKIP
    """

    name: ClassVar[str] = "leave_k_out"
    removes: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    n_steps: int = 32
    k: int = 3
    seed: int = 0
    group_by: GroupBy | None = None

    @override
    def scores(self, job: Job) -> list[Scores]:
        scores, values = leave_k_out_scores(
            job.model,
            job.records,
            job.units(),
            job.generators(self.seed),
            k=self.k,
            n_draws=self.n_steps,
            objective=job.objective,
            mask=job.mask,
        )
        return [Scores(s, v, None, None, self.n_steps) for s, v in zip(scores, values, strict=True)]
