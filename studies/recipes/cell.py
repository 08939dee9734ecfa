"""One model on one set: choose each recipe's layer, then measure every building sample at both budgets; resumes."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.models.running import device_of
from grains_tl.vectors.fisher import Fisher
from studies.recipes.bench import AtKL, Bench
from studies.recipes.directions import ATTRIBUTED, RECIPES, VARIANTS, best_shrinkage, direction
from studies.recipes.parts import Parts
from studies.recipes.sets import SAMPLE, RecordSet, other_wordings

BUDGETS = (0.05, 0.2)

#: Budgets of the curves that are drawn.
CURVE = (0.01, 0.05, 0.1, 0.2, 0.4)

#: Records of which the effect over the number of building records is measured.
NUMBERS = (4, 8, 16, 40)


@dataclass
class Cell:
    """A model, a set, and the file that receives one line per vector.

    Attributes:
        bench: cached residuals; has the records ``choose`` and ``test``.
        records: the set.
        parts: contributions of all building records.
        fisher: of the model.
        layers: candidate layers.
        out: the ``.jsonl`` file.
        done: its lines.
        recipes: those that are measured.
        calibration: alpha at the first budget over what the Fisher matrix predicts.
        growth: by which factor alpha grows from a budget to the next.
    """

    bench: Bench
    records: RecordSet
    parts: Parts
    fisher: Fisher
    layers: Sequence[int]
    out: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipes: Sequence[str] = (*RECIPES, *VARIANTS)
    calibration: dict[tuple[str, int, float], float] = field(default_factory=dict)
    growth: dict[tuple[str, int, float], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.exists():
            for line in self.out.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.done[key_of(row)] = row

    def measure(
        self,
        stage: str,
        recipe: str,
        layer: int,
        rows: Sequence[int],
        *,
        sample: int = -1,
        draw: int = 0,
        budgets: Sequence[float] = BUDGETS,
        names: Sequence[str] = ("test",),
        vectors: gr.SteeringVectors | None = None,
    ) -> dict[str, Any]:
        """Build one vector from some of the records, measure it, and write its line; a line that is there is kept.

        ``vectors`` are measured instead where they are given (they were built from the same records).
        """
        row: dict[str, Any] = {"stage": stage, "recipe": recipe, "layer": layer, "sample": sample, "draw": draw}
        row["n_build"] = len(rows)
        if key_of(row) in self.done:
            return self.done[key_of(row)]
        if vectors is None:
            vectors = self.vectors(recipe, layer, rows, seed=1000 * (sample + 1) + draw)
        if vectors is None:  # nothing that points anywhere: no token has a score of the wanted sign
            row["curve"], row["effects"] = (
                [],
                {name: [AtKL(kl, None, [])._asdict() for kl in budgets] for name in names},
            )
            return self.keep(row)
        guess = self.guess(recipe, layer, vectors, budgets[0])
        growth = [self.growth.get((recipe, layer, kl)) for kl in budgets]
        found, curve = self.bench.at_budgets(vectors, budgets, names, guess, growth)
        alphas = [point.alpha for point in found[names[0]]]
        if alphas[0] is not None:
            key = (recipe, layer, budgets[0])
            self.calibration[key] = self.calibration.get(key, 1.0) * alphas[0] / guess
        for kl, (a, b) in zip(budgets, itertools.pairwise(alphas), strict=False):
            if a and b:
                self.growth[recipe, layer, kl] = b / a
        row["curve"] = [[round(a, 5), round(k, 5)] for a, k in curve]
        row["effects"] = {name: [p._asdict() for p in points] for name, points in found.items()}
        return self.keep(row)

    def keep(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a line."""
        self.done[key_of(row)] = row
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def vectors(self, recipe: str, layer: int, rows: Sequence[int], seed: int = 0) -> gr.SteeringVectors | None:
        """The vector of some of the records at one layer; ``None`` where it is zero."""
        column = list(self.layers).index(layer)
        raw = direction(recipe, self.parts.of(rows), column, layer, self.fisher, seed)
        if not raw.any():
            return None
        return gr.SteeringVectors.from_raw(raw[None], [layer], self.parts.norms[[column]], {"method": recipe})

    def guess(self, recipe: str, layer: int, vectors: gr.SteeringVectors, kl: float) -> float:
        """alpha from the Fisher matrix, corrected by what earlier vectors of the recipe needed."""
        step = vectors.directions * vectors.resid_norms[:, None]
        predicted = float(self.fisher.at([layer]).predicted_kl(step)[0])
        alpha = math.sqrt(kl / max(predicted, 1e-12)) * self.calibration.get((recipe, layer, kl), 1.0)
        return min(max(alpha, 1e-4), 1.0)

    @property
    def everything(self) -> range:
        return range(len(self.records.build))

    def samples(self) -> Iterator[tuple[int, range]]:
        """The building samples: disjoint, ``SAMPLE`` records each."""
        for number in range(self.records.n_samples):
            yield number, range(number * SAMPLE, (number + 1) * SAMPLE)


def key_of(row: dict[str, Any]) -> str:
    return json.dumps([row[k] for k in ("stage", "recipe", "layer", "sample", "draw", "n_build")])


def choose_layers(cell: Cell) -> dict[str, int]:
    """Each recipe's best layer on the choosing records, at the smaller budget, with vectors from all building records."""
    best = {}
    for recipe in cell.recipes:
        effects = {}
        for layer in cell.layers:
            row = cell.measure("choose", recipe, layer, cell.everything, budgets=BUDGETS[:1], names=("choose",))
            change = row["effects"]["choose"][0]["change"]
            effects[layer] = sum(change) / len(change) if change else -math.inf
        best[recipe] = max(effects, key=lambda layer: effects[layer])
    best |= {control: best[own] for own, control in ATTRIBUTED.items() if own in best}
    best["random_direction"] = best["caa"]
    return best


def run_cell(cell: Cell, n_random: int) -> dict[str, int]:
    """Layers, then every recipe and control on every building sample."""
    best = choose_layers(cell)
    for sample, rows in cell.samples():
        for recipe in (*cell.recipes, "random_direction"):
            cell.measure("test", recipe, best[recipe], rows, sample=sample)
        for control in [control for own, control in ATTRIBUTED.items() if own in best]:
            for draw in range(n_random):
                cell.measure("test", control, best[control], rows, sample=sample, draw=draw)
    return best


def write_about(cell: Cell, label: str, best: dict[str, int], base: dict[str, Tensor], file: Path) -> None:
    """What the lines do not say: layers, sizes, costs, unsteered margins, ceilings, agreement between recipes."""
    columns = {layer: i for i, layer in enumerate(cell.layers)}
    ceilings = {}
    for layer in cell.layers:
        here = cell.fisher.at([layer])
        shrinkage, gain = best_shrinkage(cell.parts, columns[layer], here)
        mean = cell.parts.gradients[:, [columns[layer]]].mean(0)
        ceilings[str(layer)] = {
            "shrinkage": shrinkage,
            "predicted": {str(kl): round((2 * kl) ** 0.5 * gain, 3) for kl in BUDGETS},
            "linear_ceiling": {str(kl): round(float(here.ceiling(mean, kl, shrinkage)[0]), 3) for kl in BUDGETS},
        }
    layer = best["caa"]
    built = {name: cell.vectors(name, layer, cell.everything) for name in cell.recipes}
    vectors = {name: own.directions[0] for name, own in built.items() if own is not None}
    about = {
        "model": label,
        "set": cell.records.name,
        "layers": best,
        "candidates": list(cell.layers),
        "sample": SAMPLE,
        "n_samples": cell.records.n_samples,
        "per_question": cell.records.per_question,
        "seconds_per_record": {device_of(cell.bench.model).type: cell.parts.seconds},
        "resid_norms": [round(float(x), 2) for x in cell.parts.norms],
        "base_margin": {name: [round(float(x), 3) for x in margins] for name, margins in base.items()},
        "cosine_with_caa": {name: round(float(v @ vectors["caa"]), 3) for name, v in vectors.items()},
        "first_order": ceilings,
        "fisher_samples": len(cell.fisher.samples),
        "precision": "blocks in bfloat16" if cell.bench.half else "float32",
    }
    write_atomically(file, json.dumps(about, indent=1).encode())


def extras(cell: Cell, best: dict[str, int], others: dict[str, RecordSet]) -> None:
    """What is measured on one set only: curves over KL, other wordings, number of building records, transfer."""
    for recipe in (*RECIPES, "random_tokens", "random_direction"):
        cell.measure("curve", recipe, best[recipe], cell.everything, budgets=CURVE)
    cell.bench.add("wordings", other_wordings(cell.records.test))
    compared = [recipe for recipe in RECIPES if recipe in cell.recipes and recipe != "grains_weighted"]
    for sample, rows in cell.samples():
        for recipe in compared:
            cell.measure("wordings", recipe, best[recipe], rows, sample=sample, names=("wordings",))
    transfer(cell, best, others)
    for n in NUMBERS:
        for sample in range(min(3, len(cell.records.build) // n)):
            for recipe in compared:
                rows = range(sample * n, (sample + 1) * n)
                cell.measure("number", recipe, best[recipe], rows, sample=sample, budgets=BUDGETS[:1])


def transfer(cell: Cell, best: dict[str, int], others: dict[str, RecordSet]) -> None:
    """Vectors of all of this set's records on the test records of the others."""
    for name, records in others.items():
        if name not in cell.bench.records:
            cell.bench.add(name, records.test)
    for recipe in ("grains", "caa", "kl_optimal"):
        cell.measure("transfer", recipe, best[recipe], cell.everything, names=("test", *others))


def prepare(
    model: Any, records: RecordSet, layers: Sequence[int], parts: Parts, fisher: Fisher, out: Path
) -> tuple[Cell, dict[str, Tensor]]:
    """A cell with its records cached, and their unsteered margins."""
    bench = Bench(model, layers)
    base = {"choose": bench.add("choose", records.choose), "test": bench.add("test", records.test)}
    return Cell(bench, records, parts, fisher, layers, out), base


def timed_line(start: float, what: str) -> None:
    """Progress, with the time since ``start``."""
    print(f"{time.strftime('%H:%M:%S')} {time.perf_counter() - start:6.0f} s  {what}", flush=True)
