"""Does steering keep the tiny model's captions from naming what is not there, and does attribution add anything?

``python -m studies.tiny_vlm.captions_study --out studies/tiny_vlm/results`` (about ten minutes on one core; finished
vectors are kept and not run again). Building seeds give different scenes and so different vectors; choosing and test
scenes are fixed.
Writes ``tiny_vlm_captions.csv`` (every vector at every KL), ``tiny_vlm_yes_no.csv`` and ``tiny_vlm_partner.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import grains_tl as gr
from grains_tl.demo.scene_captions import candidates, caption_split, kl_meter, own_mistakes, tune_and_test
from grains_tl.demo.scene_questions import false_yes_questions, partner_share, yes_attributions
from studies.tiny_vlm.yes_no_study import yes_no_study

LAYERS = (1, 2, 3)
KLS = (0.05, 0.2)
N = {"build": 50, "choose": 150, "test": 500, "kl": 60}


def captions_study(model: Any, out: Path, seeds: Sequence[int], n_random: int) -> pd.DataFrame:
    """One row per vector and KL; goes on from the rows in ``out``."""
    done = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=["seed", "vector"])
    have = set(zip(done["seed"], done["vector"], strict=True))
    choose, test = (caption_split(model, part, N[part]) for part in ("choose", "test"))  # type: ignore[arg-type]
    meter = kl_meter(model, choose, n=N["kl"])
    print(f"unsteered, test: {test.scores}")
    rows = [] if done.empty else [done]
    like = None
    for seed in tqdm(seeds, desc="seed"):
        vectors, about = candidates(model, own_mistakes(model, N["build"], seed=100 + seed), layers=LAYERS, seed=seed)
        print(json.dumps(about))
        like = like or vectors["CAA"]
        draws = gr.baselines.random_direction_vectors(like, n_draws=n_random, seed=seed)
        vectors |= {f"random direction {i}": v for i, v in enumerate(draws, start=1)}
        for name, vector in vectors.items():
            if (seed, name) in have:
                continue
            found = tune_and_test(model, vector, choose=choose, test=test, meter=meter, kls=KLS, layers=LAYERS)
            base = {"base": test.scores.hallucinating, "base_coverage": test.scores.coverage}
            rows.append(
                pd.DataFrame([{"seed": seed, "vector": name, **base, **row} for row in found]).drop(
                    columns="per_caption"
                )
            )
            pd.concat(rows).to_csv(out, index=False, float_format="%.5g")
    return pd.concat(rows)


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Per kind of vector: mean over draws at each KL, and with the KL chosen too ("free")."""
    frame = frame.assign(kind=frame["vector"].str.replace(r" \d+$", "", regex=True))
    free = frame[frame["free"]].assign(kl="free")
    both = pd.concat([frame, free])
    grouped = both.groupby(["kl", "kind"], sort=False)
    table = grouped.agg(
        hallucinating=("hallucinating", "mean"),
        least=("hallucinating", "min"),
        most=("hallucinating", "max"),
        se_test=("se", "mean"),
        coverage=("coverage", "mean"),
        f1=("f1", "mean"),
        vectors=("hallucinating", "size"),
    )
    table["sd_vectors"] = grouped["hallucinating"].std()
    return table.reset_index()


def partner_study(model: Any, out: Path, n: int = 150) -> None:
    """Where the support for a false yes lies, by each attribution."""
    questions = false_yes_questions(model, n)
    found = {}
    methods: tuple[tuple[str, int], ...] = (
        ("leave_one_out", 1),
        ("gradient_x_input", 1),
        ("integrated_gradients", 32),
        ("integrated_gradients", 128),
    )
    for method, n_steps in methods:
        name = f"{method}, {n_steps} steps" if method == "integrated_gradients" else method
        found[name] = partner_share(model, questions, yes_attributions(model, questions, method, n_steps=n_steps))
        print(name, found[name], flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="studies/tiny_vlm/results")
    parser.add_argument("--seeds", type=int, default=5, help="building seeds")
    parser.add_argument("--only", action="append", choices=["captions", "partner", "yes_no"], help="only this part")
    parser.add_argument("--random", type=int, default=2, help="random directions per seed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = gr.load_model("tiny-vlm")
    parts = args.only or ["partner", "yes_no", "captions"]
    if "partner" in parts:
        partner_study(model, out / "tiny_vlm_partner.json")
    if "yes_no" in parts:
        table = yes_no_study(model, seeds=range(args.seeds), n_random=args.random)
        table.to_csv(out / "tiny_vlm_yes_no.csv", index=False, float_format="%.5g")
        print(table.to_string(index=False, float_format="{:.3f}".format))
    if "captions" in parts:
        frame = captions_study(model, out / "tiny_vlm_captions.csv", range(args.seeds), args.random)
        print(summarize(frame).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
