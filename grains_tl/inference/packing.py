"""Rows without padding: several responses share their prompt, several records share a row, and none sees another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl.inference.batches import Batch

#: What each block was called with beside the residual.
BlockInputs = list[tuple[tuple[Any, ...], dict[str, Any]]]

#: Packing pays if it leaves out this share of the tokens.
WORTH = 0.03

#: Packed rows are at most this many times as long as the longest record: attention grows with the row.
WIDEST = 4


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch go, and what the blocks are called with then.

    Attributes:
        row: ``[packed, pos]``, the row that each packed token comes from.
        pos: ``[packed, pos]``, its position there.
        to_row: ``[batch, pos]``, the packed row of each token; those of a shared prompt went to one place.
        to_pos: ``[batch, pos]``, its position there.
        block_inputs: the blocks' arguments for the packed rows.
    """

    row: Int[Tensor, "packed packed_pos"]
    pos: Int[Tensor, "packed packed_pos"]
    to_row: Int[Tensor, "batch pos"]
    to_pos: Int[Tensor, "batch pos"]
    block_inputs: BlockInputs

    def pack(self, resid: Float[Tensor, "copies batch pos d_model"]) -> Float[Tensor, "rows packed_pos d_model"]:
        """Packed rows of every copy of a batch."""
        return resid[:, self.row.to(resid.device), self.pos.to(resid.device)].flatten(0, 1)

    def keeps(self, resid: Float[Tensor, "copies batch pos d_model"]) -> bool:
        """Whether nothing is lost: hooks may have told apart rows that share their prompt.

        Measured against each token's own size: the first token of many models is a thousand times larger than the rest.
        """
        row, pos, to_row, to_pos = (x.to(resid.device) for x in (self.row, self.pos, self.to_row, self.to_pos))
        real = to_pos >= 0
        back, given = resid[:, row, pos][:, to_row, to_pos][:, real], resid[:, real]
        near = (back - given).abs() <= 1e-3 * given.nan_to_num().abs().amax(-1, keepdim=True)
        return bool((near | (back == given) | (back.isnan() & given.isnan())).all())


def pack_batch(batch: Batch, block_inputs: BlockInputs) -> Packing | None:
    """Records one after another, each without the repeats of its prompt; ``None`` where that gains little.

    Nothing here knows the architecture: masks and per-position tables among the blocks' arguments are recognised by
    their shapes, and the caller checks the result against the plain run.
    """
    if bool(batch.offset.any()) or not block_inputs:
        return None
    lengths, prompts = batch.attention_mask.sum(-1).tolist(), batch.prompt_len.tolist()
    tokens: dict[int, list[tuple[int, int]]] = {}  # of each record: row and position in the batch
    first_of: dict[int, int] = {}  # record -> its first row in the batch
    place = torch.full(batch.ids.shape, -1)  # of each token among those of its record
    for r, record in enumerate(batch.record.tolist()):
        first = first_of.setdefault(record, r)
        shared = 0 if first == r else prompts[r]
        if shared and not torch.equal(batch.ids[r, :shared], batch.ids[first, :shared]):
            return None
        own = tokens.setdefault(record, [])
        begin = len(own)
        own += [(r, p) for p in range(shared, lengths[r])]
        place[r, :shared] = place[first, :shared]
        place[r, shared : lengths[r]] = torch.arange(begin, len(own))
    bins = _balanced({record: len(own) for record, own in tokens.items()})
    packed = [[token for record in records for token in tokens[record]] for records in bins]
    width = max(map(len, packed))
    if len(packed) * width > (1 - WORTH) * batch.ids.numel():
        return None
    bin_of, start_of = torch.zeros(2, max(tokens) + 1, dtype=torch.long).unbind()
    for number, records in enumerate(bins):
        begin = 0
        for record in records:
            bin_of[record], start_of[record] = number, begin
            begin += len(tokens[record])
    record = batch.record.cpu()
    to_row = torch.where(place >= 0, bin_of[record][:, None], -1)
    to_pos = torch.where(place >= 0, place + start_of[record][:, None], -1)
    device = batch.ids.device
    # padding repeats the row's last token; nothing looks at it
    index = torch.tensor([own + own[-1:] * (width - len(own)) for own in packed], device=device)
    row, pos = index.unbind(-1)
    sees = _visible(row, pos, torch.tensor([len(own) for own in packed], device=device), batch)
    inputs = [
        (tuple(_packed(v, batch, row, pos, sees) for v in args), _packed_named(kwargs, batch, row, pos, sees))
        for args, kwargs in block_inputs
    ]
    return Packing(row, pos, to_row.to(device), to_pos.to(device), inputs)


def _balanced(sizes: dict[int, int]) -> list[list[int]]:
    """Records dealt out to rows of nearly equal length, so that padding the rows to the longest wastes least."""
    longest, best, least = max(sizes.values()), [[record] for record in sizes], len(sizes) * max(sizes.values())
    for n_rows in range(len(sizes) - 1, 0, -1):
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [0] * n_rows
        for record in sorted(sizes, key=lambda i: -sizes[i]):
            shortest = filled.index(min(filled))
            rows[shortest].append(record)
            filled[shortest] += sizes[record]
        if max(filled) > WIDEST * longest:
            break
        if n_rows * max(filled) < least:
            best, least = rows, n_rows * max(filled)
    return best


def _visible(
    row: Int[Tensor, "packed pos"], pos: Int[Tensor, "packed pos"], length: Int[Tensor, "packed"], batch: Batch
) -> Bool[Tensor, "packed pos pos"]:
    """``[packed, query, key]``: earlier tokens of the query's own row, or of the prompt that its record's rows share."""
    record = batch.record[row]
    same = row[:, :, None] == row[:, None, :]
    shared = (record[:, :, None] == record[:, None, :]) & (pos[:, None, :] < batch.prompt_len[row][:, :, None])
    place = torch.arange(row.shape[1], device=row.device)
    real = place[None] < length[:, None]
    sees = (same | shared) & (pos[:, None, :] <= pos[:, :, None]) & real[:, None, :]
    return sees | torch.eye(row.shape[1], dtype=torch.bool, device=row.device)  # no query without a key


def _packed_named(kwargs: Mapping[str, Any], batch: Batch, row: Tensor, pos: Tensor, sees: Tensor) -> dict[str, Any]:
    named = {name: _packed(value, batch, row, pos, sees) for name, value in kwargs.items()}
    if "attention_mask" in named and named["attention_mask"] is None:  # plain causal attention so far
        named["attention_mask"] = sees[:, None]
    return named


def _packed(value: Any, batch: Batch, row: Tensor, pos: Tensor, sees: Tensor) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_packed(v, batch, row, pos, sees) for v in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    row, pos, sees = (x.to(value.device) for x in (row, pos, sees))
    n_rows, n_pos = batch.ids.shape
    is_mask = value.dtype == torch.bool or value.is_floating_point()
    if is_mask and value.ndim == 4 and value.shape[-2:] == (n_pos, n_pos) and value.shape[0] in (1, n_rows):
        own = row if value.shape[0] == n_rows else torch.zeros_like(row)
        # what the model's own mask says to the query's row, so that sliding windows stay as they are
        seen = value[own[:, :, None], :, pos[:, :, None], pos[:, None, :]].movedim(-1, 1)
        hidden = torch.zeros((), dtype=value.dtype) if value.dtype == torch.bool else torch.finfo(value.dtype).min
        eye = torch.eye(row.shape[1], dtype=torch.bool, device=row.device)
        kept = torch.where(sees[:, None], seen, hidden)
        return torch.where(eye, True, kept) if value.dtype == torch.bool else kept
    if value.shape[1] == n_pos and value.shape[0] in (1, n_rows):
        return value[row if value.shape[0] == n_rows else torch.zeros_like(row), pos]
    return value
