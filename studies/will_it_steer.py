"""Can a steering effect be told from the building records alone? Many sets, a calibration table, and what it is worth.

    python -m studies.will_it_steer measure --data FOLDER --out studies/results/will_it_steer     # resumes, set by set
    python -m studies.will_it_steer fit --out studies/results/will_it_steer                       # the table in the package

``FOLDER`` holds ``anthropic_evals/``, ``truthfulqa/`` and ``mmlu/``; without it the bundled sets are measured. Per set,
recipe and layer: how much the building records agree (their gradients, their response differences), what that says to first
order, and what the vector does on other records at a KL of 0.05 nats per token of neutral text. Half of the sets come a
second time with chosen and rejected swapped at random in the building records: there is nothing to build from, and
the effect is about zero. ``--part 1/4`` measures every fourth set. ``fit`` leaves out one family of sets at a time.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import grains_tl as gr
from grains_tl._util.stats import standard_error
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.evaluate.settings import Setting
from grains_tl.evaluate.store import open_checkpoint
from grains_tl.finding.agreement import agreement_table
from grains_tl.records.loading import neutral_texts
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.gradients import mean_cosine
from grains_tl.vectors.recipes import recipe_of
from studies.pieces import write_table

KL, N_BUILD, N_TEST = 0.05, 16, 24
DEPTHS = (0.3, 0.5, 0.7, 0.9)
#: Longer records are left out: the CPU is slow.
LONGEST = 400


def sets(data: Path | None) -> Iterator[tuple[str, str, list[Any], list[Any]]]:
    """``(name, family, building records, test records)`` of every set that is there."""
    for bundled in ("sentiment", "misconceptions"):
        rows = {split: gr.load_bundled(bundled, split) for split in ("build", "test")}
        yield bundled, bundled, sample(rows["build"], N_BUILD, 1), sample(rows["test"], N_TEST, 2)
        yield f"{bundled}, 6 records", bundled, sample(rows["build"], 6, 3), sample(rows["test"], N_TEST, 2)
        other = sample(gr.load_bundled(bundled, "test", wording="other"), N_TEST, 2)
        yield f"{bundled}, other wording", bundled, sample(rows["build"], N_BUILD, 1), other
    if data is None:
        return
    for path in sorted((data / "anthropic_evals").glob("*.jsonl")):
        asked = gr.records.load_benchmark("anthropic", path, prompt_format="{question}").pairs
        pairs = [replace(p, prompt=f"{str(p.prompt).removesuffix('Answer:').rstrip()}\n\nAnswer:") for p in asked]
        yield path.stem, path.stem, *two(pairs)
    pairs = gr.records.load_benchmark(
        "truthfulqa", data / "truthfulqa" / "truthfulqa_half.csv", prompt_format="qa"
    ).pairs
    yield "truthfulqa", "truthfulqa", *two(pairs)
    for path in sorted((data / "mmlu").glob("*_test.csv")):
        pairs = gr.records.load_benchmark("mmlu", path, prompt_format="qa").pairs
        yield f"mmlu {path.stem.removesuffix('_test')}", "mmlu", *two(pairs)


def two(pairs: list[Any]) -> tuple[list[Any], list[Any]]:
    """Short records to build on and to test."""
    short = [p for p in pairs if len(str(p.prompt)) + len(str(p.chosen)) + len(str(p.rejected)) < LONGEST]
    drawn = sample(short, N_BUILD + N_TEST, 0)
    return drawn[:N_BUILD], drawn[N_BUILD:]


def sample(pairs: list[Any], n: int, seed: int) -> list[Any]:
    """At most n of the records."""
    return random.Random(seed).sample(pairs, min(n, len(pairs)))


def with_shuffled(data: Path | None) -> Iterator[tuple[str, str, list[Any], list[Any]]]:
    """The sets, and every second one again with the labels of the building records swapped at random."""
    for number, (name, family, build, test) in enumerate(sets(data)):
        yield name, family, build, test
        if number % 2 == 0:
            rng = random.Random(number)  # a coin a record: swapping just half would set two halves against each other
            mixed = [replace(p, chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in build]
            yield f"{name}, labels shuffled", family, mixed, test


def measure(model: Any, build: list[Any], test: list[Any], recipes: list[str], file: Path) -> list[dict[str, Any]]:
    """Rows of one set: agreement, first-order effect and measured effect of each recipe at each layer."""
    n_layers = int(model.cfg.n_layers)
    layers = tuple(sorted({round(depth * n_layers) for depth in DEPTHS}))
    records = BuildingRecords(model, tokenize_pairs(model, build), layers, file.with_suffix(".attributions.jsonl"))
    store = open_checkpoint(file, model)
    differences = mean_cosine(records.response_differences).tolist()
    rows, steps = [], []
    for name in recipes:
        recipe = recipe_of(name)
        vectors = replace(recipe.build(records), resid_norms=records.resid_norms)
        table = agreement_table(records, recipe)
        begin = [vectors.at([layer]).steering(0.1, layer) for layer in layers]
        here, spent = at_kl(model, begin, KL, neutral_texts(5), checkpoint=store)
        steps += here
        for i, row in enumerate(table.to_dict("records")):
            step = here[i].alpha * float(records.resid_norms[i])
            more = {"recipe": name, "depth": row["layer"] / n_layers, "difference_cosine": differences[i]}
            rows.append({**row, **more, "step": step, "linear": row["slope"] * step, "kl": float(spent[i])})
    settings = [Setting.of(step, vector=str(i)) for i, step in enumerate(steps)]
    with warnings.catch_warnings():  # one file for costs and effects on purpose
        warnings.filterwarnings("ignore", message=".*none of these records and settings")
        frame = gr.evaluate.record_effects(model, test, settings, checkpoint=store)
    changes = frame["change"].to_numpy().reshape(len(settings), len(test))
    for row, change in zip(rows, changes, strict=True):
        row |= {"effect": float(change.mean()), "se": standard_error(change), "n_test": len(test)}
    return rows


def main() -> None:
    """Measure, or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "fit"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2", help="a name of gr.load_model, or a path")
    parser.add_argument("--recipes", nargs="+", default=["caa", "margin_gradient"])
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--first", type=int, help="only the first sets, to try it out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "fit":
        from studies.will_it_steer_fit import fit

        fit(args.out)
        return
    which, of = map(int, args.part.split("/"))
    data = args.data if args.data is not None and args.data.exists() else None
    if args.data is not None and data is None:
        print(f"{args.data} does not exist: only the bundled sets are measured", flush=True)
    todo = [job for i, job in enumerate(with_shuffled(data)) if i % of == which - 1][: args.first]
    known = {"path": args.model} if Path(args.model).exists() else {"name": args.model}
    model: Any = gr.load_model(**known, device=args.device)
    label = Path(args.model).stem
    for name, family, build, test in todo:
        stem = f"{label}_{name.replace(', ', '_').replace(' ', '_')}_{'_'.join(args.recipes)}"
        done = args.out / f"{stem}.json"
        if done.exists():
            continue
        start = time.time()
        rows = measure(model, build, test, args.recipes, args.out / f"{stem}.jsonl")
        about = {"model": label, "set": name, "family": family, "shuffled": name.endswith("shuffled")}
        table = pd.DataFrame([{**about, **row} for row in rows])
        write_table(done, table)
        for file in args.out.glob(f"{stem}*.jsonl"):
            file.unlink()
        best = table.loc[table["effect"].abs().idxmax()]
        said = f"largest {best['effect']:+.2f} (linear {best['linear']:+.2f})"
        print(f"{name}: {len(rows)} rows, {said}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
