"""Where to push on SmolLM2: six sites of a block, and attention heads by probes, by patching and by gradient, at equal KL.

    python -m studies.sites --out studies/results/sites             # four minutes on a GPU, about an hour on a core; resumes
    python -m studies.sites --out studies/results/sites --tables    # prints what is there

CAA and margin-gradient vectors of every site from the same reviews, added (``operator="add"``) at the alpha that costs 0.05
nats per token of neutral text; two random directions of equal KL at every site. Heads are steered along ITI's mean shift;
only the choice of heads differs. Every piece is a file of its own and is not run again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

import grains_tl as gr
from grains_tl._util.stats import mean_interval
from grains_tl.baselines.controls import random_direction_vectors
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.evaluate.measuring import measure
from grains_tl.hooks.sites import Site
from grains_tl.inference.objectives import margins
from grains_tl.records.loading import neutral_texts
from grains_tl.vectors.steering import Steering
from studies.pieces import Pieces, settings, study_parser

KL = 0.05
LAYERS = (3, 9, 15, 21, 27)
SIZES = (2, 4, 8, 16, 32)
N_BUILD, N_TEST, N_PATCH, PATCH_LAYER = 40, 40, 12, 9


class Study(Pieces):
    """The model and the records."""

    def __init__(self, out: Path, device: str, small: bool) -> None:
        super().__init__(out)
        self.small = small
        self.model: Any = gr.load_model("smollm2", device=device)
        rng = random.Random(7)
        self.build = rng.sample(gr.load_bundled("sentiment", "build"), 6 if small else N_BUILD)
        self.test = rng.sample(gr.load_bundled("sentiment", "test"), 4 if small else N_TEST)
        self.layers: tuple[int, ...] = (15,) if small else LAYERS
        self.sizes: tuple[int, ...] = (2, 4) if small else SIZES
        self.texts = neutral_texts(2 if small else 12)

    def run(self) -> None:
        """All pieces."""
        for site in get_args(Site):
            self.piece(f"site_{site}", lambda s=site: self.site(s))  # type: ignore[misc]
        self.piece("heads", self.heads)

    def site(self, site: Any) -> pd.DataFrame:
        """Vectors of one site at every layer, and random directions."""
        build: dict[str, Any] = {"layers": list(self.layers), "site": site, "progress": False}
        vectors = {r: gr.build_vectors(self.model, self.build, recipe=r, **build) for r in ("caa", "margin_gradient")}
        like = vectors["caa"]
        draws = random_direction_vectors(like, n_draws=1 if self.small else 2, seed=1)
        named = [*vectors.items(), *(("random direction", v) for v in draws)]
        alpha = 0.1 if site.startswith("resid") else 0.5
        steps = [(name, v.steering(alpha, layer, operator="add")) for name, v in named for layer in self.layers]
        return pd.DataFrame(self.measured([(name, {"site": site, "layer": s.layers[0]}, s) for name, s in steps]))

    def heads(self) -> pd.DataFrame:
        """Heads by four ways to choose them, steered along the same mean shifts."""
        n_layers, n_heads = int(self.model.cfg.n_layers), int(self.model.cfg.n_heads)
        every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        candidates = [pair for pair in every if pair[0] > PATCH_LAYER]
        orders = {**self.rankings(candidates), **self.random_orders(candidates)}
        rows = []
        all_heads = gr.baselines.head_vectors(self.model, self.build, heads=candidates)
        for name, order in orders.items():
            for size in self.sizes:
                chosen = all_heads.vectors(n_heads).heads(order[:size], n_heads=n_heads)
                step = chosen.steering(3.0 * (8 / size) ** 0.5, chosen.layers, operator="add", scale="raw")
                rows.append((name.partition(" #")[0], {"size": size, "heads": str(order[:size])}, step))
        return pd.DataFrame(self.measured(rows))

    def rankings(self, candidates: Sequence[tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
        """Heads above the patched layer, best first, by three ways to choose."""
        n_heads = int(self.model.cfg.n_heads)
        layers = sorted({layer for layer, _ in candidates})
        probes = gr.baselines.head_vectors(self.model, self.build, layers=layers, n_heads=len(candidates))
        caa = gr.build_vectors(self.model, self.build, recipe="caa", layers=[PATCH_LAYER], progress=False)
        (step,), _ = at_kl(self.model, [caa.steering(0.1, PATCH_LAYER, operator="add")], KL, self.texts)
        few = self.build[: 2 if self.small else N_PATCH]
        patched = gr.analysis.patch(self.model, few, step, component="z", by="head", layers=layers)
        z: dict[str, Any] = {"layers": layers, "site": "z", "progress": False}
        shift, slope = (gr.build_vectors(self.model, self.build, recipe=r, **z).raw for r in ("caa", "margin_gradient"))
        gain = (shift * slope).unflatten(1, (n_heads, -1)).sum(-1)
        best = sorted(candidates, key=lambda pair: -float(gain[layers.index(pair[0]), pair[1]]))
        table = patched.sort_values("effect", ascending=False)
        return {
            "probes (ITI)": list(probes.heads),
            "patching": [(int(row.layer), int(row.head)) for row in table.itertuples()],
            "gradient": best,
        }

    def random_orders(self, candidates: Sequence[tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
        """The control: heads in random order."""
        return {
            f"random heads #{i}": random.Random(i).sample(list(candidates), len(candidates))
            for i in range(1 if self.small else 4)
        }

    def measured(self, rows: Sequence[tuple[str, dict[str, Any], Steering]]) -> list[dict[str, Any]]:
        """Effects on the test records at the KL."""
        steps, spent = at_kl(self.model, [step for *_, step in rows], KL, self.texts)
        base, steered = measure(self.model, self.test, steps)
        change = (margins(steered) - margins(base)).double().numpy()
        found = []
        for (name, about, _), step, cost, own in zip(rows, steps, spent, change, strict=True):
            mean, _, low, high = mean_interval(own)
            numbers = {"alpha": step.alpha, "kl": float(cost), "effect": mean, "low": low, "high": high, "n": len(own)}
            found.append({"vector": name, **about, **numbers})
        return found


def tables(out: Path) -> None:
    """Prints the pieces that are there."""
    sites = pd.concat([pd.read_json(file) for file in sorted(out.glob("site_*.json"))])
    sites["effect"] = np.where((sites["kl"] / KL - 1).abs() < 0.2, sites["effect"], np.nan)  # the KL was not reached
    print(sites.pivot_table(index=["site", "vector"], columns="layer", values="effect").round(2).to_string())
    best = sites.sort_values("effect", ascending=False).drop_duplicates(["vector", "site"])
    print(best[["vector", "site", "layer", "effect", "low", "high", "kl", "n"]].round(3).to_string(index=False))
    if (out / "heads.json").exists():
        heads = pd.read_json(out / "heads.json")
        print(heads.pivot_table(index="vector", columns="size", values="effect").round(2).to_string())
        print(heads.drop(columns="heads").round(3).to_string(index=False))


def main() -> None:
    """Run, or print."""
    args = study_parser(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tables:
        tables(args.out)
    else:
        with settings(args.device, 8192):
            Study(args.out, args.device, args.small).run()


if __name__ == "__main__":
    main()
