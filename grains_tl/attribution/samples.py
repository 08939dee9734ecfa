"""Gradients averaged over random points: SmoothGrad and expected gradients. Draws depend on the record, not its batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from grains_tl.attribution.field import Field, Run, fixed, values_at
from grains_tl.attribution.paths import Scores, between, complete


def record_generator(seed: int, *tokens: Sequence[int]) -> torch.Generator:
    """A generator that gives one record the same draws in every batch."""
    # one 32-bit key: torch's CPU generator ignores the higher bits of a seed
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, [list(part) for part in tokens])).encode()))


def at_the_input(field: Field) -> list[Scores]:
    """Gradient x input: the first-order effect of every token's embedding."""
    found: dict[int, Scores] = {}
    for sample in field.sample([Run(i, None) for i in range(len(field.lengths))], gradient=True):
        assert sample.gradient is not None
        found[sample.run] = Scores((sample.point * sample.gradient).sum(-1), sample.value, None, None, 1)
    return [found[i] for i in range(len(found))]


def smoothed(
    field: Field,
    x: Sequence[Tensor],
    values: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    n_samples: int,
    noise: float,
) -> list[Scores]:
    """SmoothGrad (arXiv 1706.03825) x input: the gradient averaged over Gaussian noise around the input.

    Args:
        field: f.
        x: the real inputs.
        values: f(x) of each record.
        generators: one per record.
        n_samples: draws.
        noise: standard deviation as a fraction of each token's root-mean-square embedding entry.
    """
    runs, totals = [], [torch.zeros_like(point) for point in x]
    for record, point in enumerate(x):
        scale = noise * point.pow(2).mean(-1, keepdim=True).sqrt()
        for _ in range(n_samples):
            drawn = point + scale * torch.randn(point.shape, generator=generators[record])
            runs.append(Run(record, fixed(drawn)))
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        totals[runs[sample.run].record] += sample.gradient / n_samples
    return [
        Scores((point * total).sum(-1), value, None, None, n_samples)
        for point, total, value in zip(x, totals, values, strict=True)
    ]


def expected(
    field: Field,
    x: Sequence[Tensor],
    values: Sequence[float],
    starts: Sequence[Sequence[Tensor]],
    generators: Sequence[torch.Generator],
    *,
    n_samples: int,
) -> list[Scores]:
    """Expected gradients (arXiv 1906.10670): integrated gradients averaged over baselines, by sampling both.

    Baselines take turns and the places on the path are drawn one per equal stretch, which leaves less chance than drawing
    both freely. ``start_value`` is the mean of f over the baselines, weighted as they were used.

    Args:
        field: f.
        x: the real inputs.
        values: f(x) of each record.
        starts: baselines of each record, ``[pos, d_model]``.
        generators: one per record.
        n_samples: gradients per record.
    """
    runs, starts_used = [], []
    for record, point in enumerate(x):
        own = [starts[record][i % len(starts[record])] for i in range(n_samples)]
        # each baseline gets its own stratified places
        places = torch.zeros(n_samples)
        for b in range(len(starts[record])):
            turns = torch.arange(b, n_samples, len(starts[record]))
            drawn = torch.rand(len(turns), generator=generators[record])
            places[turns] = (torch.arange(len(turns)) + drawn) / max(len(turns), 1)
        for start, alpha in zip(own, places.tolist(), strict=True):
            runs.append(Run(record, partial(between, start, point, alpha)))
            starts_used.append(start)
    scores = [torch.zeros(len(point)) for point in x]
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        record = runs[sample.run].record
        scores[record] += ((x[record] - starts_used[sample.run]) * sample.gradient).sum(-1) / n_samples
    means = [0.0] * len(x)
    for b in range(max(len(own) for own in starts)):
        found = values_at(field, [own[b % len(own)] for own in starts])
        for record, of_record in enumerate(starts):
            if b < len(of_record):
                means[record] += found[record] * len(range(b, n_samples, len(of_record))) / n_samples
    return [complete(s, values[r], means[r], n_samples) for r, s in enumerate(scores)]
