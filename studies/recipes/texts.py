"""Texts that steered models go on to write, and what a sentiment lexicon says of them.

The lexicon is VADER's (Hutto and Gilbert 2014; ``pip install vaderSentiment``): its 7,500 words were rated by people and
know nothing of the records. ``write_texts`` needs the model; ``judged`` needs only its file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import grains_tl as gr
from studies.recipes.cell import BUDGETS, Cell
from studies.recipes.directions import RECIPES

#: What is generated: tokens per text, texts per vector, building samples.
N_TOKENS, N_PROMPTS, N_SAMPLES = 24, 30, 5


def write_texts(cell: Cell, best: dict[str, int], out: Path) -> None:
    """One line per vector and budget: greedy continuations of test prompts; a line that is there is kept."""
    prompts = [p.prompt for p in cell.records.test[:N_PROMPTS]]
    done = {_key(row) for row in rows_of(out)}
    recipes = [name for name in (*RECIPES, "random_tokens", "random_direction") if name in best]
    wanted: list[tuple[str, int, float]] = [("none", -1, 0.0)]
    wanted += [
        (name, sample, kl) for name in recipes for sample, _ in list(cell.samples())[:N_SAMPLES] for kl in BUDGETS
    ]
    for recipe, sample, kl in wanted:
        row: dict[str, Any] = {"recipe": recipe, "sample": sample, "kl": kl}
        if _key(row) in done:
            continue
        steering = None
        if recipe != "none":
            rows = dict(cell.samples())[sample]
            line = cell.measure("test", recipe, best[recipe], rows, sample=sample)
            alpha = line["effects"]["test"][BUDGETS.index(kl)]["alpha"]
            if alpha is None:
                continue
            vectors = cell.vectors(recipe, best[recipe], rows, seed=1000 * (sample + 1))
            assert vectors is not None  # it has an alpha
            steering = vectors.steering(alpha)
        row["texts"] = gr.generate(cell.bench.model, prompts, steering, max_new_tokens=N_TOKENS)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not be there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _key(row: dict[str, Any]) -> tuple[str, int, float]:
    return row["recipe"], row["sample"], row["kl"]


def judged(file: Path) -> dict[tuple[str, float], np.ndarray]:
    """``[sample, prompt]`` lexicon score of each text, -1 to 1, minus that of the unsteered text, by recipe and budget."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    scores: dict[tuple[str, float], list[list[float]]] = {}
    for row in rows_of(file):
        own = [judge.polarity_scores(text)["compound"] for text in row["texts"]]
        scores.setdefault((row["recipe"], row["kl"]), []).append(own)
    base = np.array(scores.pop(("none", 0.0))[0])
    return {key: np.array(own) - base for key, own in scores.items()}
