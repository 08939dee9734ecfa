"""Scenes of digits and icons with their pictures and is-there questions, in three splits, for ``"smol-vlm-scenes"``.

``"build"`` and ``"choose"`` use the handwritten digits the model was trained on (in new scenes), ``"test"`` the held-out
ones. Scenes are clean: nothing is hidden, objects come together by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.demo.scene_records import Part
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.models._object_scenes import (
    OBJECTS,
    QUESTIONS,
    ObjectScene,
    make_object_scenes,
    named_objects,
    partner,
    render_objects,
    sentence,
    with_article,
)
from grains_tl.models._scene_grid import SceneRule, to_images
from grains_tl.models.running import hooked, hugging_face_model
from grains_tl.models.scenes_vlm import chat_text
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.images import processed
from grains_tl.types import FwdHooks, HookedModel

CAPTION_PROMPT = chat_text(QUESTIONS["caption"][0])

#: Questions per forward pass.
BATCH = 32


def object_scenes(part: Part, n: int, *, seed: int = 0) -> tuple[list[ObjectScene], list[Any]]:
    """``n`` clean scenes of one to three objects of a split, and their pictures (PIL).

    Raises:
        ValueError: an unknown split.

    Examples:
        >>> scenes, pictures = object_scenes("test", 2)
        >>> len(scenes), pictures[0].size
        (2, (64, 64))
    """
    if part not in get_args(Part):
        raise ValueError(f"part={part!r} is not known; choose one of {', '.join(get_args(Part))}")
    rng = np.random.default_rng([seed, get_args(Part).index(part)])
    scenes = make_object_scenes(n, rng, SceneRule(), "held_out" if part == "test" else "train")
    return scenes, to_images(render_objects(scenes, rng))


def object_questions(part: Part, n: int, *, seed: int = 0) -> list[YesNoQuestion]:
    """Is-there questions as POPE asks them (arXiv 2305.10355): per scene one yes, and two no.

    The no-questions ask for an object that is not shown: any (``"random"``), or the partner of a shown one
    (``"adversarial"``). Each yes-question stands in both splits.

    Args:
        part: the split of scenes.
        n: number of scenes (without those that show all partners); 4 questions each.
        seed: of scenes and questions.
    """
    drawn = zip(*object_scenes(part, 2 * n + 8, seed=seed), strict=True)
    kept = [(scene, picture) for scene, picture in drawn if absent_partners(scene)][:n]
    rng, questions = np.random.default_rng([seed, 8]), []
    for number, (scene, picture) in enumerate(kept):
        shown = [thing.index for thing in scene]
        absent = {"random": [i for i in range(len(OBJECTS)) if i not in shown], "adversarial": absent_partners(scene)}
        yes = int(rng.choice(shown))
        for split, indices in absent.items():
            for index, answer in ((yes, True), (int(rng.choice(indices)), False)):
                text = QUESTIONS["exist"][0].format(object=with_article(OBJECTS[index]))
                meta = {"scene": number, "object": index, "objects": shown, "cells": [t.cell for t in scene]}
                questions.append(YesNoQuestion(picture, text, answer, split, meta))
    return questions


def absent_partners(scene: ObjectScene) -> list[int]:
    """Partners of shown objects that are not shown themselves."""
    shown = [thing.index for thing in scene]
    return [partner(i) for i in shown if partner(i) not in shown]


def object_margins(
    model: HookedModel,
    questions: Sequence[YesNoQuestion],
    fwd_hooks: FwdHooks | Callable[[Tensor], FwdHooks] | None = None,
) -> Float[Tensor, "question"]:
    """log p(Yes) - log p(No) of each question, nats.

    Args:
        model: the bridge from ``load_model("smol-vlm-scenes")``.
        questions: with their pictures.
        fwd_hooks: hooks to run with, or a function that makes them from the ids ``[question, pos]``.
    """
    tokenizer = model.tokenizer
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    texts = [chat_text(q.question) for q in questions]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    out = torch.zeros(len(texts))
    for length in sorted(set(lengths)):  # equal lengths together: nothing is padded
        same = [i for i, n in enumerate(lengths) if n == length]
        for start in range(0, len(same), BATCH):
            part = same[start : start + BATCH]
            inputs = processed(model, [questions[i].image for i in part], [texts[i] for i in part])
            ids = inputs.pop("input_ids")
            hooks = fwd_hooks(ids) if callable(fwd_hooks) else list(fwd_hooks or [])
            with torch.no_grad(), hooked(model, hooks):
                logits = model(ids, logits_to_keep=1, use_cache=False, **inputs)[:, -1].float()
            out[part] = (logits[:, yes] - logits[:, no]).cpu()
    return out


def object_captions(
    model: HookedModel, pictures: Sequence[Any], fwd_hooks: FwdHooks | None = None, *, max_new_tokens: int = 20
) -> list[str]:
    """Greedy captions, in batches (all prompts are equally long)."""
    said = []
    for start in range(0, len(pictures), BATCH):
        part = list(pictures[start : start + BATCH])
        inputs = processed(model, part, [CAPTION_PROMPT] * len(part))
        with torch.no_grad(), hooked(model, list(fwd_hooks or [])):
            out = hugging_face_model(model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        said += model.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def object_caption_pair(scene: ObjectScene, picture: Any, said: str, *, first_word: bool = False) -> PreferencePair:
    """A caption that names absent objects (rejected) against the same without them (chosen), from where they part.

    Args:
        scene: the scene.
        picture: its picture.
        said: the caption, such as the model's own.
        first_word: cut both responses after the word where they part.

    Raises:
        ValueError: the caption names nothing absent, or nothing that is shown.
    """
    shown, named = {thing.index for thing in scene}, named_objects(said)
    if not set(named) - shown or not set(named) & shown:
        raise ValueError(f"expected a caption that names shown and absent objects, got {said!r}")
    rejected, chosen = (_words(sentence(part)) for part in (named, [i for i in named if i in shown]))
    shared = 0
    while chosen[shared] == rejected[shared]:
        shared += 1
    stop = shared + 1 if first_word else None
    meta = {"objects": sorted(shown), "absent": sorted(set(named) - shown)}
    prompt, first, second = ("".join(part) for part in (chosen[:shared], chosen[shared:stop], rejected[shared:stop]))
    return PreferencePair(CAPTION_PROMPT + prompt, first, second, image=picture, meta=meta)


def _words(text: str) -> list[str]:
    """Words with the space before them; commas and full stops on their own."""
    spaced = text.replace(",", "\0,").replace(".", "\0.").replace(" ", "\0 ")
    return [word for word in spaced.split("\0") if word]
