"""What stands in for a masked token: one vector for text, something of the image itself for its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl.hooks.mask import ImageMasker, Mask, Masker, mask_hook, replacement_embedding
from grains_tl.inference.batches import image_inputs, pad_rows
from grains_tl.models.running import attribution_point, embed_tokens, hooked, run_blocks
from grains_tl.tokens.images import ImageInputs, blurred
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.patches import ImageSpan
from grains_tl.types import FwdHooks, HookedModel


@dataclass(frozen=True)
class Replacements:
    """Stand-ins for the prompt tokens of some records, at the attribution point.

    Attributes:
        text: ``[d_model]``, for every text token.
        prompts: per record the different stand-ins ``[kind, d_model]`` and which one each position gets ``[pos]`` (small:
            a prompt may have thousands of patches); ``None`` for a record without image.
        originals: per record the unmasked embeddings, where neighbours are to be looked up.
        spans: per record the patch grids.
    """

    text: Float[Tensor, "d_model"]
    prompts: tuple[tuple[Tensor, Tensor] | None, ...]
    originals: tuple[Tensor | None, ...]
    spans: tuple[tuple[ImageSpan, ...], ...]

    def rows(
        self,
        owner: Sequence[int],
        offset: Int[Tensor, "batch"],
        like: Int[Tensor, "batch pos"],
        masked: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "*position d_model"]:
        """Stand-ins for the rows of a batch: ``[d_model]`` without images, else ``[batch, pos, d_model]``.

        Args:
            owner: which record each row belongs to.
            offset: ``[batch]`` padding before each row.
            like: ``[batch, pos]`` ids, for shape and device.
            masked: the prompt positions that will be masked in each row (neighbours are taken among the others).
        """
        if all(self.prompts[record] is None for record in owner):
            return self.text.to(like.device)
        out = self.text.to(like.device).expand(*like.shape, -1).clone()
        masked = [()] * len(owner) if masked is None else masked
        for row, (record, hidden, start) in enumerate(zip(owner, masked, offset.tolist(), strict=True)):
            if self.prompts[record] is not None:
                prompt = self._with_neighbours(record, self.of(record), hidden)
                out[row, start : start + len(prompt)] = prompt.to(out)
        return out

    def of(self, record: int) -> Float[Tensor, "*position d_model"]:
        """Stand-ins of one record on the CPU: ``[d_model]``, or ``[pos, d_model]`` with an image."""
        found = self.prompts[record]
        if found is None:
            return self.text.cpu()
        kinds, which = found
        return kinds[which]

    def _with_neighbours(
        self, record: int, prompt: Float[Tensor, "pos d_model"], masked: Sequence[int]
    ) -> Float[Tensor, "pos d_model"]:
        original = self.originals[record]
        if original is None:
            return prompt
        prompt, hidden = prompt.clone(), torch.tensor([p in set(masked) for p in range(len(prompt))])
        for span in self.spans[record]:
            places = span.positions
            seen = (~hidden[places]).nonzero()
            for row, col in hidden[places].nonzero().tolist() if len(seen) else ():
                distance = (seen - torch.tensor([row, col])).abs().sum(-1)
                near = seen[distance == distance.min()]
                prompt[places[row, col]] = original[places[near[:, 0], near[:, 1]]].mean(0)
        return prompt


def replacements(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    mask: Mask | Masker = "mean_embedding",
) -> Replacements:
    """Stand-ins for all prompt tokens of some records.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        mask: what stands in (any but ``"attention"``). Row separators and other image tokens outside the grids get zeros.

    Raises:
        ValueError: an unknown mask.
    """
    mask = Mask.of(mask)
    text = replacement_embedding(model, mask.text)
    prompts: list[tuple[Tensor, Tensor] | None] = []
    originals: list[Tensor | None] = []
    for pair in tokenized:
        if pair.images is None:
            prompts.append(None)
            originals.append(None)
            continue
        found = prompt_embeddings(model, pair)
        prompts.append(_stand_ins(model, pair, pair.images, found, text.cpu(), mask.image))
        originals.append(found if mask.image == "neighbour_patch" else None)
    spans = tuple(() if pair.images is None else pair.images.spans for pair in tokenized)
    return Replacements(text, tuple(prompts), tuple(originals), spans)


def hide(
    model: HookedModel,
    stand_ins: Replacements | None,
    owner: Sequence[int],
    masked: Sequence[Sequence[int]],
    *,
    offset: Int[Tensor, "batch"],
    like: Int[Tensor, "batch pos"],
) -> FwdHooks:
    """Hooks that take prompt positions out of the rows of a batch.

    Args:
        model: gives the hook points.
        stand_ins: what comes in their place; ``None`` to knock them out of attention.
        owner: for each row, the record it shows.
        masked: for each row, the prompt positions to hide.
        offset: ``[batch]`` padding before each row.
        like: ``[batch, pos]`` token ids; gives shape and device.
    """
    hidden = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for row, (positions, start) in enumerate(zip(masked, offset.tolist(), strict=True)):
        hidden[row, [start + p for p in positions]] = True
    if not bool(hidden.any()):
        return []
    if stand_ins is None:
        return mask_hook(model, hidden, "attention")
    return mask_hook(model, hidden, replacement=stand_ins.rows(owner, offset, like, masked))


def prompt_embeddings(
    model: HookedModel, pair: TokenizedPair, images: ImageInputs | None = None
) -> Float[Tensor, "pos d_model"]:
    """The prompt at the attribution point, on the CPU: token embeddings, with image features merged in.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pair: the record.
        images: other images in place of the record's own (of the same shape).
    """
    ids, mask, offset = pad_rows(model, [pair.prompt])
    if attribution_point(model) == "hook_embed":
        return embed_tokens(model, ids)[0].float().cpu()
    found: list[Tensor] = []

    def keep(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        found.append(act.detach()[0].float().cpu())

    inputs = image_inputs(model, [pair.images if images is None else images], ids, offset)
    with torch.no_grad(), hooked(model, [(attribution_point(model), keep)]):
        run_blocks(model, ids, mask, 1, inputs)
    return found[0]


def _stand_ins(
    model: HookedModel,
    pair: TokenizedPair,
    images: ImageInputs,
    found: Float[Tensor, "pos d_model"],
    text: Float[Tensor, "d_model"],
    how: ImageMasker,
) -> tuple[Float[Tensor, "kind d_model"], Int[Tensor, "pos"]]:
    kinds = [text.float()[None], torch.zeros(1, len(text))]
    which = torch.tensor(pair.is_image).long()
    patches = sorted(images.patches)
    if how == "blurred_image":
        kinds.append(prompt_embeddings(model, pair, blurred(model, images))[patches])
        which[patches] = 2 + torch.arange(len(patches))
    elif how in ("mean_patch", "neighbour_patch"):
        for image in sorted({span.image for span in images.spans}):
            places = [p for s in images.spans if s.image == image for p in s.positions.flatten().tolist()]
            which[places] = len(kinds)
            kinds.append(found[places].mean(0, keepdim=True))
    elif how != "zero":
        raise NotImplementedError(f"image mask {how!r} is not known")
    return torch.cat(kinds), which
