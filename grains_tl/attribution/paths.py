"""Integrals of the gradient along a path from a baseline to the input, and how far each misses what it promises.

All of them work on a ``Field``: a model, or any function of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution.field import Field, Run, values_at


class Scores(NamedTuple):
    """Scores of one record: ``[pos]`` nats, f(x), f(x') and the completeness gap where there is one, evaluations used.

    ``errors``, ``[pos]`` nats, is how far each score may be off, for methods that can tell.
    """

    scores: Tensor
    value: float
    start_value: float | None
    gap: float | None
    steps: int
    errors: Tensor | None = None


class Ends(NamedTuple):
    """Both ends of every record's path: points ``[pos, d_model]`` and f there, nats."""

    x: list[Tensor]
    start: list[Tensor]
    value: list[float]
    start_value: list[float]


def path_nodes(n_steps: int, rule: str = "gauss_legendre") -> tuple[Float[Tensor, "step"], Float[Tensor, "step"]]:
    """Nodes and weights on [0, 1].

    Args:
        n_steps: how many.
        rule: ``"gauss_legendre"``, exact for polynomials of degree ``2 * n_steps - 1``; or ``"riemann"``, midpoints of
            equal steps.

    Examples:
        >>> nodes, weights = path_nodes(2)
        >>> round(float((weights * nodes**3).sum()), 6)  # integral of x^3
        0.25
    """
    if rule == "riemann":
        return (torch.arange(n_steps) + 0.5) / n_steps, torch.full((n_steps,), 1 / n_steps)
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    return torch.tensor((nodes + 1) / 2, dtype=torch.float32), torch.tensor(weights / 2, dtype=torch.float32)


def between(start: Tensor, x: Tensor, alpha: float) -> Tensor:
    """The point of the straight path at ``alpha``."""
    return start + alpha * (x - start)


def straight_path(field: Field, ends: Ends, nodes: Tensor, weights: Tensor) -> list[Scores]:
    """Integrated gradients (arXiv 1703.01365) with given nodes."""
    totals = [torch.zeros_like(x) for x in ends.x]
    runs, steps = [], []
    for record, (start, x) in enumerate(zip(ends.start, ends.x, strict=True)):
        for step, alpha in enumerate(nodes.tolist()):
            runs.append(Run(record, partial(between, start, x, alpha)))
            steps.append(step)
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        totals[runs[sample.run].record] += weights[steps[sample.run]] * sample.gradient
    return [
        complete(((x - start) * total).sum(-1), value, start_value, len(nodes))
        for x, start, total, value, start_value in zip(
            ends.x, ends.start, totals, ends.value, ends.start_value, strict=True
        )
    ]


def complete(scores: Tensor, value: float, start_value: float, steps: int) -> Scores:
    """Scores with the gap of their sum to f(x) - f(x')."""
    return Scores(scores, value, start_value, float(scores.double().sum()) - (value - start_value), steps)


# -- adaptive ---------------------------------------------------------------------------------------------------------
class Node(NamedTuple):
    """A place on the path: f there, and each token's rate of change along the path ``[pos]``."""

    alpha: float
    value: float
    rate: Tensor


class Panel(NamedTuple):
    """An interval of the path with both ends and its middle: Simpson's rule.

    ``coarse`` is the integral over the same interval from the nodes there were before it was halved: ``[pos]`` nats.
    """

    left: Node
    middle: Node
    right: Node
    coarse: Tensor

    @property
    def scores(self) -> Tensor:
        """``[pos]`` nats, the integral over the panel."""
        width = self.right.alpha - self.left.alpha
        return width / 6 * (self.left.rate + 4 * self.middle.rate + self.right.rate)

    @property
    def gap(self) -> float:
        """How far the panel misses f(right) - f(left), which is known: no estimate of the error is needed."""
        return float(self.scores.sum()) - (self.right.value - self.left.value)


def _halves(left: Node, middle: Node, right: Node) -> tuple[Tensor, Tensor]:
    """Integrals over both halves of an interval of the parabola through its three nodes; they add up to Simpson's rule."""
    sixth = (right.alpha - left.alpha) / 24
    return (
        sixth * (5 * left.rate + 8 * middle.rate - right.rate),
        sixth * (5 * right.rate + 8 * middle.rate - left.rate),
    )


def _first_panels(nodes: Sequence[Node]) -> list[Panel]:
    """One panel of three nodes (its coarse integral is the trapezoid rule's), or two of five."""
    if len(nodes) == 3:
        left, middle, right = nodes
        return [Panel(left, middle, right, (right.alpha - left.alpha) / 2 * (left.rate + right.rate))]
    a, b, c, d, e = nodes
    first, second = _halves(a, c, e)
    return [Panel(a, b, c, first), Panel(c, d, e, second)]


def adaptive_path(field: Field, ends: Ends, *, budget: int, tolerance: float) -> list[Scores]:
    """Integrated gradients whose nodes go where f moves.

    Simpson's rule on panels. The integral of each panel is known (the difference of f at its ends, which come with the
    gradients), so every panel shows its own gap; those with the largest are halved, two new gradients each, until the
    gaps together, their signs ignored, are below ``tolerance * |f(x) - f(x')|`` or ``budget`` gradients are spent.

    The gap is a sum over tokens whose errors may cancel, so it bounds no single token's error. ``errors`` of the result is
    an estimate for each token: what the last halving of every panel changed in it, signs ignored.

    Args:
        field: the function to integrate.
        ends: input, reference and the values of f at both.
        budget: gradients per record, at least 5.
        tolerance: share of |f(x) - f(x')|.
    """
    n_first = 5 if budget >= 5 else 3
    places = [_spread(_first_place(start), n_first) for start in ends.start]
    nodes = _nodes(field, ends, [(r, a) for r, own in enumerate(places) for a in own])
    panels = [_first_panels([nodes[r, a] for a in own]) for r, own in enumerate(places)]
    used = [n_first] * len(ends.x)
    while True:
        halved = {}
        for r, own in enumerate(panels):
            target = tolerance * abs(ends.value[r] - ends.start_value[r])
            if sum(abs(p.gap) for p in own) > target and used[r] + 2 <= budget:
                halved[r] = _worst(own, (budget - used[r]) // 2)
        if not halved:
            break
        wanted = [(r, a) for r, some in halved.items() for p in some for a in _quarters(p)]
        nodes = _nodes(field, ends, wanted)
        for r, some in halved.items():
            used[r] += 2 * len(some)
            for p in some:
                panels[r] = [q for q in panels[r] if q is not p]
                a, b = (nodes[r, q] for q in _quarters(p))
                first, second = _halves(p.left, p.middle, p.right)
                panels[r] += [Panel(p.left, a, p.middle, first), Panel(p.middle, b, p.right, second)]
    return [_added_up(own, ends, r, used[r]) for r, own in enumerate(panels)]


def _added_up(panels: Sequence[Panel], ends: Ends, record: int, used: int) -> Scores:
    scores = torch.stack([p.scores for p in panels])
    errors = (scores - torch.stack([p.coarse for p in panels])).abs().sum(0)
    found = complete(scores.sum(0), ends.value[record], ends.start_value[record], used)
    return found._replace(errors=errors)


def _first_place(start: Tensor) -> float:
    """Norms have no gradient at an embedding that is exactly zero: begin a thousandth later, and let the gap show it."""
    return 1e-3 if bool((start == 0).all(-1).any()) else 0.0


def _spread(first: float, n: int) -> list[float]:
    return [first + (1 - first) * i / (n - 1) for i in range(n)]


def _worst(panels: Sequence[Panel], at_most: int) -> list[Panel]:
    """Panels with a gap of at least half the largest."""
    order = sorted(panels, key=lambda p: abs(p.gap), reverse=True)
    return [p for p in order if abs(p.gap) >= abs(order[0].gap) / 2][:at_most]


def _quarters(panel: Panel) -> tuple[float, float]:
    left, middle, right = panel.left.alpha, panel.middle.alpha, panel.right.alpha
    return (left + middle) / 2, (middle + right) / 2


def _nodes(field: Field, ends: Ends, wanted: Sequence[tuple[int, float]]) -> dict[tuple[int, float], Node]:
    runs = [Run(r, partial(between, ends.start[r], ends.x[r], a)) for r, a in wanted]
    found = {}
    for sample in field.sample(runs, gradient=True):
        assert sample.gradient is not None
        record, alpha = wanted[sample.run]
        rate = ((ends.x[record] - ends.start[record]) * sample.gradient).sum(-1)
        found[record, alpha] = Node(alpha, sample.value, rate)
    return found


def ends_of(field: Field, x: list[Tensor], values: list[float], start: list[Tensor]) -> Ends:
    """Both ends, with f(x') from a forward pass."""
    return Ends(x, start, values, values_at(field, start))
