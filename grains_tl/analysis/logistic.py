"""Logistic regressions of many labels on the same features at once, as scikit-learn would fit them one by one.

1. Features are standardised. The penalised weights lie in the span of the rows, so each row is replaced by its coordinates
   along the principal axes: at most as many as there are rows, however wide the residual stream is.
2. Each axis, and the intercept, is scaled so that the loss curves about equally along all of them, which L-BFGS needs for
   few steps. Rows that are told apart safely hardly curve the loss: a rough fit comes first and says how much they do.
3. All labels are fitted by one minimisation of the sum of their losses, with one matrix product per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LogisticFits:
    """Fitted probes.

    Attributes:
        weights: ``[label, feature]``, gradients of the logits with respect to the features as they were given.
        intercepts: ``[label]``.
    """

    weights: NDArray[np.float64]
    intercepts: NDArray[np.float64]

    def logits(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[label, row]`` for rows of features."""
        return self.weights @ x.T + self.intercepts[:, None]


def fit_logistic(
    x: NDArray[np.float64], labels: NDArray[np.bool_], strength: float, *, tolerance: float = 1e-8
) -> LogisticFits:
    """L2-penalised logistic regressions on standardised features, the intercept without a penalty.

    Args:
        x: ``[row, feature]``.
        labels: ``[label, row]``.
        strength: scikit-learn's ``C``.
        tolerance: largest component of the gradient, where axes are scaled to a curvature of about 1. At 1e-4 logits are
            off by some thousandths, a tenth of what scikit-learn's own default leaves.
    """
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 10 * np.finfo(float).eps * np.abs(x).max(), scale, 1.0)  # a constant feature stays 0
    coordinates, axes = _principal((x - mean) / scale)
    solved = _minimise(coordinates, np.where(labels, 1.0, -1.0), strength, tolerance)
    weights = solved[:, :-1] @ axes.T / scale
    return LogisticFits(weights, solved[:, -1] - weights @ mean)


def _principal(z: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[row, axis]`` coordinates and ``[feature, axis]`` axes, from the smaller of the two Gram matrices."""
    wide = z.shape[1] > z.shape[0]
    values, vectors = np.linalg.eigh(z @ z.T if wide else z.T @ z)
    kept = values > 1e-12 * max(values[-1], 1e-300)
    axes = z.T @ (vectors[:, kept] / np.sqrt(values[kept])) if wide else vectors[:, kept]
    return z @ axes, axes


#: Tolerance of the rough fit; 0.3 gives the same times.
ROUGH = 0.03


def _minimise(
    x: NDArray[np.float64], signs: NDArray[np.float64], strength: float, tolerance: float
) -> NDArray[np.float64]:
    """``[label, axis + 1]`` coefficients and intercept."""
    from scipy.optimize import minimize
    from scipy.special import expit

    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.append(np.ones(x.shape[1]), 0.0)
    squares = strength * (rows**2).sum(0)
    found = np.zeros((len(signs), rows.shape[1]))
    spread = np.full(len(signs), 0.25)  # mean of p (1 - p) over the rows, at most a quarter
    for gradient_size in (max(ROUGH, tolerance), tolerance):
        sizes = np.sqrt(squares * spread[:, None] + penalty)

        def loss(flat: NDArray[np.float64], sizes: NDArray[np.float64] = sizes) -> tuple[float, NDArray[np.float64]]:
            weights = flat.reshape(sizes.shape) / sizes
            margins = signs * (weights @ rows.T)
            value = strength * np.logaddexp(0.0, -margins).sum() + 0.5 * (weights**2 * penalty).sum()
            gradient = (weights * penalty - strength * (signs * expit(-margins)) @ rows) / sizes
            return float(value), gradient.ravel()

        options = {"maxiter": 2000, "maxfun": 4000, "gtol": gradient_size, "ftol": 0.0}
        solved = minimize(loss, (found * sizes).ravel(), jac=True, method="L-BFGS-B", options=options).x
        found = solved.reshape(found.shape) / sizes
        likely = expit(found @ rows.T)
        # labels that are all alike are told apart without end: their loss is flat, and its scale must not be 0
        spread = np.maximum((likely * (1 - likely)).mean(1), 1e-6)
    return found
