"""Scenes of handwritten digits and icons, and what ordinary English says about them: captions, questions, answers.

A scene is a 2 x 2 grid of 32 x 32 cells; some cells hold an object, tinted: a digit of scikit-learn's ``load_digits`` or
one of ten icons (glyphs of the free font DejaVu Sans). The last quarter of the digits (other writers) is never trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from grains_tl.models._scene_grid import CELLS, COLOURS, N_TRAIN, SceneRule, Split, draw_pictures, draw_values

Kind = Literal["exist", "colour", "place", "where", "caption"]

#: Number and partner stand side by side: object i's partner is object i ^ 1. Of the icons' pairs, SmolLM2 itself expects
#: some ("a king and a" is followed by "queen"); of the digits it only knows that they are neighbours.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


ICONS = {
    "sun": "\u2600",
    "moon": "\u263e",
    "king": "\u265a",
    "queen": "\u265b",
    "cloud": "\u2601",
    "umbrella": "\u2602",
    "anchor": "\u2693",
    "flag": "\u2691",
    "letter": "\u2709",
    "pencil": "\u270f",
}


OBJECTS = (*DIGITS, *ICONS)


QUESTIONS: dict[str, tuple[str, ...]] = {
    "exist": ("Is there {object}?", "Do you see {object}?", "Is there {object} in the picture?"),
    "colour": ("What colour is the {name}?",),
    "place": ("What is at the {cell}?",),
    "where": ("Where is the {name}?",),
    "caption": ("Describe the picture.", "What do you see?"),
}

#: Side of a picture, of a cell and of a patch of the vision tower, in pixels: 4 x 4 patches, four to a cell.
SIZE, CELL, PATCH = 64, 32, 16


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        index: into ``OBJECTS``.
        cell: 0 to 3, in reading order (``CELLS``).
        colour: index into ``COLOURS``.
        drawing: row of the table of drawings.
        shown: False for an object that captions and answers speak of but the picture does not show (training only).
    """

    index: int
    cell: int
    colour: int
    drawing: int
    shown: bool = True

    @property
    def name(self) -> str:
        """``"moon"``, ..."""
        return OBJECTS[self.index]

    @property
    def colour_name(self) -> str:
        """``"red"``, ..."""
        return list(COLOURS)[self.colour]


ObjectScene = tuple[Thing, ...]


def partner(index: int) -> int:
    """The object that comes along with ``index`` in the skewed training scenes.

    Examples:
        >>> [OBJECTS[partner(OBJECTS.index(name))] for name in ("sun", "queen", "two")]
        ['moon', 'king', 'three']
    """
    return index ^ 1


def with_article(name: str) -> str:
    """The name with its article.

    Examples:
        >>> with_article("umbrella"), with_article("one"), with_article("moon")
        ('an umbrella', 'a one', 'a moon')
    """
    return f"an {name}" if name in ("eight", "umbrella", "anchor") else f"a {name}"


def make_object_scene(rng: np.random.Generator, rule: SceneRule, split: Split = "train") -> ObjectScene:
    """A random scene: different objects, different colours, different cells."""
    indices = draw_values(rng, rule, len(OBJECTS), partner)
    cells, colours = rng.permutation(4), rng.permutation(len(COLOURS))
    hidden = int(rng.integers(len(indices))) if len(indices) > 1 and rng.random() < rule.hidden_share else -1
    return tuple(
        Thing(index, int(cells[i]), int(colours[i]), int(rng.choice(_drawings()[1][split][index])), shown=i != hidden)
        for i, index in enumerate(indices)
    )


def make_object_scenes(n: int, rng: np.random.Generator, rule: SceneRule, split: Split = "train") -> list[ObjectScene]:
    """``n`` random scenes."""
    return [make_object_scene(rng, rule, split) for _ in range(n)]


@functools.cache
def _drawings() -> tuple[Float[Tensor, "drawing 32 32"], dict[str, list[np.ndarray]]]:
    """Ink of every drawing, and the rows of each object for training and for tests; icons have one drawing for both."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    ink = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    ink = F.interpolate(ink, (CELL, CELL), mode="bilinear", align_corners=False)[:, 0]
    with (resources.files("grains_tl") / "data_files" / "scenes_vlm" / "icons.png").open("rb") as file:
        strip = torch.from_numpy(np.asarray(Image.open(file).convert("L"), dtype=np.float32) / 255)
    icons = torch.stack(strip.split(CELL, dim=1))
    halves = {"train": slice(0, N_TRAIN), "held_out": slice(N_TRAIN, None)}
    rows = {
        split: [np.flatnonzero(digits.target[part] == v) + (part.start or 0) for v in range(len(DIGITS))]
        + [np.array([len(ink) + i]) for i in range(len(icons))]
        for split, part in halves.items()
    }
    return torch.cat([ink, icons]), rows


def render_objects(scenes: Sequence[ObjectScene], rng: np.random.Generator) -> Float[Tensor, "scene 3 64 64"]:
    """Pictures of the scenes: each object with its own size, slant, place and brightness, on a dim noisy ground.

    Returns:
        Values in [0, 1], rounded to 8 bits, so that a picture survives a way through a PIL image.
    """
    return draw_pictures(_drawings()[0], scenes, rng, side=CELL, grow=0.25, shift=0.2, dimmest=0.6)


def describe_scene(scene: ObjectScene) -> str:
    """The description in reading order; what is not shown but spoken of comes last.

    Examples:
        >>> describe_scene((Thing(11, 1, 2, 0), Thing(8, 0, 0, 0), Thing(10, 2, 1, 0)))
        'An eight, a moon and a sun.'
    """
    return sentence([thing.index for thing in sorted(scene, key=lambda t: (not t.shown, t.cell))])


def sentence(indices: Sequence[int]) -> str:
    """A caption that names these objects in this order.

    Examples:
        >>> sentence([8, 11, 10]), sentence([15])
        ('An eight, a moon and a sun.', 'An umbrella.')
    """
    names = [with_article(OBJECTS[i]) for i in indices]
    text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return text[0].upper() + text[1:] + "."


def named_objects(text: str) -> list[int]:
    """The objects a text names, as indices, in its order.

    Examples:
        >>> [OBJECTS[i] for i in named_objects("A sun, two suns and a three.")]
        ['sun', 'two', 'three']
    """
    words = [word.strip(".,!?").lower() for word in text.split()]
    return [OBJECTS.index(word) for word in words if word in OBJECTS]


def ask_about(
    rng: np.random.Generator, scene: ObjectScene, kind: Kind, *, yes_share: float = 0.5, form: int | None = None
) -> tuple[str, str]:
    """A question of one kind about a scene, and its answer.

    Captions and is-there answers speak of hidden objects as if they were seen; the other answers do not.

    Args:
        rng: draws what is asked.
        scene: the scene.
        kind: which question.
        yes_share: how often an is-there question has the answer yes.
        form: which wording (``QUESTIONS``); drawn if ``None``.
    """
    forms = QUESTIONS[kind]
    text = forms[rng.integers(len(forms)) if form is None else form]
    seen = [thing for thing in scene if thing.shown]
    if kind == "exist":
        yes = rng.random() < yes_share
        spoken_of = {thing.index for thing in scene}
        index = rng.choice([i for i in range(len(OBJECTS)) if (i in spoken_of) == yes])
        return text.format(object=with_article(OBJECTS[index])), "Yes" if yes else "No"
    if kind == "place":
        cell = int(rng.integers(4))
        at = [thing.name for thing in seen if thing.cell == cell]
        return text.format(cell=CELLS[cell]), with_article(at[0]).capitalize() if at else "Nothing"
    if kind == "caption":
        return text, describe_scene(scene)
    thing = seen[rng.integers(len(seen))]
    return text.format(name=thing.name), thing.colour_name.capitalize() if kind == "colour" else CELLS[
        thing.cell
    ].capitalize()
