"""Which input tokens cause the preference: one interface, many methods, and the gap of each where it promises a sum.

Everything runs on the unchanged model with hooks; gradients of parameters are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl._util.progress import progress_bar
from grains_tl._util.renamed import current_names
from grains_tl._util.settings import current, with_settings
from grains_tl.attribution.job import Job
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.methods import method_of
from grains_tl.attribution.paths import Scores
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.words import GroupBy, groups_of
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.batches import by_token_budget
from grains_tl.inference.objectives import Objective, require_objective, token_weights
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel

#: Passes that records go through together: f(x), and what is refined round by round, then fill their passes.
PASSES = 4


@with_settings
def attribute(
    model: HookedModel,
    pair: PreferencePair,
    *,
    method: Method | str = "leave_one_out",
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
    content_only: bool = False,
    max_tokens: int | None = None,
    **fields: Any,
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
        method: a name from the table, or a method as a value: ``IntegratedGradients(n_steps=64)``.
        objective: ``"sum"`` over the response's tokens, their ``"mean"``, or ``"single"`` for one-token responses.
        mask: what replaces a token or patch that is left out; also what patches are at x' (zeros if the reference is).
        content_only: leave special and template tokens where they are: on a path they stay real (score 0), and nothing is
            taken out there (score NaN). ``build_vectors`` does so with methods that take tokens out; the scores that
            leave-one-out gives to the user's words are the same either way.
        max_tokens: token budget of one pass, if not that of the settings in force.
        fields: fields of a method that is given by name, ``n_steps=64`` for instance; ``help`` of the methods in
            ``gr.attribution`` explains each.

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
    if isinstance(pair, (list, tuple)):
        raise OptionError(
            f"pair is a {type(pair).__name__} of {len(pair)}; attribute takes one record and returns one Attribution. For "
            "several records: gr.attribution.attribute_all(model, pairs)"
        )
    return attribute_all(
        model, [pair], method=method, objective=objective, mask=mask, content_only=content_only, **fields
    )[0]


@with_settings
@torch.inference_mode(False)
def attribute_all(
    model: HookedModel,
    tokenized: Records,
    *,
    method: Method | str = "leave_one_out",
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
    content_only: bool = False,
    max_tokens: int | None = None,
    progress: bool | None = None,
    on_result: Callable[[int, Attribution], Any] | None = None,
    **fields: Any,
) -> list[Attribution]:
    """``attribute`` for many records, in full batches.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        method: as in ``attribute``.
        objective: as in ``attribute``.
        mask: as in ``attribute``.
        content_only: as in ``attribute``.
        max_tokens: token budget of one pass, if not that of the settings in force.
        progress: show a bar, if not as the settings in force say.
        on_result: called with (index, attribution) as soon as a record is finished, so that it can be kept.
        fields: as in ``attribute``.

    Returns:
        One ``Attribution`` per record, in their order; scores ``[pos]``, nats.

    Raises:
        ValueError: as ``attribute``.

    Examples:
        >>> found = attribute_all(model, tokenize_pairs(model, pairs), method="leave_one_out")     # doctest: +SKIP
    """
    fields, mask = current_options(fields, mask)
    method = method_of(method, **fields)
    tokenized = as_tokenized(model, tokenized)
    check_method(model, method, objective, mask)
    _require_weights(tokenized, objective)
    group_by = getattr(method, "group_by", None)
    groups = None if group_by is None else [_removable(t, group_by, content_only) for t in tokenized]
    results: list[Attribution | None] = [None] * len(tokenized)
    n_rows = [len(t.inputs) * method.n_runs(t) for t in tokenized]
    with progress_bar(total=len(tokenized), desc=method.name, unit="record") as bar:
        for part in by_token_budget([t.longest for t in tokenized], n_rows, max_tokens=PASSES * current().max_tokens):
            own = None if groups is None else [groups[i] for i in part]
            job = Job(model, [tokenized[i] for i in part], objective, mask, content_only, own)
            for index, scores in zip(part, method.scores(job), strict=True):
                results[index] = found = _attribution(tokenized[index], scores, method.name)
                if on_result is not None:
                    on_result(index, found)
            bar.update(len(part))
    return [r for r in results if r is not None]


def current_options(fields: Mapping[str, Any], mask: Mask | Masker) -> tuple[dict[str, Any], Mask]:
    """Keyword arguments under today's names, and the mask that they and ``mask`` make together."""
    given = current_names(fields)
    image = given.pop("image_mask", None)
    mask = Mask.of(given.pop("mask", mask))
    return given, mask if image is None else Mask(mask.text, image)


def check_method(model: HookedModel, method: Method, objective: str, mask: Mask) -> None:
    """Refuse what cannot work on this model before anything runs (ValueError)."""
    require_objective(objective)
    method.check(model)
    mask.check(model)


def _require_weights(tokenized: Sequence[TokenizedPair], objective: Objective) -> None:
    for number, pair in enumerate(tokenized, start=1):
        try:
            token_weights(pair.chosen, pair.rejected, objective)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None


def _removable(record: TokenizedPair, group_by: GroupBy, content_only: bool) -> list[tuple[int, ...]]:
    found = groups_of(record.strings, record.starts_word, group_by, record.wordless)
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
        chosen=record.responses[0],
        rejected=record.responses[1],
        errors=found.errors,
    )


def _flags(values: Sequence[bool]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.bool)
