"""Operators at equal KL: what adding, turning, clipping and matching of means achieve for the same price.

    python -m studies.operators --out studies/results/operators                         # SmolLM2; resumes
    python -m studies.operators --out studies/results/operators --model gemma=PATH      # another one
    python -m studies.operators --out studies/results/operators --tables                # prints what is there

Vectors of two recipes from several draws of building reviews. Every operator gets the alpha at which it costs 0.05 nats per
token of neutral text, and its effect on the same test reviews is measured. ``match 3`` matches the class means in the
subspace of the vector and the two largest principal components of the records' differences. Every draw and recipe is a
file of its own and is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl._util.stats import crossed_interval
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.records.loading import neutral_texts
from grains_tl.vectors.building import BuildingRecords
from studies.pieces import load

#: Operators and the alpha from which the search for the KL begins.
STARTS = {"add_renorm": 0.1, "add": 0.1, "rotate": 0.2, "clip": 0.2, "match": 1.0, "match 3": 0.5}
RECIPES = ("caa", "margin_gradient")
KL, AGAINST = 0.05, "add_renorm"
N_DRAWS, N_BUILD, N_TEST = 4, 20, 40


def steps_of(model: Any, vectors: Any, pairs: Any, layer: int, starts: dict[str, float]) -> dict[str, Any]:
    """The operators' steps, to be scaled."""
    vectors = vectors.with_means(model, pairs)
    made: dict[str, Any] = {
        name: vectors.steering(alpha, layer, operator=name) for name, alpha in starts.items() if name != "match 3"
    }
    records = BuildingRecords(model, gr.tokens.tokenize_pairs(model, pairs), (layer,))
    differences = records.response_differences[:, 0].double()
    components = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[:2]
    more = [
        gr.SteeringVectors.from_raw(c[None].float(), [layer], vectors.resid_norms, {"model": vectors.info.get("model")})
        for c in components
    ]
    across = sum(one.steering(0.1, layer, operator="add") for one in [vectors, *more]).orthogonal()
    made["match 3"] = sum(
        part.vectors.with_means(model, pairs).steering(starts["match 3"], layer, operator="match")
        for part in across.parts
    )
    return made


def measured(
    model: Any, recipe: str, draw: int, layer: int, small: bool, starts: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One row for every operator: what it costs, and its change of each test record's margin."""
    build = random.Random(draw).sample(gr.load_bundled("sentiment", "build"), 6 if small else N_BUILD)
    test = random.Random(1000).sample(gr.load_bundled("sentiment", "test"), 4 if small else N_TEST)
    texts = neutral_texts(2 if small else 12)
    vectors = gr.build_vectors(model, build, recipe=recipe, layers=[layer])
    steps = steps_of(model, vectors, build, layer, starts)
    found, spent = at_kl(model, list(steps.values()), KL, texts)
    frame = gr.evaluate.record_effects(
        model, test, [gr.evaluate.Setting.of(one, vector=name) for name, one in zip(steps, found, strict=True)]
    )
    for (name, first), step, kl in zip(steps.items(), found, spent, strict=True):
        changes = frame.loc[frame["vector"] == name, "change"]
        alpha = step.parts[0].alpha
        yield {
            "operator": name,
            "alpha": alpha,
            "kl": float(kl),
            "changes": [round(float(x), 5) for x in changes],
            "scaled_by": alpha / first.parts[0].alpha,
        }


def beginnings(out: Path, label: str, recipe: str) -> dict[str, float]:
    """Where the search for each alpha begins: at what another draw found, if there is one."""
    files = sorted(out.glob(f"{label}_{recipe}_draw*.json"))
    rows = json.loads(files[-1].read_text())["rows"] if files else []
    return STARTS | {row["operator"]: row["alpha"] for row in rows}


def tables(out: Path) -> pd.DataFrame:
    """Effects over records and draws, and their differences from the paper's operator."""
    rows = []
    files = sorted(out.glob("*_draw*.json"))
    pieces = [json.loads(file.read_text()) for file in files]
    for model, recipe in sorted({(piece["model"], piece["recipe"]) for piece in pieces}):
        own = [piece["rows"] for piece in pieces if (piece["model"], piece["recipe"]) == (model, recipe)]
        for number, name in enumerate(row["operator"] for row in own[0]):
            changes = np.array([draw[number]["changes"] for draw in own])
            against = np.array([next(r["changes"] for r in draw if r["operator"] == AGAINST) for draw in own])
            effect, low, high = crossed_interval(changes)
            more, more_low, more_high = crossed_interval(changes - against)
            rows.append(
                {
                    **{"model": model, "recipe": recipe, "operator": name, "draws": len(own), "n": changes.shape[1]},
                    **{"effect": effect, "low": low, "high": high},
                    **{"more": more, "more_low": more_low, "more_high": more_high},
                    "alpha": float(np.mean([draw[number]["alpha"] for draw in own])),
                    "kl": float(np.mean([draw[number]["kl"] for draw in own])),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure what is missing, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2", help="smollm2, another name, or LABEL=PATH")
    parser.add_argument("--layer", type=int, help="default 18 of SmolLM2, else six tenths of the way")
    parser.add_argument("--draws", type=int, default=N_DRAWS)
    parser.add_argument("--small", action="store_true", help="a few records, to try it out")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        label, model = load(args.model, args.device)
        layer = args.layer or (18 if label == "smollm2" else round(0.6 * model.cfg.n_layers))
        for draw in range(1 if args.small else args.draws):
            for recipe in RECIPES:
                file = args.out / f"{label}_{recipe}_draw{draw}.json"
                if file.exists():
                    continue
                start = time.time()
                starts = beginnings(args.out, label, recipe)
                rows = list(measured(model, recipe, draw, layer, args.small, starts))
                piece = {"model": label, "recipe": recipe, "draw": draw, "layer": layer, "rows": rows}
                write_atomically(file, json.dumps(piece, indent=1).encode())
                print(f"{file.name}: {time.time() - start:.0f} s", flush=True)
    print(tables(args.out).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
