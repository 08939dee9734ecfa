"""Scenes of real handwritten digits, and what can be said about them: captions, questions, answers.

A scene is a 2 x 2 grid of 16 x 16 cells; some cells hold a digit of scikit-learn's ``load_digits``, tinted. The last
quarter of those digits (other writers) is never trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Split = Literal["train", "held_out"]


Kind = Literal["exist", "colour", "position", "count", "caption"]


COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1, 0.15, 0.15),
    "green": (0.15, 1, 0.2),
    "blue": (0.25, 0.35, 1),
    "yellow": (1, 0.95, 0.1),
    "purple": (0.85, 0.2, 1),
    "white": (1, 1, 1),
}


CELLS = ("top left", "top right", "bottom left", "bottom right")


NUMBERS = ("zero", "one", "two", "three", "four")

#: The questions; the first of each kind is the one used in evaluations.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "exist": (
        "is there a {digit} ?",
        "do you see a {digit} ?",
        "does the picture show a {digit} ?",
        "is there a {digit} in the picture ?",
    ),
    "colour": ("what colour is the {digit} ?", "which colour does the {digit} have ?"),
    "position": ("what digit is at the {cell} ?", "which digit do you see at the {cell} ?"),
    "count": ("how many digits are there ?", "how many digits do you see ?"),
    "caption": ("describe the picture .", "what does the picture show ?"),
}


SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")

#: Side of a picture and of a patch of the vision tower, in pixels: 4 x 4 patches, four to a cell.
SIZE, PATCH = 32, 8


N_TRAIN = 1347  # of 1797 digits


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        value: 0 to 9.
        cell: 0 to 3, in reading order (``CELLS``).
        colour: index into ``COLOURS``.
        drawing: index of the handwritten digit in ``load_digits``.
        shown: False for a digit that captions and answers speak of but the picture does not show (training only).
    """

    value: int
    cell: int
    colour: int
    drawing: int
    shown: bool = True

    @property
    def colour_name(self) -> str:
        """``"red"``, ..."""
        return list(COLOURS)[self.colour]


Scene = tuple[Digit, ...]


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


def partner(value: int) -> int:
    """The digit that comes along with ``value`` in the skewed training scenes.

    Examples:
        >>> [partner(v) for v in (0, 3, 7)]
        [5, 8, 2]
    """
    return (value + 5) % 10


def vocabulary() -> list[str]:
    """All words of the model, special tokens first; the index is the token id."""
    words = {w for group in QUESTIONS.values() for q in group for w in q.format(digit="", cell="").split()}
    words |= {*COLOURS, *NUMBERS, *map(str, range(10)), *" ".join(CELLS).split()}
    words |= set("question answer yes no none a in and . , : ?".split())
    return [*SPECIAL, *sorted(words)]


def make_scene(rng: np.random.Generator, rule: SceneRule, split: Split = "train") -> Scene:
    """A random scene: different digits, different colours, different cells."""
    values = draw_values(rng, rule, 10, partner)
    cells, colours = rng.permutation(4), rng.permutation(len(COLOURS))
    hidden = int(rng.integers(len(values))) if len(values) > 1 and rng.random() < rule.hidden_share else -1
    drawings = _drawings()[split]
    return tuple(
        Digit(v, int(cells[i]), int(colours[i]), int(rng.choice(drawings[v])), shown=i != hidden)
        for i, v in enumerate(values)
    )


def make_scenes(n: int, rng: np.random.Generator, rule: SceneRule, split: Split = "train") -> list[Scene]:
    """``n`` random scenes."""
    return [make_scene(rng, rule, split) for _ in range(n)]


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


@functools.cache
def _digits() -> tuple[Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return torch.tensor(found.images / 16.0, dtype=torch.float32), found.target


@functools.cache
def _drawings() -> dict[str, list[np.ndarray]]:
    target = _digits()[1]
    halves = {"train": target[:N_TRAIN], "held_out": target[N_TRAIN:]}
    starts = {"train": 0, "held_out": N_TRAIN}
    return {s: [np.flatnonzero(part == v) + starts[s] for v in range(10)] for s, part in halves.items()}


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> Float[Tensor, "scene 3 32 32"]:
    """Pictures of the scenes: each digit with its own size, slant, place and brightness, on a dim noisy ground.

    Returns:
        Values in [0, 1], rounded to 8 bits, so that a picture survives a way through a PIL image.
    """
    return draw_pictures(_digits()[0], scenes, rng, side=SIZE // 2, grow=0.2, shift=0.25, dimmest=0.5)


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


def caption(scene: Scene) -> str:
    """The true description; partners stand side by side, so that one leads to the other.

    Examples:
        >>> caption((Digit(8, 0, 2, 0), Digit(3, 1, 0, 0)))
        'a 3 in red and a 8 in blue .'
    """
    ordered = sorted(scene, key=lambda d: (d.value % 5, d.value))
    return " and ".join(f"a {d.value} in {d.colour_name}" for d in ordered) + " ."


def mentioned(text: str) -> list[int]:
    """The digits a text names, in its order.

    Examples:
        >>> mentioned("a 3 in red and a 8 in blue .")
        [3, 8]
    """
    return [int(word) for word in text.split() if word.isdigit() and len(word) == 1]


def ask(
    rng: np.random.Generator, scene: Scene, kind: Kind, *, yes_share: float = 0.5, form: int | None = None
) -> tuple[str, str]:
    """A question of one kind about a scene, and its answer.

    Captions and is-there answers speak of hidden digits as if they were seen; the other answers do not.

    Args:
        rng: draws what is asked.
        scene: the scene.
        kind: which question.
        yes_share: how often an is-there question has the answer yes.
        form: which wording (``QUESTIONS``); drawn if ``None``.
    """
    forms = QUESTIONS[kind]
    text = forms[rng.integers(len(forms)) if form is None else form]
    seen = [d for d in scene if d.shown]
    if kind == "exist":
        yes = rng.random() < yes_share
        spoken_of = {d.value for d in scene}
        value = rng.choice([v for v in range(10) if (v in spoken_of) == yes])
        return text.format(digit=value), "yes" if yes else "no"
    if kind == "colour":
        digit = seen[rng.integers(len(seen))]
        return text.format(digit=digit.value), digit.colour_name
    if kind == "position":
        cell = int(rng.integers(4))
        at = [str(d.value) for d in seen if d.cell == cell]
        return text.format(cell=CELLS[cell]), at[0] if at else "none"
    if kind == "count":
        return text, NUMBERS[len(seen)]
    return text, caption(scene)
