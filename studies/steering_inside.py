"""What carries a steering effect on SmolLM2: parts of the model, circuits and their faithfulness, overlaps, random vectors.

    python -m studies.steering_inside --out studies/results/steering_inside            # ten minutes on one core; resumes
    python -m studies.steering_inside --out studies/results/steering_inside --tables   # prints what is there

GrAInS, CAA and margin-gradient vectors from the same reviews, at layer 18 and a KL of 0.05 nats per token of neutral text;
random directions of equal KL beside each. Nodes are ranked on some test reviews and the ranking is judged on others.
Every piece is a file of its own and is not run again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd

import grains_tl as gr
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.records.loading import neutral_texts
from studies.pieces import Pieces, study_parser

RECIPES = ("grains", "caa", "margin_gradient")
LAYER, KL = 18, 0.05
N_BUILD, N_RANK, N_TEST = 20, 12, 20


class Study(Pieces):
    """The model, the records, and the steps, made when they are first needed."""

    def __init__(self, out: Path, device: str, small: bool) -> None:
        super().__init__(out)
        self.small = small
        self.model: Any = gr.load_model("smollm2", device=device)
        rng = random.Random(5)
        self.build = rng.sample(gr.load_bundled("sentiment", "build"), 4 if small else N_BUILD)
        drawn = rng.sample(gr.load_bundled("sentiment", "test"), 6 if small else N_RANK + N_TEST)
        self.rank, self.test = (drawn[:3], drawn[3:]) if small else (drawn[:N_RANK], drawn[N_RANK:])
        self.n_random = 1 if small else 4
        self._steps: dict[str, Any] = {}

    def step(self, recipe: str) -> Any:
        """The recipe's step at the KL."""
        if recipe not in self._steps:
            vectors = gr.build_vectors(
                self.model, self.build, recipe=recipe, layers=[LAYER], checkpoint=self.out / f"{recipe}_records.jsonl"
            )
            (step,), _ = at_kl(self.model, [vectors.steering(0.1, LAYER)], KL, neutral_texts(12))
            self._steps[recipe] = step
        return self._steps[recipe]

    def run(self) -> None:
        """All pieces."""
        circuits = {}
        for recipe in RECIPES:
            nodes = self.piece(f"{recipe}_circuit", lambda r=recipe: self.circuit(r, self.n_random))  # type: ignore[misc]
            circuits[recipe] = nodes
            self.piece(f"{recipe}_mechanism", lambda r=recipe: self.mechanism(r))  # type: ignore[misc]
            self.piece(f"{recipe}_curve", lambda r=recipe, n=nodes: self.curve(r, n))  # type: ignore[misc]
        self.piece("overlap", lambda: gr.analysis.circuit_overlap(circuits, n_top=10))
        self.piece("caa_gradient", lambda: self.circuit("caa", 0, method="gradient"))
        for recipe in RECIPES:
            self.piece(f"{recipe}_edges", lambda r=recipe: self.circuit(r, 1, method="edges"))  # type: ignore[misc]
            self.piece(f"{recipe}_exact", lambda r=recipe: self.circuit(r, 0, method="exact"))  # type: ignore[misc]
            self.piece(f"{recipe}_layers", lambda r=recipe: self.layers(r))  # type: ignore[misc]

    def circuit(self, recipe: str, n_random: int, **options: Any) -> pd.DataFrame:
        """Nodes of a recipe's step and of random directions."""
        return gr.analysis.steering_circuit(self.model, self.step(recipe), self.rank, n_random=n_random, **options)

    def mechanism(self, recipe: str) -> pd.DataFrame:
        """Parts of the model."""
        return gr.analysis.mechanism(self.model, self.step(recipe), self.test, n_random=self.n_random)

    def layers(self, recipe: str) -> pd.DataFrame:
        """Parts of each block, and those of one random direction; on the records that nodes are ranked on."""
        return gr.analysis.mechanism(self.model, self.step(recipe), self.rank, by="layer", n_random=1)

    def curve(self, recipe: str, nodes: pd.DataFrame) -> pd.DataFrame:
        """What the first nodes carry of the effect on the other records."""
        sizes = [0, 3] if self.small else None
        return gr.analysis.circuit_faithfulness(self.model, self.step(recipe), self.test, nodes, sizes=sizes)


def tables(out: Path) -> None:
    """Prints the pieces that are there."""
    for recipe in RECIPES:
        parts = pd.read_json(out / f"{recipe}_mechanism.json").round(2)
        print(f"\n{recipe}: parts\n{parts.drop(columns=['alone', 'lost']).to_string(index=False)}")
        curve = pd.read_json(out / f"{recipe}_curve.json").round(2)
        shown = ["order", "size", "kept_share", "left_share", "kept", "kept_low", "kept_high", "total"]
        print(f"\n{recipe}: circuit\n{curve[shown].to_string(index=False)}")
        nodes = pd.read_json(out / f"{recipe}_circuit.json").round(3)
        print(nodes[nodes["vector"] == "steering"].head(8).drop(columns=["vector", "kl"]).to_string(index=False))
    print("\noverlap\n", pd.read_json(out / "overlap.json").round(2).to_string(index=False))
    names = {"score": "effect", "part": "component"}
    exact = pd.read_json(out / "caa_exact.json").drop(columns="effect").rename(columns=names)
    for method, file in (("integrated", "caa_circuit"), ("gradient", "caa_gradient")):
        quick = pd.read_json(out / f"{file}.json")
        quick = quick[quick["vector"] == "steering"].drop(columns="effect").rename(columns=names)
        print(f"\n{method} against exact freezing\n{gr.analysis.compare_patching(exact, quick).round(3).to_string()}")


def main() -> None:
    """Run, or print."""
    args = study_parser(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tables:
        tables(args.out)
    else:
        Study(args.out, args.device, args.small).run()


if __name__ == "__main__":
    main()
