"""Do the attributed tokens matter? Several methods on the same records, beside a random choice of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.renamed import current_names
from grains_tl._util.settings import with_settings
from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.api import check_method
from grains_tl.attribution.methods import METHODS, Method, method_of
from grains_tl.attribution.reference import Reference
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, random_selection, select_tokens
from grains_tl.attribution.store import attribute_records, seconds_spent
from grains_tl.attribution.top_k import TopK
from grains_tl.baselines.controls import random_token_differences
from grains_tl.evaluate.measuring import next_token_kl, swings
from grains_tl.faithfulness.agreement import mean_agreement, random_attributions
from grains_tl.faithfulness.deletion import SHARES, curves, removal_table
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import require_layers
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences, collect_differences
from grains_tl.vectors.reduce import reduce_vectors

RANDOM = "random_tokens"

#: Columns with a standard error over records beside them.
MEASURES = ("removed_chosen", "removed_rejected", "sufficiency", "deletion_area", "insertion_area")

#: Methods by name or as values; or label -> a method, or the fields of one.
Methods = Sequence[Method | str] | Mapping[str, Method | Mapping[str, Any]]


@with_settings
def compare_attributions(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    methods: Methods = (
        "leave_one_out",
        "integrated_gradients",
        "gradient_x_input",
    ),
    top_k: int = 2,
    n_steps: int = 16,
    reference: Reference | None = None,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
    shares: Sequence[float] = SHARES,
    n_draws: int = 5,
    seed: int = 0,
    eval_pairs: Iterable[PairLike] | None = None,
    layer: int | None = None,
    alpha: float = 0.2,
    max_tokens: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """One row per method: does it keep its promise of completeness, does f change when its tokens go, does its vector steer?

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: records.
        methods: names of attribution methods; or label -> arguments of ``attribute``, such as
            ``{"IG, 64": {"method": "integrated_gradients", "n_steps": 64}}``.
        top_k: tokens taken out together on each side.
        n_steps: steps of path methods (see ``attribute``).
        reference: where a path starts (see ``attribute``).
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"`` (see ``attribute``).
        mask: what replaces a removed token or patch (see ``attribute``).
        shares: where the deletion and insertion curves are read.
        n_draws: draws of the last row, ``random_tokens``: as many content tokens, chosen by chance.
        seed: of these draws, and of the methods that draw.
        eval_pairs: other records, to measure the vector that each method's tokens yield; ``None`` leaves that out.
        layer: where to steer with them; default two thirds of the way up.
        alpha: step size, a fraction of the layer's typical residual norm.
        max_tokens: token budget of one pass.
        progress: show bars.
        checkpoint: a ``.jsonl`` file that receives every record's scores; the same call resumes from it.

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
    tokenized = tokenize_pairs(model, pairs)
    evaluated = None if eval_pairs is None else tokenize_pairs(model, eval_pairs)
    plans = _plans(
        methods,
        {"n_steps": n_steps, "reference": reference, "seed": seed},
    )
    mask = Mask.of(mask)
    for plan in plans.values():
        check_method(model, plan, objective, mask)
    TopK(top_k).check(tokenized)
    (at,) = require_layers(model, [int(model.cfg.n_layers) * 2 // 3 if layer is None else layer])
    shared: dict[str, Any] = {"objective": objective, "mask": mask}

    found: dict[str, list[Attribution]] = {}
    seconds: dict[str, float] = {}
    for name, plan in plans.items():
        started = time.perf_counter()
        found[name] = attribute_records(model, tokenized, plan, objective=objective, mask=mask, checkpoint=checkpoint)
        spent = time.perf_counter() - started
        if checkpoint is not None:  # some of it in an earlier run
            spent = seconds_spent(model, tokenized, plan, objective, mask, checkpoint)
        seconds[name] = spent / len(tokenized)
    selected = {name: [select_tokens(a, top_k) for a in own] for name, own in found.items()}
    first = next(iter(found.values()))
    draws = _random_draws(tokenized, top_k, n_draws, seed)
    chosen = [*((own, selected[name]) for name, own in found.items()), *draws]
    judged = [
        _judge(model, tokenized, own, taken, shares, shared)
        for own, taken in progress_bar(chosen, desc="judge", unit="choice")
    ]
    rows = [
        {
            "method": name,
            **_gaps(own),
            **_measures(measures),
            "agreement": mean_agreement(own, first),
            "seconds": seconds[name],
        }
        for (name, own), measures in zip(found.items(), judged, strict=False)
    ]
    if n_draws:
        by_chance = torch.stack(judged[len(found) :]).mean(0)
        rows.append({"method": RANDOM, **_gaps([]), **_measures(by_chance), "seconds": 0.0})
    frame = pd.DataFrame(rows).assign(n=len(tokenized))
    unit = frame.loc[frame["method"] == "gradient_x_input", "seconds"]
    frame["relative_seconds"] = frame["seconds"] / float(unit.iloc[0]) if len(unit) else float("nan")
    if evaluated is None:
        return frame
    effect, kl = effect_of_selections(
        model,
        tokenized,
        list(selected.values()),
        evaluated,
        layer=at,
        alpha=alpha,
        n_draws=n_draws,
        seed=seed,
        **shared,
    )
    return frame.assign(**_effect_columns(effect, len(plans)), **_effect_columns(kl, len(plans), "kl"))


def _plans(methods: Methods, defaults: dict[str, Any]) -> dict[str, Method]:
    """Methods by label; what is given for all of them goes to those that have such a field."""
    if not methods:
        raise ValueError("no methods given; for example methods=['leave_one_out', 'gradient_x_input']")
    plans: dict[str, Method] = {}
    for label, given in methods.items() if isinstance(methods, Mapping) else [(None, m) for m in methods]:
        if isinstance(given, Method):
            plans[label or given.name] = given
            continue
        own = current_names({"method": given} if isinstance(given, str) else {"method": label, **given})
        name = own.pop("method")
        if name not in METHODS:
            raise ValueError(f"method={name!r} is not known; choose one of {', '.join(METHODS)}")
        known = {f.name for f in fields(METHODS[name])}
        plans[label or name] = method_of(name, **{**{k: v for k, v in defaults.items() if k in known}, **own})
    return plans


def _judge(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    found: Sequence[Attribution],
    selections: Sequence[Selection],
    shares: Sequence[float],
    shared: Mapping[str, Any],
) -> Float[Tensor, "measure record"]:
    removed = removal_table(model, tokenized, selections, **shared)
    drawn = curves(model, tokenized, found, shares=shares, **shared)
    return torch.cat([removed, torch.stack([drawn.deletion_area, drawn.insertion_area])])


def _measures(judged: Float[Tensor, "measure record"]) -> dict[str, float]:
    mean, se = mean_and_se(judged)
    row: dict[str, float] = {}
    for i, name in enumerate(MEASURES):
        row |= {name: mean[i].item(), f"{name}_se": se[i].item()}
    return row


def _random_draws(
    tokenized: Sequence[TokenizedPair], top_k: int, n_draws: int, seed: int
) -> list[tuple[list[Attribution], list[Selection]]]:
    generator = torch.Generator().manual_seed(seed)
    like = Selection((0,) * top_k, (0,) * top_k)
    return [
        (
            random_attributions(tokenized, generator),
            [random_selection(t.content, like, generator) for t in tokenized],
        )
        for _ in range(n_draws)
    ]


def _gaps(attributions: Sequence[Attribution]) -> dict[str, float]:
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


def _effect_columns(
    values: Float[Tensor, "selection record"], n_methods: int, name: str = "effect"
) -> dict[str, list[float]]:
    """One value per method, and one for all random draws together."""
    rows = [*values[:n_methods], *([values[n_methods:].mean(0)] if len(values) > n_methods else [])]
    mean, se = mean_and_se(torch.stack(rows))
    return {name: mean.tolist(), f"{name}_se": se.tolist()}


def effect_of_selections(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Sequence[Selection]],
    evaluated: Sequence[TokenizedPair],
    *,
    layer: int,
    alpha: float = 0.2,
    n_draws: int = 0,
    seed: int = 0,
    mask: Mask | Masker = "mean_embedding",
    objective: Objective = "sum",
) -> tuple[Float[Tensor, "selection record"], Float[Tensor, "selection record"]]:
    """Steering by the mean-reduced vector of each selection, on other records.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the building records.
        selections: several choices of tokens, each one per building record.
        evaluated: the records to steer on.
        layer: where to steer.
        alpha: step size, a fraction of the layer's typical residual norm.
        n_draws: random choices of as many tokens as in the first selection, appended to the results.
        seed: of these draws.
        mask: what replaces a masked token or patch (see ``build_vectors``).
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"`` (see ``attribute``).

    Returns:
        ``(effect, kl)``, each ``[selection + draw, record]`` in nats: half the change of the margin between +alpha and
        -alpha, and the mean over both signs of KL(steered || base) of the next token.
    """
    shared: dict[str, Any] = {"layers": [layer], "mask": mask}
    differences: list[Differences] = [collect_differences(model, tokenized, own, **shared) for own in selections]
    if n_draws:
        differences += random_token_differences(
            model,
            tokenized,
            selections[0],
            resid_norms=differences[0].resid_norms,
            n_draws=n_draws,
            seed=seed,
            **shared,
        )
    vectors = [reduce_vectors(d) for d in differences]
    _, effect = swings(model, evaluated, vectors, alpha, objective=objective)
    kl = [
        torch.stack([next_token_kl(model, evaluated, v.hooks(a)) for a in (alpha, -alpha)])
        for v in progress_bar(vectors, desc="cost", unit="vector")
    ]
    return effect, torch.stack(kl).mean(1)
