"""From per-record tables to one row per setting, with its uncertainty; vectors compared at equal cost. No model here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from grains_tl.effects import SETTING
from grains_tl.uncertainty import resampled_means

#: What ``verdict`` can say; see ``summarize``.
STEERS, NO_EFFECT, WRONG_WAY, TOO_FEW = "steers", "no effect", "wrong way", "too few records"


def summarize(
    frame: pd.DataFrame, costs: pd.DataFrame | None = None, *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """One row per setting, with standard errors and intervals.

    Args:
        frame: from ``record_effects`` (or ``two_sided`` of it).
        costs: from ``text_costs``, for the same settings.
        level: of the intervals.
        seed: of the resampling, where there are draws.

    Returns:
        Columns ``vector``, ``positions``, ``layer``, ``alpha``, and

        - ``effect``, ``effect_se``, ``low``, ``high``: mean paired change of the margin over the records (nats), its
          standard error, and its interval (Student's t); ``effect_token``, ``effect_token_se`` per token;
        - ``verdict``: ``"steers"`` where the interval lies on alpha's side of zero, ``"wrong way"`` on the other side
          (anti-steering), else ``"no effect"``;
        - ``win``, ``wrong_way``: share of records moved with, against alpha's sign;
        - ``margin``, ``base_margin``, ``accuracy``, ``base_accuracy``, ``mc1``, ``mc2`` and their ``base_``: means over
          records; ``accuracy_se``, ``mc1_se``, ``mc2_se``: standard errors of the paired change;
        - ``n``: records;
        - with draws (resampled or random vectors): ``n_draws``, ``draw_low``, ``draw_high``, an interval that resamples
          building draws and test records together. Draws without a vector of their own are averaged, and their spread
          is in that interval alone.
        - with costs: ``kl``, ``kl_se`` (nats per token), ``base_perplexity``, ``perplexity``, ``agreement``.

    Raises:
        ValueError: a frame without the columns of ``record_effects``.

    Example:
        >>> import pandas as pd
        >>> change = pd.DataFrame({"vector": "v", "positions": "all", "layer": 3, "alpha": 0.2, "draw": -1,
        ...                        "record": [0, 1, 2], "change": [1.0, 2.0, 3.0]})
        >>> summarize(change)[["effect", "effect_se", "verdict"]].round(2).values.tolist()
        [[2.0, 0.58, 'no effect']]
    """
    missing = [name for name in (*SETTING, "draw", "record", "change") if name not in frame]
    if missing:
        raise ValueError(f"the frame lacks {missing}; give the per-record table of record_effects or sweep_records")
    rows = [{**setting, **_effect(group, level, seed)} for setting, group in _settings(frame)]
    table = pd.DataFrame(rows)
    if costs is not None:
        spent = pd.DataFrame([{**setting, **_cost(group)} for setting, group in _settings(costs)])
        table = table.merge(spent, on=SETTING, how="left")
    table.attrs = dict(frame.attrs)
    return table


def effect_at_kl(
    frame: pd.DataFrame,
    costs: pd.DataFrame,
    kl: float = 0.05,
    *,
    against: str | None = None,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What every vector achieves for the same price: effects interpolated at one KL budget.

    Both curves start at alpha 0 (no effect, no KL). Between two measured alphas the effect is taken as linear in the
    root of the KL, since for small steps the effect grows with alpha and the KL with its square; where the KL falls
    again at larger alphas, the first crossing counts.

    Args:
        frame: from ``record_effects``, several positive alphas for each vector.
        costs: from ``text_costs`` for the same settings.
        kl: the budget, nats per token.
        against: name of a vector to compare the others with, on the same layer and scope where it has them, else on its
            only setting.
        level: of the intervals.
        n: resamples; test records and neutral texts are both drawn anew.
        seed: of the resampling.

    Returns:
        One row per vector, scope and layer: ``kl``, ``alpha`` (where the budget is reached), ``effect``, ``se``, ``low``,
        ``high`` (nats), ``n`` (records), ``largest_kl`` (measured). Where the budget is never reached ``effect`` is NaN:
        measure larger alphas. With ``against``: ``difference``, ``difference_low``, ``difference_high`` (paired).

    Raises:
        ValueError: a budget that is not positive, settings without positive alphas, costs of other settings, an unknown
            name in ``against``.

    Example:
        >>> effect_at_kl(effects, costs, kl=0.05, against="caa")                       # doctest: +SKIP
    """
    if not kl > 0:
        raise ValueError(f"kl={kl}; a budget above 0 nats per token is needed")
    curves = {setting: _curve(*parts) for setting, *parts in _curves(frame, costs)}
    if not curves:
        raise ValueError(f"no positive alphas to interpolate between; the alphas are {sorted(set(frame['alpha']))}")
    rng = np.random.default_rng(seed)
    n_records = {curve[1].shape[1] for curve in curves.values()}
    n_texts = {curve[2].shape[1] for curve in curves.values()}
    if len(n_records) > 1 or len(n_texts) > 1:
        raise ValueError("the vectors were measured on different numbers of records or texts; use the same for all")
    # the same resamples for every vector, so that differences are paired
    records = rng.integers(0, max(n_records), (n, max(n_records)))
    texts = rng.integers(0, max(n_texts), (n, max(n_texts)))
    tail = (1 - level) / 2
    samples, rows = {}, []
    for setting, curve in curves.items():
        alpha, effect = _at(curve, kl, None, None)
        draws = np.array([_at(curve, kl, r, t)[1] for r, t in zip(records, texts, strict=True)])
        samples[setting] = (effect, draws)
        low, high = _interval(draws, tail)
        rows.append(
            {
                **dict(zip(("vector", "positions", "layer"), setting, strict=True)),
                "kl": kl,
                "alpha": alpha,
                "effect": effect,
                "se": np.nan if np.isnan(low) else float(np.nanstd(draws, ddof=1)),
                "low": low,
                "high": high,
                "n": curve[1].shape[1],
                "largest_kl": float(_mean_kl(curve, None).max()),
            }
        )
    if against is not None:
        for row, setting in zip(rows, curves, strict=True):
            other = _opponent(list(curves), setting, against)
            draws = samples[setting][1] - samples[other][1]
            row["difference"] = samples[setting][0] - samples[other][0]
            row["difference_low"], row["difference_high"] = _interval(draws, tail)
    return pd.DataFrame(rows)


def verdict(low: float, high: float, alpha: float) -> str:
    """What an interval of the effect says about a step ``alpha``.

    Example:
        >>> verdict(0.1, 0.3, alpha=0.2), verdict(-0.3, -0.1, alpha=0.2), verdict(-0.1, 0.1, alpha=0.2)
        ('steers', 'wrong way', 'no effect')
    """
    if np.isnan(low) or np.isnan(high):
        return TOO_FEW
    if low <= 0 <= high:
        return NO_EFFECT
    return WRONG_WAY if (low > 0) == (alpha < 0) else STEERS


def _settings(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    for values, group in frame.groupby(SETTING, sort=False, dropna=False):
        yield dict(zip(SETTING, values, strict=True)), group


def _effect(group: pd.DataFrame, level: float, seed: int) -> dict[str, Any]:
    drawn = group[group["draw"] >= 0]
    main = group[group["draw"] < 0]
    if main.empty:
        main = drawn.groupby("record", as_index=False).mean(numeric_only=True)
    change, n = main["change"].to_numpy(), len(main)
    effect, se = float(change.mean()), _se(change)
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * se if n > 1 and se > 0 else (0.0 if n > 1 else np.nan)
    row: dict[str, Any] = {"effect": effect, "effect_se": se, "low": effect - reach, "high": effect + reach}
    row["verdict"] = verdict(row["low"], row["high"], float(group["alpha"].iloc[0]))
    if "change_token" in main:
        row |= {"effect_token": main["change_token"].mean(), "effect_token_se": _se(main["change_token"].to_numpy())}
    row |= {name: main[name].mean() for name in ("win", "wrong_way", "margin", "base_margin") if name in main}
    for name, column in (("accuracy", "correct"), ("mc1", "mc1"), ("mc2", "mc2")):
        if column in main:
            before, after = (main[c].to_numpy(dtype=float) for c in (f"base_{column}", column))
            row |= {f"base_{name}": before.mean(), name: after.mean(), f"{name}_se": _se(after - before)}
    row["n"] = n
    if not drawn.empty:
        per_draw = drawn.pivot(index="draw", columns="record", values="change").to_numpy()
        spread = resampled_means(torch.tensor(per_draw), seed=seed)
        # centred on the vector's own effect: resampled building sets are a little noisier than the whole one
        around = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2]) - spread.mean() + effect
        row |= {"n_draws": len(per_draw), "draw_low": float(around[0]), "draw_high": float(around[1])}
    return row


def _se(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _cost(group: pd.DataFrame) -> dict[str, float]:
    """Means over tokens; the standard error is that of a ratio over texts."""
    main = group[group["draw"] < 0] if (group["draw"] < 0).any() else group
    weight = main["n_tokens"].to_numpy(dtype=float)
    kl, base, nll, same = (np.average(main[c], weights=weight) for c in ("kl", "base_nll", "nll", "agreement"))
    residual = weight * (main["kl"].to_numpy() - kl) / weight.mean()
    return {
        "kl": float(kl),
        "kl_se": _se(residual),
        "base_perplexity": float(np.exp(base)),
        "perplexity": float(np.exp(nll)),
        "agreement": float(same),
    }


# -- equal cost -------------------------------------------------------------------------------------------------------

#: alphas ``[alpha]``, changes ``[alpha, record]``, KL per token ``[alpha, text]``, tokens ``[text]``
Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _curves(
    frame: pd.DataFrame, costs: pd.DataFrame
) -> Iterator[tuple[tuple[str, str, int], pd.DataFrame, pd.DataFrame]]:
    """Positive alphas of each vector, scope and layer, and their costs."""
    by = ["vector", "positions", "layer"]
    spent = dict(iter(costs[(costs["draw"] < 0) & (costs["alpha"] > 0)].groupby(by)))
    for key, group in frame[(frame["draw"] < 0) & (frame["alpha"] > 0)].groupby(by, sort=False):
        if key not in spent or set(spent[key]["alpha"]) != set(group["alpha"]):
            raise ValueError(f"no costs for the alphas of {key}; measure text_costs on the same settings")
        yield key, group, spent[key]


def _curve(group: pd.DataFrame, spent: pd.DataFrame) -> Curve:
    change = group.pivot(index="alpha", columns="record", values="change").sort_index()
    kl = spent.pivot(index="alpha", columns="text", values="kl").sort_index()
    tokens = spent.drop_duplicates("text").sort_values("text")["n_tokens"].to_numpy(dtype=float)
    start = [np.zeros((1, table.shape[1])) for table in (change, kl)]
    return (
        np.concatenate([[0.0], change.index.to_numpy(dtype=float)]),
        np.concatenate([start[0], change.to_numpy()]),
        np.concatenate([start[1], kl.to_numpy()]),
        tokens,
    )


def _mean_kl(curve: Curve, texts: NDArray[np.int64] | None) -> NDArray[np.float64]:
    kl, weight = (curve[2], curve[3]) if texts is None else (curve[2][:, texts], curve[3][texts])
    return np.average(kl, axis=1, weights=weight)


def _at(
    curve: Curve, budget: float, records: NDArray[np.int64] | None, texts: NDArray[np.int64] | None
) -> tuple[float, float]:
    """Alpha and mean effect where the KL first reaches the budget; NaN where it never does."""
    alphas, change = curve[0], curve[1] if records is None else curve[1][:, records]
    kl = _mean_kl(curve, texts)
    above = np.flatnonzero(kl >= budget)
    if not len(above):
        return np.nan, np.nan
    i = above[0]
    low, high, wanted = np.sqrt([max(kl[i - 1], 0.0), kl[i], budget])
    share = (wanted - low) / (high - low)
    effect = change.mean(1)
    return tuple(float(x[i - 1] + share * (x[i] - x[i - 1])) for x in (alphas, effect))  # type: ignore[return-value]


def _interval(draws: NDArray[np.float64], tail: float) -> tuple[float, float]:
    """Quantiles; none where many resamples do not reach the budget, for the rest would not be a fair sample."""
    if np.isnan(draws).mean() > tail:
        return np.nan, np.nan
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _opponent(settings: list[tuple[str, str, int]], setting: tuple[str, str, int], name: str) -> tuple[str, str, int]:
    same = (name, *setting[1:])
    if same in settings:
        return same
    named = [s for s in settings if s[0] == name]
    if len(named) != 1:
        known = sorted({s[0] for s in settings})
        raise ValueError(
            f"against={name!r}: {len(named)} settings of that name, none at {setting[1:]}; there are {known}"
        )
    return named[0]
