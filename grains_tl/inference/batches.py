"""Padded batches: rows of token ids and what is to be read from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grains_tl._util.settings import current
from grains_tl.inference.objectives import Objective, token_weights
from grains_tl.models.running import device_of
from grains_tl.tokens.images import ImageInputs, collate_images
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel


@dataclass(frozen=True)
class Batch:
    """Padded rows and what is to be read from them.

    One row serves both responses where one input is the beginning of the other (always so for single-token responses:
    the last token of a response is never an input).

    Attributes:
        ids: ``[batch, pos]`` token ids.
        attention_mask: ``[batch, pos]``.
        offset: ``[batch]`` padding before each row (0 when padded right).
        prompt_len: ``[batch]`` number of prompt tokens of each row.
        record: ``[batch]`` which of the given records the row belongs to.
        keep: ``[kept]`` positions whose logits are needed.
        target_row: ``[target]``, for every scored response token its row.
        target_keep: ``[target]``, its place in ``keep``.
        target_id: ``[target]``, its token id.
        target_weight: ``[target]``, its weight in the objective.
        target_slot: ``[target]``, ``2 * record + (0 chosen | 1 rejected)``.
        n_records: number of records in the batch.
        inputs: what else the model is called with: the images of all rows; for shared rows a mask and positions of their
            own, and the keys and values that they go on from (``sharing``).
    """

    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    offset: Int[Tensor, "batch"]
    prompt_len: Int[Tensor, "batch"]
    record: Int[Tensor, "batch"]
    keep: Int[Tensor, "kept"]
    target_row: Int[Tensor, "target"]
    target_keep: Int[Tensor, "target"]
    target_id: Int[Tensor, "target"]
    target_weight: Float[Tensor, "target"]
    target_slot: Int[Tensor, "target"]
    n_records: int
    inputs: dict[str, Any] = field(default_factory=dict)
    digests: tuple[str, ...] = ()

    def prompt_mask(self) -> Bool[Tensor, "batch pos"]:
        """True at the prompt's tokens."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)[None] - self.offset[:, None]
        return (position >= 0) & (position < self.prompt_len[:, None])

    def prompt_keys(self) -> list[tuple[int | str, ...]]:
        """Each row's prompt, as ``prompt_key`` names it."""
        ends, digests = (self.offset + self.prompt_len).tolist(), self.digests or [""] * len(self.ids)
        rows = zip(self.ids.tolist(), self.offset.tolist(), ends, digests, strict=True)
        return [(*row[a:b], *([digest] if digest else [])) for row, a, b, digest in rows]

    def scatter_prompt(self, per_record: Sequence[Sequence[bool]]) -> Bool[Tensor, "batch pos"]:
        """Spread one boolean per prompt token of every record over the rows."""
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, (record, offset) in enumerate(zip(self.record.tolist(), self.offset.tolist(), strict=True)):
            flags = torch.tensor(list(per_record[record]), dtype=torch.bool, device=mask.device)
            mask[row, offset : offset + len(flags)] = flags
        return mask


def scoring_batch(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    objective: Objective = "sum",
    *,
    padding_side: str = "right",
) -> Batch:
    """Rows and targets for the contrastive objective of some records.

    Args:
        model: gives the pad id and the device.
        tokenized: records; the same one may stand in the list many times (steps of a path, masked variants).
        objective: ``"sum"``, ``"mean"`` or ``"single"``, see ``objectives.token_weights``.
        padding_side: ``"right"`` (default) or ``"left"``; results agree to rounding.
    """
    rows: list[tuple[int, ...]] = []
    owner: list[int] = []
    targets: list[tuple[int, int, int, float, int]] = []  # row, position in the row, id, weight, slot
    for record, pair in enumerate(tokenized):
        inputs = pair.inputs
        weights = token_weights(pair.chosen, pair.rejected, objective)
        for side, (response, weight) in enumerate(zip((pair.chosen, pair.rejected), weights, strict=True)):
            if side < len(inputs):
                rows.append(inputs[side])
                owner.append(record)
            for i, (token, w) in enumerate(zip(response, weight, strict=True)):
                if w:
                    targets.append((len(rows) - 1, len(pair.prompt) - 1 + i, token, w, 2 * record + side))
    prompt_lens = [len(tokenized[o].prompt) for o in owner]
    images = [tokenized[o].images for o in owner]
    return batch_of(model, rows, owner, prompt_lens, targets, len(tokenized), images=images, padding_side=padding_side)


def batch_of(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    owner: Sequence[int],
    prompt_lens: Sequence[int],
    targets: Sequence[tuple[int, int, int, float, int]],
    n_records: int,
    *,
    images: Sequence[ImageInputs | None] | None = None,
    padding_side: str = "right",
) -> Batch:
    """Pad rows and put the targets in tensors.

    Args:
        model: gives the pad id and the device.
        rows: token ids.
        owner: the record of each row.
        prompt_lens: the number of prompt tokens of each row.
        targets: ``(row, position in the row, id, weight, slot)`` of each scored token.
        n_records: half the number of slots.
        images: what the processor made of the images of each row's prompt.
        padding_side: ``"right"`` or ``"left"``.
    """
    ids, mask, offset = pad_rows(model, rows, padding_side=padding_side)
    device = ids.device
    row, position, token_id, weight, slot = (torch.tensor(column) for column in zip(*targets, strict=True))
    position = position + offset.cpu()[row]
    keep, target_keep = position.unique(return_inverse=True)
    return Batch(
        ids=ids,
        attention_mask=mask,
        offset=offset,
        prompt_len=torch.tensor(prompt_lens, device=device),
        record=torch.tensor(owner, device=device),
        keep=keep.to(device),
        target_row=row.to(device),
        target_keep=target_keep.to(device),
        target_id=token_id.to(device),
        target_weight=weight.to(device),
        target_slot=slot.to(device),
        n_records=n_records,
        inputs=image_inputs(model, [None] * len(rows) if images is None else images, ids, offset),
        digests=() if images is None else tuple("" if one is None else one.digest for one in images),
    )


def prompt_key(ids: Sequence[int], images: ImageInputs | None) -> tuple[int | str, ...]:
    """What tells a prompt apart: its token ids, and behind them the digest of its images if it has some."""
    return (*ids, *([] if images is None else [images.digest]))


def text_batch(model: HookedModel, rows: Sequence[Sequence[int]]) -> Batch:
    """Texts in which every token after the first is a target.

    Slot and record are the place of the text; its first half counts as its prompt.

    Args:
        model: gives the pad id and the device.
        rows: the texts' token ids, two or more each.
    """
    targets = [(r, p, ids[p + 1], 1.0, r) for r, ids in enumerate(rows) for p in range(len(ids) - 1)]
    halves = [max(1, len(ids) // 2) for ids in rows]
    return batch_of(model, rows, list(range(len(rows))), halves, targets, (len(rows) + 1) // 2)


def image_inputs(
    model: HookedModel,
    images: Sequence[ImageInputs | None],
    ids: Int[Tensor, "batch pos"],
    offset: Int[Tensor, "batch"],
) -> dict[str, Tensor]:
    """What the model is called with besides ids and mask: the images of each row (``collate_images``)."""
    return collate_images(images, offset, ids, next(model.parameters()).dtype)


def pad_rows(
    model: HookedModel, rows: Sequence[Sequence[int]], *, padding_side: str = "right", at_least: int = 1
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch"]]:
    """Ids, attention mask and left offset of rows padded to the longest (or to ``at_least``), on the model's device."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}; expected 'left' or 'right'")
    device, pad = device_of(model), token_rules(model).pad
    longest = max(at_least, *(len(row) for row in rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    offset = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        start = longest - len(row) if padding_side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        offset[i] = start
    return ids.to(device), mask.to(device), offset.to(device)


def by_token_budget(
    lengths: Sequence[int], n_rows: Sequence[int] | None = None, *, max_tokens: int | None = None
) -> list[list[int]]:
    """Indices grouped so that every group, padded to its longest, stays under ``max_tokens``; similar lengths together.

    Args:
        lengths: length of each item's longest row.
        n_rows: rows of each item, default 1.
        max_tokens: budget of a group, default that of the settings in force; a larger item is a group of its own.

    Examples:
        >>> by_token_budget([3, 9, 4], max_tokens=10)
        [[0, 2], [1]]
    """
    budget = current().max_tokens if max_tokens is None else max_tokens
    counts = [1] * len(lengths) if n_rows is None else n_rows
    groups: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rows += counts[index]
        if groups and rows * lengths[index] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            rows = counts[index]
    return groups
