"""One preference set of the demo: attribute, build, choose on one split, measure on another against controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from grains_tl._util.settings import current
from grains_tl._util.stats import mean_and_se
from grains_tl.attribution.methods import method_of
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, select_tokens
from grains_tl.attribution.store import attribute_records
from grains_tl.attribution.top_k import TopK
from grains_tl.baselines.controls import (
    bootstrap_vectors,
    caa_differences,
    orthogonal_direction_vectors,
    random_direction_vectors,
    random_token_differences,
    random_token_vectors,
    shuffled_label_vectors,
)
from grains_tl.evaluate.controls import RANDOM_TOKENS, SIGN_TUNED, Comparison, compare_with_controls
from grains_tl.evaluate.equal_cost import effect_at_kl
from grains_tl.evaluate.measuring import effects, next_token_kl
from grains_tl.evaluate.summary import summarize
from grains_tl.evaluate.sweeps import sweep_records
from grains_tl.hooks.mask import Masker
from grains_tl.inference.generation import generate
from grains_tl.records.loading import load_bundled
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences, collect_differences
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors

ABOUT = {
    "sentiment": "Mixed reviews: one good and one bad detail, then the verdict. Chosen is a favourable completion, "
    "rejected an unfavourable one. Built on restaurants, hotels, cafes and travel; tested on films, phones, clothes "
    "and courses.",
    "misconceptions": "Questions with a popular wrong answer. Chosen is the correct sentence, rejected the "
    "misconception. Built on biology, the body, physics and food; tested on space, history, language and technology.",
}

#: At most so many records of a set: whole sentences as responses cost several times as much as single words.
AT_MOST = {
    "sentiment": {"build": 48, "choose": 24, "test": 104, "draws": 30},
    "misconceptions": {"build": 24, "choose": 12, "test": 40, "draws": 10},
}

#: Controls that are drawn from the chosen vector or its differences: ``fn(differences, n_draws=, seed=)``.
CONTROLS: dict[str, Callable[..., list[SteeringVectors]]] = {
    "random direction": lambda own, **options: random_direction_vectors(reduce_vectors(own), **options),
    "orthogonal direction": lambda own, **options: orthogonal_direction_vectors(reduce_vectors(own), **options),
    "shuffled labels": shuffled_label_vectors,
}


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is.

    Attributes:
        sets: which bundled preference sets.
        n_build: records to build on (at most ``AT_MOST``).
        n_choose: records to choose the layer on.
        n_test: records to measure on.
        n_test_draws: test records the many draws are measured on.
        n_draws: draws of random tokens, and bootstrap resamples.
        n_control_draws: draws of each of ``controls``.
        controls: besides random tokens, keys of ``CONTROLS``.
        n_cost: test records for the curve of effect against cost; 0 leaves it out.
        n_neutral: neutral texts the cost is measured on.
        kl: nats per token, where effects are compared at equal cost.
        methods: attributions to compare, with their number of path steps.
        layers: candidate layers of the sweep; of a model that has none of them, three of its own.
        alpha: step of the sweep and of the comparison, fraction of the layer's typical residual norm.
        alphas: of the cost curve, and candidates for the continuations: the largest whose KL stays under ``max_kl``.
        max_kl: nats, mean KL of the next-token distribution on the choosing split.
        top_k: tokens masked on each side.
        masker: what replaces a masked token.
        spare_end: keep the prompt's last token, where the residual is read, out of the selections.
        seed: of all draws and of the choice of records.
    """

    sets: tuple[str, ...] = ("sentiment", "misconceptions")
    n_build: int = 48
    n_choose: int = 24
    n_test: int = 104
    n_test_draws: int = 30
    n_draws: int = 20
    n_control_draws: int = 10
    controls: tuple[str, ...] = ("random direction", "orthogonal direction", "shuffled labels")
    n_cost: int = 16
    n_neutral: int = 8
    kl: float = 0.05
    methods: tuple[tuple[str, int], ...] = (
        ("leave_one_out", 1),
        ("integrated_gradients", 16),
        ("gradient_x_input", 1),
    )
    layers: tuple[int, ...] = (6, 9, 12, 15, 18, 21, 24, 27)
    alpha: float = 0.2
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    max_kl: float = 0.5
    top_k: int = 2
    masker: Masker = "mean_embedding"
    spare_end: bool = False
    seed: int = 0


def run_set(
    model: HookedModel,
    name: str,
    settings: DemoSettings,
    checkpoint: Path,
) -> dict[str, Any]:
    """Attribute, build, choose and measure on one set of records; every figure of its part of the report."""
    limit = AT_MOST[name]
    n_draw_records = min(settings.n_test_draws, settings.n_test, limit["draws"])
    build, choose, test = (
        _pick(load_bundled(name, split), min(n, limit[split]), settings.seed)
        for split, n in (("build", settings.n_build), ("choose", settings.n_choose), ("test", settings.n_test))
    )
    tokens = [tokenize_pairs(model, part) for part in (build, choose, test)]
    TopK(settings.top_k).check(tokens[0])
    _say(f"{name}: attribution of {len(build)} records")
    attributions, seconds = _attribute(model, tokens[0], settings, checkpoint)
    selections = {
        m: [select_tokens(a, settings.top_k, spare_end=settings.spare_end) for a in found]
        for m, found in attributions.items()
    }
    layers = _layers(model, settings)
    differences = {
        method: collect_differences(model, tokens[0], chosen, layers=layers, mask=settings.masker)
        for method, chosen in selections.items()
    }
    norms = next(iter(differences.values())).resid_norms
    differences["CAA"] = caa_differences(model, tokens[0], layers=layers, resid_norms=norms)

    _say(f"{name}: layer sweep on {len(choose)} records of the choosing split")
    sweep = _sweep(model, tokens[1], differences, settings)
    method, layer = _best(sweep, list(selections))
    _, caa_layer = _best(sweep, ["CAA"])
    vectors = {m: reduce_vectors(d).at([layer]) for m, d in differences.items()}
    alpha = _largest_alpha(model, tokens[1], vectors[method], layer, settings)

    _say(f"{name}: {method} at layer {layer}; controls and test split")
    draws = _draws(model, tokens[0], selections[method], differences, method, layer, settings)
    compared = compare_with_controls(
        model,
        tokens[1],
        tokens[2],
        vectors,
        draws,
        name=method,
        alpha=settings.alpha,
        n_test_draws=n_draw_records,
        seed=settings.seed,
    )
    # each at the layer that was best for it on the choosing split
    rivals = {method: vectors[method], "CAA": reduce_vectors(differences["CAA"]).at([caa_layer])}
    cost = _cost(model, test[: settings.n_cost], rivals, settings)
    base, base_se = mean_and_se(compared.base)
    return {
        "name": name,
        "about": ABOUT[name],
        "n": {
            "build": len(build),
            "choose": len(choose),
            "test": len(test),
            "test_for_draws": n_draw_records,
        },
        "base": {
            "margin": base.item(),
            "margin_se": base_se.item(),
            "accuracy": (compared.base > 0).float().mean().item(),
        },
        "tokens": [_token_row(attributions[m][i], build[i]) for i in range(min(2, len(build))) for m in attributions],
        "attribution": [
            {"method": m, "median_relative_gap": _median_gap(found), "seconds": seconds[m], "n": len(found)}
            for m, found in attributions.items()
        ],
        "sweep": _records(sweep),
        "chosen": {"method": method, "layer": layer, "alpha": alpha},
        "table": _records(compared.table),
        "draws": compared.draws,
        "cost": cost,
        "continuations": _continuations(model, test, vectors[method], layer, alpha),
        "verdict": _verdict(compared, method, layer, settings.alpha, cost),
    }


def _layers(model: HookedModel, settings: DemoSettings) -> list[int]:
    """The candidates that the model has; of a model that has none of them, three at the depths that mattered."""
    n_layers = int(model.cfg.n_layers)
    found = sorted({layer for layer in settings.layers if layer < n_layers})
    return found or sorted({n_layers * share // 5 for share in (2, 3, 4)})


def _pick(pairs: list[PreferencePair], n: int, seed: int) -> list[PreferencePair]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[i] for i in order[:n]]


def _attribute(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    settings: DemoSettings,
    checkpoint: Path,
) -> tuple[dict[str, list[Attribution]], dict[str, float]]:
    found: dict[str, list[Attribution]] = {}
    seconds: dict[str, float] = {}
    for method, n_steps in settings.methods:
        started = time.perf_counter()
        way = method_of(method, n_steps=n_steps)
        found[method] = attribute_records(model, tokenized, way, mask=settings.masker, checkpoint=checkpoint)
        seconds[method] = round(time.perf_counter() - started, 1)
    return found, seconds


def _sweep(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    differences: dict[str, Differences],
    settings: DemoSettings,
) -> pd.DataFrame:
    grid = [(name, layer) for name in differences for layer in differences[name].layers]
    reduced = {name: reduce_vectors(d) for name, d in differences.items()}
    vectors = [reduced[name].at([layer]) for name, layer in grid]
    _, found = effects(model, tokenized, vectors, settings.alpha)

    mean, se = mean_and_se(found)
    return pd.DataFrame(
        [
            {"vector": name, "layer": layer, "alpha": settings.alpha, "effect": m, "se": s, "n": len(tokenized)}
            for (name, layer), m, s in zip(grid, mean.tolist(), se.tolist(), strict=True)
        ]
    )


def _best(sweep: pd.DataFrame, methods: list[str]) -> tuple[str, int]:
    """Attribution method and layer with the largest effect on the choosing split."""
    own = sweep[sweep["vector"].isin(methods)]
    row = own.sort_values("effect").iloc[-1]
    return str(row["vector"]), int(row["layer"])


def _largest_alpha(
    model: HookedModel, tokenized: Sequence[TokenizedPair], vectors: SteeringVectors, layer: int, settings: DemoSettings
) -> float:
    best = min(settings.alphas)
    for alpha in sorted(settings.alphas):
        kl = max(
            next_token_kl(model, tokenized, vectors.hooks(sign * alpha, [layer])).mean().item() for sign in (1, -1)
        )
        if kl > settings.max_kl:
            break
        best = alpha
    return best


def _draws(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    differences: dict[str, Differences],
    method: str,
    layer: int,
    settings: DemoSettings,
) -> dict[str, list[SteeringVectors]]:
    """Vectors that show the spread: over chance directions, over chance tokens, over building records."""
    own, n_draws, seed = differences[method].at([layer]), settings.n_draws, settings.seed
    random = random_token_differences(
        model,
        tokenized,
        selections,
        layers=[layer],
        resid_norms=own.resid_norms,
        mask=settings.masker,
        spare_end=settings.spare_end,
        n_draws=n_draws,
        seed=seed,
    )
    return {
        RANDOM_TOKENS: random_token_vectors(random, seed=seed),
        **{name: CONTROLS[name](own, n_draws=settings.n_control_draws, seed=seed) for name in settings.controls},
        method: bootstrap_vectors(own, n_draws=n_draws, seed=seed),
        "CAA": bootstrap_vectors(differences["CAA"].at([layer]), n_draws=n_draws, seed=seed),
    }


def _cost(
    model: HookedModel,
    test: Sequence[PreferencePair],
    vectors: dict[str, SteeringVectors],
    settings: DemoSettings,
) -> dict[str, Any] | None:
    """Effect against KL on neutral text, and both vectors at one KL; ``None`` where the demo is too small for it."""
    if not settings.n_cost:
        return None
    found, costs = sweep_records(model, vectors, test, alphas=settings.alphas, neutral=settings.n_neutral)
    assert costs is not None
    return {
        "kl": settings.kl,
        "curve": _records(summarize(found, costs)),
        "at_kl": _records(effect_at_kl(found, costs, settings.kl, against="CAA")),
    }


def _verdict(found: Comparison, method: str, layer: int, alpha: float, cost: dict[str, Any] | None) -> str:
    def say(name: str) -> str:
        c = found.against[name]
        yes = c["low"] > 0 and c["beaten"] >= 0.95 * c["n_draws"]
        return (
            f"{'yes' if yes else 'no'}, by {c['difference']:+.2f} nats (95 % interval {c['low']:+.2f} to "
            f"{c['high']:+.2f}; above {c['beaten']:.0f} of {c['n_draws']:.0f} draws)"
        )

    caa = found.table.set_index("vector")["effect"]["CAA"]
    lines = [
        f"attribution beats random tokens: {say(RANDOM_TOKENS)}",
        f"random tokens, sign tuned on the choosing split: {say(SIGN_TUNED)}",
        *(f"{name}: {say(name)}" for name in CONTROLS if name in found.against),
        f"attribution by {method}, layer {layer}, alpha {alpha}; CAA at the same size: {caa:+.2f} nats",
    ]
    if cost is not None:
        lines.append(_at_equal_cost(cost, method))
    return "\n".join(lines)


def _at_equal_cost(cost: dict[str, Any], method: str) -> str:
    rows = {row["vector"]: row for row in cost["at_kl"]}
    own, caa = rows[method], rows["CAA"]
    if own["effect"] is None or own["difference_low"] is None:
        return f"at {cost['kl']:g} nats KL on neutral text: not reached with the alphas that were tried"
    better = "yes" if own["difference_low"] > 0 else "no"
    return (
        f"better than CAA at its own best layer (layer {caa['layer']}), both at {cost['kl']:g} nats KL on neutral text: "
        f"{better}, by {own['difference']:+.2f} nats ({own['difference_low']:+.2f} to {own['difference_high']:+.2f}; "
        f"{own['effect']:+.2f} against {caa['effect']:+.2f})"
    )


def _token_row(a: Attribution, pair: PreferencePair) -> dict[str, Any]:
    return {
        "method": a.method,
        "tokens": a.tokens,
        "scores": a.scores.nan_to_num(0.0).tolist(),
        "content": a.content.tolist(),
        "objective": a.objective,
        "baseline_objective": a.baseline_objective,
        "gap": a.gap,
        "chosen": str(pair.chosen),
        "rejected": str(pair.rejected),
    }


def _median_gap(attributions: Sequence[Attribution]) -> float | None:
    gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
    return float(np.median(gaps)) if gaps else None


def _continuations(
    model: HookedModel, test: Sequence[PreferencePair], vectors: SteeringVectors, layer: int, alpha: float
) -> list[dict[str, Any]]:
    prompts = [str(p.prompt) for p in test[:3]]
    rows = []
    for a in (-alpha, 0.0, alpha):
        texts = generate(model, prompts, vectors.hooks(a, [layer]), max_new_tokens=20)
        rows += [{"prompt": p, "alpha": a, "text": t} for p, t in zip(prompts, texts, strict=True)]
    return sorted(rows, key=lambda r: (prompts.index(r["prompt"]), r["alpha"]))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table; missing numbers as ``None``, because NaN is no JSON."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _say(text: str) -> None:
    if current().progress:
        print(text, flush=True)
