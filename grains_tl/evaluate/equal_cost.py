"""Vectors compared at equal cost: effects interpolated at one KL budget. No model here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl.evaluate.reachable import with_share
from grains_tl.evaluate.records import PER_RECORD, SETTING, require_columns
from grains_tl.vectors.steering_vectors import SteeringVectors

#: alphas ``[alpha]``, changes ``[alpha, record]``, KL per token ``[alpha, text]``, tokens ``[alpha, text]``
Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def effect_at_kl(
    frame: pd.DataFrame,
    costs: pd.DataFrame | None,
    kl: float = 0.05,
    *,
    against: str | None = None,
    best_layer: bool = False,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
    ceiling: SteeringVectors | None = None,
) -> pd.DataFrame:
    """What every vector achieves for the same price: effects interpolated at one KL budget.

    Both curves start at alpha 0 (no effect, no KL). Between two measured alphas the effect is taken as linear in the
    root of the KL, since for small steps the effect grows with alpha and the KL with its square; where the KL falls
    again at larger alphas, the first crossing counts.

    Args:
        frame: from ``record_effects``, several positive alphas for each vector.
        costs: from ``text_costs`` for the same settings; ``sweep_records`` gives both.
        kl: the budget, nats per token.
        against: name of a vector to compare the others with, on the same layer and scope where it has them, else on its
            only setting.
        best_layer: each vector at its own best layer and scope, chosen on one half of the records (drawn with ``seed``) and
            reported on the other, so that the choice does not flatter the effect.
        level: of the intervals.
        n: resamples; test records and neutral texts are both drawn anew.
        seed: of the resampling.
        ceiling: vectors of ``kl_optimal`` at these layers, which state what is possible there, for the columns ``share``.

    Returns:
        One row per vector, scope and layer: ``kl``, ``alpha`` (where the budget is reached), ``effect``, ``se``, ``low``,
        ``high`` (nats), ``n`` (records), ``largest_kl`` (measured), ``estimand`` (``"change"``: the margin at alpha minus
        that at 0). Where the budget is never reached ``effect`` is NaN: measure larger alphas. With ``against``:
        ``difference``, ``difference_low``, ``difference_high`` (paired). ``share``: the effect over the best known at that
        layer and scope, which is the largest effect in the table (a lower bound of the possible) or, with ``ceiling``, the
        held-out prediction (an estimate) if that is larger; ``share_low`` takes the first-order ceiling, which errs on the
        high side, in its place (``evaluate.reachable`` says more).

    Raises:
        ValueError: no costs, tables of something else (a summary, say), a budget that is not positive, settings without
            positive alphas, costs of other settings, an unknown name in ``against``.

    Examples:
        >>> effect_at_kl(effects, costs, kl=0.05, against="caa")                       # doctest: +SKIP
        >>> tables = sweep_records(model, {"ours": a, "caa": b}, pairs, alphas=[0.1, 0.2, 0.4], neutral=10)  # doctest: +SKIP
        >>> effect_at_kl(*tables, kl=0.05, against="caa", best_layer=True)             # doctest: +SKIP
    """
    if costs is None:
        raise ValueError("no costs were measured; give neutral texts to sweep_records, or the table of text_costs")
    require_columns(frame, (*SETTING, "draw", "record", "change"), PER_RECORD)
    per_text = "the per-text table of text_costs, or the second of sweep_records"
    require_columns(costs, (*SETTING, "draw", "text", "n_tokens", "kl"), per_text, "table of costs")
    if not kl > 0:
        raise ValueError(f"kl={kl}; a budget above 0 nats per token is needed")
    if best_layer:
        frame, costs = _at_best_layers(frame, costs, kl, seed)
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
                "estimand": "change",
            }
        )
    if against is not None:
        for row, setting in zip(rows, curves, strict=True):
            other = _opponent(list(curves), setting, against)
            draws = samples[setting][1] - samples[other][1]
            row["difference"] = samples[setting][0] - samples[other][0]
            row["difference_low"], row["difference_high"] = _interval(draws, tail)
    return with_share(pd.DataFrame(rows), [] if ceiling is None else [ceiling])


def _at_best_layers(
    frame: pd.DataFrame, costs: pd.DataFrame, kl: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables with the best layer and scope of every vector alone, and the records that did not choose it."""
    name = "record_id" if "record_id" in frame else "record"  # copies of a record stay on one side
    records = np.random.default_rng(seed).permutation(sorted(frame[name].unique()))
    if len(records) < 2:
        raise ValueError("best_layer needs two records or more: one half chooses, the other reports")
    choosing = frame[name].isin(records[: len(records) // 2])
    found = effect_at_kl(frame[choosing], costs, kl, n=2, seed=seed)
    best = found.sort_values("effect", ascending=False, na_position="last").drop_duplicates("vector")
    by = ["vector", "positions", "layer"]
    return frame[~choosing].merge(best[by], on=by), costs.merge(best[by], on=by)


def _curves(
    frame: pd.DataFrame, costs: pd.DataFrame
) -> Iterator[tuple[tuple[str, str, int], pd.DataFrame, pd.DataFrame]]:
    """Positive alphas of each vector, scope and layer, and their costs."""
    by = ["vector", "positions", "layer"]
    found: Any = frame[(frame["draw"] < 0) & (frame["alpha"] > 0)].groupby(by, sort=False)
    spent = dict(iter(costs[(costs["draw"] < 0) & (costs["alpha"] > 0)].groupby(by)))
    for (vector, positions, layer), group in found:
        key = (vector, positions, int(layer))  # pandas 2 hands out NumPy's integers
        if key not in spent or set(spent[key]["alpha"]) != set(group["alpha"]):
            raise ValueError(f"no costs for the alphas of {key}; measure text_costs on the same settings")
        yield key, group, spent[key]


def _curve(group: pd.DataFrame, spent: pd.DataFrame) -> Curve:
    change = group.pivot(index="alpha", columns="record", values="change").sort_index()
    kl = spent.pivot(index="alpha", columns="text", values="kl").sort_index()
    tokens = spent.pivot(index="alpha", columns="text", values="n_tokens").sort_index().to_numpy(dtype=float)
    start = [np.zeros((1, table.shape[1])) for table in (change, kl)]
    return (
        np.concatenate([[0.0], change.index.to_numpy(dtype=float)]),
        np.concatenate([start[0], change.to_numpy()]),
        np.concatenate([start[1], kl.to_numpy()]),
        np.concatenate([tokens[:1], tokens]),  # generated texts have another length at every alpha
    )


def _mean_kl(curve: Curve, texts: NDArray[np.int64] | None) -> NDArray[np.float64]:
    kl, weight = (curve[2], curve[3]) if texts is None else (curve[2][:, texts], curve[3][:, texts])
    return np.average(kl, axis=1, weights=weight)


def _at(
    curve: Curve, budget: float, records: NDArray[np.int64] | None, texts: NDArray[np.int64] | None
) -> tuple[float, float]:
    """Alpha and mean effect where the KL first reaches the budget; NaN where it never does."""
    alphas, change = curve[0], curve[1] if records is None else curve[1][:, records]
    kl = _mean_kl(curve, texts)
    crossed = crossing(kl, budget)
    if crossed is None:
        return np.nan, np.nan
    i, share = crossed
    effect = change.mean(1)
    alpha, nats = (float(x[i - 1] + share * (x[i] - x[i - 1])) for x in (alphas, effect))
    return alpha, nats


def crossing(kl: NDArray[np.float64], budget: float) -> tuple[int, float] | None:
    """Where a KL first reaches the budget: linear in its root, as the KL of small steps grows with alpha squared.

    Args:
        kl: at rising alphas, beginning with 0 at alpha 0.
        budget: above 0, in the same unit.

    Returns:
        The first place that reaches the budget, and how far it lies from the place before (a share of 0 to 1); ``None``
        where it is never reached.

    Examples:
        >>> place, share = crossing(np.array([0.0, 0.01, 0.04]), 0.0225)
        >>> place, round(share, 3)
        (2, 0.5)
    """
    above = np.flatnonzero(kl >= budget)
    if not len(above):
        return None
    i = int(above[0])
    low, high, wanted = np.sqrt([max(kl[i - 1], 0.0), kl[i], budget])
    return i, float((wanted - low) / (high - low))


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
