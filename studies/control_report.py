"""Tables, sentences and the picture from the raw results of ``studies.control``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.evaluate.equal_cost import crossing

N_RESAMPLES = 2000
NEUTRAL_KL, GENERATED_KL = 0.05, 0.03

#: The model of the picture, and the alpha at which weights of one sum are compared (0.1 elsewhere).
PICTURED = "smollm2"
SHOWN = {"gemma3-270m": 0.04}

Arrays = dict[str, dict[str, NDArray[np.float64]]]


def arrays(effects: pd.DataFrame, costs: pd.DataFrame) -> Arrays:
    """By vector: ``alpha``, ``change`` ``[alpha, record]`` and ``kl`` ``[alpha, text]`` at the alphas with both, 0 first."""
    found: Arrays = {}
    for name, rows in costs.groupby("vector", sort=False):
        kl = rows.pivot(index="alpha", columns="text", values="kl").dropna()
        change = effects[effects["vector"] == name].pivot(index="alpha", columns="record", values="change")
        if len(kl) < 2 or change.empty:
            continue
        change = change.loc[kl.index]
        zero = [np.zeros((1, x.shape[1])) for x in (change, kl)]
        found[str(name)] = {
            "alpha": np.array([0.0, *kl.index]),
            "change": np.concatenate([zero[0], change.to_numpy()]),
            "kl": np.concatenate([zero[1], kl.to_numpy()]),
        }
    return found


def value_at(x: dict[str, NDArray[np.float64]], alpha: float, what: str) -> NDArray[np.float64]:
    """Change or KL per record or text at an alpha, by interpolation."""
    return np.array([np.interp(alpha, x["alpha"], column) for column in x[what].T])


def alpha_at(x: dict[str, NDArray[np.float64]], budget: float) -> float:
    """Where the mean KL reaches a budget."""
    crossed = crossing(x["kl"].mean(1), budget)
    if crossed is None:
        return float("nan")
    i, share = crossed
    return float(x["alpha"][i - 1] + share * (x["alpha"][i] - x["alpha"][i - 1]))


def interval(matrix: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of ``[draw, record]`` and its 95 % interval, over draws and records together."""
    rng = np.random.default_rng(0)
    n_draws, n = matrix.shape
    means = [matrix[rng.integers(0, n_draws, n_draws)][:, rng.integers(0, n, n)].mean() for _ in range(N_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(matrix.mean()), float(low), float(high)


def said(matrix: NDArray[np.float64]) -> str:
    """Mean and interval as text; a column that nothing reached says so."""
    if not np.isfinite(matrix).all():
        return "not reached"
    mean, low, high = interval(matrix)
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def stems(out: Path, label: str, kind: str) -> list[Path]:
    """The table of effects of each draw of a model."""
    return sorted(out.glob(f"{label}_draw[0-9]_{kind}_effects.csv"))


def at_alphas(parts: Sequence[Arrays], name: str, alphas: Sequence[float], what: str = "change") -> NDArray[np.float64]:
    """``[draw, record]`` at one alpha for each draw; NaN where there is none."""
    rows = zip(parts, alphas, strict=True)
    return np.stack(
        [value_at(x[name], a, what) if a == a else np.full(x[name][what].shape[1], np.nan) for x, a in rows]
    )


def gate_tables(out: Path, label: str) -> dict[str, pd.DataFrame]:
    """Every gate at the alpha at which the ungated vector spends the budget, at equal KL, and at equal generated KL."""
    draws = stems(out, label, "gated")
    costs: dict[str, list[Arrays]] = {"neutral_text": [], "neutral_prompts": [], "target_prompts": []}
    for file in draws:
        for kind, parts in costs.items():
            table = pd.read_csv(str(file).replace("effects", kind))
            parts.append(arrays(pd.read_csv(file), table))
    fires = pd.read_csv(str(draws[0]).replace("gated_effects", "fires"))
    text, prompts = costs["neutral_text"], costs["neutral_prompts"]
    begin = [alpha_at(one["no gate"], NEUTRAL_KL) for one in text]
    base = at_alphas(text, "no gate", begin)
    both = [_mixed(*one) for one in zip(prompts, costs["target_prompts"], strict=True)]
    free = at_alphas(text, "no gate", [alpha_at(one["no gate"], GENERATED_KL) for one in both])
    same, equal, generated = [], [], []
    for name in text[0]:
        opened = fires[fires["gate"] == name].groupby("kind")["opened"].mean()
        row: dict[str, Any] = {"model": label, "gate": name, "draws": len(draws), "records": base.shape[1]}
        change = at_alphas(text, name, begin)
        about: dict[str, Any] = {f"opens for {kind}": float(opened.get(kind, 1.0)) for kind in ("targets", "neutral")}
        about |= {"effect, nats": said(change), "minus no gate": said(change - base)}
        about |= {"KL neutral text": said(at_alphas(text, name, begin, "kl"))}
        same.append({**row, **about, "KL neutral prompts": said(at_alphas(prompts, name, begin, "kl"))})
        alphas = [alpha_at(x[name], NEUTRAL_KL) for x in text]
        equal.append({**row, **_compared(text, name, alphas, base)})
        if not all(name in x for x in both):
            continue
        alphas = [alpha_at(x[name], GENERATED_KL) for x in both]
        spent = {f"KL {kind}": said(at_alphas(costs[kind], name, alphas, "kl")) for kind in list(costs)[1:]}
        generated.append({**row, **_compared(text, name, alphas, free), **spent})
    return {
        "same_alpha": pd.DataFrame(same),
        "equal_kl": pd.DataFrame(equal),
        "equal_generated_kl": pd.DataFrame(generated),
    }


def _mixed(one: Arrays, other: Arrays) -> Arrays:
    """With the mean KL of two kinds of prompts, half of each, in place of the KL of texts; gates that both have."""
    found: Arrays = {}
    for name in (name for name in one if name in other):
        n = min(len(x[name]["alpha"]) for x in (one, other))  # both begin at 0 and rise alike
        kl = (one[name]["kl"][:n].mean(1) + other[name]["kl"][:n].mean(1)) / 2
        found[name] = {"alpha": one[name]["alpha"][:n], "change": one[name]["change"][:n], "kl": kl[:, None]}
    return found


def _compared(parts: Sequence[Arrays], name: str, alphas: Sequence[float], base: NDArray[np.float64]) -> dict[str, Any]:
    at = at_alphas(parts, name, alphas)
    return {
        "alpha": " ".join(f"{a:.2g}" for a in alphas),
        "effect, nats": said(at),
        "minus no gate": said(at - base),
    }


def strength_table(out: Path, label: str) -> pd.DataFrame:
    """Strength by attribution against uniform strength and random places, each at the alpha of one generated KL."""
    files = stems(out, label, "weighted")
    found = [arrays(pd.read_csv(file), pd.read_csv(str(file).replace("effects.csv", "costs.csv"))) for file in files]
    # a run that was cut off leaves weights without their larger alphas
    found = [{name: y for name, y in x.items() if len(y["alpha"]) == len(x["uniform"]["alpha"])} for x in found]

    def at_budget(parts: Sequence[Arrays], name: str) -> NDArray[np.float64]:
        return at_alphas(parts, name, [alpha_at(x[name], GENERATED_KL) for x in parts])

    rows = []
    names = list(dict.fromkeys(name for x in found for name in x))
    chance = [name for name in names if name.startswith("random ")]
    for name in names:
        own = [x for x in found if name in x]
        alphas = [alpha_at(x[name], GENERATED_KL) for x in own]
        row: dict[str, Any] = {"model": label, "weights": name, "alpha": " ".join(f"{a:.2g}" for a in alphas)}
        at = at_budget(own, name)
        row |= {"effect, nats": said(at), "minus uniform": said(at - at_budget(own, "uniform"))}
        beside = [x for x in own if chance and all(other in x for other in chance)]
        if name == "leave-one-out" and beside:  # the random places have its weights
            others = np.mean([at_budget(beside, other) for other in chance], axis=0)
            row |= {"minus random": said(at_budget(beside, name) - others), "draws with random": len(beside)}
        rows.append({**row, "draws": len(own), "records": at.shape[1], "prompts": own[0][name]["kl"].shape[1]})
    return pd.DataFrame(rows)


def strength_at_one_alpha(out: Path, label: str, alpha: float = 0.1) -> pd.DataFrame:
    """Effects of all weights at one alpha (their prompts' weights have one sum), beside uniform and random places."""
    tables = [t[t["alpha"] == alpha] for t in map(pd.read_csv, stems(out, label, "weighted"))]
    change = {
        str(name): np.stack([t[t["vector"] == name].sort_values("record")["change"].to_numpy() for t in tables])
        for name in tables[0]["vector"].unique()
    }
    rows = []
    for name, own in change.items():
        kind = "random, half" if name.endswith("half") else "random"
        chance = np.mean([x for other, x in change.items() if other.rpartition(" ")[0] == kind], axis=0)
        row = {
            "model": label,
            "weights": name,
            "effect, nats": said(own),
            "minus uniform": said(own - change["uniform"]),
        }
        rows.append(row if name == "uniform" or "random" in name else {**row, "minus random": said(own - chance)})
    return pd.DataFrame(rows)


def generated(out: Path, label: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokens of the recipes at one effect, and the summary with intervals over prompts (of all draws)."""
    parts = []
    for number, file in enumerate(sorted(out.glob(f"{label}_draw[0-9]_generated.csv"))):
        table = pd.read_csv(file)
        table["kl_by_token"] = [json.loads(x) for x in table["kl_by_token"]]
        parts.append(table.assign(sample=table["sample"] + 100 * number))  # draws share prompts: not independent
    tokens = pd.concat(parts, ignore_index=True)
    rows = []
    for temperature, group in tokens.groupby("temperature"):
        kept = gr.evaluate.summarize(group)
        rows.append(kept.assign(decoding="sampled" if temperature else "greedy"))
    return tokens, pd.concat(rows, ignore_index=True)


def report(out: Path) -> None:
    """Write ``table_*.csv`` and the picture, and print everything."""
    made: dict[str, list[pd.DataFrame]] = {}
    labels = sorted({file.name.partition("_draw")[0] for file in out.glob("*_draw[0-9]_*_effects.csv")}, reverse=True)
    for label in labels:
        tables = gate_tables(out, label) if stems(out, label, "gated") else {}
        if stems(out, label, "weighted"):
            tables["strength"] = strength_table(out, label)
            tables["strength_at_one_alpha"] = strength_at_one_alpha(out, label, SHOWN.get(label, 0.1))
        if label == PICTURED:
            tokens, tables["generated"] = generated(out, label)
        for name, table in tables.items():
            made.setdefault(name, []).append(table)
    for name, parts in made.items():
        table = pd.concat(parts, ignore_index=True)
        write_atomically(out / f"table_{name}.csv", table.to_csv(index=False, float_format="%.4g").encode())
        print(f"\n{name}\n{table.to_string(index=False)}")
    print(tokens.groupby("vector")[["alpha", "effect"]].agg(["min", "max"]))
    figure = gr.plotting.plot_generation_kl(tokens[tokens["temperature"] == 0])
    figure.savefig("docs/img/control-positions.png", dpi=110, bbox_inches="tight")
