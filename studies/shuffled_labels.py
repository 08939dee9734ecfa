"""Does find_vector say that something steers where there is nothing to find? 24 refusal pairs, a coin says which is chosen.

    nice -n 19 python -m studies.shuffled_labels --out studies/results/shuffled_labels     # about four minutes a seed

A coin per record and a split per seed, otherwise the defaults of ``find_vector`` on SmolLM2; with ``--as-written`` the pairs
keep their labels. One row per seed and recipe in results.jsonl; a run that was interrupted goes on at the next seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grains_tl as gr

PAIRS = Path(__file__).parents[1] / "tests" / "data" / "refusal.jsonl"


def with_coins(pairs: list[gr.PreferencePair], seed: int) -> list[gr.PreferencePair]:
    """The records, each turned round with probability one half."""
    coins = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return [
        gr.PreferencePair(p.prompt, p.rejected, p.chosen) if turned else p for p, turned in zip(pairs, coins, strict=True)
    ]


def run_seed(model: Any, pairs: list[gr.PreferencePair], seed: int, recipes: list[str] | None) -> dict[str, Any]:
    """The verdict and the table of one search."""
    start = time.process_time()
    given = {} if recipes is None else {"recipes": recipes}
    found = gr.find_vector(model, pairs, seed=seed, n_examples=0, **given)
    return {
        "seed": seed,
        "steers": found.steers,
        "verdict": found.verdict.splitlines()[0],
        "cpu_seconds": round(time.process_time() - start, 1),
        "table": json.loads(found.table.round(5).to_json(orient="records")),
    }


def main() -> None:
    """Parse the command line and run the seeds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--as-written", action="store_true")
    parser.add_argument("--recipes", help="separated by commas; default those of find_vector")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("as_written.jsonl" if args.as_written else "results.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    pairs, model = gr.load_pairs(PAIRS), gr.load_model("smollm2")
    with gr.settings(progress=False):
        for seed in range(args.seeds):
            if any(row["seed"] == seed for row in rows):
                continue
            given = pairs if args.as_written else with_coins(pairs, seed)
            rows.append(run_seed(model, given, seed, args.recipes.split(",") if args.recipes else None))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print({name: rows[-1][name] for name in ("seed", "steers", "verdict", "cpu_seconds")}, flush=True)
    print(f"{sum(not row['steers'] for row in rows)} of {len(rows)} searches find nothing that steers")


if __name__ == "__main__":
    main()
