"""Do the attributed tokens matter? Several methods on the same records, beside a random choice of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from grains_tl._util.progress import progress_bar
from grains_tl._util.renamed import current_names, old_keywords
from grains_tl._util.settings import with_settings
from grains_tl.attribution.api import check_method
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.methods import method_of
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import select_tokens
from grains_tl.attribution.store import attribute_records, seconds_spent
from grains_tl.attribution.top_k import TopK
from grains_tl.faithfulness.agreement import mean_agreement
from grains_tl.faithfulness.effect import effect_columns, effect_of_selections, steering_layer
from grains_tl.faithfulness.judging import Judge, Judging, gap_columns, measure_columns
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.objectives import Objective
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel

RANDOM = "random_tokens"

#: Steps of a method that is given by name: half of what ``attribute`` takes, as several methods run.
N_STEPS = 16

#: Methods by name or as values; or label -> a method, or the fields of one.
Methods = Sequence[Method | str] | Mapping[str, Method | Mapping[str, Any]]

#: Keywords of release 0.1, and what to write instead.
OLD = {
    "n_steps": "methods=[IntegratedGradients(n_steps={value!r}), ...]",
    "reference": "methods=[IntegratedGradients(reference={value!r}), ...]",
    **{name: f"judging=Judging({name}={{value!r}})" for name in ("shares", "n_draws", "seed", "layer", "alpha")},
}


@with_settings
def compare_attributions(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    methods: Methods = ("leave_one_out", "integrated_gradients", "gradient_x_input"),
    top_k: int = 2,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
    eval_pairs: Iterable[PairLike] | None = None,
    judging: Judging | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """One row per method: does it keep its promise of completeness, does f change when its tokens go, does its vector steer?

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: records.
        methods: attribution methods as values, such as ``IntegratedGradients(n_steps=64)``, or by name (those that take
            steps then take 16); or label -> a method, such as ``{"IG, 64": IntegratedGradients(n_steps=64)}``.
        top_k: tokens taken out together on each side.
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"`` (see ``attribute``).
        mask: what replaces a removed token or patch (see ``attribute``).
        eval_pairs: other records, to measure the vector that each method's tokens yield; ``None`` leaves that out.
        judging: random draws, seed, curves, and where and how far to steer; default ``Judging()``.
        checkpoint: a ``.jsonl`` file that receives every record's scores; the same call resumes from it.
        options: of the run: ``max_tokens`` and ``progress``. Keywords of release 0.1 (``n_steps``, ``n_draws``, ``layer``,
            ...) still work, with a DeprecationWarning.

    Returns:
        Columns, in nats where nothing else is said:
        ``method``; ``gap`` and ``relative_gap`` (median over records of the absolute completeness gap, and of its share of
        |f(x) - f(x')|; NaN where the method has none); ``converged`` (share of records with a relative gap below 5 %);
        ``steps`` (median runs per record);
        ``removed_chosen`` = f(x) - f(x without I+), ``removed_rejected`` = f(x without I-) - f(x), larger is more faithful;
        ``sufficiency`` = f(x) - f(I+ alone), smaller is more faithful; ``deletion_area`` and ``insertion_area`` (see
        ``curves``), larger is more faithful; each with ``_se`` over records;
        ``agreement``: Spearman's correlation with the first method;
        ``seconds`` per record; ``relative_seconds`` (in units of gradient x input, if it is among the methods); ``n``.
        With ``eval_pairs`` also ``effect``, ``effect_se``, ``kl``, ``kl_se`` (see ``effect_of_selections``; of the random
        row the standard error is over records of the mean over draws).
        Leave-one-out is favoured by the removal columns: it takes the same tokens out, if one at a time.

    Raises:
        ValueError: bad records or options, before anything runs.

    Examples:
        >>> compare_attributions(model, pairs, methods=["leave_one_out", "gradient_x_input"])   # doctest: +SKIP
    """
    given, judging = _settings(judging, options)
    tokenized = tokenize_pairs(model, pairs)
    evaluated = None if eval_pairs is None else tokenize_pairs(model, eval_pairs)
    plans = _plans(methods, {"n_steps": N_STEPS, "seed": judging.seed, **given})
    judge = Judge(model, tokenized, top_k, objective, Mask.of(mask), judging)
    for plan in plans.values():
        check_method(model, plan, objective, judge.mask)
    TopK(top_k).check(tokenized)
    steering_layer(model, judging.layer)

    found: dict[str, list[Attribution]] = {}
    seconds: dict[str, float] = {}
    for name, plan in plans.items():
        started = time.perf_counter()
        found[name] = attribute_records(model, tokenized, plan, **judge.shared, checkpoint=checkpoint)
        spent = time.perf_counter() - started
        if checkpoint is not None:  # some of it in an earlier run
            spent = seconds_spent(model, tokenized, plan, objective, judge.mask, checkpoint)
        seconds[name] = spent / len(tokenized)
    selected = {name: [select_tokens(a, top_k) for a in own] for name, own in found.items()}
    chosen = [*((own, selected[name]) for name, own in found.items()), *judge.random_draws()]
    judged = [judge.measures(*one) for one in progress_bar(chosen, desc="judge", unit="choice")]
    first = next(iter(found.values()))
    rows = [
        {
            "method": name,
            **gap_columns(own),
            **measure_columns(measures),
            "agreement": mean_agreement(own, first),
            "seconds": seconds[name],
        }
        for (name, own), measures in zip(found.items(), judged, strict=False)
    ]
    if judging.n_draws:
        by_chance = torch.stack(judged[len(found) :]).mean(0)
        rows.append({"method": RANDOM, **gap_columns([]), **measure_columns(by_chance), "seconds": 0.0})
    frame = pd.DataFrame(rows).assign(n=len(tokenized))
    unit = frame.loc[frame["method"] == "gradient_x_input", "seconds"]
    frame["relative_seconds"] = frame["seconds"] / float(unit.iloc[0]) if len(unit) else float("nan")
    if evaluated is None:
        return frame
    effect, kl = effect_of_selections(judge, list(selected.values()), evaluated)
    return frame.assign(**effect_columns(effect, len(plans)), **effect_columns(kl, len(plans), "kl"))


def _settings(judging: Judging | None, options: Mapping[str, Any]) -> tuple[dict[str, Any], Judging]:
    """What release 0.1 gave to all methods at once, and the judge's settings, keywords of release 0.1 among them."""
    given = {name: value for name, value in options.items() if name not in ("max_tokens", "progress")}
    old = old_keywords("compare_attributions", given, OLD)
    of_methods = {name: value for name, value in old.items() if name in ("n_steps", "reference")}
    of_judge = {name: value for name, value in old.items() if name not in of_methods}
    return of_methods, replace(judging or Judging(), **of_judge)


def _plans(methods: Methods, shared: Mapping[str, Any]) -> dict[str, Method]:
    """Methods by label; what is given for all of them goes to those named that have such a field."""
    if not methods:
        raise ValueError("no methods given; for example methods=['leave_one_out', 'gradient_x_input']")
    plans: dict[str, Method] = {}
    labelled = methods.items() if isinstance(methods, Mapping) else [("", method) for method in methods]
    for label, given in labelled:
        own = current_names(given) if isinstance(given, Mapping) else {"method": given}
        method = method_of(own.pop("method", label), shared=shared, **own)
        plans[label or method.name] = method
    return plans
