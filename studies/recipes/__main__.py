"""Measure recipes on models and sets, one line per vector.

    python -m studies.recipes --model smollm2 --set reviews --out studies/results/recipes
    python -m studies.recipes --model qwen=FOLDER --set survival-instinct --data FOLDER

``--model`` is a name that ``gr.load_model`` knows, or ``label=path`` of a folder or GGUF file. Whatever is finished is
kept: a run that was stopped goes on where it was. ``python -m studies.recipes.report`` makes tables, plots and the page.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from studies.pieces import load, settings
from studies.recipes.cell import extras, prepare, run_cell, timed_line, write_about
from studies.recipes.directions import ATTRIBUTED, RECIPES, VARIANTS
from studies.recipes.parts import N_FISHER, contributions, fisher_of
from studies.recipes.sets import SAMPLE, SIZES, record_set
from studies.recipes.texts import write_texts

#: Candidate layers, as shares of the depth.
DEPTHS = (0.25, 0.4, 0.5, 0.6, 0.75)


def main() -> None:
    """Parse the command line and run one model on its sets, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--data", type=Path, help="folder with truthfulqa/ and anthropic_evals/")
    parser.add_argument("--out", type=Path, default=Path("studies/results/recipes"))
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"), help="contributions and Fisher samples")
    parser.add_argument("--layers", type=int, nargs="+", help="default: at five depths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=10, help="building samples at most")
    parser.add_argument("--fisher", type=int, default=N_FISHER, help="samples for the Fisher matrix")
    parser.add_argument("--random", type=int, default=4, help="random-token draws per building sample")
    parser.add_argument("--skip", nargs="*", default=[], choices=(*RECIPES, *VARIANTS), help="recipes to leave out")
    parser.add_argument("--small", action="store_true", help="fewer records, for a CPU")
    parser.add_argument("--extras", action="store_true", help="curves, wordings, numbers of records, transfer")
    parser.add_argument("--texts", action="store_true", help="generated texts of the reviews")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    label, model = load(args.model, args.device)
    layers = args.layers or [round(d * int(model.cfg.n_layers)) for d in DEPTHS]
    (args.out / label).mkdir(parents=True, exist_ok=True)
    with settings(args.device):
        timed_line(begin, f"{label} loaded, layers {layers}")
        fisher = fisher_of(model, layers, args.work / label / "fisher.safetensors", args.fisher)
        timed_line(begin, f"{len(fisher.samples)} Fisher samples")
        for name in args.set:
            records = record_set(name, args.data, small=args.small)
            records = replace(records, build=records.build[: args.samples * SAMPLE])
            masking = not set(ATTRIBUTED) <= set(args.skip)
            parts = contributions(model, records.build, layers, args.work / label / f"{name}.pt", masking=masking)
            timed_line(begin, f"{name}: contributions, CPU seconds per record {parts.seconds}")
            cell, base = prepare(model, records, layers, parts, fisher, args.out / label / f"{name}.jsonl")
            cell.recipes = [recipe for recipe in (*RECIPES, *VARIANTS) if recipe not in args.skip]
            best = run_cell(cell, args.random)
            write_about(cell, label, best, base, args.out / label / f"{name}.json")
            timed_line(begin, f"{name}: measured, layers {best}")
            if args.extras:
                others = {
                    n: record_set(n, args.data) for n in SIZES if n != name and (args.data or n == "misconceptions")
                }
                extras(cell, best, others)
                timed_line(begin, f"{name}: extras")
            if args.texts:
                write_texts(cell, best, args.out / label / f"{name}-texts.jsonl")
                timed_line(begin, f"{name}: texts")


if __name__ == "__main__":
    main()
