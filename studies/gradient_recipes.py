"""Gradient recipes beside grains and CAA at equal KL: SmolLM2, the bundled sentiment set, several building draws.

    python -m studies.gradient_recipes --out studies/results/gradient_recipes       # resumes; some minutes a draw on a core

Each draw takes 20 records of the building split that no other draw has; the 16 test records are of the test split (other
domains). Costs are measured on the first 12 neutral texts; F is estimated once, from the other 18 and the first draw's
prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically

RECIPES: dict[str, dict[str, Any]] = {
    "grains": {"top_k": 1},
    "caa": {},
    "margin_gradient": {},
    "kl_optimal": {},
}
ALPHAS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
LAYER, KL, N_BUILD, N_TEST, N_TEXTS = 18, 0.05, 20, 16, 12


def draw_of(number: int, records: list[gr.PreferencePair]) -> list[gr.PreferencePair]:
    """The building records of one draw; no two draws share one."""
    shuffled = random.Random(0).sample(records, len(records))
    return shuffled[number * N_BUILD : (number + 1) * N_BUILD]


def run_draw(model: Any, number: int, out: Path) -> pd.DataFrame:
    """Build and measure every recipe on one draw of building records; per-record and per-text tables go into ``out``."""
    build = draw_of(number, gr.load_bundled("sentiment", "build"))
    test = random.Random(1000).sample(gr.load_bundled("sentiment", "test"), N_TEST)
    vectors, about = {}, {}
    for name, options in RECIPES.items():
        file = out / f"draw{number}_{name}.safetensors"
        begin = time.perf_counter()
        if not file.exists():
            extra: dict[str, Any] = {"fisher": out / "fisher.safetensors"} if name == "kl_optimal" else {}
            gr.build_vectors(model, build, recipe=name, layers=[LAYER], **options, **extra).save(file)
        vectors[name] = gr.load_vectors(file, model)
        seconds = time.perf_counter() - begin
        kept = ("shrinkage", "held_out_gain", "linear_ceiling_kl_0.05", "mean_cosine", "fisher_texts")
        about[name] = {"seconds": seconds, **{k: vectors[name].info[k] for k in kept if k in vectors[name].info}}
        print(number, name, f"{seconds:.0f} s", flush=True)
    effects, costs = gr.evaluate.sweep_records(
        model,
        vectors,
        test,
        layers=[LAYER],
        alphas=list(ALPHAS),
        neutral=gr.records.neutral_texts(N_TEXTS),
        checkpoint=out / f"draw{number}.jsonl",
    )
    assert costs is not None
    effects.to_csv(out / f"draw{number}_effects.csv", index=False)
    costs.to_csv(out / f"draw{number}_costs.csv", index=False)
    about["cosine_with_caa"] = {n: float(v.cosine(vectors["caa"])[0]) for n, v in vectors.items()}
    write_atomically(out / f"draw{number}_about.json", json.dumps(about, indent=1).encode())
    table = gr.evaluate.effect_at_kl(effects, costs, KL, against="caa")
    print(table.to_string(), flush=True)
    return table


def pooled(out: Path, draws: list[int]) -> pd.DataFrame:
    """Effects at the budget over all draws; the intervals resample building draws and test records together."""
    at_budget: dict[str, list[np.ndarray]] = {name: [] for name in RECIPES}
    for number in draws:
        effects, costs = (pd.read_csv(out / f"draw{number}_{kind}.csv") for kind in ("effects", "costs"))
        found = gr.evaluate.effect_at_kl(effects, costs, KL, n=2).set_index("vector")
        for name in RECIPES:
            own = effects[(effects["vector"] == name) & (effects["alpha"] > 0)]
            change = own.pivot(index="alpha", columns="record", values="change").sort_index()
            alphas = np.concatenate([[0.0], change.index.to_numpy()])
            columns = np.concatenate([np.zeros((1, change.shape[1])), change.to_numpy()]).T
            at_budget[name].append(np.array([np.interp(found.loc[name, "alpha"], alphas, c) for c in columns]))
    data = {name: np.stack(values) for name, values in at_budget.items()}
    rng = np.random.default_rng(0)
    n_draws, n_records = data["caa"].shape
    which = rng.integers(0, n_draws, (4000, n_draws))
    records = rng.integers(0, n_records, (4000, n_records))
    rows = []
    for name, values in data.items():
        row: dict[str, Any] = {"recipe": name, "n_draws": n_draws, "n_build": N_BUILD, "n_test": n_records, "kl": KL}
        for column, matrix in (("effect", values), ("minus_caa", values - data["caa"])):
            means = [matrix[w][:, r].mean() for w, r in zip(which, records, strict=True)]
            low, high = np.quantile(means, [0.025, 0.975])
            row |= {column: matrix.mean(), f"{column}_low": low, f"{column}_high": high}
        row["per_draw"] = " ".join(f"{m:+.2f}" for m in values.mean(1))
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Parse the command line and run the draws that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("studies/results/gradient_recipes"))
    parser.add_argument("--draws", type=int, default=3, choices=range(1, 5))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = gr.load_model("smollm2")
    done = []
    for number in range(args.draws):
        if not (args.out / f"draw{number}_about.json").exists():
            run_draw(model, number, args.out)
        done.append(number)
        table = pooled(args.out, done)
        table.to_csv(args.out / "table.csv", index=False)
        print(table.to_string(), flush=True)


if __name__ == "__main__":
    main()
