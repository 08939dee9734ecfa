"""Steering captions away from absent objects: every vector at the same KL on captions, three building seeds.

Building records: captions in which the model names an absent object, against the same caption without it. Alpha is set so
that the next-token distribution along unsteered captions moves by the wanted KL; the layer is chosen on other scenes, by F1
over the objects named; figures come from the test scenes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import grains_tl as gr
from grains_tl.demo.object_scenes import (
    CAPTION_PROMPT,
    object_caption_pair,
    object_captions,
    object_margins,
    object_questions,
    object_scenes,
)
from grains_tl.hallucination.captions import caption_hallucination
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.inference.objectives import kl_divergence
from grains_tl.models._object_scenes import named_objects
from grains_tl.models.running import hooked
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.images import processed
from grains_tl.types import FwdHooks
from grains_tl.vectors.steering_vectors import SteeringVectors

LAYERS = (10, 20)
KLS = (0.05,)
SEEDS = (0, 1, 2)
N_BUILD, N_CHOOSE, N_TEST, N_METER, N_ASKED = 14, 32, 100, 14, 50

#: Recipes and their options; ICV's principal direction of the response-end differences is VTI's step on the text side.
RECIPES: dict[str, dict[str, Any]] = {
    "grains": {"recipe": "grains", "top_k": 4, "progress": False},
    "random_tokens": {"recipe": "random_tokens", "top_k": 4},
    "caa": {"recipe": "caa"},
    "margin_gradient": {"recipe": "margin_gradient", "progress": False},
    "icv": {"recipe": "icv"},
    "random_direction": {"recipe": "random_direction"},
}


class Scenes:
    """Scenes of a split with their pictures and unsteered captions."""

    def __init__(self, model: Any, part: Any, n: int, seed: int = 0) -> None:
        self.model = model
        self.scenes, self.pictures = object_scenes(part, n, seed=seed)
        self.shown = [{thing.index for thing in scene} for scene in self.scenes]
        self.said = object_captions(model, self.pictures)

    def under(self, hooks: FwdHooks) -> Any:
        """Scores of the captions under hooks."""
        return caption_hallucination(object_captions(self.model, self.pictures, hooks), self.shown, named_objects)

    @property
    def base(self) -> Any:
        """Scores of the unsteered captions."""
        return caption_hallucination(self.said, self.shown, named_objects)


def own_mistakes(model: Any, n: int, seed: int) -> list[PreferencePair]:
    """The first ``n`` captions with shown and absent objects, on building scenes; cut after the word where they part."""
    pairs: list[PreferencePair] = []
    scenes, pictures = object_scenes("build", 320, seed=100 + seed)
    for start in range(0, len(scenes), 32):
        part = slice(start, start + 32)
        said = object_captions(model, pictures[part])
        for scene, picture, text in zip(scenes[part], pictures[part], said, strict=True):
            named, shown = set(named_objects(text)), {thing.index for thing in scene}
            if named - shown and named & shown and len(pairs) < n:
                pairs.append(object_caption_pair(scene, picture, text, first_word=True))
        if len(pairs) == n:
            return pairs
    raise ValueError(f"320 scenes gave {len(pairs)} captions with shown and absent objects, {n} are wanted")


class KlMeter:
    """How far hooks move the next-token distribution along unsteered captions."""

    def __init__(self, model: Any, part: Scenes, n: int) -> None:
        self.model = model
        texts = [f"{CAPTION_PROMPT}{text}{model.tokenizer.eos_token}" for text in part.said[:n]]
        self.inputs = processed(model, part.pictures[:n], texts, padding=True, padding_side="right")
        prompt = processed(model, part.pictures[:1], [CAPTION_PROMPT])["input_ids"].shape[1]
        self.prompt = prompt
        self.scored = self.inputs["attention_mask"][:, prompt:].bool()
        self.base = self._logprobs([])

    def _logprobs(self, hooks: FwdHooks) -> Float[Tensor, "scored vocab"]:
        rest = {k: v for k, v in self.inputs.items() if k != "input_ids"}
        keep = self.scored.shape[1] + 1
        with torch.no_grad(), hooked(self.model, hooks):
            logits = self.model(self.inputs["input_ids"], use_cache=False, logits_to_keep=keep, **rest)
        return logits[:, :-1][self.scored].float().log_softmax(-1)

    def kl(self, hooks: FwdHooks) -> float:
        """Mean KL(steered || base) per caption token, nats."""
        return float(kl_divergence(self._logprobs(hooks), self.base).mean())

    def alpha(self, vectors: SteeringVectors, layer: int, kl: float, start: float) -> float:
        """The alpha with this KL, within 7 %: KL goes about as alpha squared, so each try corrects the last. NaN above 3."""
        alpha = start
        for _ in range(7):
            found = self.kl(vectors.hooks(alpha, [layer]))
            if abs(math.log(max(found, 1e-9) / kl)) < 0.07:
                return alpha
            alpha *= float(np.clip((kl / max(found, 1e-9)) ** 0.5, 0.2, 4))
            if alpha > 3:
                return math.nan
        return alpha


def steering_study(model: Any, out: Path, seeds: Sequence[int] = SEEDS) -> None:
    """One line per vector and building seed, and one unsteered; goes on from the lines in ``out``."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["seed"], row["vector"], row["kl"]) for row in rows}
    choose, test = Scenes(model, "choose", N_CHOOSE), Scenes(model, "test", N_TEST)
    asked = [q for q in object_questions("test", N_ASKED) if q.split == "adversarial"]
    meter, starts = KlMeter(model, choose, N_METER), dict.fromkeys(LAYERS, 0.1)
    if ("unsteered", 0.0) not in {(row["vector"], row["kl"]) for row in rows}:
        margins = object_margins(model, asked)
        _write(out, {"seed": -1, "vector": "unsteered", "kl": 0.0, **_scores(test.base), **_asked(asked, margins)})
    for seed in seeds:
        wanted = [name for name in RECIPES if any((seed, name, kl) not in done for kl in KLS)]
        pairs = own_mistakes(model, N_BUILD, seed) if wanted else []
        for name in wanted:
            options = dict(RECIPES[name]) | ({"seed": seed} if name.startswith("random") else {})
            vectors = gr.build_vectors(model, pairs, layers=list(LAYERS), **options)
            for kl in KLS:
                tried = []
                for layer in LAYERS:
                    alpha = meter.alpha(vectors, layer, kl, starts[layer])
                    if math.isfinite(alpha):
                        starts[layer] = alpha
                        tried.append((choose.under(vectors.hooks(alpha, [layer])).f1, layer, alpha))
                if not tried:
                    _write(out, {"seed": seed, "vector": name, "kl": kl, "note": "no alpha up to 3 reaches this KL"})
                    continue
                f1, layer, alpha = max(tried)
                hooks = vectors.hooks(alpha, [layer])
                about = {"seed": seed, "vector": name, "kl": kl, "layer": layer, "alpha": round(alpha, 4)}
                scores = {
                    "choose_f1": round(f1, 4),
                    **_scores(test.under(hooks)),
                    **_asked(asked, object_margins(model, asked, hooks)),
                }
                _write(out, {**about, **scores})


def _scores(scores: Any) -> dict[str, Any]:
    return {
        "hallucinating": round(scores.hallucinating, 4),
        "coverage": round(scores.coverage, 4),
        "f1": round(scores.f1, 4),
        "per_caption": [int(bad) for bad in scores.per_caption],
    }


def _asked(questions: Sequence[Any], margins: Float[Tensor, "question"]) -> dict[str, float]:
    scores = yes_no_scores([q.answer for q in questions], margins=margins.tolist())
    names = ("balanced_accuracy", "false_yes", "recall", "auc")
    return {f"asked_{name}": round(float(getattr(scores, name)), 4) for name in names}


def _write(out: Path, row: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if k != "per_caption"}, flush=True)
