"""Effects at given KL budgets: unsteered residuals are cached once, and every vector is continued from its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.inference.batches import Batch, batch_of, by_token_budget
from grains_tl.inference.logprobs import hooks_for, score_batches
from grains_tl.inference.restart import Restart, prepare_restart, restart_logits, restart_many
from grains_tl.models.running import device_of
from grains_tl.tokens.prompts import prompt_ids

#: Tokens of neutral text in one pass, on a CPU and on a GPU.
TEXT_TOKENS, TEXT_TOKENS_GPU = 200, 4000

#: On a CPU the KL is averaged over every third predicted token of the neutral texts: unembedding all of them is most of
#: the work there. A GPU takes all.
EVERY = 3

#: How near the measured KL must be to a budget before alpha is taken from a power law: of exponent 2, or through two points.
NEAR_ONE, NEAR_TWO = 1.12, 1.4

#: Past this step the direction counts as unable to reach the budget.
LARGEST_ALPHA = 3.0


class AtKL(NamedTuple):
    """Effects of one vector at one budget; ``alpha`` and ``change`` are empty where it is not reached."""

    kl: float
    alpha: float | None
    change: list[float]


class Bench:
    """Cached runs of neutral texts and records of one model, to be continued from some layers."""

    def __init__(self, model: Any, layers: Sequence[int], *, half: bool | None = None, n_texts: int = 12) -> None:
        on_gpu = device_of(model).type == "cuda"
        self.model, self.layers, self.half = model, list(layers), not on_gpu if half is None else half
        rows = [prompt_ids(model, text) for text in gr.records.neutral_texts(n_texts)]
        self.texts: list[tuple[Restart, Tensor]] = []
        max_tokens, every = (TEXT_TOKENS_GPU, 1) if on_gpu else (TEXT_TOKENS, EVERY)
        with self.running():
            for group in by_token_budget([len(row) for row in rows], max_tokens=max_tokens):
                restart = prepare_restart(model, text_batch(model, [rows[i] for i in group], every), self.layers)
                (base,) = restart_logits(model, restart, max(self.layers), [[]])
                self.texts.append((restart, base.float().log_softmax(-1)))
        self.records: dict[str, list[tuple[list[int], Restart]]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients; blocks in bfloat16 autocast where ``half`` (the default on a CPU), unembedding in float32."""
        with torch.no_grad(), torch.autocast(device_of(self.model).type, dtype=torch.bfloat16, enabled=self.half):
            yield

    def add(self, name: str, pairs: Sequence[gr.PreferencePair]) -> Tensor:
        """Cache records under a name.

        Returns:
            ``[record]`` unsteered margins, nats.
        """
        tokenized = gr.tokens.tokenize_pairs(self.model, pairs)
        with self.running():
            self.records[name] = [
                (group, prepare_restart(self.model, batch, self.layers))
                for group, batch in score_batches(self.model, tokenized)
            ]
        base = torch.zeros(len(tokenized))
        for group, restart in self.records[name]:
            base[group] = (restart.base[:, 0] - restart.base[:, 1]).float().cpu()
        return base

    def kl(self, vectors: gr.SteeringVectors, alpha: float) -> float:
        """Mean KL(steered || base) over the predicted tokens of the neutral texts, nats."""
        total, n = 0.0, 0
        with self.running():
            for restart, base in self.texts:
                hooks = hooks_for(vectors.steering(alpha), restart.batch)
                (logits,) = restart_logits(self.model, restart, vectors.layers[0], [hooks])
                steered = logits.float().log_softmax(-1)
                total += float((steered.exp() * (steered - base)).sum(dtype=torch.float64))
                n += len(base)
        return total / n

    def change(self, vectors: gr.SteeringVectors, alpha: float, name: str) -> Tensor:
        """``[record]`` margin under steering minus margin without, nats."""
        parts = self.records[name]
        out = torch.zeros(sum(len(group) for group, _ in parts))
        for group, restart in parts:
            hooks = hooks_for(vectors.steering(alpha), restart.batch)
            with self.running():
                (found,) = restart_many(self.model, restart, vectors.layers[0], [hooks])
            out[group] = (found[:, 0] - found[:, 1] - restart.base[:, 0] + restart.base[:, 1]).float().cpu()
        return out

    def at_budgets(
        self,
        vectors: gr.SteeringVectors,
        budgets: Sequence[float],
        records: Sequence[str],
        guess: float,
        growth: Sequence[float | None],
    ) -> tuple[dict[str, list[AtKL]], list[tuple[float, float]]]:
        """Effects on named records at each budget, and the ``(alpha, KL)`` that were measured to find the steps.

        Args:
            vectors: of one layer.
            budgets: KL budgets, rising.
            records: names given to ``add``.
            guess: alpha at the first budget, roughly.
            growth: by which factor alpha grew from each budget to the next for similar vectors, where that is known.
        """
        curve: list[tuple[float, float]] = []
        found: dict[str, list[AtKL]] = {name: [] for name in records}
        start: float | None = guess
        for i, budget in enumerate(budgets):
            alpha = solve_alpha(lambda a: self.kl(vectors, a), budget, curve, start)
            for name in records:
                change = [] if alpha is None else self.change(vectors, alpha, name).tolist()
                found[name].append(AtKL(budget, alpha, [round(x, 4) for x in change]))
            factor = growth[i] if i < len(growth) else None
            start = None if alpha is None or factor is None else alpha * factor
        return found, curve


def text_batch(model: Any, rows: Sequence[Sequence[int]], every: int = EVERY) -> Batch:
    """Texts with every ``every``-th of their tokens to be predicted."""
    targets = [(r, p, ids[p + 1], 1.0, r) for r, ids in enumerate(rows) for p in range(1, len(ids) - 1, every)]
    halves = [max(1, len(ids) // 2) for ids in rows]
    return batch_of(model, rows, list(range(len(rows))), halves, targets, (len(rows) + 1) // 2)


def solve_alpha(
    measure: Callable[[float], float], budget: float, curve: list[tuple[float, float]], guess: float | None
) -> float | None:
    """The alpha at which ``measure`` (a KL that grows about as alpha squared) reaches a budget.

    Args:
        measure: alpha -> KL.
        budget: the KL wanted.
        curve: ``(alpha, KL)`` measured so far, in the order of alpha; receives the new ones.
        guess: where to measure first; ``None`` to go on from the points that there are.

    Returns:
        alpha, or ``None`` if the budget is not reached below ``LARGEST_ALPHA``.
    """
    for _ in range(7):
        alpha, distance = _from_nearest(curve, budget)
        if distance < math.log(NEAR_TWO if len(curve) > 1 else NEAR_ONE):
            return alpha
        if guess is not None:
            alpha, guess = guess, None
        if alpha > LARGEST_ALPHA and curve and max(a for a, _ in curve) >= LARGEST_ALPHA:
            return None
        alpha = min(alpha, LARGEST_ALPHA)
        curve.append((alpha, measure(alpha)))
        curve.sort()
    alpha, distance = _from_nearest(curve, budget)
    return alpha if distance < math.log(2.0) else None


def _from_nearest(curve: list[tuple[float, float]], budget: float) -> tuple[float, float]:
    """The next alpha by a power law through the two points nearest to the budget, and the nearest's distance in log KL."""
    usable = [(a, k) for a, k in curve if k > 1e-7 and math.isfinite(k)]
    if not usable:
        blown_up = any(not math.isfinite(k) for _, k in curve)
        return (curve[0][0] / 10 if blown_up else 4 * curve[-1][0]) if curve else 0.1, math.inf
    order = sorted(usable, key=lambda p: abs(math.log(p[1] / budget)))
    (a, k), power = order[0], 2.0
    if len(order) > 1 and order[1][0] != a and order[1][1] != k:
        power = math.log(order[1][1] / k) / math.log(order[1][0] / a)
        power = min(max(power, 0.7), 4.0)
    return a * (budget / k) ** (1 / power), abs(math.log(k / budget))
