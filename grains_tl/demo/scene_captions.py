"""Steering captions away from what is not there: vectors and their rivals, tuned alike and compared at equal KL.

Every rival goes through the same mill: alpha is set so that the caption's next-token distribution moves by a given KL; the
layer (and, in the free comparison, that KL) is chosen on one set of scenes; figures come from another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.stats import standard_error
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.selection import select_tokens
from grains_tl.baselines.controls import caa_differences, random_token_differences
from grains_tl.demo.scene_records import CAPTION_PROMPT, Part, caption_pair, scenes_for
from grains_tl.demo.scene_skills import describe
from grains_tl.hallucination.captions import CaptionScores, caption_hallucination
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.objectives import kl_divergence
from grains_tl.models._scenes import Scene, mentioned
from grains_tl.models.running import hooked
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.images import processed
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.differences import collect_differences
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Tokens per forward pass: so small a model wants larger batches than the package's default.


@dataclass(frozen=True)
class Captioned:
    """Scenes with their captions and scores.

    Attributes:
        scenes: the scenes described.
        pictures: their pictures.
        said: the captions.
        scores: how far they name what is not there.
    """

    scenes: Sequence[Scene]
    pictures: Sequence[Any]
    said: list[str]
    scores: CaptionScores


def caption_scenes(
    model: HookedModel, scenes: Sequence[Scene], pictures: Sequence[Any], fwd_hooks: FwdHooks | None = None
) -> Captioned:
    """Describe scenes (greedily, under hooks) and score the captions."""
    said = describe(model, pictures, fwd_hooks)
    shown = [{d.value for d in scene} for scene in scenes]
    return Captioned(scenes, pictures, said, caption_hallucination(said, shown, mentioned))


def caption_split(model: HookedModel, part: Part, n: int, *, seed: int = 0) -> Captioned:
    """Unsteered captions of ``n`` scenes of a split."""
    return caption_scenes(model, *scenes_for(part, n, seed=seed))


def own_mistakes(model: HookedModel, n: int, *, seed: int = 0, at_most: int = 2000) -> list[PreferencePair]:
    """Pairs from the model's own hallucinations: the true caption against what it said, from where the two part.

    Args:
        model: the bridge.
        n: number of pairs.
        seed: of the building scenes.
        at_most: scenes to look through.

    Raises:
        ValueError: too few mistakes in ``at_most`` scenes.
    """
    pairs: list[PreferencePair] = []
    scenes, pictures = scenes_for("build", at_most, seed=seed)
    for start in range(0, at_most, 4 * n):
        stop = min(start + 4 * n, at_most)
        part = caption_scenes(model, scenes[start:stop], pictures[start:stop])
        absent = part.scores.per_caption
        for scene, picture, text, wrong in zip(part.scenes, part.pictures, part.said, absent, strict=True):
            if wrong and len(pairs) < n:
                pairs.append(caption_pair(scene, picture, text))
        if len(pairs) == n:
            return pairs
    raise ValueError(f"{at_most} scenes gave {len(pairs)} captions with absent digits, {n} are wanted")


def candidates(
    model: HookedModel,
    pairs: Sequence[PreferencePair],
    *,
    layers: Sequence[int],
    methods: Sequence[tuple[str, int]] = (("leave_one_out", 1), ("integrated_gradients", 32)),
    top_k: int = 5,
    mask: Mask | Masker = Mask("zero", "zero"),
    n_random_tokens: int = 2,
    seed: int = 0,
) -> tuple[dict[str, SteeringVectors], list[dict[str, Any]]]:
    """The vectors to compare, from the same pairs: each attribution reduced by mean and PCA, random tokens, CAA.

    CAA is read at the word where the responses part, and, as ``"CAA, whole responses"``, at their last.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        layers: where vectors are wanted.
        methods: attributions, with their number of path steps.
        top_k: tokens masked on each side, words and patches together.
        mask: what replaces them.
        n_random_tokens: draws of as many random tokens, imitating the first method.
        seed: of the draws.

    Returns:
        Vectors by name (draws are numbered), and one row per attribution method: its median relative gap, and the share
        of the masked tokens that are patches.
    """
    tokenized, layers = tokenize_pairs(model, pairs), sorted(set(layers))
    common: dict[str, Any] = {"mask": mask}
    found, about, first = {}, [], None
    for method, n_steps in methods:
        attributions = attribute_all(
            model,
            tokenized,
            method=method,
            n_steps=n_steps,
            content_only=method == "leave_one_out",
            **common,
        )
        selections = [select_tokens(a, top_k) for a in attributions]
        differences = collect_differences(model, tokenized, selections, layers=list(layers), **common)
        first = first or (selections, differences.resid_norms)
        for reduce in ("mean", "pca"):
            found[f"{method}, {reduce}"] = reduce_vectors(differences, reduce=reduce)
        gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
        chosen = [
            bool(a.is_image[p])
            for a, s in zip(attributions, selections, strict=True)
            for p in (*s.toward_chosen, *s.toward_rejected)
        ]
        gap = float(np.median(gaps)) if gaps else None
        about.append(
            {"method": method, "median_relative_gap": gap, "patch_share": float(np.mean(chosen)), "n": len(pairs)}
        )
    assert first is not None
    selections, norms = first
    drawn = random_token_differences(
        model,
        tokenized,
        selections,
        layers=list(layers),
        resid_norms=norms,
        n_draws=n_random_tokens,
        seed=seed,
        **common,
    )
    found |= {f"random tokens {i}": reduce_vectors(d) for i, d in enumerate(drawn, start=1)}
    short = tokenize_pairs(model, [_first_words(pair) for pair in pairs])
    for name, records in (("CAA", short), ("CAA, whole responses", tokenized)):
        found[name] = reduce_vectors(caa_differences(model, records, layers=list(layers), resid_norms=norms))
    return found, about


def _first_words(pair: PreferencePair) -> PreferencePair:
    """Both responses cut after the word where they part: there CAA reads what distinguishes them."""
    chosen, rejected = (f" {str(text).split()[0]}" for text in (pair.chosen, pair.rejected))
    return replace(pair, chosen=chosen, rejected=rejected)


# -- equal KL ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class KlMeter:
    """Measures how far hooks move the next-token distribution along unsteered captions.

    Attributes:
        inputs: ids, attention mask and pixels of prompt + unsteered caption.
        scored: ``[row, pos]``, True where the next token belongs to the caption.
        base: ``[scored, vocab]`` log-probabilities there, nats.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    base: Float[Tensor, "scored vocab"]


def kl_meter(model: HookedModel, part: Captioned, n: int = 100) -> KlMeter:
    """A meter on the first ``n`` captions."""
    end = model.tokenizer.eos_token
    texts = [f"{CAPTION_PROMPT} {text} {end}" for text in part.said[:n]]
    inputs = processed(model, part.pictures[:n], texts, padding=True, padding_side="right")
    prompt = processed(model, part.pictures[:1], [CAPTION_PROMPT])["input_ids"].shape[1]
    mask = inputs["attention_mask"].bool()
    place = torch.arange(mask.shape[1], device=mask.device)
    scored = torch.zeros_like(mask)
    scored[:, :-1] = mask[:, 1:] & (place[1:] >= prompt)
    return KlMeter(inputs, scored, _scored_logprobs(model, inputs, scored, []))


def _scored_logprobs(
    model: HookedModel, inputs: dict[str, Tensor], scored: Tensor, hooks: FwdHooks
) -> Float[Tensor, "scored vocab"]:
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with torch.no_grad(), hooked(model, hooks):
        return model(inputs["input_ids"], use_cache=False, **rest)[scored].float().log_softmax(-1)


def caption_kl(model: HookedModel, meter: KlMeter, hooks: FwdHooks) -> float:
    """Mean KL(steered || base) per caption token, nats."""
    steered = _scored_logprobs(model, meter.inputs, meter.scored, hooks)
    return float(kl_divergence(steered, meter.base).mean())


ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def alphas_for_kl(
    model: HookedModel, meter: KlMeter, vectors: SteeringVectors, layer: int, kls: Sequence[float]
) -> list[float]:
    """For each wanted KL the alpha that gives it, interpolated in logarithms on ``ALPHAS`` (NaN beyond the largest)."""
    found = [max(caption_kl(model, meter, vectors.hooks(a, [layer])), 1e-9) for a in ALPHAS]
    rising = np.maximum.accumulate(found)
    x, y = np.log(rising) + 1e-9 * np.arange(len(rising)), np.log(ALPHAS)
    return [float(np.exp(np.interp(math.log(kl), x, y))) if kl <= rising[-1] else math.nan for kl in kls]


def tune_and_test(
    model: HookedModel,
    vectors: SteeringVectors,
    *,
    choose: Captioned,
    test: Captioned,
    meter: KlMeter,
    kls: Sequence[float],
    layers: Sequence[int],
) -> list[dict[str, Any]]:
    """Choose the layer on one set of captions for every KL, and measure it on another.

    The best layer is the one with the largest F1 over digits named (it weighs absent mentions against coverage).

    Returns:
        One row per KL: ``kl``, ``layer``, ``alpha``, ``choose_f1``, ``free`` (True for the KL with the largest F1 on the
        choosing set), and the test figures: ``hallucinating`` (with ``se``, and ``change`` from the unsteered captions
        with its paired ``change_se``), ``absent_mentions``, ``coverage``, ``f1``, ``per_caption``.
    """
    alphas = {layer: alphas_for_kl(model, meter, vectors, layer, kls) for layer in layers}
    rows: list[dict[str, Any]] = []
    for i, kl in enumerate(kls):
        tried = []
        for layer in layers:
            if math.isfinite(alphas[layer][i]):
                hooks = vectors.hooks(alphas[layer][i], [layer])
                tried.append((caption_scenes(model, choose.scenes, choose.pictures, hooks).scores.f1, layer))
        if not tried:
            continue
        f1, layer = max(tried)
        found = caption_scenes(model, test.scenes, test.pictures, vectors.hooks(alphas[layer][i], [layer])).scores
        change = np.subtract(found.per_caption, test.scores.per_caption, dtype=float)
        rows.append(
            {
                "kl": kl,
                "layer": layer,
                "alpha": alphas[layer][i],
                "choose_f1": f1,
                "hallucinating": found.hallucinating,
                "se": found.hallucinating_se,
                "change": float(change.mean()),
                "change_se": standard_error(change),
                "absent_mentions": found.absent_mentions,
                "coverage": found.coverage,
                "f1": found.f1,
                "n": found.n,
                "per_caption": found.per_caption,
            }
        )
    best = max(rows, key=lambda r: r["choose_f1"], default=None)
    return [{**row, "free": row is best} for row in rows]
