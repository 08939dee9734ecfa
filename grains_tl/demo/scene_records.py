"""Preference pairs and is-there questions about scenes, in three splits of different scenes.

``"build"`` and ``"choose"`` use the handwritten digits the model was trained on (in new scenes), ``"test"`` the held-out
ones. Scenes are clean: nothing is hidden, digits come together by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.models._scene_grid import COLOURS, SceneRule, to_images
from grains_tl.models._scenes import QUESTIONS, Digit, Scene, caption, make_scenes, mentioned, partner, render
from grains_tl.models.tiny_vlm import question_text
from grains_tl.records.pairs import PreferencePair

Part = Literal["build", "choose", "test"]


CAPTION_PROMPT = question_text(QUESTIONS["caption"][0])


def scenes_for(part: Part, n: int, *, seed: int = 0) -> tuple[list[Scene], list[Any]]:
    """``n`` clean scenes of a split, and their pictures (PIL).

    Examples:
        >>> scenes, pictures = scenes_for("test", 2)
        >>> len(scenes), pictures[0].size
        (2, (32, 32))
    """
    if part not in get_args(Part):
        raise ValueError(f"no split {part!r}; there are {get_args(Part)}")
    rng = np.random.default_rng([seed, get_args(Part).index(part)])
    scenes = make_scenes(n, rng, SceneRule(), "held_out" if part == "test" else "train")
    return scenes, to_images(render(scenes, rng))


def caption_pairs(part: Part, n: int, *, seed: int = 0, part_at: bool = True) -> list[PreferencePair]:
    """Chosen: the true caption. Rejected: the same with the absent partner of one digit added, where it would stand.

    Args:
        part: the split.
        n: number of records; scenes that show every digit's partner are drawn again.
        seed: of scenes and added digits.
        part_at: put what both captions begin with into the prompt, so that prompt and responses part where the captions
            do; otherwise the prompt is the question alone.
    """
    rng = np.random.default_rng([seed, 7])
    pairs: list[PreferencePair] = []
    for scene, picture in zip(*scenes_for(part, 2 * n + 8, seed=seed), strict=True):
        absent = _absent_partners(scene)
        if absent and len(pairs) < n:
            value = absent[rng.integers(len(absent))]
            unused = [c for c in range(len(COLOURS)) if c not in {d.colour for d in scene}]
            added = Digit(value, -1, int(rng.choice(unused)), -1, shown=False)
            pairs.append(caption_pair(scene, picture, caption((*scene, added)), part_at=part_at))
    return pairs


def caption_pair(scene: Scene, picture: Any, rejected: str, *, part_at: bool = True) -> PreferencePair:
    """The true caption of a scene against another one, such as the model's own.

    Raises:
        ValueError: the other caption is the true one.
    """
    chosen, other = caption(scene).split(), rejected.split()
    shared = 0
    while part_at and shared < min(len(chosen), len(other)) - 1 and chosen[shared] == other[shared]:
        shared += 1
    values = {d.value for d in scene}
    return PreferencePair(
        prompt=" ".join([CAPTION_PROMPT, *chosen[:shared]]),
        chosen=" " + " ".join(chosen[shared:]),
        rejected=" " + " ".join(other[shared:]),
        image=picture,
        meta={"digits": sorted(values), "absent": [v for v in mentioned(rejected) if v not in values]},
    )


def yes_no_questions(part: Part, n: int, *, seed: int = 0) -> list[YesNoQuestion]:
    """Is-there questions in POPE's three splits (arXiv 2305.10355): per scene one yes, and one no of each kind.

    The no-questions ask for a digit that is not shown: any (``"random"``), one of the three most frequent in these scenes
    (``"popular"``; digits are about equally frequent, so this is close to random here), or the partner of a shown one
    (``"adversarial"``). Each yes-question stands in all three splits.

    Args:
        part: the split of scenes.
        n: number of scenes (without those that show all partners); 6 questions each.
        seed: of scenes and questions.
    """
    drawn = zip(*scenes_for(part, 2 * n + 8, seed=seed), strict=True)
    kept = [(scene, picture) for scene, picture in drawn if _absent_partners(scene)][:n]
    scenes, pictures = [scene for scene, _ in kept], [picture for _, picture in kept]
    rng = np.random.default_rng([seed, 8])
    counts = Counter(d.value for scene in scenes for d in scene)
    popular = [value for value, _ in counts.most_common(3)]
    found = []
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        shown = [d.value for d in scene]
        absent = [v for v in range(10) if v not in shown]
        candidates = {
            "random": absent,
            "popular": [v for v in popular if v not in shown] or absent,
            "adversarial": _absent_partners(scene),
        }
        yes = int(rng.choice(shown))
        for split, values in candidates.items():
            for value, answer in ((yes, True), (int(rng.choice(values)), False)):
                text = QUESTIONS["exist"][0].format(digit=value)
                meta = {"scene": number, "digit": value, "digits": shown, "cells": [d.cell for d in scene]}
                found.append(YesNoQuestion(picture, text, answer, split, meta))
    return found


def _absent_partners(scene: Scene) -> list[int]:
    shown = [d.value for d in scene]
    return [partner(v) for v in shown if partner(v) not in shown]


def yes_no_pairs(questions: Sequence[YesNoQuestion]) -> list[PreferencePair]:
    """Is-there questions as preferences: the right answer against the wrong one."""
    sides = {True: (" yes", " no"), False: (" no", " yes")}
    return [
        PreferencePair(question_text(q.question), *sides[q.answer], image=q.image, meta={**q.meta, "split": q.split})
        for q in questions
    ]
