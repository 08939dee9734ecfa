"""What is left of a vector with few coordinates or few features, on SmolLM2; and what lenses say of it.

    python -m studies.sparse_vectors --out studies/results/sparse_vectors            # four minutes on a GPU; resumes
    python -m studies.sparse_vectors --out studies/results/sparse_vectors --tables   # prints what is there

CAA, margin-gradient and GrAInS vectors of the same reviews at layer 18. Coordinates are kept by size, by vector times
gradient, or at random. A top-k autoencoder of 2048 features is trained on text that the model writes; vectors are regressed
on its decoder, and single features clamped and taken out, beside random directions in the decoder's place and beside
features that are active as often. Effects at a KL of 0.05 nats per token of neutral text unless a column says otherwise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl._util.stats import mean_interval
from grains_tl.analysis.autoencoders import SparseAutoencoder
from grains_tl.evaluate.costs import kl_per_token, text_costs
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.evaluate.measuring import measure
from grains_tl.inference.objectives import margins
from grains_tl.records.loading import neutral_texts
from studies.pieces import Pieces, settings, study_parser
from studies.sparse_autoencoder import activations, shuffled, train, written_text

RECIPES = ("caa", "margin_gradient", "grains")
LAYER, KL = 18, 0.05
POINT = f"blocks.{LAYER}.hook_resid_post"
N_BUILD, N_TEST = 40, 40


class Study(Pieces):
    """The model, the records, the vectors and the autoencoder, made when they are first needed."""

    def __init__(self, out: Path, device: str, small: bool, n_texts: int = 1500, n_steps: int = 6000) -> None:
        super().__init__(out)
        self.small, self.device = small, device
        self.size = (24, 60, 256, 16) if small else (n_texts, n_steps, 2048, 32)
        self.model: Any = gr.load_model("smollm2", device=device)
        rng = random.Random(7)
        self.build = rng.sample(gr.load_bundled("sentiment", "build"), 6 if small else N_BUILD)
        self.test = rng.sample(gr.load_bundled("sentiment", "test"), 4 if small else N_TEST)
        self.texts = neutral_texts(2 if small else 12)
        self._vectors: dict[str, Any] = {}
        self._sae: tuple[SparseAutoencoder, torch.Tensor] | None = None

    def vectors(self, recipe: str) -> Any:
        """The recipe's vector at the layer."""
        if recipe not in self._vectors:
            self._vectors[recipe] = gr.build_vectors(
                self.model, self.build, recipe=recipe, layers=[LAYER], checkpoint=self.out / f"{recipe}_records.jsonl"
            )
        return self._vectors[recipe]

    @property
    def sae(self) -> tuple[SparseAutoencoder, torch.Tensor]:
        """The autoencoder, and activations that it has not seen."""
        if self._sae is None:
            unseen = self.out / "unseen.pt"
            if not unseen.exists():
                self.train(unseen)
            self._sae = (gr.analysis.read_sae(self.out / "sae"), usual(torch.load(unseen)))
        return self._sae

    def train(self, unseen: Path) -> None:
        """Train the autoencoder and keep it, with the activations that were set aside."""
        n_texts, n_steps, n_features, k = self.size
        start = time.time()
        acts = usual(activations(self.model, written_text(self.model, n_texts, 32 if self.small else 128), LAYER))
        print(f"{len(acts)} tokens written and read, {time.time() - start:.0f} s", flush=True)
        cut = len(acts) * 9 // 10
        batch = 1024 if self.device != "cpu" else 512
        options: dict[str, Any] = {"n_features": n_features, "k": k, "n_steps": n_steps, "device": self.device}
        made, losses = train(acts[:cut], POINT, batch=batch, **options)
        made.save(self.out / "sae")
        torch.save(acts[cut:].clone(), unseen)
        about = f"{cut} tokens, {n_steps} steps of {batch}, loss {np.mean(losses[-100:]):.3f}"
        print(f"autoencoder: {about}, {time.time() - start:.0f} s", flush=True)

    def run(self, pieces: Sequence[str]) -> None:
        """All pieces, or some."""
        for recipe in RECIPES:
            if "curves" in pieces:
                self.piece(f"curve_{recipe}", lambda r=recipe: self.curve(r))  # type: ignore[misc]
            if "lenses" in pieces:
                self.piece(f"lens_{recipe}", lambda r=recipe: self.lens(r))  # type: ignore[misc]
        if "features" in pieces:
            self.piece("sae_quality", self.quality)
            for recipe in RECIPES:
                self.piece(f"features_{recipe}", lambda r=recipe: self.features(r))  # type: ignore[misc]
                self.piece(f"interventions_{recipe}", lambda r=recipe: self.interventions(r))  # type: ignore[misc]

    def curve(self, recipe: str) -> pd.DataFrame:
        """Effects over the share of coordinates."""
        step = self.vectors(recipe).steering(0.1, LAYER, operator="add")
        (step,), _ = at_kl(self.model, [step], KL, self.texts)
        own = None if recipe == "margin_gradient" else self.vectors("margin_gradient")
        few: dict[str, Any] = {"shares": [0.1, 1.0], "n_random": 1} if self.small else {}
        return gr.analysis.sparsity_curve(self.model, step, self.test, gradient=own, kl=KL, texts=self.texts, **few)

    def lens(self, recipe: str) -> pd.DataFrame:
        """Lenses against what is promoted in context."""
        step = self.vectors(recipe).steering(0.1, LAYER, operator="add")
        (step,), _ = at_kl(self.model, [step], KL, self.texts)
        n_random = 1 if self.small else 4
        return gr.analysis.lens_agreement(
            self.model, step, lens=self.jacobian_lens(), texts=self.texts, n_random=n_random, n_top=20
        )

    def jacobian_lens(self) -> Any:
        """A lens fitted on texts that the truth is not measured on; ``None`` before TransformerLens 4.3."""
        try:
            from transformer_lens.tools.analysis import JacobianLens
        except ImportError:
            return None
        file = self.out / "lens.pt"
        if not file.exists():
            texts, width = neutral_texts(30)[12 : 13 if self.small else 30], 8 if self.device == "cpu" else 64
            options: dict[str, Any] = {"corpus": "neutral texts 13 to 30", "source_layers": [LAYER], "dim_batch": width}
            JacobianLens.fit(self.model, texts, show_progress=False, **options).save(str(file))
        return JacobianLens.load(str(file))

    def quality(self) -> pd.DataFrame:
        """What the autoencoder reconstructs of text it has not seen, beside random directions in its place."""
        sae, acts = self.sae
        few, rows, settings = acts[:4096], [], []
        for name, one in (("trained", sae), ("random directions", shuffled(sae))):
            features = one.features(few)
            left = (few - one.reconstruct(few)).square().sum() / (few - few.mean(0)).square().sum()
            active = (features > 0).float().mean(0)
            dead = float((active == 0).float().mean())
            l0 = float((features > 0).sum(-1).float().mean())
            rows.append({"decoder": name, "explained": 1 - float(left), "active": l0, "dead": dead, "tokens": len(few)})
            replaced = [(POINT, lambda act, hook, one=one: one.reconstruct(act).to(act.dtype))]
            settings.append(gr.evaluate.Setting(LAYER, sparing_first(replaced), vector=name))
        mean = [(POINT, lambda act, hook: few.mean(0).to(act).expand_as(act))]
        rows.append({"decoder": "mean activation", "explained": 0.0, "active": 0.0, "dead": 1.0, "tokens": len(few)})
        settings.append(gr.evaluate.Setting(LAYER, sparing_first(mean), vector="mean activation"))
        spent = kl_per_token(text_costs(self.model, settings, self.texts), len(settings))
        return pd.DataFrame(rows).assign(kl_replaced=[float(kl) for kl in spent])

    def features(self, recipe: str) -> pd.DataFrame:
        """The vector as a sum of features: explained share, and effect at equal KL, over their number."""
        sae, _ = self.sae
        vectors, rows, steps = self.vectors(recipe), [], []
        numbers = (1, 4, 8) if self.small else (1, 4, 16, 64)
        for name, decoder in (("trained", sae.W_dec), ("random directions", shuffled(sae).W_dec)):
            for n in numbers:
                table = gr.analysis.sparse_decomposition(vectors, decoder, layer=LAYER, n_features=n)
                part = gr.analysis.feature_vectors(vectors, decoder, table, layer=LAYER)
                rows.append({"decoder": name, "features": n, "explained": float(table["explained"].iloc[-1])})
                steps.append(part.steering(0.1, LAYER, operator="add"))
        rows.append({"decoder": "whole vector", "features": 0, "explained": 1.0})
        steps.append(vectors.steering(0.1, LAYER, operator="add"))
        steps, spent = at_kl(self.model, steps, KL, self.texts)
        base, steered = measure(self.model, self.test, steps)
        change = (margins(steered) - margins(base)).double().numpy()
        for row, step, kl, own in zip(rows, steps, spent, change, strict=True):
            mean, _, low, high = mean_interval(own)
            row |= {"alpha": step.alpha, "kl": float(kl), "effect": mean, "low": low, "high": high, "n": len(own)}
        return pd.DataFrame(rows)

    def interventions(self, recipe: str) -> pd.DataFrame:
        """The vector's features clamped and taken out, beside random ones that are active as often."""
        sae, acts = self.sae
        features = sae.features(acts[:8192])
        often = (features > 0).float().mean(0)
        alive = (often > 1e-3).nonzero().flatten()
        n_pool = min(64, len(alive))
        table = gr.analysis.sparse_decomposition(self.vectors(recipe), sae.W_dec[alive], layer=LAYER, n_features=n_pool)
        order = [(int(alive[int(f)]), float(c)) for f, c in zip(table["feature"], table["coefficient"], strict=True)]
        up, down = ([f for f, c in order if sign * c > 0] for sign in (1, -1))
        high = {int(f): float(features[:, f][features[:, f] > 0].quantile(0.9)) for f in alive}
        rows: list[dict[str, Any]] = []
        settings = []
        for n in (1, 4) if self.small else (1, 4, 16):
            for draw in range(2 if self.small else 4):
                chosen = (up[:n], down[:n]) if not draw else tuple(alike(s[:n], often, alive, draw) for s in (up, down))
                clamp = {
                    "clamp": {f: high[f] for f in chosen[0]},
                    "ablate": [f for f in chosen[1] if f not in chosen[0]],
                }
                for way, options in (("ablate towards chosen", {"ablate": chosen[0]}), ("clamp and ablate", clamp)):
                    hooks = sparing_first(gr.analysis.sae_hooks(sae, **options))
                    settings.append(gr.evaluate.Setting(LAYER, hooks, vector=way))
                    rows.append(
                        {"intervention": way, "features": n, "of": "random" if draw else "vector", "draw": draw - 1}
                    )
        spent = kl_per_token(text_costs(self.model, settings, self.texts), len(settings))
        base, steered = measure(self.model, self.test, settings)
        change = (margins(steered) - margins(base)).double().numpy()
        for row, kl, own in zip(rows, spent, change, strict=True):
            mean, _, low, high_ = mean_interval(own)
            row |= {"kl": float(kl), "effect": mean, "low": low, "high": high_, "n": len(own)}
        return pd.DataFrame(rows)


def alike(chosen: Sequence[int], often: torch.Tensor, alive: torch.Tensor, seed: int) -> list[int]:
    """For every feature another that is active about as often, drawn from the ten nearest."""
    rng, taken = random.Random(seed), set(chosen)
    found = []
    for feature in chosen:
        near = sorted(
            (int(f) for f in alive if int(f) not in taken), key=lambda f: abs(float(often[f] - often[feature]))
        )[:10]
        found.append(rng.choice(near))
        taken.add(found[-1])
    return found


def is_usual(acts: torch.Tensor) -> torch.Tensor:
    """Which activations have a usual length: a few tokens that attention rests on are a hundred times as long as others."""
    length = acts.norm(dim=-1)
    return length <= 5 * length.median()


def usual(acts: torch.Tensor) -> torch.Tensor:
    """The activations of usual length."""
    return acts[is_usual(acts)]


def sparing_first(hooks: Sequence[tuple[str, Any]]) -> Any:
    """Hooks that leave alone what no feature describes, such as the first position: see ``is_usual``."""

    def spare(fn: Any) -> Any:
        def hook_fn(act: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.where(is_usual(act)[..., None], fn(act, hook=hook), act)

        return hook_fn

    return [(name, spare(fn)) for name, fn in hooks]


def tables(out: Path) -> None:
    """Prints the pieces that are there."""
    for recipe in RECIPES:
        for name in ("curve", "lens", "features", "interventions"):
            file = out / f"{name}_{recipe}.json"
            if not file.exists():
                continue
            table = pd.read_json(file)
            if name == "lens":
                table = table.groupby(["vector", "lens"]).mean(numeric_only=True).drop(columns="draw").reset_index()
            if name == "interventions":
                table = table.groupby(["intervention", "features", "of"])[["kl", "effect"]].mean().reset_index()
            print(f"\n{recipe}: {name}\n{table.round(3).to_string(index=False)}")
    if (out / "sae_quality.json").exists():
        print(pd.read_json(out / "sae_quality.json").round(3).to_string(index=False))


def main() -> None:
    """Run, or print."""
    parser = study_parser(__doc__)
    parser.add_argument("--pieces", nargs="+", default=["curves", "lenses", "features"])
    parser.add_argument("--texts", type=int, default=1500, help="texts of 128 tokens to train the autoencoder on")
    parser.add_argument("--steps", type=int, default=6000, help="of its training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tables:
        tables(args.out)
    else:
        with settings(args.device, 8192):
            Study(args.out, args.device, args.small, args.texts, args.steps).run(args.pieces)


if __name__ == "__main__":
    main()
