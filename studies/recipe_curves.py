"""Effect against KL, every recipe a line, the ceiling dashed: the picture of docs/how-to/build.md.

    python -m studies.recipe_curves        # a trained vector beside the first draw of studies/gradient_recipes.py; resumes

The other recipes' raw results are those of ``studies/results/gradient_recipes/draw0_*.csv``: SmolLM2, layer 18, 20 mixed
reviews to build on, 16 test records of other domains, 12 neutral texts.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl.plotting.style import figure, style
from studies.gradient_recipes import ALPHAS, LAYER, N_TEST, N_TEXTS, draw_of

RESULTS = Path("studies/results/gradient_recipes")
NAMES = {
    "kl_optimal": "kl_optimal",
    "trained": "trained",
    "margin_gradient": "margin_gradient",
    "caa": "caa",
    "grains": "grains",
}


def measure_trained(out: Path) -> None:
    """Build and measure a trained vector on the first draw's records."""
    model = gr.load_model("smollm2")
    build = draw_of(0, gr.load_bundled("sentiment", "build"))
    test = random.Random(1000).sample(gr.load_bundled("sentiment", "test"), N_TEST)
    vectors = gr.build_vectors(
        model, build, recipe="trained", layers=[LAYER], checkpoint=out / "draw0_trained_steps.jsonl"
    )
    vectors.save(out / "draw0_trained.safetensors")
    effects, costs = gr.evaluate.sweep_records(
        model,
        {"trained": vectors},
        test,
        layers=[LAYER],
        alphas=list(ALPHAS),
        neutral=gr.records.neutral_texts(N_TEXTS),
        checkpoint=out / "draw0_trained_measured.jsonl",
    )
    assert costs is not None
    effects.to_csv(RESULTS / "draw0_trained_effects.csv", index=False)
    costs.to_csv(RESULTS / "draw0_trained_costs.csv", index=False)


def curve(effects: pd.DataFrame, costs: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Root of the mean KL per token, and mean change of the margin, by rising alpha from 0."""
    own, spent = effects[effects["vector"] == name], costs[costs["vector"] == name]
    change = own.groupby("alpha")["change"].mean()
    kl = spent.groupby("alpha")[["kl", "n_tokens"]].apply(lambda t: np.average(t["kl"], weights=t["n_tokens"]))
    return np.concatenate([[0], kl.to_numpy()]), np.concatenate([[0], change.to_numpy()])


def draw(path: Path) -> None:
    """The picture, from the raw tables."""
    parts = [RESULTS / f"draw0{extra}_{{}}.csv" for extra in ("", "_trained")]
    effects, costs = (
        pd.concat([pd.read_csv(str(p).format(kind)) for p in parts], ignore_index=True) for kind in ("effects", "costs")
    )
    about: dict[str, Any] = json.loads((RESULTS / "draw0_about.json").read_text())["kl_optimal"]
    with style():
        fig = figure(6.4, 4.4, constrained=True)
        axes = fig.subplots()
        grid = np.linspace(0, 0.2, 100)
        ceiling, held = about["linear_ceiling_kl_0.05"]["chosen"][0], max(g[0] for g in about["held_out_gain"].values())
        axes.plot(
            grid,
            ceiling * (grid / 0.05) ** 0.5,
            "--",
            color="grey",
            label="ceiling as estimated",
        )
        axes.plot(
            grid,
            held * (2 * grid) ** 0.5,
            ":",
            color="grey",
            label="predicted, held-out data",
        )
        for name, label in NAMES.items():
            kl, change = curve(effects, costs, name)
            order = np.arange(len(kl)) <= np.argmax(np.append(kl > 0.2, True))
            axes.plot(kl[order], change[order], marker="o", markersize=3, label=label)
        axes.axvline(0.05, color="lightgrey", linewidth=1, zorder=0)
        axes.set(xlim=(0, 0.2), ylim=(0, None), xlabel="KL on neutral text, nats per token")
        axes.set_ylabel("change of the margin, nats")
        fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=150)


def main() -> None:
    """Measure what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/recipe_curves"), help="checkpoints")
    parser.add_argument("--picture", type=Path, default=Path("docs/img/recipes.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (RESULTS / "draw0_trained_costs.csv").exists():
        measure_trained(args.work)
    draw(args.picture)


if __name__ == "__main__":
    main()
