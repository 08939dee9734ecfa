"""Which input tokens cause the preference: one interface, many methods, and the gap of each where it promises a sum.

Everything runs on the unchanged model with hooks; gradients of parameters are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.progress import progress_bar
from grains_tl._util.settings import current, with_settings
from grains_tl.attribution.groups import GroupBy, groups_of
from grains_tl.attribution.methods import (
    REMOVAL,
    Method,
    Nodes,
    Options,
    check_attribution_options,
    compute,
    default_baseline,
    default_nodes,
    n_runs,
)
from grains_tl.attribution.paths import Scores
from grains_tl.attribution.reference import Baseline
from grains_tl.attribution.result import Attribution
from grains_tl.hooks.mask import Masker
from grains_tl.hooks.stand_ins import ImageMasker, check_image_masker
from grains_tl.inference.batches import by_token_budget
from grains_tl.inference.objectives import Objective, token_weights
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized, tokenize_pairs
from grains_tl.types import HookedModel

#: Passes that records go through together: f(x), and what is refined round by round, then fill their passes.
PASSES = 4


@with_settings
def attribute(
    model: HookedModel,
    pair: PreferencePair,
    *,
    method: Method = "leave_one_out",
    n_steps: int = 32,
    baseline: Baseline | None = None,
    objective: Objective = "sum",
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    nodes: Nodes | None = None,
    layer: int | None = None,
    noise: float = 0.1,
    k: int = 3,
    seed: int = 0,
    content_only: bool = False,
    group_by: GroupBy | None = None,
    max_tokens: int | None = None,
) -> Attribution:
    """Signed scores of the prompt's tokens for one record.

    f(x) = log p(chosen | x) - log p(rejected | x), the response held fixed (GrAInS, arXiv 2507.18043, section 3; unlike
    the authors' code the whole response is scored, at the right positions).

    | method | score of a token, nats | runs per record | gap |
    |---|---|---|---|
    | ``leave_one_out`` | f(x) - f(x without it) | a forward pass per token | no |
    | ``leave_k_out`` | least-squares share when ``k`` go at a time | ``n_steps`` forward | no |
    | ``integrated_gradients`` | the paper's: along the straight path from the baseline | ``n_steps`` gradients | yes |
    | ``sequential_ig`` | 2305.15853: one token at a time | ``n_steps`` gradients per token | yes |
    | ``discretized_ig`` | 2108.13654: along a path close to real tokens | ``n_steps`` gradients | yes |
    | ``expected_gradients`` | 1906.10670: averaged over several baselines | ``n_steps`` gradients | yes |
    | ``smoothgrad`` | 1706.03825: gradient averaged over noise, x input | ``n_steps`` gradients | no |
    | ``gradient_x_input`` | first-order effect | 1 gradient | no |
    | ``attention_aware`` | 2402.05602: gradient x input of the model made linear | 1 gradient | no |

    The limit of ``sequential_ig`` is leave-one-out with the baseline as mask. Leave-one-out is the default because it
    measured best; docs/attribution.md has the figures.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pair: the record.
        method: see above.
        n_steps: gradients (or draws) per record; with ``nodes="adaptive"`` the most that may be spent.
        baseline: x': ``"zero"``, ``"mean_embedding"``, ``"eos"``, ``"pad"``, ``"mask"``, ``"uniform_prompt"``,
            ``"neutral"`` (see ``attribution.baselines``), a ``[d_model]`` vector, or a list of those for expected gradients.
            Default neutral (expected gradients: three of them), from which the path converges; the paper's is zero.
        objective: ``"sum"``, ``"mean"`` or ``"single"``.
        masker: what replaces a token that is left out.
        image_masker: what replaces a patch that is left out, and what the patches are at x' (zeros if the baseline is).
        nodes: of integrated gradients: ``"adaptive"``, refined where f moves until the gap is below 5 % of
            |f(x) - f(x')| (the default from 9 steps on); ``"gauss_legendre"`` (as the paper's code) or ``"riemann"``
            (midpoints).
        layer: attribute the residual stream at ``blocks.{layer}.hook_resid_pre`` instead of the embeddings (gradient
            methods): scores then belong to positions, and the blocks below need no gradient.
        noise: of SmoothGrad, standard deviation as a fraction of each token's embedding size.
        k: tokens left out together in ``leave_k_out``.
        seed: of the methods that draw (``leave_k_out``, ``smoothgrad``, ``expected_gradients``); the global random state
            is not touched, and a record's draws do not depend on its batch.
        content_only: leave special and template tokens where they are: on a path they stay real (score 0), and nothing is
            taken out there (score NaN).
        group_by: take out ``"word"``, ``"sentence"`` or given spans as wholes; the score is shared by the tokens.
        max_tokens: token budget of one pass.

    Returns:
        ``Attribution``: ``scores`` ``[pos]`` in nats, ``tokens``, ``gap`` (nats), ``steps``, ``converged``, ...

    Raises:
        ValueError: options that do not exist or do not fit together, or a record the model cannot take; before anything
            runs. Also NaN in the model, or a model without the hook points ``attention_aware`` needs.

    Examples:
        >>> a = attribute(model, pair, method="integrated_gradients", n_steps=32)   # doctest: +SKIP
        >>> print(a)                                                               # doctest: +SKIP
        integrated_gradients: f(x) = +0.41 nats, gap -0.52 nats; largest: ' filthy' -1.20, ' fresh' +0.84, ...
    """
    return attribute_all(
        model,
        tokenize_pairs(model, [pair]),
        method=method,
        n_steps=n_steps,
        baseline=baseline,
        objective=objective,
        masker=masker,
        image_masker=image_masker,
        nodes=nodes,
        layer=layer,
        noise=noise,
        k=k,
        seed=seed,
        content_only=content_only,
        group_by=group_by,
    )[0]


@with_settings
@torch.inference_mode(False)
def attribute_all(
    model: HookedModel,
    tokenized: Records,
    *,
    method: Method = "leave_one_out",
    n_steps: int = 32,
    baseline: Baseline | None = None,
    objective: Objective = "sum",
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    nodes: Nodes | None = None,
    layer: int | None = None,
    noise: float = 0.1,
    k: int = 3,
    seed: int = 0,
    content_only: bool = False,
    group_by: GroupBy | None = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
    on_result: Callable[[int, Attribution], Any] | None = None,
) -> list[Attribution]:
    """``attribute`` for many records, in full batches.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        method: see ``attribute``, also for the options that follow.
        n_steps: steps of path methods, samples of sampling ones.
        baseline: where a path starts.
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"``.
        masker: what replaces a removed token.
        image_masker: what replaces a removed patch.
        nodes: where a path is evaluated.
        layer: of methods that attribute to a layer's residual stream.
        noise: of SmoothGrad.
        k: tokens taken out together by leave-k-out.
        seed: of methods that draw at random.
        content_only: leave special and template tokens where they are.
        group_by: take out words, sentences or spans together.
        max_tokens: token budget of one pass, if not that of the settings in force.
        progress: show a progress bar.
        on_result: called with (index, attribution) as soon as a record is finished, so that it can be kept.

    Returns:
        One ``Attribution`` per record, in their order; scores ``[pos]``, nats.

    Raises:
        ValueError: as ``attribute``; also ``group_by`` with a method that takes nothing out.

    Examples:
        >>> found = attribute_all(model, tokenize_pairs(model, pairs), method="leave_one_out")     # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    n_steps, k, seed = whole("n_steps", n_steps), whole("k", k), whole("seed", seed)
    check_attribution_options(
        method, n_steps, baseline, objective, nodes=nodes, layer=layer, k=k, noise=noise, model=model
    )
    if group_by is not None and method not in REMOVAL:
        raise ValueError(
            f"group_by is for {REMOVAL}; group the scores of {method} afterwards with gr.attribution.group"
        )
    check_image_masker(image_masker)
    _require_weights(tokenized, objective)
    start = default_baseline(model, method) if baseline is None else baseline
    rule = default_nodes(method, n_steps) if nodes is None else nodes
    options = Options(n_steps, start, objective, masker, image_masker, rule, layer, noise, k, seed, content_only)
    groups = None if group_by is None else [_removable(t, group_by, content_only) for t in tokenized]
    results: list[Attribution | None] = [None] * len(tokenized)
    n_rows = [len(t.inputs) * n_runs(t, method, n_steps) for t in tokenized]
    with progress_bar(total=len(tokenized), desc=method, unit="record") as bar:
        for part in by_token_budget([t.longest for t in tokenized], n_rows, max_tokens=PASSES * current().max_tokens):
            records = [tokenized[i] for i in part]
            own = None if groups is None else [groups[i] for i in part]
            for index, scores in zip(part, compute(model, records, method, options, own), strict=True):
                found = _attribution(tokenized[index], scores, method)
                results[index] = found
                if on_result is not None:
                    on_result(index, found)
            bar.update(len(part))
    return [r for r in results if r is not None]


def _require_weights(tokenized: Sequence[TokenizedPair], objective: Objective) -> None:
    for number, pair in enumerate(tokenized, start=1):
        try:
            token_weights(pair.chosen, pair.rejected, objective)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None


def _removable(record: TokenizedPair, group_by: GroupBy, content_only: bool) -> list[tuple[int, ...]]:
    found = groups_of(record.strings, record.starts_word, group_by)
    if not content_only:
        return found
    kept = [tuple(p for p in group if record.content[p]) for group in found]
    return [group for group in kept if group]


def _attribution(record: TokenizedPair, found: Scores, method: str) -> Attribution:
    return Attribution(
        scores=found.scores,
        tokens=list(record.strings),
        content=_flags(record.content),
        is_image=_flags(record.is_image),
        gap=found.gap,
        objective=found.value,
        baseline_objective=found.start_value,
        method=method,
        spans=() if record.images is None else record.images.spans,
        steps=found.steps,
        starts_word=_flags(record.starts_word),
    )


def _flags(values: Sequence[bool]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.bool)
