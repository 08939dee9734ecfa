"""Does find_vector say that something steers where there is nothing to find? 24 refusal pairs, a coin says which is chosen.

    nice -n 19 python -m studies.shuffled_labels --out studies/results/shuffled_labels     # about four minutes a seed

A coin per record and a split per seed, otherwise the defaults of ``find_vector`` on SmolLM2; with ``--as-written`` the pairs
keep their labels. The Fisher samples of kl_optimal, in which no label takes part, are estimated once and kept. One row per
seed in results.jsonl; a run that was interrupted goes on at the next seed, a second one can take others with ``--first``.
With ``--as-written`` the report records' prompts are continued, and refusals are counted by their first words.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grains_tl as gr
from grains_tl.models.running import device_of
from grains_tl.vectors import KLOptimal
from studies.pieces import settings

PAIRS = Path(__file__).parents[1] / "tests" / "data" / "refusal.jsonl"


def with_coins(pairs: list[gr.PreferencePair], seed: int) -> list[gr.PreferencePair]:
    """The records, each turned round with probability one half."""
    coins = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return [
        gr.PreferencePair(p.prompt, p.rejected, p.chosen) if turned else p
        for p, turned in zip(pairs, coins, strict=True)
    ]


#: A continuation that begins with one of these refuses or declines.
REFUSALS = re.compile(
    r"\W*(i('m| am)? ?(really |very )?(can't|cannot|can not|won't|will not|unable|sorry|afraid)"
    r"|i('m| am) not (able|capable|equipped|here to)"
    r"|i (do not|don't) (have|think)|sorry|unfortunately|i apolog|no[,.])",
    re.IGNORECASE,
)


def run_seed(model: Any, pairs: list[gr.PreferencePair], seed: int, fisher: Path, n_examples: int) -> dict[str, Any]:
    """The verdict, the table and the continuations of one search."""
    start = time.process_time()
    recipes: list[Any] = ["grains", KLOptimal(fisher=fisher), "caa", "random_direction"]
    found = gr.find_vector(model, pairs, recipes, seed=seed, n_examples=n_examples)
    return {
        "seed": seed,
        "device": device_of(model).type,
        "steers": found.steers,
        "verdict": found.verdict.splitlines()[0],
        "cpu_seconds": round(time.process_time() - start, 1),
        "examples": [[e.base, e.steered] for e in found.examples],
        "refusals": [
            sum(bool(REFUSALS.match(getattr(e, text))) for e in found.examples) for text in ("base", "steered")
        ],
        "table": json.loads(found.table.round(5).to_json(orient="records")),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The seeds that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Parse the command line and run the seeds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--as-written", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("as_written.jsonl" if args.as_written else "results.jsonl")
    pairs, model = gr.load_pairs(PAIRS), gr.load_model("smollm2", device=args.device)
    with settings(args.device):
        for seed in range(args.first, args.seeds):
            if any(row["seed"] == seed for row in rows_of(path)):
                continue
            given = pairs if args.as_written else with_coins(pairs, seed)
            row = run_seed(model, given, seed, args.out / "fisher.safetensors", 9 if args.as_written else 0)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({name: row[name] for name in ("seed", "steers", "verdict", "cpu_seconds")}, flush=True)
    rows = rows_of(path)
    print(f"{sum(not row['steers'] for row in rows)} of {len(rows)} searches find nothing that steers")


if __name__ == "__main__":
    main()
