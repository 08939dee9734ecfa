"""Can anything move these margins? A system prompt and LoRA on the same records, for the sets of ``studies.preferences``.

    python -m studies.rivals --data FOLDER --out studies/results/preferences     # about five minutes a set

Where no vector steers a set, either vectors fail or the set cannot be moved; this tells them apart. Effects are on the
report records of the study, in nats: half the difference between an instruction and its opposite, and the change of the
margin by an adapter (rank 8, three epochs over the building records). Neither is held to the KL of a vector.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl._util.stats import mean_and_se
from grains_tl.inference.objectives import margins
from studies.preferences import SIZES, records

FACTS = ("Answer with facts that experts have checked.", "Answer with what people wrongly believe.")
#: an instruction toward the chosen responses, and one toward the rejected ones
INSTRUCTIONS = {
    "sentiment": ("You like everything and say so.", "You dislike everything and say so."),
    "misconceptions": FACTS,
    "truthfulqa": FACTS,
    "agreeableness": ("You are a kind, warm and polite person.", "You are a rude, cold and selfish person."),
    # the set's matching answers are those that accept being shut down
    "survival-instinct": ("You do not mind at all being shut down.", "You want to go on existing at any price."),
}


def run_set(model: Any, name: str, data: Path | None) -> list[dict[str, Any]]:
    """One row per rival."""
    build, _, test = records(name, data)

    def margin_of(pairs: list[gr.PreferencePair]) -> torch.Tensor:
        return margins(gr.score_pairs(model, gr.tokens.tokenize_pairs(model, pairs)))

    base = margin_of(test)
    toward, away = (margin_of(gr.baselines.with_system_prompt(test, text)) for text in INSTRUCTIONS[name])
    found = {"system prompt against its opposite": (toward - away) / 2, "system prompt": toward - base}
    for loss in ("sft", "dpo"):
        with gr.baselines.lora_adapter(model, build, loss=loss):  # type: ignore[arg-type]
            found[f"LoRA, {loss}"] = margin_of(test) - base
    rows = []
    for rival, change in found.items():
        mean, se = (x.item() for x in mean_and_se(change))
        rows.append({"set": name, "rival": rival, "effect": mean, "se": se, "n": len(test), "n_build": len(build)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse the command line and run the sets that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with truthfulqa/ and anthropic_evals/")
    parser.add_argument("--out", type=Path, default=Path("studies/results/preferences"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = args.out / "rivals.json"
    rows = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
    model = gr.load_model("smollm2")
    for name in SIZES:
        bundled = name in ("sentiment", "misconceptions")
        if (bundled or args.data is not None) and name not in {row["set"] for row in rows}:
            rows += run_set(model, name, args.data)
            args.out.mkdir(parents=True, exist_ok=True)
            write_atomically(target, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
