"""The attribution methods under one interface: options in, one set of scores per record out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grains_tl.attribution import paths, samples
from grains_tl.attribution.field import ModelField, real_inputs, values_at
from grains_tl.attribution.paths import Ends, Scores
from grains_tl.attribution.propagation import checked, frozen_hooks
from grains_tl.attribution.reference import DEFAULT_SET, Baseline, Baselines, check_baseline, require_baseline
from grains_tl.attribution.removal import leave_k_out_scores, leave_out_scores
from grains_tl.attribution.sharing import shares_prompts
from grains_tl.hooks.mask import Masker
from grains_tl.hooks.stand_ins import ImageMasker
from grains_tl.inference.objectives import Objective, require_objective
from grains_tl.models.running import device_of, embed_tokens, require_layers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

Method = Literal[
    "leave_one_out",
    "leave_k_out",
    "integrated_gradients",
    "sequential_ig",
    "discretized_ig",
    "expected_gradients",
    "smoothgrad",
    "gradient_x_input",
    "attention_aware",
]

#: How integrated gradients place their nodes.
Nodes = Literal["gauss_legendre", "riemann", "adaptive"]

#: Methods that only take tokens out: no gradients.
REMOVAL = ("leave_one_out", "leave_k_out")

#: Methods that draw at random.
DRAWS = ("leave_k_out", "expected_gradients", "smoothgrad")

#: Methods that go along a path from a baseline.
PATH = ("integrated_gradients", "sequential_ig", "discretized_ig", "expected_gradients")

#: A gap below this share of |f(x) - f(x')| counts as converged.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Options:
    """Everything a method can be told; ``attribute`` explains each."""

    n_steps: int = 32
    baseline: Baseline = "zero"
    objective: Objective = "sum"
    masker: Masker = "mean_embedding"
    image_masker: ImageMasker = "mean_patch"
    nodes: Nodes = "gauss_legendre"
    layer: int | None = None
    noise: float = 0.1
    k: int = 3
    seed: int = 0
    content_only: bool = False


@dataclass(frozen=True)
class Job:
    """What a gradient method works on: the records with their real inputs ``[pos, d_model]`` and f(x)."""

    model: HookedModel
    records: Sequence[TokenizedPair]
    field: ModelField
    options: Options
    x: list[Tensor]
    values: list[float]


def check_attribution_options(
    method: str,
    n_steps: int,
    baseline: Baseline | None,
    objective: str,
    *,
    nodes: str | None = None,
    layer: int | None = None,
    k: int = 3,
    noise: float = 0.1,
    model: HookedModel | None = None,
) -> None:
    """Refuse options that cannot work before anything runs (ValueError)."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; it is one of {get_args(Method)}")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; {method} needs at least one step")
    if method == "discretized_ig" and n_steps < 2:
        raise ValueError("n_steps=1; discretized_ig needs both ends of its path, n_steps=2 or more")
    if nodes is not None and nodes not in get_args(Nodes):
        raise ValueError(f"nodes={nodes!r}; it is one of {get_args(Nodes)}")
    if nodes == "adaptive" and method == "integrated_gradients" and n_steps < 3:
        raise ValueError(f"n_steps={n_steps}; adaptive nodes need at least 3 gradients")
    if nodes == "adaptive" and method == "sequential_ig":
        raise ValueError(
            "nodes='adaptive' is for integrated_gradients; sequential_ig takes 'gauss_legendre' or 'riemann'"
        )
    if k < 1 or not 0 <= noise < math.inf:
        raise ValueError(f"k={k}, noise={noise}; k is at least 1, noise is finite and not negative")
    if layer is not None:
        if method in REMOVAL or method == "discretized_ig":
            raise ValueError(f"layer={layer}: {method} works on tokens; leave layer out, or take a gradient method")
        if model is not None:
            require_layers(model, [layer])
    require_objective(objective)
    if baseline is not None:
        check_baseline(baseline, several=method == "expected_gradients")
        if model is not None and method in PATH:
            require_baseline(model, baseline)


def compute(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    method: Method,
    options: Options,
    groups: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[Scores]:
    """Scores of every record by one method.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        records: the records, tokenized.
        method: its name.
        options: what it is told.
        groups: for the methods that take tokens out, positions to take out together, per record.
    """
    if method in REMOVAL:
        return _by_removal(model, records, method, options, groups)
    if method == "attention_aware":
        with checked(frozen_hooks(model, from_layer=options.layer or 0)) as hooks:
            return samples.at_the_input(_field(model, records, options, lambda: hooks))
    field = _field(model, records, options)
    if method == "gradient_x_input":
        return samples.at_the_input(field)
    return _WITH_REAL_INPUTS[method](Job(model, records, field, options, *real_inputs(field)))


def n_runs(record: TokenizedPair, method: str, n_steps: int) -> int:
    """About how many rows of the model one record needs (for batching)."""
    tokens = len(record.prompt)
    return {
        "gradient_x_input": 1,
        "attention_aware": 1,
        "leave_one_out": tokens,
        "sequential_ig": tokens * n_steps,
    }.get(method, n_steps)


def _field(
    model: HookedModel, records: Sequence[TokenizedPair], options: Options, extra: Callable = list
) -> ModelField:
    # hooks of attention meet attention of one row per response, as they expect
    shared = extra is list and shares_prompts(model, records, options.objective)
    return ModelField(model, records, options.objective, options.layer, extra, shared)


def _by_removal(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    method: str,
    options: Options,
    groups: Sequence[Sequence[Sequence[int]]] | None,
) -> list[Scores]:
    units = groups if groups is not None else [single_tokens(r, content_only=options.content_only) for r in records]
    shared: dict[str, Any] = {
        "objective": options.objective,
        "masker": options.masker,
        "image_masker": options.image_masker,
    }
    if method == "leave_one_out":
        scores, values = leave_out_scores(model, records, units, **shared)
        used = [len(own) for own in units]
    else:
        scores, values = leave_k_out_scores(
            model,
            records,
            units,
            _generators(records, options),
            k=options.k,
            n_draws=options.n_steps,
            **shared,
        )
        used = [options.n_steps] * len(records)
    return [Scores(s, v, None, None, n) for s, v, n in zip(scores, values, used, strict=True)]


def single_tokens(record: TokenizedPair, *, content_only: bool) -> list[tuple[int, ...]]:
    """Every prompt token by itself."""
    return [(p,) for p in range(len(record.prompt)) if record.content[p] or not content_only]


def _integrated(job: Job) -> list[Scores]:
    options = job.options
    if options.nodes == "adaptive":
        return paths.adaptive_path(job.field, _ends(job), budget=options.n_steps, tolerance=TOLERANCE)
    return paths.straight_path(job.field, _ends(job), *paths.path_nodes(options.n_steps, options.nodes))


def _sequential(job: Job) -> list[Scores]:
    # f(x') is not needed: every token has its own
    ends = Ends(job.x, _starts(job, job.options.baseline), job.values, job.values)
    return paths.one_at_a_time(job.field, ends, *paths.path_nodes(job.options.n_steps, job.options.nodes))


def _discretized(job: Job) -> list[Scores]:
    ends = _ends(job)
    everything = torch.arange(int(job.model.cfg.d_vocab), device=device_of(job.model))
    vocabulary = torch.cat([embed_tokens(job.model, part[None])[0].float().cpu() for part in everything.split(8192)])
    steps = job.options.n_steps
    walks = [paths.token_path(a, b, vocabulary, steps) for a, b in zip(ends.x, ends.start, strict=True)]
    return paths.along_points(job.field, ends, walks)


def _expected(job: Job) -> list[Scores]:
    given = job.options.baseline
    several = [given] if isinstance(given, (str, Tensor)) else list(given)
    per_record = [list(own) for own in zip(*(_starts(job, one) for one in several), strict=True)]
    draws = _generators(job.records, job.options)
    return samples.expected(job.field, job.x, job.values, per_record, draws, n_samples=job.options.n_steps)


def _smoothed(job: Job) -> list[Scores]:
    draws, options = _generators(job.records, job.options), job.options
    return samples.smoothed(job.field, job.x, job.values, draws, n_samples=options.n_steps, noise=options.noise)


_WITH_REAL_INPUTS: dict[str, Callable[..., list[Scores]]] = {
    "integrated_gradients": _integrated,
    "sequential_ig": _sequential,
    "discretized_ig": _discretized,
    "expected_gradients": _expected,
    "smoothgrad": _smoothed,
}


def default_baseline(model: HookedModel, method: str) -> Baseline:
    """What a path starts from unless told otherwise: the one from which integrated gradients converge."""
    if method not in PATH:
        return "zero"
    nearest = Baselines(model).default()
    return DEFAULT_SET if method == "expected_gradients" and nearest == "neutral" else nearest


def default_nodes(method: str, n_steps: int) -> Nodes:
    """Adaptive, where there are enough gradients to refine anything."""
    return "adaptive" if method == "integrated_gradients" and n_steps >= 9 else "gauss_legendre"


def _generators(records: Sequence[TokenizedPair], options: Options) -> list[torch.Generator]:
    return [samples.record_generator(options.seed, r.prompt, r.chosen, r.rejected) for r in records]


def _ends(job: Job) -> Ends:
    return paths.ends_of(job.field, job.x, job.values, _starts(job, job.options.baseline))


def _starts(job: Job, baseline: Baseline) -> list[Tensor]:
    """x' of every record at the field's entry."""
    if not isinstance(baseline, (str, Tensor)):
        raise ValueError(f"baseline={baseline!r}; one of them is needed here")
    make = Baselines(job.model)

    def starts(real: list[Tensor]) -> list[Tensor]:
        pairs = zip(real, job.records, strict=True)
        found = [make.of_record(baseline, point, r, job.options.image_masker) for point, r in pairs]
        if not job.options.content_only:
            return found
        kept = [torch.tensor(r.content)[:, None] for r in job.records]
        return [torch.where(k, f, point) for k, f, point in zip(kept, found, real, strict=True)]

    if job.options.layer is None or isinstance(baseline, Tensor):
        return starts(job.x)
    # inside the model the baseline is what the layers below make of a baseline prompt
    tokens = ModelField(job.model, job.records, job.options.objective)
    return activations_at(tokens, starts(real_inputs(tokens)[0]), job.field.entry)


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
