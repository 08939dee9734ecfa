"""Cross-validated probes with shuffled floors, against scikit-learn's pipeline one fit at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import grains_tl as gr
from benchmarks.common import timed
from benchmarks.rows import Row, python_shares
from benchmarks.starting import bundled


def scikit_learn(features: Tensor, *, n_folds: int = 5, n_shuffles: int = 10, seed: int = 0) -> NDArray[np.float64]:
    """``[layer, draw]`` accuracies: the same folds and shuffles, a pipeline fitted for each, and one on all records."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n, _, n_layers, width = features.shape
    rng = np.random.default_rng(seed)
    fold = rng.permutation(np.arange(n) % n_folds)
    swapped = np.concatenate([np.zeros((1, n), dtype=bool), rng.random((n_shuffles, n)) < 0.5])
    found = np.zeros((n_layers, len(swapped)))
    for layer in range(n_layers):
        x = features[:, :, layer].double().numpy()
        for d, draw in enumerate(swapped):
            y = np.stack([~draw, draw], axis=1)
            right = np.zeros(n)
            for k in range(n_folds):
                test = fold == k
                probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
                probe.fit(x[~test].reshape(-1, width), y[~test].ravel())
                hits = probe.predict(x[test].reshape(-1, width)) == y[test].ravel()
                right[test] = hits.reshape(-1, 2).mean(1)
            found[layer, d] = right.mean()
        everything = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        everything.fit(x.reshape(-1, width), np.tile([True, False], n))
    return found


def residuals(model: Any, n: int, layers: list[int]) -> Tensor:
    """``[record, 2, layer, d_model]`` at the end of the responses of n bundled records."""
    pairs = [p for name in ("sentiment", "misconceptions") for p in bundled(name)]
    if n > len(pairs):
        raise ValueError(f"{n} records; the bundled sets have {len(pairs)}")
    return gr.analysis.residuals(model, pairs[:n], layers=layers, readout="response_end")


def run(model: Any, *, shapes: tuple[tuple[int, int], ...], repeats: int) -> list[Row]:
    """A row for each shape: records, and layers spread over the model."""
    found = []
    for n, n_layers in shapes:
        layers = np.linspace(0, int(model.cfg.n_layers) - 1, n_layers).astype(int).tolist()
        features = residuals(model, n, layers)

        def ours(features: Tensor = features, layers: list[int] = layers) -> gr.analysis.Probes:
            with gr.settings(progress=False):
                return gr.analysis.fit_probes(features, layers)

        jobs: dict[str, Callable[[], Any]] = {"ours": ours, "theirs": partial(scikit_learn, features)}
        seconds, results = timed(jobs, repeats)
        frame, wanted = results["ours"].frame, results["theirs"]
        apart = max(np.abs(frame.accuracy - wanted[:, 0]).max(), np.abs(frame.floor - wanted[:, 1:].mean(1)).max())
        found.append(
            Row(
                f"probes, {n} records, {n_layers} layers",
                seconds["ours"],
                "scikit-learn's pipeline",
                seconds["theirs"],
                aim="2",
                agreement=f"accuracies within {apart:.3f}",
                rest=python_shares(ours),
            )
        )
    return found
