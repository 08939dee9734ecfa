"""Tables, sentences and the picture from the raw results of ``studies.control``."""

from __future__ import annotations

import json
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


def gate_tables(out: Path, label: str) -> dict[str, pd.DataFrame]:
    """Every gate at the alpha at which the ungated vector spends the budget, and at equal KL."""
    draws = sorted(out.glob(f"{label}_draw[0-9]_gated_effects.csv"))
    text, prompts, fires = [], [], []
    for file in draws:
        effects, stem = pd.read_csv(file), str(file).removesuffix("_effects.csv")
        text.append(arrays(effects, pd.read_csv(f"{stem}_neutral_text.csv")))
        prompts.append(arrays(effects, pd.read_csv(f"{stem}_neutral_prompts.csv")))
        fires.append(pd.read_csv(str(file).replace("gated_effects", "fires")))
    begin = [alpha_at(one["no gate"], NEUTRAL_KL) for one in text]
    same, equal = [], []
    for name in text[0]:
        opened = fires[0][fires[0]["gate"] == name].groupby("kind")["opened"].agg(["mean", "size"])
        row: dict[str, Any] = {"gate": name, "opens for targets": 1.0, "opens for neutral": 1.0}
        if len(opened):
            row |= {f"opens for {kind}": float(opened.loc[kind, "mean"]) for kind in ("targets", "neutral")}
        change = np.stack([value_at(x[name], a, "change") for x, a in zip(text, begin, strict=True)])
        base = np.stack([value_at(x["no gate"], a, "change") for x, a in zip(text, begin, strict=True)])
        row["effect, nats"], row["minus no gate"] = said(change), said(change - base)
        for kind, parts in (("KL neutral text", text), ("KL neutral prompts", prompts)):
            row[kind] = said(np.stack([value_at(x[name], a, "kl") for x, a in zip(parts, begin, strict=True)]))
        same.append(row)
        alphas = [alpha_at(x[name], NEUTRAL_KL) for x in text]
        at = np.stack(
            [
                value_at(x[name], a, "change") if a == a else np.full(base.shape[1], np.nan)
                for x, a in zip(text, alphas, strict=True)
            ]
        )
        equal.append(
            {
                "gate": name,
                "alpha": " ".join(f"{a:.2f}" for a in alphas),
                "effect, nats": said(at),
                "minus no gate": said(at - base),
            }
        )
    return {"same_alpha": pd.DataFrame(same), "equal_kl": pd.DataFrame(equal)}


def strength_table(out: Path, label: str) -> pd.DataFrame:
    """Strength by attribution against uniform strength and random places, at one KL along generated tokens."""
    found = []
    for file in sorted(out.glob(f"{label}_draw[0-9]_weighted_effects.csv")):
        found.append(arrays(pd.read_csv(file), pd.read_csv(str(file).replace("effects.csv", "costs.csv"))))
    rows = []
    base = np.stack([value_at(x["uniform"], alpha_at(x["uniform"], GENERATED_KL), "change") for x in found])
    for name in [n for n in found[0] if all(n in x for x in found)]:
        alphas = [alpha_at(x[name], GENERATED_KL) for x in found]
        if not np.isfinite(alphas).all():
            continue
        at = np.stack([value_at(x[name], a, "change") for x, a in zip(found, alphas, strict=True)])
        kl = np.stack([value_at(x[name], 0.1, "kl") for x in found])
        rows.append({"weights": name, "alpha": " ".join(f"{a:.2f}" for a in alphas), "KL at alpha 0.1": said(kl),
                     "effect, nats": said(at), "minus uniform": said(at - base), "draws": len(at),
                     "records": at.shape[1]})  # fmt: skip
    return pd.DataFrame(rows)


def strength_at_one_alpha(out: Path, label: str, alpha: float = 0.1) -> pd.DataFrame:
    """Effects of all weights at one alpha (their prompts' weights have one sum), beside uniform and random places."""
    files = sorted(out.glob(f"{label}_draw[0-9]_weighted_effects.csv"))
    tables = [t[t["alpha"] == alpha] for t in map(pd.read_csv, files)]
    change = {
        str(name): np.stack([t[t["vector"] == name].sort_values("record")["change"].to_numpy() for t in tables])
        for name in tables[0]["vector"].unique()
    }
    rows = []
    for name, own in change.items():
        kind = "random, half" if name.endswith("half") else "random"
        chance = np.mean([x for other, x in change.items() if other.rpartition(" ")[0] == kind], axis=0)
        row = {"weights": name, "effect, nats": said(own), "minus uniform": said(own - change["uniform"])}
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


def report(out: Path, label: str = "smollm2") -> None:
    """Write ``tables_*.csv`` and the picture, and print everything."""
    tables = gate_tables(out, label)
    tables["strength"] = strength_table(out, label)
    tables["strength_at_alpha_0.1"] = strength_at_one_alpha(out, label)
    tokens, tables["generated"] = generated(out, label)
    for name, table in tables.items():
        write_atomically(out / f"table_{name}.csv", table.to_csv(index=False, float_format="%.4g").encode())
        print(f"\n{name}\n{table.to_string(index=False)}")
    print(tokens.groupby("vector")[["alpha", "effect"]].agg(["min", "max"]))
    figure = gr.plotting.plot_generation_kl(tokens[tokens["temperature"] == 0])
    figure.savefig("docs/img/control-positions.png", dpi=110, bbox_inches="tight")
