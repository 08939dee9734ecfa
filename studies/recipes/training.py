"""Vectors that are trained on each building sample, added to a model and set that are measured already.

    python -m studies.recipes.training --model smollm2 --set reviews

Each is trained at the layer where the KL-optimal direction was best, from that direction, with the options given here.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from studies.pieces import load, settings
from studies.recipes.cell import prepare, timed_line
from studies.recipes.parts import contributions, fisher_of
from studies.recipes.sets import SAMPLE, SIZES, record_set


def main() -> None:
    """Train and measure every building sample that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", choices=list(SIZES), default="reviews")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("studies/results/recipes"))
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"))
    parser.add_argument("--loss", default="margin")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=10, help="building samples at most, as in the first run")
    parser.add_argument("--layer", type=int, help="instead of the KL-optimal direction's, while that is not known yet")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    label, model = load(args.model, args.device)
    about_file = args.out / label / f"{args.set}.json"
    about = json.loads(about_file.read_text(encoding="utf-8")) if args.layer is None else None
    layer = about["layers"]["kl_optimal"] if about else args.layer
    records = record_set(args.set, args.data)
    records = replace(records, build=records.build[: args.samples * SAMPLE])
    with settings(args.device):
        fisher = fisher_of(model, [layer], args.work / label / f"fisher-{layer}.safetensors")
        file = args.work / label / f"{args.set}-{layer}.pt"
        parts = contributions(model, records.build, [layer], file, masking=False)
        cell, _ = prepare(model, records, [layer], parts, fisher, args.out / label / f"{args.set}.jsonl")
        seconds = []
        for sample, rows in cell.samples():
            file = args.work / label / f"{args.set}-trained-{args.loss}-{sample}.safetensors"
            if not file.exists():
                start = time.process_time()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.device == "cpu"):
                    found = gr.build_vectors(
                        model,
                        [records.build[i] for i in rows],
                        recipe="trained",
                        layers=[layer],
                        loss=args.loss,
                        n_steps=args.steps,
                        fisher=fisher.at([layer]),
                    )
                found.save(file)
                seconds.append((time.process_time() - start) / len(rows))
            vectors = gr.load_vectors(file)
            cell.measure("test", "trained", layer, rows, sample=sample, vectors=vectors)
            timed_line(begin, f"sample {sample}, CPU seconds per record {seconds}")
    if about is None:
        return
    about["layers"]["trained"] = layer
    if seconds:
        about["seconds_per_record"].setdefault(args.device, {})["trained"] = round(sum(seconds) / len(seconds), 2)
    write_atomically(about_file, json.dumps(about, indent=1).encode())


if __name__ == "__main__":
    main()
