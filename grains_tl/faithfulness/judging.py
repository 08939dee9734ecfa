"""How methods are judged: curves while tokens go, the tokens of both sides, and a random choice of tokens beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, random_selection
from grains_tl.faithfulness.agreement import random_attributions
from grains_tl.faithfulness.deletion import SHARES, curves, removal_table
from grains_tl.hooks.mask import Mask
from grains_tl.inference.objectives import Objective
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: Columns with a standard error over records beside them.
MEASURES = ("removed_chosen", "removed_rejected", "sufficiency", "deletion_area", "insertion_area")


@dataclass(frozen=True)
class Judging:
    """The settings of ``compare_attributions`` that belong to the judge and not to a method.

    Attributes:
        n_draws: draws of the row ``random_tokens``: as many content tokens, chosen by chance.
        seed: of these draws, and of methods given by name that draw at random.
        shares: the shares of the content tokens at which deletion and insertion curves are read, between 0 and 1.
        layer: where to steer with the vectors that the tokens yield; default two thirds of the way up.
        alpha: step size of that, a fraction of the layer's typical residual norm.

    Raises:
        ValueError: a number that cannot be meant.

    Examples:
        >>> Judging(n_draws=3, layer=24).alpha
        0.2
    """

    n_draws: int = 5
    seed: int = 0
    shares: Sequence[float] = SHARES
    layer: int | None = None
    alpha: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_draws", whole("n_draws", self.n_draws, 0))
        object.__setattr__(self, "seed", whole("seed", self.seed))
        object.__setattr__(self, "alpha", finite("alpha", self.alpha))
        shares = tuple(finite("share", s) for s in listed("shares", self.shares))
        if not shares or any(not 0 < s < 1 for s in shares):
            raise OptionError(f"shares={shares}; expected numbers between 0 and 1 (both ends are always added)")
        object.__setattr__(self, "shares", shares)


@dataclass(frozen=True)
class Judge:
    """Measures what a choice of tokens does to f, on the same records and in the same way for every method.

    Attributes:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        top_k: tokens taken out together on each side.
        objective: how response tokens are combined.
        mask: what replaces a removed token or patch.
        judging: the other settings.
    """

    model: HookedModel
    tokenized: Sequence[TokenizedPair]
    top_k: int
    objective: Objective
    mask: Mask
    judging: Judging

    @property
    def shared(self) -> dict[str, Any]:
        """How f is measured, wherever it is."""
        return {"objective": self.objective, "mask": self.mask}

    def measures(
        self, attributions: Sequence[Attribution], selections: Sequence[Selection]
    ) -> Float[Tensor, "measure record"]:
        """``MEASURES`` of one method, nats."""
        removed = removal_table(self.model, self.tokenized, selections, **self.shared)
        drawn = curves(self.model, self.tokenized, attributions, shares=self.judging.shares, **self.shared)
        return torch.cat([removed, torch.stack([drawn.deletion_area, drawn.insertion_area])])

    def random_draws(self) -> list[tuple[list[Attribution], list[Selection]]]:
        """Scores and choices of tokens drawn by chance."""
        generator = torch.Generator().manual_seed(self.judging.seed)
        like = Selection((0,) * self.top_k, (0,) * self.top_k)
        return [
            (
                random_attributions(self.tokenized, generator),
                [random_selection(t.content, like, generator) for t in self.tokenized],
            )
            for _ in range(self.judging.n_draws)
        ]


def measure_columns(measures: Float[Tensor, "measure record"]) -> dict[str, float]:
    """Mean over records of each measure, with its standard error."""
    mean, se = mean_and_se(measures)
    row: dict[str, float] = {}
    for i, name in enumerate(MEASURES):
        row |= {name: mean[i].item(), f"{name}_se": se[i].item()}
    return row


def gap_columns(attributions: Sequence[Attribution]) -> dict[str, float]:
    """How well a method keeps its promise of completeness; NaN where it makes none."""
    gaps = [abs(a.gap) for a in attributions if a.gap is not None]
    relative = [a.relative_gap for a in attributions if a.relative_gap is not None]
    converged = [a.converged for a in attributions if a.converged is not None]
    steps = [a.steps for a in attributions if a.steps is not None]
    nan = float("nan")
    return {
        "gap": float(np.median(gaps)) if gaps else nan,
        "relative_gap": float(np.median(relative)) if relative else nan,
        "converged": float(np.mean(converged)) if converged else nan,
        "steps": float(np.median(steps)) if steps else nan,
    }
