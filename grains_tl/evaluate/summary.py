"""From per-record tables to one row per setting, with its uncertainty. No model here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from grains_tl._util.stats import centred_interval, mean_interval, resampled_means, standard_error
from grains_tl.evaluate.display import EffectTable
from grains_tl.evaluate.generation_tables import is_generation_table, summarize_generations
from grains_tl.evaluate.records import PER_RECORD, SETTING, require_columns

#: What ``verdict`` can say; see ``summarize``.
STEERS, NO_EFFECT, WRONG_WAY, TOO_FEW = "steers", "no effect", "wrong way", "too few records"


def summarize(
    frame: pd.DataFrame, costs: pd.DataFrame | None = None, *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """One row per setting, with standard errors and intervals; of ``generation_quality`` one row per measure.

    Args:
        frame: from ``record_effects`` (or ``two_sided`` of it), or from ``generation_quality``.
        costs: from ``text_costs``, for the same settings.
        level: of the intervals.
        seed: of the resampling, where there are draws.

    Returns:
        Columns ``vector``, ``positions``, ``layer``, ``alpha``, and

        - ``effect``, ``effect_se``, ``low``, ``high``: mean paired change of the margin over the records (nats), its
          standard error, and its interval (Student's t); ``effect_token``, ``effect_token_se`` per token;
        - ``estimand``: what ``effect`` is: ``"change"``, the margin at alpha minus the margin at 0, or (of ``two_sided``)
          ``"swing"``, half of the margin at +alpha minus that at -alpha;
        - where both signs of an alpha were run: ``swing`` with ``swing_se``, ``swing_low``, ``swing_high``, in both rows;
        - ``verdict``: ``"steers"`` where the interval lies on alpha's side of zero, ``"wrong way"`` on the other side
          (anti-steering), else ``"no effect"``;
        - ``win``, ``wrong_way``: share of records moved with, against alpha's sign;
        - ``margin``, ``base_margin``, ``accuracy``, ``base_accuracy``, ``mc1``, ``mc2`` and their ``base_``: means over
          records; ``accuracy_se``, ``mc1_se``, ``mc2_se``: standard errors of the paired change;
        - ``n``: records;
        - with draws (resampled or random vectors): ``n_draws``, ``draw_low``, ``draw_high``, an interval that resamples
          building draws and test records together. Draws without a vector of their own are averaged, and their spread
          is in that interval alone.
        - of a sweep: its ``operator`` and ``objective``;
        - with costs: ``kl``, ``kl_se`` (nats per token), ``base_perplexity``, ``perplexity``, ``agreement``.

        Of ``generation_quality``: ``measure``, ``steered``, ``base``, ``change`` with its interval ``low``, ``high`` over
        prompts, ``n``, and ``vector`` where the table has it. ``kl``, ``kl_p50`` and ``kl_p95`` are taken over all tokens.

    Raises:
        ValueError: a frame without the columns of ``record_effects``.

    Examples:
        >>> import pandas as pd
        >>> change = pd.DataFrame({"vector": "v", "positions": "all", "layer": 3, "alpha": 0.2, "draw": -1,
        ...                        "record": [0, 1, 2], "change": [1.0, 2.0, 3.0]})
        >>> summarize(change)[["effect", "effect_se", "verdict"]].round(2).values.tolist()
        [[2.0, 0.58, 'no effect']]
    """
    if is_generation_table(frame):
        return summarize_generations(frame, level, seed)
    require_columns(frame, (*SETTING, "draw", "record", "change"), PER_RECORD)
    rows = [{**setting, **_effect(group, level, seed)} for setting, group in _settings(frame)]
    table = pd.DataFrame(rows)
    if costs is not None:
        spent = pd.DataFrame([{**setting, **_cost(group)} for setting, group in _settings(costs)])
        table = table.merge(spent, on=SETTING, how="left")
    estimand = frame.attrs.get("estimand", "change")
    table["estimand"] = estimand
    if estimand == "change":
        table = _with_swing(table, frame, level)
    table.attrs = dict(frame.attrs)
    if "operator" in table.attrs:  # of a sweep: columns survive a csv file and joined tables, attrs do not
        table = table.assign(operator=table.attrs["operator"], objective=table.attrs["objective"])
    shown = EffectTable(table)
    shown.attrs = table.attrs
    return shown


def verdict(low: float, high: float, alpha: float) -> str:
    """What an interval of the effect says about a step ``alpha``.

    Examples:
        >>> verdict(0.1, 0.3, alpha=0.2), verdict(-0.3, -0.1, alpha=0.2), verdict(-0.1, 0.1, alpha=0.2)
        ('steers', 'wrong way', 'no effect')
    """
    if np.isnan(low) or np.isnan(high):
        return TOO_FEW
    if low <= 0 <= high:
        return NO_EFFECT
    return WRONG_WAY if (low > 0) == (alpha < 0) else STEERS


def _settings(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    bare = pd.DataFrame(frame, copy=False)
    bare.attrs = {}  # pandas copies attrs, the hashes of all records among them, into every group
    for values, group in bare.groupby(SETTING, sort=False, dropna=False):
        yield dict(zip(SETTING, values, strict=True)), group


def _with_swing(table: pd.DataFrame, frame: pd.DataFrame, level: float) -> pd.DataFrame:
    """The table with the swing of every alpha whose two signs were run; unchanged where there is none."""
    by = ["vector", "positions", "layer", "size"]
    main = frame.loc[frame["draw"] < 0, [*SETTING, "record", "change"]].assign(size=lambda f: f["alpha"].abs())
    up, down = (main[main["alpha"] * sign > 0].set_index([*by, "record"])["change"] for sign in (1, -1))
    swing = ((up - down) / 2).dropna()
    if swing.empty or not up.index.is_unique or not down.index.is_unique:
        return table
    rows = []
    for setting, values in swing.groupby(by, sort=False):
        mean, se, low, high = mean_interval(values.to_numpy(), level)
        rows.append((*setting, mean, se, low, high))
    columns = ["swing", "swing_se", "swing_low", "swing_high"]
    found = pd.DataFrame(rows, columns=[*by, *columns])
    return table.assign(size=table["alpha"].abs()).merge(found, on=by, how="left").drop(columns="size")


def _effect(group: pd.DataFrame, level: float, seed: int) -> dict[str, Any]:
    drawn = group[group["draw"] >= 0]
    main = group[group["draw"] < 0]
    if main.empty:
        main = drawn.groupby("record", as_index=False).mean(numeric_only=True)
    change, n = main["change"].to_numpy(), len(main)
    effect, se, low, high = mean_interval(change, level)
    row: dict[str, Any] = {"effect": effect, "effect_se": se, "low": low, "high": high}
    row["verdict"] = verdict(row["low"], row["high"], float(group["alpha"].iloc[0]))
    if "change_token" in main:
        row |= {
            "effect_token": main["change_token"].mean(),
            "effect_token_se": standard_error(main["change_token"].to_numpy()),
        }
    row |= {name: main[name].mean() for name in ("win", "wrong_way", "margin", "base_margin") if name in main}
    for name, column in (("accuracy", "correct"), ("mc1", "mc1"), ("mc2", "mc2")):
        if column in main:
            before, after = (main[c].to_numpy(dtype=float) for c in (f"base_{column}", column))
            row |= {f"base_{name}": before.mean(), name: after.mean(), f"{name}_se": standard_error(after - before)}
    row["n"] = n
    if not drawn.empty:
        per_draw = drawn.pivot(index="draw", columns="record", values="change").to_numpy()
        spread = resampled_means(torch.tensor(per_draw), seed=seed)
        draw_low, draw_high = centred_interval(spread, effect, level)
        row |= {"n_draws": len(per_draw), "draw_low": draw_low, "draw_high": draw_high}
    return row


def _cost(group: pd.DataFrame) -> dict[str, Any]:
    """Means over tokens; the standard error is that of a ratio over texts."""
    main = group[group["draw"] < 0] if (group["draw"] < 0).any() else group
    weight = main["n_tokens"].to_numpy(dtype=float)
    kl, base, nll, same = (np.average(main[c], weights=weight) for c in ("kl", "base_nll", "nll", "agreement"))
    residual = weight * (main["kl"].to_numpy() - kl) / weight.mean()
    return {
        "kl": float(kl),
        "kl_se": standard_error(residual),
        "base_perplexity": float(np.exp(base)),
        "perplexity": float(np.exp(nll)),
        "agreement": float(same),
        **({"budget": main["budget"].iloc[0]} if "budget" in main else {}),  # of generated texts
    }
