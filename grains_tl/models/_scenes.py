"""Scenes of real handwritten digits, and what can be said about them: captions, questions, answers.

A scene is a 2 x 2 grid of 16 x 16 cells; some cells hold a digit of scikit-learn's ``load_digits``, tinted. The last
quarter of those digits (other writers) is never trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.models._scene_grid import CELLS, COLOURS, N_TRAIN, SceneRule, Split, draw_pictures, draw_values

Kind = Literal["exist", "colour", "position", "count", "caption"]


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
