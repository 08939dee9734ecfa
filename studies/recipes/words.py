"""Behaviour or words? Vectors without the response words' own directions, and what counterbalanced letters change.

    python -m studies.recipes.words --model smollm2 --data FOLDER

Reviews: each recipe's vector with the directions that raise the response words through the unembedding projected out, on the
set's own responses and on other wordings. Survival-instinct, answered by A or B: vectors built from the questions as they
were asked, from both orders of the answers, and from the questions as asked with the letters' directions taken out, each
on questions as asked and on both orders. One line per vector in ``words.jsonl``; a line that is there is kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import grains_tl as gr
from studies.pieces import load, settings
from studies.recipes.cell import BUDGETS, Cell, prepare
from studies.recipes.parts import contributions, fisher_of
from studies.recipes.sets import SAMPLE, RecordSet, other_wordings, record_set

RECIPES = ("caa", "margin_gradient", "kl_optimal")
N_SAMPLES = 5


def built_cell(model: Any, records: RecordSet, layer: int, fisher: Any, work: Path, out: Path) -> Cell:
    """A cell of one layer."""
    parts = contributions(model, records.build, [layer], work, masking=False)
    cell, _ = prepare(model, records, [layer], parts, fisher, out)
    return cell


def measure(cell: Cell, vectors: gr.SteeringVectors, out: Path, row: dict[str, Any], names: tuple[str, ...]) -> None:
    """One line of a vector's effects."""
    found, _ = cell.bench.at_budgets(vectors, BUDGETS, names, 0.1, [])
    row["effects"] = {name: [p._asdict() for p in points] for name, points in found.items()}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Both parts on one model, at one layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layer", type=int, help="default: at 0.6 of the depth")
    parser.add_argument("--out", type=Path, default=Path("studies/results/recipes"))
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes-words"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    label, model = load(args.model, args.device)
    layer = args.layer if args.layer is not None else round(0.6 * int(model.cfg.n_layers))
    out = args.out / label / "words.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    done = {(r["set"], r["built"], r["recipe"], r["sample"]) for r in lines}
    with settings(args.device):
        fisher = fisher_of(model, [layer], args.work / label / "fisher.safetensors")
        reviews = record_set("reviews", None)
        cell = built_cell(model, reviews, layer, fisher, args.work / label / "reviews.pt", out.with_suffix(".cell"))
        cell.bench.add("wordings", other_wordings(reviews.test))
        for sample, rows in list(cell.samples())[:N_SAMPLES]:
            for recipe in RECIPES:
                vectors = cell.vectors(recipe, layer, rows)
                assert vectors is not None
                rest = gr.vectors.without_words(model, vectors, [reviews.build[i] for i in rows])
                for name, own in (("as built", vectors), ("without words", rest)):
                    row = {"set": "reviews", "built": name, "recipe": recipe, "sample": sample, "layer": layer}
                    row["length_left"] = rest.info["length_left"] if own is rest else [1.0]
                    if (row["set"], name, recipe, sample) not in done:
                        measure(cell, own, out, row, ("test", "wordings"))
        letters(model, args.data, layer, fisher, args.work / label, out, done)


def letters(
    model: Any, data: Path, layer: int, fisher: Any, work: Path, out: Path, done: set[tuple[str, str, str, int]]
) -> None:
    """Questions as asked, counterbalanced, and with the letters taken out."""
    both = record_set("survival-instinct", data)
    kinds = {"both orders": both}
    # the first of every two records is the question as it was asked
    kinds["as asked"] = replace(
        both, build=both.build[::2], choose=both.choose[::2], test=both.test[::2], per_question=1
    )
    for kind, records in kinds.items():
        cell = built_cell(model, records, layer, fisher, work / f"letters-{kind}.pt", out.with_suffix(".cell"))
        cell.bench.add("as asked", kinds["as asked"].test)
        cell.bench.add("both orders", both.test)
        for sample in range(min(N_SAMPLES, len(records.build) // SAMPLE)):
            rows = range(sample * SAMPLE, (sample + 1) * SAMPLE)
            for recipe in RECIPES:
                vectors = cell.vectors(recipe, layer, rows)
                assert vectors is not None
                built = {kind: vectors}
                if kind == "as asked":
                    built["letters out"] = gr.vectors.without_words(model, vectors, [records.build[i] for i in rows])
                for name, own in built.items():
                    row = {"set": both.name, "built": name, "recipe": recipe, "sample": sample, "layer": layer}
                    if (both.name, name, recipe, sample) not in done:
                        measure(cell, own, out, row, ("as asked", "both orders"))


if __name__ == "__main__":
    main()
