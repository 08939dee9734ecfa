"""One preference set of the demo: attribute, build, choose on one split, measure on another against controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from grains_tl.demo.figures import attribution_figures, base, continuations, table_rows
from grains_tl.demo.settings import ABOUT, AT_MOST, OPEN_PROMPTS, DemoSettings
from grains_tl.demo.verdicts import headline, verdict
from grains_tl.evaluate.controls import RANDOM_TOKENS, compare_with_controls
from grains_tl.evaluate.equal_cost import effect_at_kl
from grains_tl.evaluate.measuring import next_token_kl, swings
from grains_tl.evaluate.summary import summarize
from grains_tl.evaluate.sweeps import sweep_records
from grains_tl.records.loading import load_bundled
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences, collect_differences
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Controls that are drawn from the chosen vector or its differences: ``fn(differences, n_draws=, seed=)``.
CONTROLS: dict[str, Callable[..., list[SteeringVectors]]] = {
    "random direction": lambda own, **options: random_direction_vectors(reduce_vectors(own), **options),
    "orthogonal direction": lambda own, **options: orthogonal_direction_vectors(reduce_vectors(own), **options),
    "shuffled labels": shuffled_label_vectors,
}


def run_set(
    model: HookedModel,
    name: str,
    settings: DemoSettings,
    checkpoint: Path,
) -> dict[str, Any]:
    """Attribute, build, choose and measure on one set of records; every figure of its part of the report.

    1. Records are split into those to build on, to choose on and to test on.
    2. Every method's attributions select tokens, and the differences that masking them makes are collected.
    3. Method, layer and alpha are chosen on the choosing split.
    4. The chosen vector is compared with its controls, and at equal cost with CAA, on the test split.
    """
    records, n = _splits(name, settings)
    tokens = {part: tokenize_pairs(model, pairs) for part, pairs in records.items()}
    TopK(settings.top_k).check(tokens["build"])
    _say(f"{name}: attribution of {n['build']} records")
    attributions, seconds = _attribute(model, tokens["build"], settings, checkpoint)
    selections = {
        m: [select_tokens(a, settings.top_k, spare_end=settings.spare_end) for a in found]
        for m, found in attributions.items()
    }
    differences = _differences(model, tokens["build"], selections, settings)

    _say(f"{name}: layer sweep on {n['choose']} records of the choosing split")
    sweep = _sweep(model, tokens["choose"], differences, settings)
    method, layer = _best(sweep, list(selections))
    _, caa_layer = _best(sweep, ["CAA"])
    vectors = {m: reduce_vectors(d).at([layer]) for m, d in differences.items()}
    alpha = _largest_alpha(model, tokens["choose"], vectors[method], layer, settings)

    _say(f"{name}: {method} at layer {layer}; controls and test split")
    draws = _draws(model, tokens["build"], selections[method], differences, method, layer, settings)
    compared = compare_with_controls(
        model,
        tokens["choose"],
        tokens["test"],
        vectors,
        draws,
        name=method,
        alpha=settings.alpha,
        n_test_draws=n["test_for_draws"],
        seed=settings.seed,
    )
    # each at the layer that was best for it on the choosing split
    rivals = {method: vectors[method], "CAA": reduce_vectors(differences["CAA"]).at([caa_layer])}
    cost = _cost(model, records["test"][: settings.n_cost], rivals, settings)
    prompts = [*OPEN_PROMPTS.get(name, ()), *(str(p.prompt) for p in records["test"][:2])]
    return {
        "name": name,
        "about": ABOUT[name],
        "n": n,
        "base": base(compared),
        **attribution_figures(attributions, seconds, records["build"]),
        "sweep": table_rows(sweep),
        "chosen": {"method": method, "layer": layer, "alpha": alpha},
        "table": table_rows(compared.table),
        "draws": compared.draws,
        "cost": cost,
        "continuations": continuations(model, prompts, vectors[method], layer, alpha),
        "headline": headline(compared, cost, method=method),
        "verdict": verdict(compared, list(CONTROLS), cost, method=method, layer=layer, alpha=settings.alpha),
    }


def _splits(name: str, settings: DemoSettings) -> tuple[dict[str, list[PreferencePair]], dict[str, int]]:
    """The records of each split, and how many there are."""
    limit = AT_MOST[name]
    sizes = {"build": settings.n_build, "choose": settings.n_choose, "test": settings.n_test}
    records = {
        split: _pick(load_bundled(name, split), min(n, limit[split]), settings.seed) for split, n in sizes.items()
    }
    for_draws = min(settings.n_test_draws, settings.n_test, limit["draws"])
    return records, {**{split: len(pairs) for split, pairs in records.items()}, "test_for_draws": for_draws}


def _differences(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: dict[str, list[Selection]],
    settings: DemoSettings,
) -> dict[str, Differences]:
    """What masking each method's tokens changes, and CAA's differences beside them."""
    layers = _layers(model, settings)
    differences = {
        method: collect_differences(model, tokenized, chosen, layers=layers, mask=settings.masker)
        for method, chosen in selections.items()
    }
    norms = next(iter(differences.values())).resid_norms
    differences["CAA"] = caa_differences(model, tokenized, layers=layers, resid_norms=norms)
    return differences


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
    _, found = swings(model, tokenized, vectors, settings.alpha)

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
        "curve": table_rows(summarize(found, costs)),
        "at_kl": table_rows(effect_at_kl(found, costs, settings.kl, against="CAA")),
    }


def _say(text: str) -> None:
    if current().progress:
        print(text, flush=True)
