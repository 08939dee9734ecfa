"""Which prompt token shows which part of which image: grids, tiles and row separators of every vision family."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from grains_tl.models.hugging_face import tile_grid
from grains_tl.models.running import hugging_face_model
from grains_tl.types import HookedModel

#: left, top, right, bottom of a part of an image, as fractions of its width and height.
Box = tuple[float, float, float, float]


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class ImageSpan:
    """A run of image tokens that form one grid of patches.

    Attributes:
        start: prompt position of the first token.
        length: number of tokens, row separators included.
        rows: rows of the grid; a separator token after each (LLaVA-NeXT, LLaVA-OneVision) is not a patch.
        cols: columns of the grid.
        image: which of the record's images, from 0.
        tile: which grid of that image, from 0 (an overview and a high-resolution grid, or crops).
        box: the part of the image under the grid; ``None`` where it is not known.

    Examples:
        >>> ImageSpan(start=3, length=6, rows=2, cols=2, image=0, tile=1, box=WHOLE).positions
        tensor([[3, 4],
                [6, 7]])
    """

    start: int
    length: int
    rows: int
    cols: int
    image: int = 0
    tile: int = 0
    box: Box | None = WHOLE

    @property
    def positions(self) -> Int[Tensor, "row col"]:
        """Prompt position of every patch."""
        stride = self.length // self.rows
        return self.start + stride * torch.arange(self.rows)[:, None] + torch.arange(self.cols)

    def patch_box(self, row: int, col: int) -> Box | None:
        """The part of the image that one patch shows."""
        if self.box is None:
            return None
        left, top, right, bottom = self.box
        width, height = (right - left) / self.cols, (bottom - top) / self.rows
        return left + col * width, top + row * height, left + (col + 1) * width, top + (row + 1) * height


@dataclass(frozen=True)
class _Piece:
    """Consecutive image tokens that belong together; no grid (rows = 0) for lone separators."""

    length: int
    rows: int
    cols: int
    image: int
    tile: int = 0
    box: Box | None = WHOLE


def image_spans(
    model: HookedModel,
    ids: Sequence[int],
    inputs: Mapping[str, Tensor],
    sizes: Sequence[tuple[int, int]],
) -> tuple[ImageSpan, ...]:
    """The patch grids of a prompt, in order.

    Args:
        model: gives the configuration and, as ``model.processor``, how images are cropped.
        ids: the prompt with its image tokens expanded.
        inputs: the processor's image tensors.
        sizes: (width, height) of every image of the record, before processing.

    Returns:
        One ``ImageSpan`` per grid. Of a family that is not known, every run of image tokens is one span: square if it can
        be, else a single row, with ``box=None``.
    """
    image_token = image_token_id(model)
    positions = [i for i, token in enumerate(ids) if token == image_token]
    runs = _runs(positions)
    pieces = _pieces(model, ids, runs, inputs, sizes)
    if sum(piece.length for piece in pieces) != len(positions):
        pieces = [_unknown(length, number) for number, (_, length) in enumerate(runs)]
    spans, used = [], 0
    for piece in pieces:
        if piece.rows:
            spans.append(
                ImageSpan(positions[used], piece.length, piece.rows, piece.cols, piece.image, piece.tile, piece.box)
            )
        used += piece.length
    return tuple(spans)


def image_token_id(model: HookedModel) -> int:
    """Id of the token that image features replace.

    Raises:
        ValueError: the model takes no images.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise ValueError("the model takes no images (its configuration names no image token); leave the image out")


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """(first position, length) of every stretch of neighbouring positions."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs


def _pieces(
    model: HookedModel,
    ids: Sequence[int],
    runs: Sequence[tuple[int, int]],
    inputs: Mapping[str, Tensor],
    sizes: Sequence[tuple[int, int]],
) -> list[_Piece]:
    config = hugging_face_model(model).config
    family = str(getattr(config, "model_type", ""))
    if "image_grid_thw" in inputs:
        merge = int(config.vision_config.spatial_merge_size)
        return [
            _Piece(h // merge * (w // merge), h // merge, w // merge, image, frame)
            for image, (frames, h, w) in enumerate(inputs["image_grid_thw"].tolist())
            for frame in range(frames)
        ]
    if family in ("llava_next", "llava_onevision"):
        return _any_resolution(config, inputs)
    if family == "idefics3":
        return _tagged_tiles(model, ids, runs)
    if family == "gemma3":
        side = math.isqrt(int(config.mm_tokens_per_image))
        n_crops = sum(length for _, length in runs) // side**2
        if n_crops != len(sizes) and len(sizes) > 1:
            raise ValueError("pan-and-scan crops of several images cannot be told apart; give one image, or no crops")
        one_each = n_crops == len(sizes)
        return [
            _Piece(side**2, side, side, crop if one_each else 0, 0 if one_each else crop, _box(one_each or crop == 0))
            for crop in range(n_crops)
        ]
    if family == "llava":
        patch = int(config.vision_config.patch_size)
        rows, cols = (int(n) // patch for n in inputs["pixel_values"].shape[-2:])
        boxes = [_visible_part(getattr(model, "processor", None), size) for size in sizes]
        return [_Piece(rows * cols, rows, cols, image, 0, box) for image, box in enumerate(boxes)]
    return []


def _box(known: bool) -> Box | None:
    return WHOLE if known else None


def _unknown(length: int, image: int) -> _Piece:
    side = math.isqrt(length)
    rows, cols = (side, side) if side**2 == length else (1, length)
    return _Piece(length, rows, cols, image, 0, None)


def _any_resolution(config: Any, inputs: Mapping[str, Tensor]) -> list[_Piece]:
    """LLaVA-NeXT and OneVision: an overview, then one high-resolution grid without padding, a separator per row."""
    tower = config.vision_config
    side = int(tower.image_size) // int(tower.patch_size)
    single = [n == 1 for n in inputs.get("batch_num_images", torch.ones(0)).tolist() for _ in range(int(n))]
    pieces = []
    for image, size in enumerate(inputs["image_sizes"].tolist()):
        pieces.append(_Piece(side**2, side, side, image, 0))
        if single and not single[image]:  # several images of one prompt are not tiled
            pieces.append(_Piece(1, 0, 0, image))
            continue
        rows, cols = tile_grid(tuple(size), config.image_grid_pinpoints, tower.image_size, side)
        most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
        ratio = math.sqrt(rows * cols / (int(most) * side**2)) if most.isdigit() else 0.0
        if ratio > 1.1:  # OneVision shrinks grids above this number of tiles
            rows, cols = int(rows // ratio), int(cols // ratio)
        pieces.append(_Piece(rows * (cols + 1), rows, cols, image, 1))
    return pieces


def _tagged_tiles(model: HookedModel, ids: Sequence[int], runs: Sequence[tuple[int, int]]) -> list[_Piece]:
    """Idefics3: every tile follows a tag with its row and column, the overview comes last."""
    tags = []
    for start, _ in runs:
        before = model.tokenizer.decode(list(ids[max(0, start - 12) : start]))  # a tag may be several tokens
        found = re.search(r"<row_(\d+)_col_(\d+)>\s*$", before)
        tags.append((int(found[1]) - 1, int(found[2]) - 1) if found else None)
    pieces: list[_Piece] = []
    image, first = 0, 0
    for number, ((_, length), tag) in enumerate(zip(runs, tags, strict=True)):
        side = math.isqrt(length)
        if tag is None:  # the overview closes its image
            tiles = [t for t in tags[first:number] if t is not None]
            rows, cols = (1 + max((t[axis] for t in tiles), default=0) for axis in (0, 1))
            for tile, (r, c) in enumerate(tiles):
                box = (c / cols, r / rows, (c + 1) / cols, (r + 1) / rows)
                pieces.append(_Piece(runs[first + tile][1], side, side, image, tile, box))
            pieces.append(_Piece(length, side, side, image, len(tiles)))
            image, first = image + 1, number + 1
    return pieces


def _visible_part(processor: Any, size: tuple[int, int]) -> Box:
    """What a resize of the shortest edge with a centre crop, or padding to a square, leaves of an image."""
    how: Any = getattr(processor, "image_processor", None)
    width, height = size
    if getattr(how, "do_pad", False):
        x, y = ((max(size) / side - 1) / 2 for side in size)
        return -x, -y, 1 + x, 1 + y
    edge = _entry(getattr(how, "size", None), "shortest_edge")
    if not getattr(how, "do_center_crop", False) or edge is None:
        return WHOLE
    scale = edge / min(size)
    seen = [
        (_entry(how.crop_size, name) or edge) / (scale * side) for name, side in (("width", width), ("height", height))
    ]
    x, y = ((1 - part) / 2 for part in seen)
    return x, y, 1 - x, 1 - y


def _entry(sizes: Any, name: str) -> float | None:
    value = sizes.get(name) if hasattr(sizes, "get") else getattr(sizes, name, None)
    return None if value is None else float(value)
