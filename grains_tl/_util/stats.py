"""How sure a comparison of vectors is: over test records, over building records, and over random draws at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


def mean_and_se(values: Float[Tensor, "*shape record"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Mean over records and its standard error (NaN for a single record).

    Examples:
        >>> import torch
        >>> mean, se = mean_and_se(torch.tensor([1.0, 3.0]))
        >>> mean.item(), se.item()
        (2.0, 1.0)
    """
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5


def compare(
    own: Float[Tensor, "record"],
    resampled: Float[Tensor, "draw_a record"],
    random: Float[Tensor, "draw_b record"],
    *,
    seed: int = 0,
    n: int = 4000,
) -> dict[str, float]:
    """How far a vector's effect lies above that of random draws, with all three uncertainties in one interval.

    Args:
        own: ``[record]`` effects of the vector.
        resampled: ``[draw, record]`` effects of its bootstrap vectors (resampled building records).
        random: ``[draw, record]`` effects of the control's draws.
        seed: of the resampling.
        n: resamples.

    Returns:
        ``difference`` of the means, its 95 % interval ``low`` .. ``high`` (resampling building records, test records and
        draws together), ``beaten``: number of draws with a smaller mean effect, of ``n_draws``.
    """
    rng = np.random.default_rng(seed)
    a, b = resampled.numpy(), random.numpy()
    records = rng.integers(0, a.shape[1], (n, a.shape[1]))
    pick_a = rng.integers(0, a.shape[0], n)
    pick_b = rng.integers(0, b.shape[0], (n, b.shape[0]))
    difference = np.array(
        [a[i][r].mean() - b[j].mean(0)[r].mean() for i, j, r in zip(pick_a, pick_b, records, strict=True)]
    )
    estimate = float(own.mean() - random.mean())
    low, high = centred_interval(difference, estimate)
    beaten = int((random.mean(-1) < own.mean()).sum())
    return {"difference": estimate, "low": low, "high": high, "beaten": beaten, "n_draws": len(b)}


def resampled_means(effects: Float[Tensor, "draw record"], *, seed: int = 0, n: int = 4000) -> NDArray[np.float64]:
    """``[n]`` mean effects over resampled draws and resampled records of ``[draw, record]`` effects."""
    rng = np.random.default_rng(seed)
    values = effects.double().numpy()
    records = rng.integers(0, values.shape[1], (n, values.shape[1]))
    return np.array([values[i][r].mean() for i, r in zip(rng.integers(0, len(values), n), records, strict=True)])


def centred_interval(draws: NDArray[np.floating], estimate: float, level: float = 0.95) -> tuple[float, float]:
    """The quantiles of bootstrap draws, moved so that the draws' mean lies on the estimate.

    Resampled building sets are a little noisier than the whole one, and draws may be measured on fewer records.

    Examples:
        >>> [round(x, 2) for x in centred_interval(np.arange(101.0), 0.0, 0.9)]
        [-45.0, 45.0]
    """
    low, high = np.quantile(draws, tails(level)) + estimate - float(draws.mean())
    return float(low), float(high)


def tails(level: float) -> list[float]:
    """Below which shares of a distribution the two ends of its central interval lie.

    Examples:
        >>> tails(0.95)
        [0.025, 0.975]
    """
    return [round((1 - level) / 2, 15), round((1 + level) / 2, 15)]


def mean_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean over records, its standard error, and its interval (Student's t); NaN where one record is all there is.

    Examples:
        >>> [round(x, 3) for x in mean_interval(np.array([1.0, 2.0, 3.0]))]
        [2.0, 0.577, -0.484, 4.484]
    """
    mean, se, n = float(values.mean()), standard_error(values), len(values)
    reach = t_reach(se, n, level) if n > 1 and se > 0 else (0.0 if n > 1 else math.nan)
    return mean, se, mean - reach, mean + reach


def crossed_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float, float]:
    """Mean over draws and records, and its interval over both: other draws and other records might have come.

    The two parts of the variance of the mean are added (each holds a share of the rest, so the sum is a little too large
    rather than too small); the degrees of freedom are Satterthwaite's. A single draw, or a single record, adds nothing.

    Args:
        values: ``[draw, record]``.
        level: of the interval.

    Returns:
        ``(mean, low, high)``.

    Examples:
        >>> [round(x, 3) for x in crossed_interval(np.array([[1.0, 2.0, 3.0]]))]
        [2.0, -0.484, 4.484]
        >>> [round(x, 3) for x in crossed_interval(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))]
        [2.0, -0.484, 4.484]
    """
    from scipy import stats

    mean = float(values.mean())
    parts = []
    for axis in (1, 0):
        means = values.mean(axis)
        if len(means) > 1:
            parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    variance = sum(part for part, _ in parts)
    if not parts:
        return mean, math.nan, math.nan
    if variance == 0:
        return mean, mean, mean
    df = variance**2 / sum(part**2 / n for part, n in parts)
    reach = float(stats.t.ppf((1 + level) / 2, df)) * math.sqrt(variance)
    return mean, mean - reach, mean + reach


def t_reach(se: float, n: int, level: float = 0.95) -> float:
    """Half the length of Student's interval of a mean of ``n`` values."""
    from scipy import stats  # a second to import

    return float(stats.t.ppf((1 + level) / 2, n - 1)) * se


def rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Spearman's; NaN where one side is constant or has fewer than two values.

    Examples:
        >>> rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
        1.0
    """
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(spearmanr(a, b).statistic)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of a mean; NaN for fewer than two values."""
    x = np.asarray(values, dtype=float)
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
