"""Attribution by gradients: along a path from a reference, averaged over noise, or once at the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError
from grains_tl.attribution import other_paths, paths, samples
from grains_tl.attribution.job import Job
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.paths import Ends, Scores
from grains_tl.attribution.propagation import checked, frozen_hooks
from grains_tl.attribution.reference import DEFAULT_SET, Reference, References, check_reference
from grains_tl.models.running import device_of, embed_tokens
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: How integrated gradients place their nodes.
Nodes = Literal["gauss_legendre", "riemann", "adaptive"]

#: A gap below this share of |f(x) - f(x')| counts as converged.
TOLERANCE = 0.05


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Integrated gradients (arXiv 1703.01365) along the straight path from a reference, the paper's method.

    Attributes:
        n_steps: gradients per record; with ``nodes="adaptive"`` the most that may be spent.
        reference: x', the other end of the path: ``"function_words"``, ``"mean_embedding"``, ``"zero"`` (the paper's),
            ``"eos"``, ``"pad"``, ``"mask"``, ``"uniform_prompt"`` (see ``attribution.reference``), or a ``[d_model]``
            vector. Default: function words, from which the path converges.
        nodes: ``"adaptive"``, refined where f moves until the gap is below 5 % of |f(x) - f(x')| (the default from 9 steps
            on); ``"gauss_legendre"`` (as the paper's code) or ``"riemann"`` (midpoints).
        layer: attribute the residual stream at ``blocks.{layer}.hook_resid_pre`` instead of the embeddings: scores then
            belong to positions, and the blocks below need no gradient.

    Examples:
        >>> IntegratedGradients(n_steps=20, reference="zero", nodes="gauss_legendre").completes   # as the paper
        True
    """

    name: ClassVar[str] = "integrated_gradients"
    completes: ClassVar[bool] = True
    n_steps: int = 32
    reference: Reference | None = None
    nodes: Nodes | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference)
        if self.nodes is not None and self.nodes not in get_args(Nodes):
            raise OptionError(f"nodes={self.nodes!r} is not known; expected one of {', '.join(get_args(Nodes))}")
        if self.nodes == "adaptive" and self.n_steps < 3:
            raise OptionError(f"n_steps={self.n_steps} is too few for adaptive nodes; expected at least 3")

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(self.layer)
        ends = own.ends(_single(job.model, self.reference))
        nodes = self.nodes or ("adaptive" if self.n_steps >= 9 else "gauss_legendre")
        if nodes == "adaptive":
            return paths.adaptive_path(own.field, ends, budget=self.n_steps, tolerance=TOLERANCE)
        return paths.straight_path(own.field, ends, *paths.path_nodes(self.n_steps, nodes))


@dataclass(frozen=True)
class SequentialIG(Method):
    """Sequential integrated gradients (arXiv 2305.15853): one token moves at a time, the others stay real.

    Its limit is leave-one-out with the reference as the mask.

    Attributes:
        n_steps: gradients per token.
        reference: as in ``IntegratedGradients``.
        nodes: ``"gauss_legendre"`` or ``"riemann"``.
        layer: as in ``IntegratedGradients``.

    Examples:
        >>> attribute(model, pair, method=SequentialIG(n_steps=8))              # doctest: +SKIP
    """

    name: ClassVar[str] = "sequential_ig"
    completes: ClassVar[bool] = True
    n_steps: int = 32
    reference: Reference | None = None
    nodes: Literal["gauss_legendre", "riemann"] | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference)
        if self.nodes not in (None, "gauss_legendre", "riemann"):
            raise OptionError(
                f"nodes={self.nodes!r} cannot be used by sequential_ig; expected 'gauss_legendre' or 'riemann'"
            )

    @override
    def n_runs(self, record: TokenizedPair) -> int:
        return len(record.prompt) * self.n_steps

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(self.layer)
        # f(x') is not needed: every token has its own
        ends = Ends(own.x, own.starts(_single(job.model, self.reference)), own.values, own.values)
        return other_paths.one_at_a_time(
            own.field, ends, *paths.path_nodes(self.n_steps, self.nodes or "gauss_legendre")
        )


@dataclass(frozen=True)
class DiscretizedIG(Method):
    """Discretized integrated gradients (arXiv 2108.13654): along a path close to embeddings of real tokens.

    Attributes:
        n_steps: points of the path, both ends included.
        reference: as in ``IntegratedGradients``.

    Examples:
        >>> attribute(model, pair, method=DiscretizedIG(n_steps=30))            # doctest: +SKIP
    """

    name: ClassVar[str] = "discretized_ig"
    completes: ClassVar[bool] = True
    n_steps: int = 32
    reference: Reference | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference)
        if self.n_steps < 2:
            raise OptionError(
                f"n_steps={self.n_steps} is too few for discretized_ig, whose path has two ends; expected at least 2"
            )

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(None)
        ends = own.ends(_single(job.model, self.reference))
        ids = torch.arange(int(job.model.cfg.d_vocab), device=device_of(job.model))
        vocabulary = torch.cat([embed_tokens(job.model, part[None])[0].float().cpu() for part in ids.split(8192)])
        walks = [
            other_paths.token_path(a, b, vocabulary, self.n_steps) for a, b in zip(ends.x, ends.start, strict=True)
        ]
        return other_paths.along_points(own.field, ends, walks)


@dataclass(frozen=True)
class ExpectedGradients(Method):
    """Expected gradients (arXiv 1906.10670): integrated gradients averaged over several references, by sampling.

    Attributes:
        n_steps: gradients per record.
        reference: one or several, as in ``IntegratedGradients``; default three of them.
        layer: as in ``IntegratedGradients``.
        seed: of the draws; a record's draws do not depend on its batch.

    Examples:
        >>> attribute(model, pair, method=ExpectedGradients(n_steps=64))        # doctest: +SKIP
    """

    name: ClassVar[str] = "expected_gradients"
    draws: ClassVar[bool] = True
    completes: ClassVar[bool] = True
    n_steps: int = 32
    reference: Reference | None = None
    layer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference, several=True)

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(self.layer)
        given = _several(job.model, self.reference)
        starts = [list(s) for s in zip(*(own.starts(one) for one in given), strict=True)]
        draws = job.generators(self.seed)
        return samples.expected(own.field, own.x, own.values, starts, draws, n_samples=self.n_steps)


@dataclass(frozen=True)
class SmoothGrad(Method):
    """SmoothGrad (arXiv 1706.03825) x input: the gradient averaged over noise around the input.

    Attributes:
        n_steps: draws per record.
        noise: standard deviation as a fraction of each token's root-mean-square embedding entry.
        layer: as in ``IntegratedGradients``.
        seed: of the draws; a record's draws do not depend on its batch.

    Examples:
        >>> attribute(model, pair, method=SmoothGrad(noise=0.05))               # doctest: +SKIP
    """

    name: ClassVar[str] = "smoothgrad"
    draws: ClassVar[bool] = True
    n_steps: int = 32
    noise: float = 0.1
    layer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if finite("noise", self.noise) < 0:
            raise OptionError(f"noise={self.noise}: expected a fraction of 0 or more")

    @override
    def scores(self, job: Job) -> list[Scores]:
        own, draws = job.at(self.layer), job.generators(self.seed)
        return samples.smoothed(own.field, own.x, own.values, draws, n_samples=self.n_steps, noise=self.noise)


@dataclass(frozen=True)
class GradientXInput(Method):
    """Gradient x input: the first-order effect of each token, for one gradient per record.

    Attributes:
        layer: as in ``IntegratedGradients``.

    Examples:
        >>> GradientXInput().options()
        {'method': 'gradient_x_input', 'n_steps': 32, 'baseline': None}
    """

    name: ClassVar[str] = "gradient_x_input"
    layer: int | None = None

    @override
    def scores(self, job: Job) -> list[Scores]:
        return samples.at_the_input(job.at(self.layer).field)


@dataclass(frozen=True)
class AttentionAware(Method):
    """Gradient x input of the model made linear, after AttnLRP (arXiv 2402.05602): one gradient per record.

    Attributes:
        layer: as in ``IntegratedGradients``.

    Examples:
        >>> attribute(model, pair, method=AttentionAware())                     # doctest: +SKIP
    """

    name: ClassVar[str] = "attention_aware"
    layer: int | None = None

    @override
    def scores(self, job: Job) -> list[Scores]:
        with checked(frozen_hooks(job.model, from_layer=self.layer or 0)) as hooks:
            return samples.at_the_input(job.at(self.layer, lambda: hooks).field)


def _single(model: HookedModel, reference: Reference | None) -> Reference:
    return References(model).default() if reference is None else reference


def _several(model: HookedModel, reference: Reference | None) -> Sequence[str | Tensor]:
    if reference is None:
        nearest = References(model).default()
        return DEFAULT_SET if nearest == "function_words" else [nearest]
    return [reference] if isinstance(reference, (str, Tensor)) else list(reference)
