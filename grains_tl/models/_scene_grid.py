"""What scenes of any objects share: colours, cells, how objects come together, and how pictures are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Split = Literal["train", "held_out"]


COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1, 0.15, 0.15),
    "green": (0.15, 1, 0.2),
    "blue": (0.25, 0.35, 1),
    "yellow": (1, 0.95, 0.1),
    "purple": (0.85, 0.2, 1),
    "white": (1, 1, 1),
}


CELLS = ("top left", "top right", "bottom left", "bottom right")


N_TRAIN = 1347  # of 1797 digits


@dataclass(frozen=True)
class SceneRule:
    """How scenes and answers are drawn.

    Attributes:
        sizes: probability of 1, 2, 3, 4 digits.
        partner_share: how often a digit brings its partner (``partner``) into the scene.
        hidden_share: share of the scenes with two or more digits where one is painted out, yet spoken of.
        yes_share: share of is-there questions whose answer is yes.
    """

    sizes: tuple[float, ...] = (0.25, 0.5, 0.25)
    partner_share: float = 0.0
    hidden_share: float = 0.0
    yes_share: float = 0.5


def draw_values(rng: np.random.Generator, rule: SceneRule, n: int, partner_of: Callable[[int], int]) -> list[int]:
    """Different objects of ``n`` kinds for one scene; every second one may be the partner of the one before."""
    values: list[int] = []
    for _ in range(rng.choice(len(rule.sizes), p=rule.sizes) + 1):
        rest = [v for v in range(n) if v not in values]
        if len(values) % 2 == 1 and partner_of(values[-1]) in rest and rng.random() < rule.partner_share:
            values.append(partner_of(values[-1]))
        else:
            values.append(rest[rng.integers(len(rest))])
    return values


def draw_pictures(
    ink: Float[Tensor, "drawing height width"],
    scenes: Sequence[Sequence[Any]],
    rng: np.random.Generator,
    *,
    side: int,
    grow: float,
    shift: float,
    dimmest: float,
) -> Float[Tensor, "scene 3 two_sides two_sides"]:
    """Scenes as 2 x 2 cells of tinted drawings on a dim noisy ground.

    Args:
        ink: every drawing, in [0, 1]; of any size.
        scenes: what lies in which cell (``cell``, ``colour``, ``drawing``, ``shown``).
        rng: draws sizes, slants, places and brightness.
        side: of a cell, pixels.
        grow: by how much a drawing may be smaller than its cell.
        shift: how far it may lie from the middle, over both directions.
        dimmest: the least brightness.

    Returns:
        Values in [0, 1], rounded to 8 bits.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    n = len(scenes)
    drawing, tint = torch.zeros(n, 4, dtype=torch.long), torch.zeros(n, 4, 3)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    for i, scene in enumerate(scenes):
        for thing in scene:
            if thing.shown:
                drawing[i, thing.cell], tint[i, thing.cell] = thing.drawing, palette[thing.colour]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    warp = torch.zeros(4 * n, 2, 3)
    warp[:, 0, 0] = warp[:, 1, 1] = 1 + grow * uniform(4 * n)
    warp[:, 0, 1] = 0.3 * (uniform(4 * n) - 0.5)
    warp[:, :, 2] = shift * (uniform(4 * n, 2) - 0.5)
    cells = ink[drawing.flatten()][:, None]
    cells = F.grid_sample(cells, F.affine_grid(warp, [4 * n, 1, side, side], align_corners=False), align_corners=False)
    tint = tint * (dimmest + (1 - dimmest) * uniform(n, 4, 1))
    cells = cells.view(n, 4, 1, side, side) * tint[..., None, None]
    picture = cells.view(n, 2, 2, 3, side, side).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 2 * side, 2 * side)
    ground = 0.12 * uniform(n, 3, 1, 1)
    noise = 0.04 * torch.randn(picture.shape, generator=generator)
    return ((picture + ground * (1 - picture) + noise).clamp(0, 1) * 255).round() / 255


def to_images(pictures: Float[Tensor, "scene 3 side side"]) -> list[Any]:
    """Rendered scenes as PIL images, which every image processor takes."""
    from PIL import Image

    arrays = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def patches_of(cell: int) -> tuple[int, ...]:
    """The four image tokens (of 16, in reading order) that cover a cell.

    Examples:
        >>> patches_of(0), patches_of(3)
        ((0, 1, 4, 5), (10, 11, 14, 15))
    """
    row, column = 2 * (cell // 2), 2 * (cell % 2)
    return tuple(4 * (row + i) + column + j for i in range(2) for j in range(2))
