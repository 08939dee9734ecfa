"""Does the model look, does it err from habit, what carries its answers, and what keeps it from erring?

``python -m studies.scenes_vlm.measure [looks] [attribution] [steering]``: each part writes one file into
``studies/scenes_vlm/results`` and goes on from the rows that are there. About 20 minutes of CPU time on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grains_tl as gr
from grains_tl._util.stats import standard_error
from grains_tl.demo.object_scenes import object_captions, object_margins, object_questions, object_scenes
from grains_tl.hallucination.captions import caption_hallucination
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.models._object_scenes import OBJECTS, ObjectScene, named_objects, partner, sentence
from grains_tl.models.scenes_vlm import N_IMAGE
from studies.scenes_vlm.attribution import attribution_study
from studies.scenes_vlm.steering import SEEDS, steering_study

RESULTS = Path(__file__).parent / "results"
N_QUESTIONS, N_CAPTIONS = 50, 80

#: Where the image stands in every prompt: after "<|im_start|>", "user", "\n".
IMAGE = slice(3, 3 + N_IMAGE)


def zero_image(model: Any) -> list[Any]:
    """Hooks that put zeros in the place of the image tokens."""

    def fn(act: torch.Tensor, hook: Any) -> torch.Tensor:
        if act.shape[1] <= IMAGE.stop:  # a later step of generation
            return act
        return torch.cat([act[:, : IMAGE.start], torch.zeros_like(act[:, IMAGE]), act[:, IMAGE.stop :]], dim=1)

    return [("blocks.0.hook_resid_pre", fn)]


def looks(model: Any) -> dict[str, Any]:
    """Questions and captions on held-out digits: as they are, with the image tokens zeroed, with another scene's picture."""
    questions = object_questions("test", N_QUESTIONS)
    pictures: list[Any] = [q.image for q in questions]
    others = [pictures[(i + 4) % len(pictures)] for i in range(len(pictures))]  # four questions a scene
    shuffled = [type(q)(p, q.question, q.answer, q.split, q.meta) for q, p in zip(questions, others, strict=True)]
    figures: dict[str, Any] = {"questions": {}, "captions": {}}
    for name, asked, hooks in (
        ("as is", questions, []),
        ("zeroed", questions, zero_image(model)),
        ("shuffled", shuffled, []),
    ):
        margins = object_margins(model, asked, hooks).numpy()
        for split in ("random", "adversarial"):
            at = [i for i, q in enumerate(questions) if q.split == split]
            scores = yes_no_scores([questions[i].answer for i in at], margins=margins[at].tolist())
            figures["questions"][f"{split}, {name}"] = _rounded(asdict(scores))
        print(f"questions, {name}", flush=True)
    scenes, drawn = object_scenes("test", N_CAPTIONS)
    rolled = drawn[1:] + drawn[:1]
    for name, shown, hooks in (("as is", drawn, []), ("zeroed", drawn, zero_image(model)), ("shuffled", rolled, [])):
        said = object_captions(model, shown, hooks)
        figures["captions"][name] = caption_figures(scenes, said)
        print(f"captions, {name}", flush=True)
    return figures


def caption_figures(scenes: Sequence[ObjectScene], said: Sequence[str]) -> dict[str, Any]:
    """Scores of captions, how many absent objects are partners, how many captions name exactly what is shown."""
    shown = [{thing.index for thing in scene} for scene in scenes]
    scores = asdict(caption_hallucination(said, shown, named_objects))
    del scores["per_caption"]
    absent = [(i, there) for text, there in zip(said, shown, strict=True) for i in set(named_objects(text)) - there]
    habits = [partner(i) in there for i, there in absent]
    exact = [set(named_objects(text)) == there for text, there in zip(said, shown, strict=True)]
    return {
        **_rounded(scores),
        "absent_named": len(absent),
        "absent_are_partners": round(float(np.mean(habits)), 4) if habits else None,
        "exact": round(float(np.mean(exact)), 4),
        "exact_se": round(standard_error(np.array(exact, dtype=float)), 4),
        "of_icons": round(float(np.mean([i >= 10 for i, _ in absent])), 4) if absent else None,
        "examples": [[sentence([t.index for t in s]), t] for s, t in list(zip(scenes, said, strict=True))[:6]],
    }


def _rounded(figures: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else round(float(value), 4) for name, value in figures.items()}


def habit(model: Any) -> dict[str, float]:
    """The language model alone: p(partner) after "A <object> and a", beside the mean over the other objects."""
    tokenizer = model.tokenizer
    ask = "<|im_start|>user\nDescribe the picture.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(" " + name)["input_ids"][0] for name in OBJECTS])
    ratios = {}
    for i, name in enumerate(OBJECTS):
        row = torch.tensor([tokenizer(f"{ask}A {name} and a")["input_ids"]])
        with torch.no_grad():
            logprobs = model(row, use_cache=False)[0, -1].float().log_softmax(-1)[ids]
        others = [k for k in range(len(OBJECTS)) if k not in (i, partner(i))]
        ratios[name] = round(float(logprobs[partner(i)] - logprobs[others].mean()), 3)
    return ratios


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="looks, attribution, steering; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="building seeds of the steering part")
    args = parser.parse_args(argv)
    wanted = args.parts or ["looks", "attribution", "steering"]
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    model = gr.load_model("smol-vlm-scenes", device=args.device)
    parts: dict[str, Callable[[], Any]] = {
        "looks": lambda: {**looks(model), "habit_of_the_language_model_in_nats": habit(model)},
        "attribution": lambda: attribution_study(model),
    }
    for name in wanted:
        if name == "steering":
            steering_study(model, RESULTS / "steering.jsonl", args.seeds)
        else:
            (RESULTS / f"{name}.json").write_text(json.dumps(parts[name](), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
