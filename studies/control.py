"""Steering under control: gates, where along the text the KL is spent, and strength by attribution.

    python -m studies.control gates --out studies/results/control          # resumes; --draw 1, 2: other building records
    python -m studies.control positions --out studies/results/control
    python -m studies.control strength --out studies/results/control
    python -m studies.control strength --model scenes --out studies/results/control      # image patches
    python -m studies.control report --out studies/results/control

``--model`` is ``smollm2``, ``scenes`` (the bundled vision model, for ``strength`` alone) or LABEL=PATH of any other. Vectors
are built from 20 bundled sentiment records of the draw (of ``scenes``: pictures); effects are measured on records of the
test split. A gate is fitted on prompts of building records (targets) and on questions and beginnings of neutral texts, its
threshold is set on others of the same kinds for a false-fire rate of 5 %, and it is reported on third ones.
``--short`` takes half the prompts and texts, 16 tokens of each and fewer gates and weights, for a larger model on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl.attribution import prompt_weights
from grains_tl.evaluate import Setting
from grains_tl.hooks import CosineGate, ProbeGate
from grains_tl.inference import Continuations
from grains_tl.records import PreferencePair, neutral_texts
from studies.control_report import report

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)
FALSE_FIRE = 0.05
RECIPES = ("caa", "grains", "kl_optimal")


@dataclass
class Study:
    """What all parts share.

    Attributes:
        out: receives the tables.
        label: of the model.
        path: what ``gr.load_model`` takes.
        device: where it runs.
        draw: which building records.
        small: a few records and tokens, to try it out.
        short: fewer prompts, texts, tokens, gates and weights.
        alphas: to measure at.
    """

    out: Path
    label: str
    path: str
    device: str
    draw: int
    small: bool
    short: bool = False
    alphas: Sequence[float] = ALPHAS
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = gr.load_model("smol-vlm-scenes" if self.label == "scenes" else self.path, device=self.device)
        n_layers = int(self.model.cfg.n_layers)
        self.layer, self.gate_layer = round(0.6 * n_layers), round(0.25 * n_layers)
        size = (4, 3, 4, 2) if self.small else (24, 8, 16, 6) if self.short else (24, 16, 24, 12)
        self.n_test, self.n_prompts, self.n_new, self.n_texts = size
        self.stem = f"{self.label}_draw{self.draw}" + ("_small" if self.small else "")

    def build_records(self) -> list[PreferencePair]:
        """Of this draw; no two draws share one."""
        if self.label == "scenes":
            from grains_tl.demo.scene_records import caption_pairs

            return caption_pairs("build", 8 if self.small else 24, seed=self.draw)
        shuffled = random.Random(0).sample(gr.load_bundled("sentiment", "build"), 80)
        return shuffled[self.draw * 20 : (self.draw + 1) * 20]

    def test_records(self) -> list[PreferencePair]:
        """The same for all draws."""
        if self.label == "scenes":
            from grains_tl.demo.scene_records import caption_pairs

            return caption_pairs("test", self.n_test)
        return random.Random(1).sample(gr.load_bundled("sentiment", "test"), self.n_test)

    def vectors(self, recipe: str) -> gr.SteeringVectors:
        """One recipe's vector at the steered layer, kept in a file."""
        file = self.out / f"{self.stem}_{recipe}.safetensors"
        if not file.exists():
            fisher = {"fisher": self.out / f"{self.label}_fisher.safetensors"} if recipe == "kl_optimal" else {}
            options = {"top_k": 1} if recipe == "grains" else fisher
            gr.build_vectors(self.model, self.build_records(), recipe=recipe, layers=[self.layer], **options).save(file)
        return gr.load_vectors(file)

    def keep(self, name: str, table: pd.DataFrame, add: bool = False) -> None:
        """Write a table of this model and draw; with ``add``, rows of vectors that it does not have stay in the file."""
        file = self.out / f"{self.stem}_{name}.csv"
        if add and file.exists():
            there = pd.read_csv(file)
            table = pd.concat([there[~there["vector"].isin(set(table["vector"]))], table], ignore_index=True)
        table.to_csv(file, index=False)
        print(name, len(table), "rows", flush=True)

    def known(self, name: str, n_rows: int) -> set[str]:
        """Vectors of a table that have all their rows, so that they are not measured again."""
        file = self.out / f"{self.stem}_{name}.csv"
        if not file.exists():
            return set()
        counts = pd.read_csv(file)["vector"].value_counts()
        return {str(vector) for vector, count in counts.items() if count >= n_rows}

    def measured(self, name: str, settings: Sequence[Setting], texts: Any, add: bool = False) -> None:
        """Costs of some settings, resumable."""
        costs = gr.evaluate.text_costs(self.model, settings, texts, checkpoint=self.out / f"{self.stem}_{name}.jsonl")
        self.keep(name, costs, add)


def neutral_prompts() -> dict[str, list[str]]:
    """Questions and beginnings of texts: to fit on, to set the threshold on, to report on."""
    questions = [r.prompt for r in gr.load_bundled("misconceptions", "build")]
    others = [r.prompt for r in gr.load_bundled("misconceptions", "test")]
    begun = [" ".join(text.split()[:8]) for text in neutral_texts()]
    parts = {"fit": questions[:36] + begun[12:21], "choose": questions[36:] + begun[21:], "report": others + begun[:12]}
    return {name: [str(p) for p in random.Random(2).sample(part, len(part))] for name, part in parts.items()}


def gates_of(study: Study) -> dict[str, Any]:
    """No gate, and gates of both kinds that decide by row and by token."""
    neutral, targets = neutral_prompts(), [r.prompt for r in gr.load_bundled("sentiment", "build")]
    fit, choose = targets[:40], targets[40:]
    made: dict[str, Any] = {"no gate": None}
    for decide in ("prompt_end", "token"):
        probe = ProbeGate.fit(study.model, fit, neutral["fit"], study.gate_layer, decide=decide)  # type: ignore[arg-type]
        cosine = CosineGate.fit(study.model, fit, neutral["fit"], study.gate_layer, decide=decide)  # type: ignore[arg-type]
        for kind, gate in (("probe", probe), ("cosine", cosine)):
            chosen = gate.calibrated(study.model, neutral["choose"], FALSE_FIRE, targets=choose)
            made[f"{kind}, {decide}"] = chosen
    if study.short:
        del made["cosine, token"]
    return made


def gates(study: Study) -> None:
    """Effects and costs with and without gates, over alphas; how often each gate opens."""
    vectors, made = study.vectors("caa"), gates_of(study)
    records, neutral = study.test_records(), neutral_prompts()["report"]
    fires = []
    for name, gate in made.items():
        for kind, prompts in () if gate is None else (("targets", [r.prompt for r in records]), ("neutral", neutral)):
            opened = [float((r > gate.threshold).float().mean()) for r in gate.readings(study.model, prompts)]
            fires += [{"gate": name, "kind": kind, "prompt": i, "opened": x} for i, x in enumerate(opened)]
    study.keep("fires", pd.DataFrame(fires))
    settings = [
        Setting.of(vectors.steering(alpha, study.layer, gate=gate), vector=name)
        for name, gate in made.items()
        for alpha in study.alphas
    ]
    effects = gr.evaluate.record_effects(
        study.model, records, settings, checkpoint=study.out / f"{study.stem}_gated.jsonl"
    )
    study.keep("gated_effects", effects)
    study.measured("gated_neutral_text", settings, neutral_texts(study.n_texts))
    study.measured("gated_neutral_prompts", settings, Continuations(neutral[: study.n_prompts], study.n_new))
    targets = [r.prompt for r in records][: study.n_prompts]
    study.measured("gated_target_prompts", settings, Continuations(targets, study.n_new))


def positions(study: Study) -> None:
    """Three recipes at the same mean effect: KL over the positions of what they write."""
    recipes = ("caa", "margin_gradient") if study.small else RECIPES
    named = {name: study.vectors(name) for name in recipes}
    records = study.test_records()
    effects, costs = gr.evaluate.sweep_records(
        study.model,
        named,
        records,
        layers=[study.layer],
        alphas=study.alphas,
        neutral=neutral_texts(study.n_texts),
        checkpoint=study.out / f"{study.stem}_recipes.jsonl",
    )
    assert costs is not None
    study.keep("recipe_effects", effects)
    study.keep("recipe_costs", costs)
    means = effects.pivot_table(index="alpha", columns="vector", values="change")
    at_kl = gr.evaluate.effect_at_kl(effects, costs, 0.05, n=2)["effect"].dropna()
    wanted = float(min(at_kl.min() if len(at_kl) else np.inf, means.max().min()))
    prompts = [r.prompt for r in records][: study.n_prompts]
    parts = []
    for name, vectors in named.items():
        rising = np.maximum.accumulate([0.0, *means[name]])
        alpha = float(np.interp(wanted, rising, [0.0, *means.index]))
        step = vectors.steering(alpha, study.layer)
        for temperature, n_samples in ((0.0, 1), (1.0, 2)):
            table = gr.evaluate.generation_quality(
                study.model, prompts, step, max_new_tokens=study.n_new, temperature=temperature, n_samples=n_samples
            )
            parts.append(table.assign(vector=name, alpha=alpha, effect=wanted, temperature=temperature))
    found = pd.concat(parts, ignore_index=True)
    found["kl_by_token"] = [json.dumps([round(x, 5) for x in row]) for row in found["kl_by_token"]]
    study.keep("generated", found)


def strength(study: Study, only: Collection[str] | None = None) -> None:
    """Uniform strength, strength by attribution and the same weights at random places, on the prompts alone."""
    records = study.test_records()
    vectors = study.vectors("caa")
    makers: dict[str, dict[str, Any]] = {
        "uniform": {"floor": 1.0},
        "gradient x input": {},
        "gradient x input, half": {"floor": 0.5},
        "leave-one-out": {"method": "leave_one_out"},
        "leave-one-out, half": {"method": "leave_one_out", "floor": 0.5},
        **{f"random {seed}": {"method": "leave_one_out", "shuffle_seed": seed} for seed in range(3)},
        **{
            f"random, half {seed}": {"method": "leave_one_out", "floor": 0.5, "shuffle_seed": seed} for seed in range(3)
        },
    }
    if study.short:
        makers = {name: options for name, options in makers.items() if "half" not in name and name != "random 2"}
    known = study.known("weighted_costs", len(study.alphas) * study.n_prompts)
    makers = {name: options for name, options in makers.items() if name in (only or makers) and name not in known}
    tokenized = gr.tokens.tokenize_pairs(study.model, records)
    methods = ("gradient_x_input", "leave_one_out")
    scores = {method: gr.attribution.attribute_all(study.model, tokenized, method=method) for method in methods}
    settings = []
    for name, options in makers.items():
        found = scores[options.pop("method", "gradient_x_input")]
        weights = prompt_weights(study.model, tokenized, after=0.0, attributions=found, **options)
        steps = [vectors.steering(alpha, study.layer, positions=weights) for alpha in study.alphas]
        settings += [Setting.of(step, vector=name) for step in steps]
    effects = gr.evaluate.record_effects(
        study.model, records, settings, checkpoint=study.out / f"{study.stem}_weighted.jsonl"
    )
    study.keep("weighted_effects", effects, add=True)
    part = records[: study.n_prompts]
    images = [r.image for r in part] if study.label == "scenes" else None
    texts = Continuations([r.prompt for r in part], study.n_new, images=images)
    study.measured("weighted_costs", settings, texts, add=True)


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["gates", "positions", "strength", "report"])
    parser.add_argument("--out", type=Path, default=Path("studies/results/control"))
    parser.add_argument("--model", default="smollm2", help="smollm2, scenes or LABEL=PATH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draw", type=int, default=0, choices=range(4))
    parser.add_argument("--small", action="store_true", help="a few records and tokens, to try it out")
    parser.add_argument("--short", action="store_true", help="fewer prompts, texts, tokens, gates and weights")
    parser.add_argument("--alphas", type=float, nargs="+", help="default 0.1 and 0.3 with --small, else six to 0.45")
    parser.add_argument("--only", nargs="+", help="of strength: these weights alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "report":
        report(args.out)
        return
    if args.device == "cpu":
        torch.set_num_threads(1)
    label, _, path = args.model.partition("=")
    alphas = args.alphas or ((0.1, 0.3) if args.small else ALPHAS)
    study = Study(args.out, label, path or label, args.device, args.draw, args.small, args.short, tuple(alphas))
    if args.part == "strength":
        strength(study, args.only)
    else:
        {"gates": gates, "positions": positions}[args.part](study)


if __name__ == "__main__":
    main()
