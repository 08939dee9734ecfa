"""One tidy table from the raw lines, and the markdown tables of the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from studies.recipes.cell import BUDGETS
from studies.recipes.directions import ATTRIBUTED, RECIPES, VARIANTS
from studies.recipes.intervals import Estimate, effects_of, estimate, read_cells
from studies.recipes.sets import SIZES
from studies.recipes.texts import judged

#: Models from small to large, and how they are named on the page.
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3-270m": "Gemma-3-270M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct",
}

LABELS = {
    "grains": "GrAInS (leave-one-out, k = 1)",
    "grains_weighted": "GrAInS, all tokens by score",
    "caa": "CAA",
    "margin_gradient": "margin gradient",
    "kl_optimal": "KL-optimal",
    "trained": "trained",
    "grains_at_token": "GrAInS, read at the attributed tokens",
    "grains_over_price": "GrAInS divided by the price",
    "gradient_at_tokens": "margin gradient at attributed tokens",
    "kl_optimal_at_tokens": "KL-optimal from attributed tokens",
    "random_tokens": "random tokens",
    "random_direction": "random direction",
}

#: A cell counts as steered if an interval of this level lies above 0: every recipe and variant at two budgets, 5 % in all.
STRICT = 1 - 0.05 / ((len(RECIPES) + len(VARIANTS)) * len(BUDGETS))

#: CPU seconds per building record by model and set, measured on one core before the study ran on a GPU.
CPU_SECONDS = "cpu_seconds.json"

#: Fewer building samples give no interval worth printing.
MIN_SAMPLES = 5

Rows = list[dict[str, Any]]


def recipes_in(rows: Rows, stage: str = "test") -> list[str]:
    """Recipes and controls that a cell has lines of, in the order of the page."""
    there = {r["recipe"] for r in rows if r["stage"] == stage}
    controls = (*ATTRIBUTED.values(), "random_direction")
    return [name for name in (*RECIPES, "trained", *VARIANTS, *controls) if name in there]


def table_of(folder: Path, stage: str = "test") -> pd.DataFrame:
    """One row per model, set, recipe and budget, with intervals over samples, draws and questions.

    Args:
        folder: raw results.
        stage: ``"test"``, or ``"wordings"``.
    """
    out = []
    for about, rows in read_cells(folder):
        per_question = about["per_question"]
        for kl in BUDGETS:
            found = {name: effects_of(rows, name, kl, stage=stage) for name in recipes_in(rows, stage)}
            for name, effects in found.items():
                if effects is None or len(effects) < MIN_SAMPLES:
                    continue
                own = estimate(effects, per_question)
                row: dict[str, Any] = {"model": about["model"], "set": about["set"], "recipe": name, "kl": kl}
                row |= {"layer": about["layers"].get(name), "n_samples": effects.shape[0], "n_draws": effects.shape[1]}
                row |= {
                    "n_test": effects.shape[2] // per_question,
                    "effect": own.mean,
                    "low": own.low,
                    "high": own.high,
                }
                row["strict_low"] = estimate(effects, per_question, level=STRICT).low
                row["per_sample"] = " ".join(f"{x:+.2f}" for x in own.per_sample)
                for against, other in (
                    ("caa", "caa"),
                    ("kl_optimal", "kl_optimal"),
                    ("control", ATTRIBUTED.get(name, "")),
                ):
                    rival = found.get(other)
                    if rival is None or other == name:
                        continue
                    samples = min(len(rival), len(effects))
                    less = estimate(effects[:samples], per_question, minus=rival[:samples])
                    row |= {
                        f"minus_{against}": less.mean,
                        f"minus_{against}_low": less.low,
                        f"minus_{against}_high": less.high,
                    }
                out.append(row)
    return pd.DataFrame(out)


def cells_of(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Models and sets that are there, in the order of the page."""
    there = set(zip(table["model"], table["set"], strict=True))
    return [(model, name) for model in MODELS for name in SIZES if (model, name) in there]


def steered(cell: pd.DataFrame) -> bool:
    """Whether any recipe of a cell has its strict interval above 0 at one of the budgets."""
    own = cell[cell["recipe"].isin([*RECIPES, *VARIANTS, "trained"])]
    return bool((own["strict_low"] > 0).any())


def _shown(row: pd.Series | None, column: str = "effect", low: str = "low", high: str = "high") -> str:
    if row is None or column not in row:
        return "not measured"
    if pd.isna(row[column]):
        return "not reached"
    text = str(Estimate(row[column], row[low], row[high], ()))
    return f"**{text}**" if row[low] > 0 else text


def _row(cell: pd.DataFrame, recipe: str, kl: float) -> pd.Series | None:
    own = cell[(cell["recipe"] == recipe) & (cell["kl"] == kl)]
    return None if own.empty else own.iloc[0]


def effects_table(table: pd.DataFrame, kl: float, recipes: Sequence[str]) -> str:
    """Markdown: one row per model and set, one column per recipe; bold where the interval lies above 0."""
    lines = [
        "| model | set | " + " | ".join(LABELS[r] for r in recipes) + " | anything steers? |",
        "|---" * (len(recipes) + 3) + "|",
    ]
    for model, name in cells_of(table):
        cell = table[(table["model"] == model) & (table["set"] == name)]
        shown = [_shown(_row(cell, recipe, kl)) for recipe in recipes]
        lines.append(f"| {MODELS[model]} | {name} | {' | '.join(shown)} | {'yes' if steered(cell) else 'nothing'} |")
    return "\n".join(lines)


def differences_table(table: pd.DataFrame, kl: float, recipes: Sequence[str], column: str = "minus_caa") -> str:
    """Markdown: each recipe minus CAA, or (``"minus_control"``) minus the same with random tokens, paired."""
    what = " minus CAA" if column == "minus_caa" else ""
    lines = [
        "| model | set | " + " | ".join(LABELS[r] + what for r in recipes) + " |",
        "|---" * (len(recipes) + 2) + "|",
    ]
    for model, name in cells_of(table):
        cell = table[(table["model"] == model) & (table["set"] == name)]
        if not steered(cell):
            continue
        shown = [_shown(_row(cell, r, kl), column, f"{column}_low", f"{column}_high") for r in recipes]
        lines.append(f"| {MODELS[model]} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def trained_table(table: pd.DataFrame) -> str:
    """Markdown: trained vectors, and their paired differences from CAA and from the KL-optimal direction they began at."""
    own = table[table["recipe"] == "trained"]
    if own.empty:
        return ""
    lines = [
        "| model | set | KL, nats | samples | trained | minus CAA | minus KL-optimal |",
        "|---" * 7 + "|",
    ]
    for model, name in cells_of(own):
        for _, row in own[(own["model"] == model) & (own["set"] == name)].iterrows():
            less = [_shown(row, f"minus_{r}", f"minus_{r}_low", f"minus_{r}_high") for r in ("caa", "kl_optimal")]
            what = f"| {MODELS[model]} | {name} | {row['kl']:g} | {row['n_samples']} |"
            lines.append(f"{what} {_shown(row)} | {' | '.join(less)} |")
    return "\n".join(lines)


def seconds_table(folder: Path) -> str:
    """Markdown: CPU seconds per building record for what each recipe needs."""
    names = {
        "leave_one_out": "leave-one-out scores",
        "masked_prompts": "one masked run per token",
        "caa": "CAA",
        "margin_gradient": "margin gradient",
    }
    lines = ["| model | set | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    file = folder / CPU_SECONDS
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for model in MODELS:
        for name in SIZES:
            if name in measured.get(model, {}):
                seconds = measured[model][name]
                shown = [f"{seconds[k]:.2f}" if k in seconds else "" for k in names]
                lines.append(f"| {MODELS[model]} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def numbers_table(folder: Path, kl: float = 0.05) -> str:
    """Markdown: effect over the number of building records, where vectors of all records were measured too.

    Samples of ``SAMPLE`` records and vectors of all of them come from the other stages.
    """
    out: list[str] = []
    for about, rows in read_cells(folder):
        if not any(r["stage"] == "curve" for r in rows):
            continue
        means: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            points = row["effects"].get("test", []) if row["stage"] in ("number", "test", "curve") else []
            for change in [p["change"] for p in points if p["kl"] == kl and p["change"]]:
                means.setdefault((row["recipe"], row["n_build"]), []).append(float(np.mean(change)))
        recipes = [name for name in RECIPES if any(r == name for r, _ in means)]
        numbers = sorted({n for _, n in means})
        out.append(
            f"| {MODELS[about['model']]}, {about['set']} | " + " | ".join(f"{n} records" for n in numbers) + " |"
        )
        out.append("|---" * (len(numbers) + 1) + "|")
        for recipe in recipes:
            shown = [_spread(means.get((recipe, n), [])) for n in numbers]
            out.append(f"| {LABELS[recipe]} | {' | '.join(shown)} |")
    return "\n".join(out)


def _spread(means: Sequence[float]) -> str:
    """Their mean, and how many they are with their range."""
    if not means:
        return ""
    text = f"{np.mean(means):+.2f}"
    return text if len(means) == 1 else f"{text} ({len(means)} vectors, {min(means):+.2f} to {max(means):+.2f})"


def transfer_table(folder: Path, kl: float = 0.2) -> str:
    """Markdown: vectors of one set on the test records of the others, with standard errors over records."""
    out: list[str] = []
    for about, rows in read_cells(folder):
        own = [r for r in rows if r["stage"] == "transfer"]
        if not own:
            continue
        names = list(own[0]["effects"])
        shown_names = [about["set"] if n == "test" else n for n in names]
        out += [f"| from {about['set']} | " + " | ".join(shown_names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in own:
            points = [next(p for p in row["effects"][n] if p["kl"] == kl)["change"] for n in names]
            shown = [f"{np.mean(c):+.2f} ± {np.std(c, ddof=1) / len(c) ** 0.5:.2f}" if c else "" for c in points]
            out.append(f"| {LABELS[row['recipe']]} | {' | '.join(shown)} |")
    return "\n".join(out)


def wordings_table(table: pd.DataFrame, other: pd.DataFrame, kl: float) -> str:
    """Markdown: the set's own responses and other wordings, side by side."""
    lines = ["| recipe | own wording | other wordings | other wordings, minus CAA |", "|---|---|---|---|"]
    for model, name in cells_of(other):
        own, new = (t[(t["model"] == model) & (t["set"] == name)] for t in (table, other))
        for recipe in RECIPES:
            row = _row(new, recipe, kl)
            if row is not None:
                less = _shown(row, "minus_caa", "minus_caa_low", "minus_caa_high") if recipe != "caa" else ""
                lines.append(f"| {LABELS[recipe]} | {_shown(_row(own, recipe, kl))} | {_shown(row)} | {less} |")
    return "\n".join(lines)


def replaced(page: str, name: str, content: str) -> str:
    """The page with what stands between its markers ``<!-- name -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    head, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"the page has no part between {begin.strip()} and {end}")
    return head + begin + content.strip() + "\n" + end + rest.partition(end)[2]


def in_order(names: Iterable[str]) -> list[str]:
    """Recipes in the order of the page."""
    there = set(names)
    return [name for name in LABELS if name in there]


def texts_table(folder: Path) -> str:
    """Markdown: how much more positive a lexicon finds the texts that steered models write, with intervals."""
    lines = ["| model | recipe | " + " | ".join(f"{kl} nats" for kl in BUDGETS) + " |", "|---|---|---|---|"]
    for model in MODELS:
        file = folder / model / "reviews-texts.jsonl"
        found = judged(file) if file.exists() else {}
        for recipe in [name for name in LABELS if any(name == r for r, _ in found)]:
            shown = []
            for kl in BUDGETS:
                own = found.get((recipe, kl))
                if own is None or len(own) < MIN_SAMPLES:
                    shown.append("not reached")
                    continue
                one = estimate(own[:, None], 1)
                shown.append(f"**{one}**" if one.low > 0 else str(one))
            lines.append(f"| {MODELS[model]} | {LABELS[recipe]} | {' | '.join(shown)} |")
    return "\n".join(lines)
