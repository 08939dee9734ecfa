"""Runs of one prompt that are alike up to some token, in one row: what they have in common runs through the model once.

A row holds a trunk, the prompt's unchanged beginning, and branches: the prompt from a run's first changed token on, then
both responses. Every token keeps its own position and sees what it would see alone: the trunk up to where its branch
leaves it, its branch before it, and of the responses its own. That is exact for models whose only path between positions
is causal attention with a mask and position ids from outside; for all others a check against the plain run decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl.inference.batches import Batch, batch_of, by_token_budget, scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import Objective, token_weights
from grains_tl.models.precision import agrees
from grains_tl.models.running import is_bridge
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: Longest row, in tokens: attention looks at every pair of tokens of a row, so long rows lose what sharing gains.
ROW = 192

#: Sharing pays if it leaves out this share of the tokens (wider rows cost more attention).
WORTH = 0.2


class Branch(NamedTuple):
    """One run: its number, its record, the prompt positions taken out, and the first of them (where it leaves the trunk)."""

    run: int
    record: int
    gone: tuple[int, ...]
    start: int


def can_share(model: HookedModel, tokenized: Sequence[TokenizedPair]) -> bool:
    """Whether rows may be tried at all: a bridge takes masks and position ids; images have positions of their own."""
    text = not getattr(model.cfg, "is_multimodal", False) and all(t.images is None for t in tokenized)
    return is_bridge(model) and text


def branch(run: int, record: int, pair: TokenizedPair, gone: Sequence[int]) -> Branch:
    """A run as a branch; every branch has the prompt's last token, which predicts the responses, for itself."""
    return Branch(run, record, tuple(gone), min([*gone, len(pair.prompt) - 1]))


def branch_length(pair: TokenizedPair, start: int) -> int:
    """Tokens of a branch: the rest of the prompt, and the responses."""
    return len(pair.prompt) - start + sum(len(ids) - len(pair.prompt) for ids in pair.inputs)


def row_length(tokenized: Sequence[TokenizedPair], row: Sequence[Branch]) -> int:
    """Tokens of a row: the trunk of its first branch, which leaves it last, and the branches."""
    return row[0].start + sum(branch_length(tokenized[one.record], one.start) for one in row)


def rows_of(tokenized: Sequence[TokenizedPair], branches: Sequence[Branch], longest: int = ROW) -> list[list[Branch]]:
    """The branches of each record in rows of about equal length, at most about ``longest`` tokens.

    Branches that leave the trunk late stand together, so that the other rows have short trunks.
    """
    rows = []
    for record in sorted({one.record for one in branches}):
        own = sorted((one for one in branches if one.record == record), key=lambda one: -one.start)
        ends = list(accumulate(branch_length(tokenized[record], one.start) for one in own))
        n_rows = ceil((own[0].start + ends[-1]) / longest)
        for _, row in groupby(zip(own, ends, strict=True), key=lambda pair: ceil(pair[1] * n_rows / ends[-1])):
            rows.append([one for one, _ in row])
    return rows


def shared_batches(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    rows: Sequence[Sequence[Branch]],
    objective: Objective,
    max_tokens: int | None = None,
) -> Iterator[tuple[list[int], Batch, Bool[Tensor, "batch pos"]]]:
    """Rows in batches under a token budget.

    Yields:
        ``(runs, batch, hidden)``: "record" i of the batch is run ``runs[i]``; ``hidden`` is True at tokens taken out.
    """
    for group in by_token_budget([row_length(tokenized, row) for row in rows], max_tokens=max_tokens):
        yield _batch(model, tokenized, [rows[i] for i in group], objective)


def shares_prompts(model: HookedModel, tokenized: Sequence[TokenizedPair], objective: Objective) -> bool:
    """Whether both responses after one prompt in one row save enough, and give what two rows give (tried on one record)."""
    if not can_share(model, tokenized):
        return False
    plain = sum(sum(map(len, t.inputs)) for t in tokenized)
    shared = sum(branch_length(t, 0) for t in tokenized)
    if shared > 0.95 * plain:  # the trial costs about one record of one step
        return False
    longest = max((t for t in tokenized if len(t.inputs) > 1), key=lambda t: t.longest)
    try:
        with torch.no_grad():
            wanted = batch_logprobs(model, scoring_batch(model, [longest], objective))
            found = batch_logprobs(model, _batch(model, [longest], [[Branch(0, 0, (), 0)]], objective)[1])
    except MODEL_ERRORS as error:  # an architecture that takes no such mask or positions
        require_from_outside(error)
        return False
    return agrees(model, found, wanted)


def prompt_batches(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    runs: Sequence[int],
    objective: Objective,
    max_tokens: int | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """``field.run_batches`` with one row per run: its prompt, then both responses."""
    rows = [[Branch(i, record, (), 0)] for i, record in enumerate(runs)]
    for part, batch, _ in shared_batches(model, tokenized, rows, objective, max_tokens):
        yield part, batch


class _Token(NamedTuple):
    """A token of a row: id, position, branch (0 is the trunk), response (-1 is the prompt), trunk tokens seen, taken out."""

    id: int
    pos: int
    branch: int
    response: int
    trunk: int
    hidden: bool


def _batch(
    model: HookedModel, tokenized: Sequence[TokenizedPair], rows: Sequence[Sequence[Branch]], objective: Objective
) -> tuple[list[int], Batch, Bool[Tensor, "batch pos"]]:
    table: list[list[_Token]] = []
    targets: list[tuple[int, int, int, float, int]] = []
    runs: list[int] = []
    for branches in rows:
        pair = tokenized[branches[0].record]
        prompt, n = pair.prompt, len(pair.prompt)
        weights = token_weights(pair.chosen, pair.rejected, objective)
        row = [_Token(prompt[p], p, 0, -1, 0, False) for p in range(branches[0].start)]
        for number, (run, _, gone, start) in enumerate(branches, start=1):
            row += [_Token(prompt[p], p, number, -1, start, p in gone) for p in range(start, n)]
            last, begin = len(row) - 1, []  # where the prompt ends, and where each response begins
            for r, ids in enumerate(pair.inputs):
                begin.append(len(row))
                row += [_Token(token, n + i, number, r, start, False) for i, token in enumerate(ids[n:])]
            for side, (response, weight) in enumerate(zip((pair.chosen, pair.rejected), weights, strict=True)):
                first = begin[min(side, len(begin) - 1)]  # one row serves both where one begins the other
                for i, (token, w) in enumerate(zip(response, weight, strict=True)):
                    if w:
                        at = first + i - 1 if i else last
                        targets.append((len(table), at, token, w, 2 * len(runs) + side))
            runs.append(run)
        table.append(row)
    lengths = [len(tokenized[branches[0].record].prompt) for branches in rows]
    tokens = [[token.id for token in row] for row in table]
    batch = batch_of(model, tokens, range(len(rows)), lengths, targets, len(runs))
    pad = _Token(0, 0, -1, -1, 0, False)  # padding sees padding; nothing else does
    columns = torch.tensor([row + [pad] * (batch.ids.shape[1] - len(row)) for row in table], device=batch.ids.device)
    pos, of_branch, of_response, trunk, hidden = columns[..., 1:].unbind(-1)
    dtype = next(model.parameters()).dtype
    mask = _mask(_sees(pos, of_branch, of_response, trunk), dtype)
    return runs, replace(batch, inputs={"attention_mask": mask, "position_ids": pos}), hidden.bool()


def _sees(
    pos: Int[Tensor, "batch pos"],
    of_branch: Int[Tensor, "batch pos"],
    response: Int[Tensor, "batch pos"],
    trunk: Int[Tensor, "batch pos"],
) -> Bool[Tensor, "batch pos pos"]:
    """``[batch, query, key]``."""
    earlier = pos[:, None, :] <= pos[:, :, None]
    own = of_branch[:, None, :] == of_branch[:, :, None]
    own &= (response[:, None, :] < 0) | (response[:, None, :] == response[:, :, None])
    shared = (of_branch[:, None, :] == 0) & (pos[:, None, :] < trunk[:, :, None])
    return earlier & (own | shared)


def _mask(sees: Bool[Tensor, "batch pos pos"], dtype: torch.dtype) -> Float[Tensor, "batch 1 pos pos"]:
    """Added to attention scores, as Hugging Face models take it."""
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=sees.device)
    return torch.where(sees, torch.zeros((), dtype=dtype, device=sees.device), hidden)[:, None]
