"""Runs of one prompt that are alike up to some token: what they have in common runs through the model once.

A run that changes a prompt from some token on is a branch: the prompt from there, then both responses. What comes before is
taken from the keys and values of one plain run of the prompt. Rows of equal length hold several branches of one record.
Every token keeps its own position and sees what it would see alone: the prompt up to where its branch leaves it, its branch
before it, and of the responses its own. That is exact for models whose only path between positions is causal attention with
a mask and position ids from outside; for all others a check against the plain run decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl.inference.batches import Batch, batch_of, by_token_budget, scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import Objective, token_weights
from grains_tl.models.precision import agrees
from grains_tl.models.prompt_cache import PromptCache
from grains_tl.models.running import is_bridge
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel

#: Sharing pays if it leaves out this share of the tokens.
WORTH = 0.2


class Branch(NamedTuple):
    """One run: its number, its record, the prompt positions taken out, and the first position that it has for itself."""

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
    """Tokens of a row."""
    return sum(branch_length(tokenized[one.record], one.start) for one in row)


def rows_of(tokenized: Sequence[TokenizedPair], branches: Sequence[Branch]) -> list[list[Branch]]:
    """The branches of each record in rows of nearly equal length, about that of the longest of all branches.

    Short rows keep attention small; rows of equal length need no padding.
    """
    length = {one: branch_length(tokenized[one.record], one.start) for one in branches}
    longest = max(length.values(), default=0)
    rows: list[list[Branch]] = []
    for record in sorted({one.record for one in branches}):
        own: dict[Branch, int] = {one: length[one] for one in branches if one.record == record}
        # a few tokens more in a row may save a whole row
        ways = [_filled(own, longest + more) for more in range(0, longest // 8 + 2, ceil(longest / 64))]
        padded = [len(way) * max(row_length(tokenized, row) for row in way) for way in ways]
        rows += ways[padded.index(min(padded))]
    return rows


def _filled(lengths: Mapping[Branch, int], longest: int) -> list[list[Branch]]:
    """Branches, longest first, each in the first row where it fits."""
    rows: list[list[Branch]] = []
    free: list[int] = []
    for one in sorted(lengths, key=lambda one: -lengths[one]):
        place = next((i for i, tokens in enumerate(free) if tokens >= lengths[one]), None)
        if place is None:
            rows.append([one])
            free.append(longest - lengths[one])
        else:
            rows[place].append(one)
            free[place] -= lengths[one]
    return rows


def shared_batches(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    rows: Sequence[Sequence[Branch]],
    objective: Objective,
    max_tokens: int | None = None,
    prompts: PromptCache | None = None,
) -> Iterator[tuple[list[int], Batch, Bool[Tensor, "batch pos"]]]:
    """Rows in batches under a token budget.

    Args:
        model: a bridge.
        tokenized: the records.
        rows: branches of one record each.
        objective: how response tokens are combined.
        max_tokens: budget of a batch, default that of the settings in force.
        prompts: what the branches' prompts left behind; not needed if all branches start at 0.

    Yields:
        ``(runs, batch, hidden)``: "record" i of the batch is run ``runs[i]``; ``hidden`` is True at tokens taken out.
    """
    for group in by_token_budget([row_length(tokenized, row) for row in rows], max_tokens=max_tokens):
        yield _batch(model, tokenized, [rows[i] for i in group], objective, prompts)


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
    """A token of a row: id, position, branch, response (-1 is the prompt), where its branch begins, taken out."""

    id: int
    pos: int
    branch: int
    response: int
    start: int
    hidden: bool


def _batch(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    rows: Sequence[Sequence[Branch]],
    objective: Objective,
    prompts: PromptCache | None = None,
) -> tuple[list[int], Batch, Bool[Tensor, "batch pos"]]:
    table: list[list[_Token]] = []
    targets: list[tuple[int, int, int, float, int]] = []
    runs: list[int] = []
    for branches in rows:
        pair = tokenized[branches[0].record]
        prompt, n = pair.prompt, len(pair.prompt)
        weights = token_weights(pair.chosen, pair.rejected, objective)
        row: list[_Token] = []
        for number, (run, _, gone, start) in enumerate(branches):
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
    pos, of_branch, of_response, starts, hidden = columns[..., 1:].unbind(-1)
    sees, before = _sees(pos, of_branch, of_response), int(starts.max())
    inputs: dict[str, Any] = {"position_ids": pos}
    if before:
        assert prompts is not None
        earlier = torch.arange(before, device=pos.device) < starts[..., None]
        sees = torch.cat([earlier, sees], dim=-1)
        inputs |= {"past_key_values": prompts.rows([row[0].record for row in rows], before), "use_cache": True}
    inputs["attention_mask"] = _mask(sees, next(model.parameters()).dtype)
    return runs, replace(batch, inputs=inputs), hidden.bool()


def _sees(
    pos: Int[Tensor, "batch pos"], of_branch: Int[Tensor, "batch pos"], response: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos pos"]:
    """``[batch, query, key]``, within a row."""
    earlier = pos[:, None, :] <= pos[:, :, None]
    own = of_branch[:, None, :] == of_branch[:, :, None]
    return earlier & own & ((response[:, None, :] < 0) | (response[:, None, :] == response[:, :, None]))


def _mask(sees: Bool[Tensor, "batch query key"], dtype: torch.dtype) -> Float[Tensor, "batch 1 query key"]:
    """Added to attention scores, as Hugging Face models take it."""
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=sees.device)
    return torch.where(sees, torch.zeros((), dtype=dtype, device=sees.device), hidden)[:, None]
