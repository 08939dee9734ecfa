"""Deletion and insertion: f while the prompt's tokens go, or come back, in the order of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import finite, listed
from grains_tl.attribution.removal import Removal, values_without
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.objectives import Objective
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel

#: Shares of the content tokens at which the curves are read.
SHARES = (0.1, 0.2, 0.35, 0.5, 0.75)


@dataclass(frozen=True)
class Curves:
    """f of every record with part of its content tokens, nats.

    Tokens are ordered by their signed score, the one that pushes most towards ``chosen`` first.

    Attributes:
        shares: ``[step]`` from 0 to 1.
        deleted: ``[record, step]`` f without the first ``share`` of the tokens.
        inserted: ``[record, step]`` f with only the first ``share`` of them.

    Examples:
        >>> c = Curves(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.5, 2.0]]))
        >>> c.deletion_area, c.insertion_area
        (tensor([1.]), tensor([1.2500]))
    """

    shares: Float[Tensor, "step"]
    deleted: Float[Tensor, "record step"]
    inserted: Float[Tensor, "record step"]

    @property
    def deletion_area(self) -> Float[Tensor, "record"]:
        """How far f falls on average while tokens go: larger is more faithful."""
        return torch.trapezoid(self.deleted[:, :1] - self.deleted, self.shares, dim=-1)

    @property
    def insertion_area(self) -> Float[Tensor, "record"]:
        """How far f rises on average while tokens come back: larger is more faithful."""
        return torch.trapezoid(self.inserted - self.inserted[:, :1], self.shares, dim=-1)


def curves(
    model: HookedModel,
    tokenized: Records,
    attributions: Sequence[Attribution],
    *,
    shares: Sequence[float] = SHARES,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
) -> Curves:
    """Deletion and insertion curves (arXiv 1806.07421) of one method's scores.

    Areas are in nats and are not divided by f(x) - f(nothing), which is often near zero for a contrastive objective.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        attributions: one per record; tokens without a score (NaN) count as 0.
        shares: where to read the curves, besides 0 and 1.
        objective: as in ``attribute``.
        mask: what stands in for a deleted token or patch; areas of different masks are not comparable.

    Returns:
        ``Curves``: ``[record, step]``, nats.

    Raises:
        ValueError: shares outside 0 to 1, or not one attribution of the same prompt per record.

    Examples:
        >>> found = curves(model, tokenized, attributions)     # doctest: +SKIP
        >>> found.deletion_area.mean()                         # doctest: +SKIP
        tensor(1.2311)
    """
    tokenized = as_tokenized(model, tokenized)
    _require_same(tokenized, attributions)
    shares = [finite("share", s) for s in listed("shares", shares)]
    if not shares or any(not 0 < s < 1 for s in shares):
        raise ValueError(f"shares={tuple(shares)}; expected numbers between 0 and 1 (both ends are always added)")
    steps = [0.0, *sorted(shares), 1.0]
    orders = [content_order(a) for a in attributions]
    removals: list[Removal] = []
    for record, order in enumerate(orders):
        counts = [round(s * len(order)) for s in steps]
        removals += [(record, order[:n]) for n in counts] + [(record, order[n:]) for n in counts]
    unique = sorted({(r, tuple(sorted(gone))) for r, gone in removals})
    found = values_without(model, tokenized, unique, objective=objective, mask=mask).tolist()
    value = dict(zip(unique, found, strict=True))
    values = torch.tensor([value[r, tuple(sorted(gone))] for r, gone in removals])
    table = rearrange(values, "(record way step) -> record way step", way=2, step=len(steps))
    return Curves(torch.tensor(steps), table[:, 0], table[:, 1])


def removal_table(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
) -> Float[Tensor, "3 record"]:
    """What the chosen tokens do to f, nats (ERASER's terms, arXiv 1911.03429).

    Returns:
        Row 0, comprehensiveness: f(x) - f(x without I+). Row 1: f(x without I-) - f(x). Row 2, sufficiency:
        f(x) - f(x with no other content token than I+), smaller is better.
    """
    removals: list[Removal] = [(r, ()) for r in range(len(tokenized))]
    removals += [(r, s.toward_chosen) for r, s in enumerate(selections)]
    removals += [(r, s.toward_rejected) for r, s in enumerate(selections)]
    for r, (t, s) in enumerate(zip(tokenized, selections, strict=True)):
        removals.append((r, [p for p, content in enumerate(t.content) if content and p not in s.toward_chosen]))
    f = values_without(model, tokenized, removals, objective=objective, mask=mask)
    whole, no_up, no_down, only_up = rearrange(f, "(removed record) -> removed record", removed=4)
    return torch.stack([whole - no_up, no_down - whole, whole - only_up])


def content_order(attribution: Attribution) -> list[int]:
    """Content positions, the largest score first; ties keep the prompt's order."""
    scores = attribution.scores.nan_to_num(0.0)
    return [i for i in scores.argsort(descending=True, stable=True).tolist() if attribution.content[i]]


def _require_same(tokenized: Sequence[TokenizedPair], attributions: Sequence[Attribution]) -> None:
    same = len(tokenized) == len(attributions) and all(
        len(t.prompt) == len(a.scores) for t, a in zip(tokenized, attributions, strict=True)
    )
    if not same:
        raise ValueError("expected one attribution per record, with one score for each of its prompt tokens")
