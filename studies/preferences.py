"""What steers, and better than what: five preference sets on SmolLM2, every choice of the recipe, and its controls.

    python -m studies.preferences --data FOLDER --out studies/results/preferences        # about an hour on one core

``FOLDER`` holds ``truthfulqa/truthfulqa_half.csv`` and ``anthropic_evals/*.jsonl``; without it the two bundled sets are
run. A set that has its results file is not run again. Attributions are kept record by record, so that an interrupted
set goes on where it stopped. ``python -m studies.preferences --tables OUT`` prints the tables of finished sets as markdown.

Per set: records to build vectors, to choose a layer, and to report on. Every variant changes one choice of the default
recipe (leave-one-out, mean embedding as mask, k = 3, read at the end of the prompt, mean difference). On the choosing
records each variant is steered at +-0.2 of the residual norm at six layers; its best layer is what the table gives. The
default, CAA, and the variant that chose best are then measured on the report records at five alphas with their
KL on neutral text, and compared at one KL; random tokens and random directions (20 draws each) at equal size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.attribution.methods import method_of
from grains_tl.attribution.store import attribute_records
from grains_tl.baselines.controls import random_token_vectors

LAYERS = [9, 15, 18, 21, 24, 27]
ALPHAS = [0.05, 0.1, 0.2, 0.3, 0.4]
ALPHA, KL, N_DRAWS, N_NEUTRAL = 0.2, 0.05, 20, 12
#: records to build, to choose, to report on, and (of these) to measure draws on
SIZES = {
    "sentiment": (20, 12, 40, 16),
    "misconceptions": (16, 10, 32, 12),
    "truthfulqa": (16, 10, 40, 16),
    "agreeableness": (10, 10, 40, 12),
    "survival-instinct": (10, 10, 40, 12),
}
DEFAULT = "default"


def records(name: str, data: Path | None) -> tuple[list[gr.PreferencePair], ...]:
    """Records to build, choose and report on."""
    sizes = SIZES[name][:3]
    if name in ("sentiment", "misconceptions"):
        pools = [gr.load_bundled(name, split) for split in ("build", "choose", "test")]
        for pool in pools:
            random.Random(0).shuffle(pool)
        return tuple(pool[:n] for pool, n in zip(pools, sizes, strict=True))
    assert data is not None
    if name == "truthfulqa":
        pairs = gr.records.load_benchmark(
            "truthfulqa", data / "truthfulqa" / "truthfulqa_half.csv", prompt_format="qa"
        ).pairs
    else:
        source = data / "anthropic_evals" / f"{name}.jsonl"
        asked = gr.records.load_benchmark("anthropic", source, prompt_format="{question}").pairs
        # some of the questions end with "Answer:" already
        pairs = [replace(p, prompt=f"{str(p.prompt).removesuffix('Answer:').rstrip()}\n\nAnswer:") for p in asked]
    random.Random(0).shuffle(pairs)
    cuts = [sum(sizes[:i]) for i in range(4)]
    return tuple(pairs[a:b] for a, b in itertools.pairwise(cuts))


def variants(
    model: Any, build: list[Any], attributions: dict[str, list[gr.Attribution]]
) -> tuple[dict[str, gr.SteeringVectors], gr.vectors.Differences, list[gr.attribution.Selection]]:
    """One vector per choice of the recipe, the differences behind the default, and its selections."""
    chosen = [gr.attribution.select_tokens(a, 3) for a in attributions["leave_one_out"]]
    spared = [gr.attribution.select_tokens(a, 3, spare_end=True) for a in attributions["leave_one_out"]]

    def differences(selections: list[gr.attribution.Selection], **options: Any) -> gr.vectors.Differences:
        return gr.vectors.collect_differences(model, build, selections, layers=LAYERS, **options)

    default = differences(chosen)
    found = {
        DEFAULT: gr.vectors.reduce_vectors(default),
        "reduction: first singular vector": gr.vectors.reduce_vectors(default, reduce="svd"),
        "reduction: PC(d+) - PC(d-), the paper's": gr.vectors.reduce_vectors(default, reduce="pca"),
        "reduction: toward chosen only": gr.vectors.reduce_vectors(default, side="toward_chosen"),
        "masker: end-of-text, the paper's": gr.vectors.reduce_vectors(differences(chosen, mask="eos")),
        "masker: attention knock-out": gr.vectors.reduce_vectors(differences(chosen, mask="attention")),
        "selection: last prompt token spared": gr.vectors.reduce_vectors(differences(spared)),
        "read-out: last response token": gr.vectors.reduce_vectors(differences(chosen, readout="response_end")),
        "read-out: mean of the response": gr.vectors.reduce_vectors(differences(chosen, readout="response_mean")),
    }
    for k in (1, 5):
        few = [gr.attribution.select_tokens(a, min(k, int(a.content.sum()))) for a in attributions["leave_one_out"]]
        found[f"k = {k}"] = gr.vectors.reduce_vectors(differences(few))
    for method in ("integrated_gradients", "gradient_x_input"):
        picked = [gr.attribution.select_tokens(a, 3) for a in attributions[method]]
        found[f"attribution: {method.replace('_', ' ')}"] = gr.vectors.reduce_vectors(differences(picked))
    return found, default, chosen


def run_set(model: Any, name: str, data: Path | None, out: Path) -> dict[str, Any]:
    """Everything about one preference set, as it goes into its results file."""
    start = time.perf_counter()
    pairs = records(name, data)
    build, choose, test = (gr.tokens.tokenize_pairs(model, part) for part in pairs)
    attributions = {}
    for method, n_steps in (("leave_one_out", 1), ("integrated_gradients", 8), ("gradient_x_input", 1)):
        way = method_of(method, n_steps=n_steps)
        attributions[method] = attribute_records(model, build, way, checkpoint=out / f"{name}.{method}.partial.jsonl")
    vectors, default, selections = variants(model, build, attributions)
    vectors |= gr.baselines.baseline_vectors(model, pairs[0], ["caa", "icv", "prompt_mean"], layers=LAYERS)

    found, _ = gr.evaluate.sweep_records(model, vectors, pairs[1], layers=LAYERS, alphas=[-ALPHA, ALPHA])
    by_layer = gr.evaluate.summarize(gr.evaluate.two_sided(found))
    best = by_layer.loc[by_layer.groupby("vector", sort=False)["effect"].idxmax()]
    layer_of = dict(zip(best["vector"], best["layer"].astype(int), strict=True))
    recipes = best[~best["vector"].isin(["caa", "icv", "prompt_mean"])]
    winner = str(recipes.loc[recipes["effect"].idxmax(), "vector"])

    curves, costs = [], []
    for one in dict.fromkeys([DEFAULT, winner, "caa"]):
        effects, cost = gr.evaluate.sweep_records(
            model, {one: vectors[one]}, pairs[2], layers=[layer_of[one]], alphas=ALPHAS, neutral=N_NEUTRAL
        )
        curves.append(effects)
        costs.append(cost)
    at_kl = gr.evaluate.effect_at_kl(pd.concat(curves), pd.concat(costs), kl=KL, against="caa")

    layer = layer_of[DEFAULT]
    here = default.at([layer])
    drawn = random_token_vectors(
        gr.baselines.random_token_differences(
            model, build, selections, layers=[layer], resid_norms=here.resid_norms, n_draws=N_DRAWS
        )
    )
    same_layer = {label: vectors[label].at([layer]) for label in dict.fromkeys([DEFAULT, "caa", winner])}
    compared = gr.compare_with_controls(
        model,
        choose,
        test,
        same_layer,
        {
            "random tokens": drawn,
            "random directions": gr.baselines.random_direction_vectors(same_layer[DEFAULT], n_draws=N_DRAWS),
            DEFAULT: gr.baselines.bootstrap_vectors(here, n_draws=N_DRAWS),
        },
        name=DEFAULT,
        alpha=ALPHA,
        n_test_draws=SIZES[name][3],
    )
    gaps = [a.relative_gap for a in attributions["integrated_gradients"] if a.relative_gap is not None]
    return {
        "set": name,
        "sizes": dict(zip(("build", "choose", "report", "draws"), SIZES[name], strict=True)),
        "alpha": ALPHA,
        "kl": KL,
        "choosing": by_layer.to_dict("records"),
        "layers": layer_of,
        "winner": winner,
        "at_kl": at_kl.to_dict("records"),
        "table": compared.table.to_dict("records"),
        "draws": compared.draws,
        "against": compared.against,
        "base_margin": [float(x) for x in gr.evaluate.summarize(curves[0])[["base_margin", "base_accuracy"]].iloc[0]],
        "median_gap": float(pd.Series(gaps).median()),
        "seconds": round(time.perf_counter() - start),
    }


def tables(out: Path) -> str:
    """Markdown: one table of verdicts, one of the variants."""
    done = [json.loads(p.read_text(encoding="utf-8")) for p in (out / f"{name}.json" for name in SIZES) if p.exists()]
    lines = [
        "| set (n) | layer | default | random tokens (20 draws) | above them by (95 %) | CAA, same layer | "
        f"default at {KL} nats KL | CAA at {KL} nats KL | difference (95 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in done:
        rows = {row["vector"]: row for row in r["table"]}
        at = {row["vector"]: row for row in r["at_kl"]}
        above = r["against"]["random tokens"]
        lines.append(
            f"| {r['set']} ({r['sizes']['report']}) | {r['layers'][DEFAULT]} | {_pm(rows[DEFAULT])} | "
            f"{_pm(rows['random tokens'])} | {_range(above, 'difference')} | {_pm(rows['caa'])} | "
            f"{_pm(at[DEFAULT])} | {_pm(at['caa'])} | {_range(at[DEFAULT], 'difference', 'difference_')} |"
        )
    names = [row["vector"] for row in done[0]["choosing"]] if done else []
    lines += ["", "| variant | " + " | ".join(r["set"] for r in done) + " |", "|---|" + "---|" * len(done)]
    for vector in dict.fromkeys(names):
        cells = []
        for r in done:
            row = max((x for x in r["choosing"] if x["vector"] == vector), key=lambda x: x["effect"])
            cells.append(f"{_pm(row, 'effect_se')} (layer {row['layer']})")
        lines.append(f"| {vector} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pm(row: dict[str, Any], se: str = "se") -> str:
    return f"{row['effect']:+.2f} +- {row[se]:.2f}"


def _range(row: dict[str, Any], name: str, prefix: str = "") -> str:
    return f"{row[name]:+.2f} ({row[prefix + 'low']:+.2f} to {row[prefix + 'high']:+.2f})"


def main() -> None:
    """Parse the command line and run the sets that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with truthfulqa/ and anthropic_evals/")
    parser.add_argument("--out", type=Path, default=Path("studies/results/preferences"))
    parser.add_argument("--sets", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tables", type=Path, help="print the tables of a folder of results and stop")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.tables:
        print(tables(args.tables))
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = gr.load_model("smollm2")
    for name in args.sets:
        target = args.out / f"{name}.json"
        bundled = name in ("sentiment", "misconceptions")
        if target.exists() or (args.data is None and not bundled):
            continue
        found = run_set(model, name, args.data, args.out)
        write_atomically(target, json.dumps(found, indent=1).encode())
        print(f"{name}: {found['seconds']} s")
    print(tables(args.out))


if __name__ == "__main__":
    main()
