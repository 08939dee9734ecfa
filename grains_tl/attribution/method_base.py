"""What every attribution method has: a name, what it promises, its options as plain data, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from grains_tl._util.checks import whole
from grains_tl.attribution.job import Job
from grains_tl.attribution.paths import Scores
from grains_tl.attribution.reference import require_reference
from grains_tl.models.running import require_layers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel


@dataclass(frozen=True)
class Method:
    """What every attribution method has.

    Attributes:
        name: its short name.
        removes: it takes tokens out and needs no gradients.
        draws: it draws at random, from its ``seed``.
        completes: its scores promise to add up to f(x) - f(x').

    Examples:
        >>> from grains_tl.attribution.methods import METHODS
        >>> [name for name, method in METHODS.items() if method.draws]
        ['leave_k_out', 'expected_gradients', 'smoothgrad']
    """

    name: ClassVar[str]
    removes: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    completes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("n_steps", "k"):
            if hasattr(self, name):
                object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if hasattr(self, "seed"):
            object.__setattr__(self, "seed", whole("seed", self.seed))

    @classmethod
    def field_names(cls) -> list[str]:
        """The options the method takes."""
        return [f.name for f in fields(cls)]

    def scores(self, job: Job) -> list[Scores]:
        """Scores of every record of the job."""
        raise NotImplementedError

    def n_runs(self, record: TokenizedPair) -> int:
        """About how many rows of the model one record needs, for batching."""
        return int(getattr(self, "n_steps", 1))

    def check(self, model: HookedModel) -> None:
        """Refuse what this model cannot do (ValueError), before anything long runs."""
        if getattr(self, "layer", None) is not None:
            require_layers(model, [self.layer])  # type: ignore[attr-defined]
        if getattr(self, "reference", None) is not None:
            require_reference(model, self.reference)  # type: ignore[attr-defined]

    def options(self) -> dict[str, Any]:
        """The method as plain data, in the form that checkpoints and manifests have had since release 0.1."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        stated = {"method": self.name, "n_steps": own.pop("n_steps", 32), "baseline": own.pop("reference", None)}
        changed = {f.name for f in fields(self) if getattr(self, f.name) is not f.default}
        return stated | {name: value for name, value in own.items() if name in changed and name != "group_by"}
