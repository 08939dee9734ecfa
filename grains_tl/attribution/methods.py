"""The attribution methods, each a frozen value that checks itself and knows what it promises.

A name with its fields is shorthand: ``method="integrated_gradients", n_steps=64`` is ``IntegratedGradients(n_steps=64)``.
A method of one's own is a subclass of ``Method`` with ``scores``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from grains_tl._util.checks import finite, whole
from grains_tl._util.errors import OptionError
from grains_tl.attribution import paths, samples
from grains_tl.attribution.groups import GroupBy
from grains_tl.attribution.job import Job
from grains_tl.attribution.paths import Ends, Scores
from grains_tl.attribution.propagation import checked, frozen_hooks
from grains_tl.attribution.reference import DEFAULT_SET, Reference, References, check_reference, require_reference
from grains_tl.attribution.removal import leave_k_out_scores, leave_out_scores
from grains_tl.models.running import device_of, embed_tokens, require_layers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: How integrated gradients place their nodes.
Nodes = Literal["gauss_legendre", "riemann", "adaptive"]

#: A gap below this share of |f(x) - f(x')| counts as converged.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Method:
    """What every attribution method has.

    Attributes:
        name: its short name.
        removes: it takes tokens out and needs no gradients.
        draws: it draws at random, from its ``seed``.
        completes: its scores promise to add up to f(x) - f(x').

    Examples:
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
            raise OptionError(f"nodes={self.nodes!r} is not known; choose one of {', '.join(get_args(Nodes))}")
        if self.nodes == "adaptive" and self.n_steps < 3:
            raise OptionError(f"n_steps={self.n_steps}: adaptive nodes need at least 3 gradients")

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
            raise OptionError(f"nodes={self.nodes!r}: sequential_ig takes 'gauss_legendre' or 'riemann'")

    @override
    def n_runs(self, record: TokenizedPair) -> int:
        return len(record.prompt) * self.n_steps

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(self.layer)
        # f(x') is not needed: every token has its own
        ends = Ends(own.x, own.starts(_single(job.model, self.reference)), own.values, own.values)
        return paths.one_at_a_time(own.field, ends, *paths.path_nodes(self.n_steps, self.nodes or "gauss_legendre"))


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
            raise OptionError(f"n_steps={self.n_steps}: discretized_ig needs both ends of its path, n_steps=2 or more")

    @override
    def scores(self, job: Job) -> list[Scores]:
        own = job.at(None)
        ends = own.ends(_single(job.model, self.reference))
        ids = torch.arange(int(job.model.cfg.d_vocab), device=device_of(job.model))
        vocabulary = torch.cat([embed_tokens(job.model, part[None])[0].float().cpu() for part in ids.split(8192)])
        walks = [paths.token_path(a, b, vocabulary, self.n_steps) for a, b in zip(ends.x, ends.start, strict=True)]
        return paths.along_points(own.field, ends, walks)


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
            raise OptionError(f"noise={self.noise}: a fraction of 0 or more is needed")

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


#: Every method by its short name.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LeaveOneOut,
        LeaveKOut,
        IntegratedGradients,
        SequentialIG,
        DiscretizedIG,
        ExpectedGradients,
        SmoothGrad,
        GradientXInput,
        AttentionAware,
    )
}


def method_of(method: Method | str, *, shared: Mapping[str, Any] | None = None, **given: Any) -> Method:
    """A method from its name and fields.

    ``n_steps`` may be given for any method and is used by those that take steps; fields that are ``None`` keep their
    defaults.

    Args:
        method: its name, or the method itself.
        shared: what is given for several methods at once: each takes the fields it has.
        given: fields of this method.

    Raises:
        ValueError: an unknown name, a field the method does not have, or fields beside a method that is a value already.

    Examples:
        >>> method_of("integrated_gradients", n_steps=64)
        IntegratedGradients(n_steps=64, reference=None, nodes=None, layer=None)
        >>> method_of("gradient_x_input", shared={"n_steps": 64, "layer": 3})
        GradientXInput(layer=3)
    """
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(method, Method):
        if given:
            raise OptionError(f"{', '.join(given)}: set these on the method itself: {type(method).__name__}(...)")
        return method
    if method not in METHODS:
        raise OptionError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    kind = METHODS[method]
    known = kind.field_names()
    if "n_steps" not in known and "n_steps" in given:
        whole("n_steps", given.pop("n_steps"), 1)
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = f"its options are {', '.join(known)}" if known else "it has no options"
        raise OptionError(f"method {method!r} takes no {', '.join(unknown)}; {has}")
    common = {name: value for name, value in (shared or {}).items() if name in known and value is not None}
    return kind(**{**common, **given})


def _single(model: HookedModel, reference: Reference | None) -> Reference:
    return References(model).default() if reference is None else reference


def _several(model: HookedModel, reference: Reference | None) -> Sequence[str | Tensor]:
    if reference is None:
        nearest = References(model).default()
        return DEFAULT_SET if nearest == "function_words" else [nearest]
    return [reference] if isinstance(reference, (str, Tensor)) else list(reference)
