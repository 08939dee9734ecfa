"""Do the attributed tokens matter? Several methods on the same records, beside a random choice of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution import Method, attribute_all, check_attribution_options
from grains_tl.evaluate import margins, mean_and_se
from grains_tl.masking import Masker, Selection, random_selection, select_tokens
from grains_tl.objectives import Objective
from grains_tl.pipeline import check_top_k
from grains_tl.replacements import ImageMasker, Replacements, hide, replacements
from grains_tl.scoring import MAX_TOKENS, batch_logprobs, score_batches
from grains_tl.tokens import TokenizedPair, tokenize_pairs
from grains_tl.types import Attribution, HookedModel, PreferencePair


def compare_attributions(
    model: HookedModel,
    pairs: Iterable[PreferencePair],
    *,
    methods: Sequence[Method] = ("leave_one_out", "integrated_gradients", "gradient_x_input"),
    top_k: int = 3,
    n_steps: int = 16,
    baseline: str = "zero",
    objective: Objective = "sum",
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    n_draws: int = 5,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per method: does it keep its promise of completeness, and does f change when its tokens are taken out?

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: records.
        methods: names of attribution methods.
        top_k: tokens taken out together on each side.
        n_steps, baseline, objective, masker, image_masker: as in ``attribute``.
        n_draws: draws of the last row, ``random_tokens``: as many content tokens, chosen by chance.
        seed: of these draws.
        max_tokens: token budget of one pass.
        progress: show bars.

    Returns:
        Columns ``method``; ``gap`` and ``relative_gap`` (median over records of the absolute completeness gap, nats, and
        of its share of |f(x) - f(x')|; NaN where the method has none); ``removed_chosen`` = f(x) - f(x without I+) and
        ``removed_rejected`` = f(x without I-) - f(x), nats, larger is more faithful, with ``_se`` over records;
        ``seconds`` per record; ``relative_seconds`` (in units of gradient x input, if it is among the methods); ``n``.
        Leave-one-out is favoured here: it takes the same tokens out, if one at a time.

    Raises:
        ValueError: bad records or options, before anything runs.

    Example:
        >>> compare_attributions(model, pairs, methods=["leave_one_out", "gradient_x_input"])   # doctest: +SKIP
    """
    tokenized = tokenize_pairs(model, pairs)
    if not methods:
        raise ValueError("no methods given; for example methods=['leave_one_out', 'gradient_x_input']")
    for method in methods:
        check_attribution_options(method, n_steps, baseline, objective)
    check_top_k(tokenized, top_k)
    stand_ins = None if masker == "attention" else replacements(model, tokenized, masker, image_masker)

    def removal(selections: Sequence[Selection]) -> Float[Tensor, "2 record"]:
        return _removal_effects(model, tokenized, selections, objective, stand_ins, max_tokens)

    rows: list[dict[str, object]] = []
    for method in methods:
        started = time.perf_counter()
        found = attribute_all(
            model,
            tokenized,
            method=method,
            n_steps=n_steps,
            baseline=baseline,
            objective=objective,
            masker=masker,
            image_masker=image_masker,
            content_only=method == "leave_one_out",
            max_tokens=max_tokens,
            progress=progress,
        )
        seconds = (time.perf_counter() - started) / len(tokenized)
        selected = [select_tokens(a, top_k) for a in found]
        rows.append({"method": method, **_gaps(found), **_row(removal(selected)), "seconds": seconds})
    generator = torch.Generator().manual_seed(seed)
    like = Selection((0,) * top_k, (0,) * top_k)
    draws = [removal([random_selection(t.content, like, generator) for t in tokenized]) for _ in range(n_draws)]
    if draws:
        rows.append({"method": "random_tokens", **_gaps([]), **_row(torch.stack(draws).mean(0)), "seconds": 0.0})
    frame = pd.DataFrame(rows).assign(n=len(tokenized))
    unit = frame.loc[frame["method"] == "gradient_x_input", "seconds"]
    frame["relative_seconds"] = frame["seconds"] / float(unit.iloc[0]) if len(unit) else float("nan")
    return frame


def _removal_effects(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    objective: Objective,
    stand_ins: Replacements | None,
    max_tokens: int,
) -> Float[Tensor, "2 record"]:
    """How far f falls without I+ (0) and rises without I- (1)."""
    f = torch.zeros(3, len(tokenized))
    nothing: list[tuple[int, ...]] = [()] * len(tokenized)
    sides = [nothing, [s.toward_chosen for s in selections], [s.toward_rejected for s in selections]]
    with torch.no_grad():
        for group, batch in score_batches(model, tokenized, objective, max_tokens=max_tokens):
            owner = [group[record] for record in batch.record.tolist()]
            for row, side in enumerate(sides):
                masked = [side[i] for i in owner]
                hooks = hide(model, stand_ins, owner, masked, offset=batch.offset, like=batch.ids)
                f[row, group] = margins(batch_logprobs(model, batch, hooks)).cpu()
    return torch.stack([f[0] - f[1], f[2] - f[0]])


def _row(effects: Float[Tensor, "2 record"]) -> dict[str, float]:
    mean, se = mean_and_se(effects)
    return {
        "removed_chosen": mean[0].item(),
        "removed_chosen_se": se[0].item(),
        "removed_rejected": mean[1].item(),
        "removed_rejected_se": se[1].item(),
    }


def _gaps(attributions: Sequence[Attribution]) -> dict[str, float]:
    gaps = [abs(a.gap) for a in attributions if a.gap is not None]
    relative = [a.relative_gap for a in attributions if a.relative_gap is not None]
    return {
        "gap": float(np.median(gaps)) if gaps else float("nan"),
        "relative_gap": float(np.median(relative)) if relative else float("nan"),
    }
