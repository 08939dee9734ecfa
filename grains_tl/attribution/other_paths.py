"""Integrals along paths that are not straight: one token at a time, or close to real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution.field import Field, Run
from grains_tl.attribution.paths import Ends, Scores, between, complete


def one_at_a_time(field: Field, ends: Ends, nodes: Tensor, weights: Tensor) -> list[Scores]:
    """Sequential integrated gradients (arXiv 2305.15853): only one token moves, the others stay real.

    A token's exact integral is f(x) - f(x with this token at its baseline), which is leave-one-out with the baseline as
    the mask. So the method converges to leave-one-out; ``gap`` is the sum of what is missing, and
    ``start_value = f(x) - sum of leave-one-out`` stands in for f(x').
    """
    runs, owner, removals = [], [], []
    scores = [torch.zeros(len(x)) for x in ends.x]
    for record, (start, x) in enumerate(zip(ends.start, ends.x, strict=True)):
        for pos in range(len(x)):
            if torch.equal(start[pos], x[pos]):
                continue
            removals.append((record, pos))
            for step, alpha in enumerate(nodes.tolist()):
                runs.append(Run(record, partial(_move_one, start, x, pos, alpha)))
                owner.append((record, pos, step))
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        record, pos, step = owner[sample.run]
        difference = ends.x[record][pos] - ends.start[record][pos]
        scores[record][pos] += weights[step] * (difference * sample.gradient[pos]).sum()
    exact = [0.0] * len(ends.x)
    ones = [Run(r, partial(_move_one, ends.start[r], ends.x[r], p, 0.0)) for r, p in removals]
    for sample in field.sample(ones, gradient=False):
        record = removals[sample.run][0]
        exact[record] += ends.value[record] - sample.value
    used = [len(nodes) * sum(r == record for r, _ in removals) for record in range(len(ends.x))]
    return [complete(own, ends.value[r], ends.value[r] - exact[r], used[r]) for r, own in enumerate(scores)]


def _move_one(start: Tensor, x: Tensor, pos: int, alpha: float) -> Tensor:
    point = x.clone()
    point[pos] = between(start[pos], x[pos], alpha)
    return point


def along_points(field: Field, ends: Ends, paths: Sequence[Tensor]) -> list[Scores]:
    """The trapezoid rule along any paths ``[step, pos, d_model]`` from x' to x (arXiv 2108.13654: close to real tokens)."""
    runs, places = [], []
    weights = [_trapezoid(path) for path in paths]
    for record, path in enumerate(paths):
        for step in range(len(path)):
            runs.append(Run(record, partial(path.__getitem__, step)))
            places.append((record, step))
    scores = [torch.zeros(path.shape[1]) for path in paths]
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        record, step = places[sample.run]
        scores[record] += (weights[record][step] * sample.gradient).sum(-1)
    return [complete(own, ends.value[r], ends.start_value[r], len(paths[r])) for r, own in enumerate(scores)]


def _trapezoid(path: Float[Tensor, "step pos d_model"]) -> Float[Tensor, "step pos d_model"]:
    """Half of the way into each point and half of the way out of it."""
    half = torch.diff(path, dim=0) / 2
    nothing = torch.zeros_like(path[:1])
    return torch.cat([nothing, half]) + torch.cat([half, nothing])


def token_path(
    x: Float[Tensor, "pos d_model"],
    start: Float[Tensor, "pos d_model"],
    vocabulary: Float[Tensor, "vocab d_model"],
    n_points: int,
    n_neighbours: int = 30,
) -> Float[Tensor, "point pos d_model"]:
    """Points from ``start`` to ``x`` that keep close to embeddings of real tokens and move monotonically.

    After discretized integrated gradients (arXiv 2108.13654, the greedy variant): a candidate token is pulled, dimension by
    dimension, into the box between the point before and the end, and the candidate that moves least is taken. Unlike there,
    the candidates are the neighbours of the straight path at the same place, not of the last token, so that the steps are
    even.
    """
    points = [x]
    for step in range(n_points - 2, 0, -1):
        line = between(start, x, step / (n_points - 1))
        nearest = torch.cdist(line, vocabulary).topk(min(n_neighbours, len(vocabulary)), largest=False).indices
        candidates = vocabulary[nearest]
        low, high = torch.minimum(points[-1], start)[:, None], torch.maximum(points[-1], start)[:, None]
        pulled = torch.maximum(torch.minimum(candidates, high), low)
        best = (pulled - candidates).norm(dim=-1).argmin(-1)
        points.append(pulled[torch.arange(len(x)), best])
    return torch.stack([*points, start]).flip(0)
