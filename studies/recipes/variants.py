"""Why masked differences steer one model and hardly another: one choice of the recipe changed at a time, on reviews.

    python -m studies.recipes.variants --model qwen=FOLDER --layers 7 11 15 19

Per variant: the effect at 0.05 nats KL at each layer, the share of records whose most positive token belongs to the good
word (and whose most negative one to the bad word), how often the first or last token is taken, and the cosine with CAA.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution.removal import leave_out_scores
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.vectors.building import BuildingRecords
from studies.pieces import load, settings
from studies.recipes.bench import Bench
from studies.recipes.parts import masked_differences
from studies.recipes.sets import record_set

INSTRUCTION = "Complete this review with its last words.\n"

#: name -> what differs from the default: mask, read-out, tokens spared, chat template, or the words themselves.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "first token spared": {"spare": "first"},
    "last token spared": {"spare": "last"},
    "first and last token spared": {"spare": "both"},
    "the words themselves instead of attributed tokens": {"words": True},
    "mask: end-of-text": {"mask": "eos"},
    "mask: attention knock-out": {"mask": "attention"},
    "read-out: last response token": {"readout": "response_end"},
    "chat template": {"chat": True},
}


def in_chat(pairs: Sequence[gr.PreferencePair]) -> list[gr.PreferencePair]:
    """The same reviews as a request to an assistant."""
    return [replace(p, prompt=[{"role": "user", "content": INSTRUCTION + str(p.prompt)}]) for p in pairs]


def word_places(record: TokenizedPair, word: str) -> list[int]:
    """Places, among the content tokens, of the tokens that spell a word."""
    strings = [s for s, keep in zip(record.strings, record.content, strict=True) if keep]
    text, spans = "", []
    for s in strings:
        spans.append((len(text), len(text) + len(s)))
        text += s
    start = text.find(word)
    return [i for i, (a, b) in enumerate(spans) if start >= 0 and a < start + len(word) and b > start]


def spared(scores: Tensor, record: TokenizedPair, which: str | None) -> Tensor:
    """Scores of content tokens with those that are spared at 0."""
    places = [p for p, keep in enumerate(record.content) if keep]
    out = scores.clone()
    if which in ("first", "both") and places[0] <= 1:
        out[0] = 0
    if which in ("last", "both") and places[-1] == len(record.prompt) - 1:
        out[-1] = 0
    return out


class Masked:
    """Leave-one-out scores and masked differences, run once for all variants that share them."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self.layers = model, layers
        self.scores: dict[tuple[str, bool], list[Tensor]] = {}
        self.masked: dict[tuple[str, str, bool], list[Tensor]] = {}

    def of(self, records: Sequence[TokenizedPair], variant: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of every prompt token, and ``[content token, layer, d_model]`` differences, per record."""
        chat, mask = variant.get("chat", False), variant.get("mask", "mean_embedding")
        readout = variant.get("readout", "prompt_end")
        if (mask, chat) not in self.scores:
            groups = [[[p] for p, keep in enumerate(t.content) if keep] for t in records]
            self.scores[mask, chat] = leave_out_scores(self.model, records, groups, objective="sum", mask=mask)[0]
        if (mask, readout, chat) not in self.masked:
            options = {"mask": mask, "readout": readout}
            self.masked[mask, readout, chat] = masked_differences(self.model, records, self.layers, **options)
        return self.scores[mask, chat], self.masked[mask, readout, chat]


def built(
    store: Masked, pairs: Sequence[gr.PreferencePair], variant: dict[str, Any]
) -> tuple[Tensor, dict[str, float]]:
    """``[layer, d_model]`` of one variant, and what its tokens are."""
    records = tokenize_pairs(store.model, pairs)
    found, differences = store.of(records, variant)
    total = torch.zeros_like(differences[0][0])
    counts = {"good": 0, "bad": 0, "first": 0, "last": 0}
    for pair, record, scores, masked in zip(pairs, records, found, differences, strict=True):
        own = spared(scores[torch.tensor(record.content)], record, variant.get("spare"))
        good, bad = (word_places(record, str(pair.meta[k])) for k in ("good", "bad"))
        up, down = [int(own.argmax())], [int(own.argmin())]
        counts["good"] += up[0] in good
        counts["bad"] += down[0] in bad
        counts["first"] += 0 in (*up, *down)
        counts["last"] += len(own) - 1 in (*up, *down)
        if variant.get("words"):
            up, down = good, bad
        total += masked[up].sum(0) - masked[down].sum(0)
    n = len(records)
    return total / n, {k: v / n for k, v in counts.items()}


def main() -> None:
    """Every variant on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name, or label=path")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--n", type=int, default=8, help="building records")
    parser.add_argument("--out", type=Path, default=Path("studies/results/recipes"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    label, model = load(args.model, args.device)
    records = record_set("reviews", None)
    build, test = records.build[: args.n], records.test[:12]
    rows = []
    with settings(args.device):
        bench = Bench(model, args.layers)
        bench.add("plain", test)
        if getattr(model.tokenizer, "chat_template", None):
            bench.add("chat", in_chat(test))
        with bench.running():
            of_records = BuildingRecords(model, tokenize_pairs(model, build), tuple(args.layers))
            caa, norms = of_records.response_differences.mean(0), of_records.resid_norms
        store = Masked(model, args.layers)
        for name, variant in {**VARIANTS, "CAA": {}}.items():
            if variant.get("chat") and "chat" not in bench.records:
                continue
            pairs, where = (in_chat(build), "chat") if variant.get("chat") else (build, "plain")
            with bench.running():
                raw, about = (caa, {}) if name == "CAA" else built(store, pairs, variant)
            for column, layer in enumerate(args.layers):
                vectors = gr.SteeringVectors.from_raw(raw[[column]], [layer], norms[[column]])
                found, _ = bench.at_budgets(vectors, [0.05], [where], 0.1, [])
                change = found[where][0].change
                row = {"model": label, "variant": name, "layer": layer, "alpha": found[where][0].alpha}
                row |= {
                    "effect": np.mean(change) if change else np.nan,
                    "se": np.std(change) / max(len(change), 1) ** 0.5,
                }
                row |= {
                    "cosine_with_caa": float(torch.nn.functional.cosine_similarity(raw[column], caa[column], dim=0))
                }
                row |= {"size": float(raw[column].norm() / norms[column]), "n_build": args.n, **about}
                rows.append(row)
            print(
                pd.DataFrame(rows[-len(args.layers) :]).round(3).to_string(header=len(rows) <= len(args.layers)),
                flush=True,
            )
            pd.DataFrame(rows).round(4).to_csv(args.out / f"variants-{label}.csv", index=False)


if __name__ == "__main__":
    main()
