"""Linear probes for chosen against rejected, and how far a direction separates the two."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util import html
from grains_tl._util.progress import progress_bar
from grains_tl.attribution.selection import Selection
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.models.running import existing_layers, hooked
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.readout import read_out, read_out_responses
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Where the two sides of a record are read. ``"response_end"``: last token of prompt + chosen and of prompt + rejected.
#: ``"prompt_end"``: last token of the prompt, once without its tokens toward rejected, once without those toward chosen.
ProbeReadout = Literal["prompt_end", "response_end"]


@dataclass(frozen=True, eq=False, repr=False)
class Probes:
    """Probes of all layers.

    Attributes:
        frame: one row per layer, see ``fit_probes``.
        directions: ``[layer, d_model]`` unit vectors, the gradient of each probe's logit (fitted on all records).
        patterns: ``[layer, d_model]`` unit vectors, the features' covariance times that gradient: what the probe's
            output goes along with, and the one to compare with a difference of means.
        layers: the layer of each row.

    Examples:
        >>> probes = fit_probes(residuals(model, tokenized, layers=[12], readout="response_end"), [12])     # doctest: +SKIP
        >>> probes.frame[["layer", "accuracy", "floor"]]                                               # doctest: +SKIP
    """

    frame: pd.DataFrame
    directions: Float[Tensor, "layer d_model"]
    patterns: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]

    def __repr__(self) -> str:
        best = self.frame.loc[self.frame["accuracy"].idxmax()]
        where = f"layers {list(self.layers)}, {int(best['n'])} records"
        return f"Probes({where}; best at layer {int(best['layer'])}: {best['accuracy']:.2f}, floor {best['floor']:.2f})"

    def _repr_html_(self) -> str:
        columns = [c for c in self.frame.columns if c not in ("layer", "n")]
        rows = [
            [html.number(row["layer"], "d"), *(html.number(row[c]) for c in columns)]
            for row in self.frame.to_dict("records")
        ]
        title = html.title("Probes", f"held-out accuracy on {html.count(int(self.frame['n'].max()), 'record')}")
        return html.frame(title, html.table(["layer", *columns], rows, numbers=range(len(columns) + 1)))


def residuals(
    model: HookedModel,
    tokenized: Records,
    *,
    layers: Sequence[int] | None = None,
    readout: ProbeReadout = "prompt_end",
    selections: Sequence[Selection] | None = None,
    mask: Mask | Masker = "mean_embedding",
    fwd_hooks: FwdHooks | None = None,
) -> Float[Tensor, "record 2 layer d_model"]:
    """Residuals of the chosen (0) and rejected (1) side of every record, in whatever run the hooks make.

    At ``"response_end"`` a response of one token is itself what is read: a probe there finds the word, at any layer.
    ``"prompt_end"`` has no response in it.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        layers: default all; the result has them in this order.
        readout: see ``ProbeReadout``.
        selections: the tokens to mask, needed for ``"prompt_end"``.
        mask: how they are masked.
        fwd_hooks: for example ``vectors.hooks(0.2, [18])``, to see the residuals of a steered run.

    Returns:
        ``[record, 2, layer, d_model]``, residual units; side 0 chosen, 1 rejected.

    Raises:
        ValueError: unknown read-out, or ``"prompt_end"`` without one selection per record.

    Examples:
        >>> residuals(model, tokenized, layers=[12], readout="response_end").shape     # doctest: +SKIP
        torch.Size([24, 2, 1, 576])
    """
    tokenized = as_tokenized(model, tokenized)
    if readout not in get_args(ProbeReadout):
        raise ValueError(f"readout={readout!r}; it is one of {get_args(ProbeReadout)}")
    at = existing_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    with hooked(model, fwd_hooks or []):
        if readout == "response_end":
            return read_out_responses(model, tokenized, layers=at)
        if selections is None or len(selections) != len(tokenized):
            given = None if selections is None else len(selections)
            raise ValueError(
                f"selections: {given} for {len(tokenized)} records; readout='prompt_end' compares each prompt without its "
                "tokens toward rejected and toward chosen (select_tokens), or use readout='response_end'"
            )
        sides = ([s.toward_rejected for s in selections], [s.toward_chosen for s in selections])
        found = [read_out(model, tokenized, masked, layers=at, mask=mask) for masked in sides]
    return torch.stack(found, dim=1)


def fit_probes(
    features: Float[Tensor, "record 2 layer d_model"],
    layers: Sequence[int],
    *,
    vectors: SteeringVectors | None = None,
    n_folds: int = 5,
    n_shuffles: int = 10,
    strength: float = 1.0,
    seed: int = 0,
) -> Probes:
    """Cross-validated logistic regressions, one per layer, with a floor from shuffled labels.

    Both sides of a record are always in the same fold. For the floor the two labels of each record are swapped by a
    coin and everything is fitted again; selectivity is what the true labels have above that (in the spirit of arXiv
    1909.03368, whose control tasks give random labels to word types instead).

    Args:
        features: from ``residuals``.
        layers: the layer of each row of the third axis.
        vectors: adds their cosines to the probes, where they have the layer.
        n_folds: folds over records.
        n_shuffles: draws of the floor.
        strength: scikit-learn's ``C``, the inverse of the L2 penalty on standardised features.
        seed: of folds and shuffles.

    Returns:
        ``Probes``; ``frame`` has ``layer``, ``accuracy`` (held-out records; 0.5 is chance), ``se`` over records,
        ``floor`` (mean accuracy with shuffled labels), ``floor_high`` (the largest of the draws), ``selectivity``
        (accuracy - floor), ``n`` records, and with vectors ``cosine`` and ``cosine_pattern`` of their direction to
        ``directions`` and ``patterns``.

    Raises:
        ValueError: shapes that do not fit, fewer records than folds, fewer than two folds.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(20, 2, 1, 8, generator=generator)
        >>> x[:, 0, :, 0] += 4                       # chosen and rejected differ along the first axis
        >>> fit_probes(x, [12]).frame.accuracy.item() > 0.9
        True
    """
    n = len(features)
    if features.shape[1:3] != (2, len(layers)):
        raise ValueError(f"features {tuple(features.shape)} do not fit [record, 2, {len(layers)} layers, d_model]")
    if not 2 <= n_folds <= n:
        raise ValueError(f"{n} records in n_folds={n_folds}; at least 2 folds and one record in each are needed")
    rng = np.random.default_rng(seed)
    fold = rng.permutation(np.arange(n) % n_folds)
    swaps = rng.random((n_shuffles, n)) < 0.5
    truth = np.zeros(n, dtype=bool)
    rows, directions, patterns = [], [], []
    for column, layer in enumerate(progress_bar(layers, desc="probe", unit="layer")):
        x = features[:, :, column].double().cpu().numpy()
        right = _held_out(x, truth, fold, strength)
        floors = [_held_out(x, swap, fold, strength).mean() for swap in swaps]
        floor = float(np.mean(floors)) if floors else float("nan")
        rows.append(
            {
                "layer": layer,
                "accuracy": right.mean(),
                "se": right.std(ddof=1) / n**0.5,
                "floor": floor,
                "floor_high": max(floors, default=float("nan")),
                "selectivity": right.mean() - floor,
                "n": n,
            }
        )
        direction, pattern = _direction(x, strength)
        directions.append(direction)
        patterns.append(pattern)
    found = Probes(pd.DataFrame(rows), torch.stack(directions), torch.stack(patterns), tuple(layers))
    if vectors is None:
        return found
    both = {"cosine": found.directions, "cosine_pattern": found.patterns}
    cosines = {
        name: [_cosine(vectors, layer, d) for layer, d in zip(layers, ds, strict=True)] for name, ds in both.items()
    }
    return Probes(found.frame.assign(**cosines), found.directions, found.patterns, found.layers)


def separation(
    features: Float[Tensor, "record 2 layer d_model"], vectors: SteeringVectors, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """How far the projections of the two sides lie apart along each layer's direction.

    Call it on the residuals of a plain and of a steered run: a step added to both sides alike moves the means and
    leaves AUC and d' where they were.

    Args:
        features: from ``residuals``.
        vectors: the directions; every layer of ``features`` must be stored.
        layers: the layer of each row of the third axis, default those of the vectors.

    Returns:
        One row per layer: ``auc`` (a random chosen side lies above a random rejected one), ``d_prime`` (difference of
        the means over the pooled standard deviation), ``paired`` (share of records whose own chosen side is higher),
        ``chosen`` and ``rejected`` (mean projections, residual units), ``n``.

    Raises:
        ValueError: features whose axes do not fit, or a layer that is not stored.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[1.0, 0.0]]), (4,), torch.ones(1), torch.full((1,), 50.0))
        >>> sides = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]], [[[3.0, 0.0]], [[1.0, 0.0]]]])
        >>> separation(sides, v)["paired"].tolist()
        [1.0]
    """
    from sklearn.metrics import roc_auc_score

    at = vectors.layers if layers is None else tuple(layers)
    if features.shape[2] != len(at):
        raise ValueError(
            f"features of {features.shape[2]} layers, but layers {list(at)}; name the layers of the features"
        )
    projections = torch.einsum("rsld,ld->rsl", features.double().cpu(), vectors.at(at).directions.double()).numpy()
    rows = []
    for layer, p in zip(at, np.moveaxis(projections, 2, 0), strict=True):
        spread = np.sqrt((p[:, 0].var(ddof=1) + p[:, 1].var(ddof=1)) / 2)
        rows.append(
            {
                "layer": layer,
                "auc": roc_auc_score([1] * len(p) + [0] * len(p), np.concatenate([p[:, 0], p[:, 1]])),
                "d_prime": float((p[:, 0].mean() - p[:, 1].mean()) / spread),
                "paired": float((p[:, 0] > p[:, 1]).mean()),
                "chosen": float(p[:, 0].mean()),
                "rejected": float(p[:, 1].mean()),
                "n": len(p),
            }
        )
    return pd.DataFrame(rows)


def _held_out(
    x: NDArray[np.float64], swapped: NDArray[np.bool_], fold: NDArray[np.int64], strength: float
) -> NDArray[np.float64]:
    """Per record, the share of its two sides that a probe fitted on the other folds gets right."""
    labels = np.stack([~swapped, swapped], axis=1)  # [record, 2]: is this side called chosen
    right = np.zeros(len(x))
    for k in np.unique(fold):
        test = fold == k
        model = _fit(x[~test].reshape(-1, x.shape[-1]), labels[~test].ravel(), strength)
        guess = model.predict(x[test].reshape(-1, x.shape[-1])).reshape(-1, 2)
        right[test] = (guess == labels[test]).mean(1)
    return right


def _fit(x: NDArray[np.float64], y: NDArray[np.bool_], strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():  # a probe that stops at the iteration limit is good enough for its accuracy
        warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500)).fit(x, y)


def _direction(x: NDArray[np.float64], strength: float) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"]]:
    flat = x.reshape(-1, x.shape[-1])
    scaler, probe = _fit(flat, np.tile([True, False], len(x)), strength)
    weights = probe.coef_[0] / scaler.scale_
    centred = flat - flat.mean(0)
    pattern = centred.T @ (centred @ weights)  # Haufe et al. 2014: a filter's weights are not what it filters for
    direction, pattern = (torch.nn.functional.normalize(torch.from_numpy(v).float(), dim=0) for v in (weights, pattern))
    return direction, pattern


def _cosine(vectors: SteeringVectors, layer: int, unit: Float[Tensor, "d_model"]) -> float:
    return float((vectors.at([layer]).directions[0] * unit).sum()) if layer in vectors.layers else float("nan")
