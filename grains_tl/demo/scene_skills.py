"""What the tiny model answers and describes, and what it can do on held-out digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.stats import standard_error
from grains_tl.demo.scene_records import scenes_for
from grains_tl.hooks.mask import mask_hook
from grains_tl.models._scenes import QUESTIONS, Kind, ask
from grains_tl.models.running import hooked, hugging_face_model
from grains_tl.models.tiny_vlm import question_text
from grains_tl.tokens.images import processed
from grains_tl.types import FwdHooks, HookedModel

BATCH = 250


OTHER_KINDS: tuple[Kind, ...] = ("position", "colour", "count")


def answer_logprobs(
    model: HookedModel,
    texts: Sequence[str],
    pictures: Sequence[Any],
    fwd_hooks: FwdHooks | None = None,
    *,
    without_image: bool = False,
) -> Float[Tensor, "question vocab"]:
    """Log-probabilities (nats) of the word that follows each text.

    Args:
        model: the bridge from ``load_model("tiny-vlm")``.
        texts: prompts with ``<image>``, e.g. from ``question_text``.
        pictures: one each.
        fwd_hooks: hooks to run with.
        without_image: put zeros in the place of the image tokens.
    """
    out = torch.zeros(len(texts), int(model.cfg.d_vocab))
    lengths = [len(t.split()) for t in texts]
    for length in sorted(set(lengths)):  # equal lengths together: nothing is padded
        same = [i for i, n in enumerate(lengths) if n == length]
        for start in range(0, len(same), BATCH):
            part = same[start : start + BATCH]
            inputs = processed(model, [pictures[i] for i in part], [texts[i] for i in part])
            hooks = list(fwd_hooks or [])
            if without_image:
                hooks = mask_hook(model, inputs["input_ids"] == _image_token(model), "zero") + hooks
            with torch.no_grad(), hooked(model, hooks):
                logits = model(inputs.pop("input_ids"), logits_to_keep=1, use_cache=False, **inputs)
            out[part] = logits[:, -1].float().log_softmax(-1).cpu()
    return out


def yes_margins(logprobs: Float[Tensor, "question vocab"], model: HookedModel) -> Float[Tensor, "question"]:
    """log p(yes) - log p(no), nats."""
    yes, no = model.tokenizer.convert_tokens_to_ids(["yes", "no"])
    return logprobs[:, yes] - logprobs[:, no]


def describe(
    model: HookedModel, pictures: Sequence[Any], fwd_hooks: FwdHooks | None = None, *, max_new_tokens: int = 24
) -> list[str]:
    """Greedy captions, in large batches (all prompts are equally long here)."""
    text, found = question_text(QUESTIONS["caption"][0]), []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        inputs = processed(model, part, [text] * len(part))
        with torch.no_grad(), hooked(model, list(fwd_hooks or [])):
            out = hugging_face_model(model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        found += model.tokenizer.batch_decode(new, skip_special_tokens=True)
    return found


def _image_token(model: HookedModel) -> int:
    return int(hugging_face_model(model).config.image_token_id)


def skills(model: HookedModel, n: int, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracy of position, colour and count questions on held-out digits, with the image tokens and with zeros for them.

    Returns:
        Per kind: ``accuracy``, ``se``, ``accuracy_no_image``, ``se_no_image``, ``commonest`` (the share of the commonest
        right answer), ``n``.
    """
    scenes, pictures = scenes_for("test", n, seed=seed)
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, Any]] = {}
    for kind in OTHER_KINDS:
        asked = [ask(rng, scene, kind) for scene in scenes]
        texts, answers = [question_text(q) for q, _ in asked], [a for _, a in asked]
        found[kind] = {
            **_accuracy(model, answer_logprobs(model, texts, pictures), answers, ""),
            **_accuracy(model, answer_logprobs(model, texts, pictures, without_image=True), answers, "_no_image"),
            "commonest": max(answers.count(a) for a in set(answers)) / n,
            "n": n,
        }
    return found


def _accuracy(
    model: HookedModel, logprobs: Float[Tensor, "question vocab"], answers: Sequence[str], suffix: str
) -> dict[str, float]:
    wanted = torch.tensor(model.tokenizer.convert_tokens_to_ids(list(answers)))
    right = (logprobs.argmax(-1) == wanted).double().numpy()
    return {f"accuracy{suffix}": float(right.mean()), f"se{suffix}": standard_error(right)}
