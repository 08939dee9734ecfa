"""The vision-language half of the demo, on the bundled tiny model: what it looks at, why it errs, whether steering helps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from grains_tl._util.files import write_atomically
from grains_tl._util.settings import current
from grains_tl._util.stats import compare, resampled_means
from grains_tl.attribution.result import Attribution
from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.demo.scene_captions import (
    Captioned,
    candidates,
    caption_scenes,
    caption_split,
    kl_meter,
    own_mistakes,
    tune_and_test,
)
from grains_tl.demo.scene_questions import false_yes_questions, partner_share, yes_attributions
from grains_tl.demo.scene_skills import skills
from grains_tl.demo.vision_report import write_vision_report
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.models._scenes import caption, mentioned
from grains_tl.types import HookedModel
from grains_tl.vectors.manifest import package_versions
from grains_tl.vectors.steering_vectors import SteeringVectors

OWN = "leave_one_out, mean"


LABELS = {"random tokens": "random tokens masked", "random direction": "random direction, tuned the same way"}


@dataclass(frozen=True)
class VisionDemoSettings:
    """How large the demo is.

    Attributes:
        n_build: pairs per building seed (the model's own hallucinated captions against the true ones).
        n_choose: scenes to choose the layer on.
        n_test: scenes to measure on.
        n_questions: false-yes questions whose attribution is looked at.
        seeds: building seeds; each gives its own vectors.
        n_random: random directions, and random-token maskings, per seed.
        methods: attributions, with their number of path steps.
        layers: candidate layers.
        kl: nats; every vector is scaled to move the next-token distribution of captions by this much.
        top_k: tokens masked on each side.
    """

    n_build: int = 50
    n_choose: int = 120
    n_test: int = 250
    n_questions: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    n_random: int = 3
    methods: tuple[tuple[str, int], ...] = (("leave_one_out", 1), ("integrated_gradients", 16))
    layers: tuple[int, ...] = (1, 2)
    kl: float = 0.05
    top_k: int = 5


VISION_QUICK = VisionDemoSettings(
    n_build=20,
    n_choose=60,
    n_test=120,
    n_questions=20,
    seeds=(0, 1),
    n_random=2,
    methods=(("leave_one_out", 1), ("integrated_gradients", 8)),
    layers=(1, 2),
)


def run_vision_demo(
    model: HookedModel,
    out: str | Path,
    settings: VisionDemoSettings | None = None,
) -> dict[str, Any]:
    """Run everything and write ``results.json`` and ``report.html`` into a folder.

    Args:
        model: the bridge from ``load_model("tiny-vlm")``.
        out: the folder.
        settings: sizes; ``VISION_QUICK`` for a smaller run.

    Returns:
        The results, as in ``results.json``.
    """
    settings = settings or VisionDemoSettings()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _say("Does it look? Questions with and without the image tokens")
    looks = skills(model, settings.n_test)
    _say(f"Why a false yes? Attribution of {settings.n_questions} questions")
    questions = false_yes_questions(model, settings.n_questions)
    shares, shown = _false_yes(model, questions, settings)
    _say(f"Captions: {settings.n_choose} scenes to choose on, {settings.n_test} to test")
    choose = caption_split(model, "choose", settings.n_choose)
    test = caption_split(model, "test", settings.n_test)
    rows, first = _captions(model, choose, test, settings)
    table, against = _compare(rows, test)
    results: dict[str, Any] = {
        "settings": {
            "model": str(getattr(model.cfg, "model_name", "?")),
            "class": type(model).__name__,
            "threads": torch.get_num_threads(),
            **{k: str(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()},
        },
        "versions": package_versions(),
        "skills": looks,
        "false_yes": shares,
        "base": {k: v for k, v in asdict(test.scores).items() if k != "per_caption"},
        "table": table,
        "against": against,
        "captions": _before_and_after(model, test, first),
        "verdict": _verdict(table, against, test, settings),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
    write_vision_report(results, shown, folder)
    return results


def vision_summary(results: Mapping[str, Any]) -> str:
    """The compact tables and the verdict as text."""
    lines = ["\nDoes it look? Accuracy on held-out digits"]
    lines += [
        f"  {kind}: {f['accuracy']:.2f}; image tokens zeroed: {f['accuracy_no_image']:.2f} "
        f"(always the commonest answer: {f['commonest']:.2f})"
        for kind, f in results["skills"].items()
    ]
    lines.append("\nFalse yes to 'is there a d ?' where only d's partner is shown: support for yes by token scores")
    for method, f in results["false_yes"].items():
        gap = "" if f["median_relative_gap"] is None else f"; median completeness gap {f['median_relative_gap']:.0%}"
        lines.append(
            f"  {method}: {f['share']:.2f} +- {f['se']:.2f} of it on the partner's 4 patches of 16 (n = {f['n']}); "
            f"agreement with occlusion {f['agreement']:.2f}{gap}"
        )
    base = results["base"]
    lines.append(
        f"\nCaptions that name an absent digit, unsteered: {base['hallucinating']:.3f} +- {base['hallucinating_se']:.3f} "
        f"(n = {base['n']}), coverage {base['coverage']:.2f}\nsteered, every vector at KL {results['settings']['kl']} nats:"
    )
    columns = ["vector", "hallucinating", "low", "high", "coverage", "n_vectors"]
    lines.append(pd.DataFrame(results["table"])[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    for row in results["captions"][:4]:
        lines.append(f"truth  {row['truth']}\nbefore {row['before']}\nafter  {row['after']}\n")
    lines.append(f"VERDICT {results['verdict']}")
    return "\n".join(lines)


def _false_yes(
    model: HookedModel, questions: Sequence[YesNoQuestion], settings: VisionDemoSettings
) -> tuple[dict[str, Any], list[tuple[YesNoQuestion, Attribution]]]:
    shares: dict[str, Any] = {}
    shown: list[tuple[YesNoQuestion, Attribution]] = []
    for method, n_steps in settings.methods:
        attributions = yes_attributions(model, questions, method, n_steps=n_steps)
        shares[method] = partner_share(model, questions, attributions)
        shown = shown or list(zip(questions[:3], attributions[:3], strict=True))
    return shares, shown


def _captions(
    model: HookedModel,
    choose: Captioned,
    test: Captioned,
    settings: VisionDemoSettings,
) -> tuple[list[dict[str, Any]], tuple[SteeringVectors, int, float]]:
    """One row per vector, and the first seed's own vector with its layer and alpha."""
    meter = kl_meter(model, choose, n=40)
    rows, first = [], None
    for seed in settings.seeds:
        _say(f"  building seed {seed}: vectors, random directions and random tokens")
        pairs = own_mistakes(model, settings.n_build, seed=100 + seed)
        vectors, _ = candidates(
            model,
            pairs,
            layers=settings.layers,
            methods=settings.methods,
            top_k=settings.top_k,
            n_random_tokens=settings.n_random,
            seed=seed,
        )
        draws = random_direction_vectors(vectors[OWN], n_draws=settings.n_random, seed=seed)
        vectors |= {f"random direction {i}": v for i, v in enumerate(draws, start=1)}
        for name, vector in vectors.items():
            found = tune_and_test(
                model, vector, choose=choose, test=test, meter=meter, kls=(settings.kl,), layers=settings.layers
            )
            rows += [{"seed": seed, "vector": name, "kind": name.rstrip(" 0123456789"), **row} for row in found]
            if first is None and name == OWN and found:
                first = (vector, int(found[0]["layer"]), float(found[0]["alpha"]))
    if first is None:
        raise ValueError(f"no alpha gives a KL of {settings.kl} nats; choose a smaller kl")
    return rows, first


def _compare(
    rows: Sequence[Mapping[str, Any]], test: Captioned
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Mean share of hallucinating captions per kind of vector, with an interval over building seeds (draws) and scenes."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    samples = {
        kind: torch.tensor([row["per_caption"] for row in rows if row["kind"] == kind], dtype=torch.float32)
        for kind in kinds
    }
    table = []
    for kind, sample in samples.items():
        low, high = np.quantile(resampled_means(sample), [0.025, 0.975])
        own = [row for row in rows if row["kind"] == kind]
        table.append(
            {
                "vector": LABELS.get(kind, kind),
                "hallucinating": float(sample.mean()),
                "low": float(low),
                "high": float(high),
                "coverage": float(np.mean([row["coverage"] for row in own])),
                "f1": float(np.mean([row["f1"] for row in own])),
                "layers": ", ".join(sorted({str(row["layer"]) for row in own})),
                "n_vectors": len(own),
                "n": sample.shape[1],
            }
        )
    samples["no steering"] = torch.tensor([test.scores.per_caption], dtype=torch.float32)
    own_sample = samples[OWN]
    against = {
        LABELS.get(kind, kind): compare(1 - own_sample.mean(0), 1 - own_sample, 1 - other)
        for kind, other in samples.items()
        if kind != OWN
    }
    return table, against


def _before_and_after(
    model: HookedModel, test: Captioned, first: tuple[SteeringVectors, int, float], n: int = 8
) -> list[dict[str, Any]]:
    """Captions that named an absent digit (six), and some that did not, before and after."""
    wrong = [i for i, bad in enumerate(test.scores.per_caption) if bad][: n - 2]
    right = [i for i, bad in enumerate(test.scores.per_caption) if not bad][: n - len(wrong)]
    vector, layer, alpha = first
    picked = [*wrong, *right]
    scenes, pictures = [test.scenes[i] for i in picked], [test.pictures[i] for i in picked]
    after = caption_scenes(model, scenes, pictures, vector.hooks(alpha, [layer])).said
    rows = []
    for i, scene, steered in zip(picked, scenes, after, strict=True):
        there = {d.value for d in scene}
        row = {"truth": caption(scene), "before": test.said[i], "after": steered}
        rows.append({**row, "absent": sorted({v for t in (test.said[i], steered) for v in mentioned(t)} - there)})
    return rows


def _verdict(
    table: Sequence[Mapping[str, Any]],
    against: Mapping[str, Mapping[str, float]],
    test: Captioned,
    settings: VisionDemoSettings,
) -> str:
    own = next(row for row in table if row["vector"] == OWN)
    lines = [
        f"captions that name an absent digit: {test.scores.hallucinating:.3f} unsteered, {own['hallucinating']:.3f} with "
        f"the vector of leave-one-out, mean ({own['low']:.3f} to {own['high']:.3f}); coverage {test.scores.coverage:.3f} "
        f"to {own['coverage']:.3f}; every vector at KL {settings.kl} nats"
    ]
    for name, c in against.items():
        word = "fewer" if c["low"] > 0 else "more" if c["high"] < 0 else "no clear difference"
        lines.append(f"against {name}: {word}, by {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})")
    return "\n".join(lines)


def _say(text: str) -> None:
    if current().progress:
        print(text, flush=True)
