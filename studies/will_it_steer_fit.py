"""The calibration table of ``gr.finding.predict_effect``, and its worth on sets that were left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grains_tl._util.files import write_atomically
from grains_tl._util.stats import rank_correlation
from grains_tl.finding.prediction import LEVEL, Calibration

TABLE = Path("grains_tl/data_files/steerability.json")
COLUMNS = ["model", "set", "family", "recipe", "layer", "n", "linear", "effect"]
FEATURES = ["linear", "slope", "separation", "agree", "split_half", "mean_cosine", "difference_cosine"]


def load(out: Path) -> pd.DataFrame:
    """All sets that were measured; an empty table where there are none."""
    files = sorted(out.glob("smollm2_*.json"))
    return pd.concat([pd.read_json(file) for file in files], ignore_index=True) if files else pd.DataFrame()


def left_out(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Each group's effects predicted from the others alone."""
    parts = []
    for _, own in frame.groupby(by):
        rest = frame[~frame.index.isin(own.index)]
        calibration = Calibration.of(rest)
        predicted, low, high = calibration.predict(own["linear"].to_numpy(float))
        parts.append(own.assign(predicted=predicted, low=low, high=high))
    return pd.concat(parts)


def worth(frame: pd.DataFrame, later: pd.DataFrame) -> dict[str, Any]:
    """Correlations of left-out predictions with measured effects, coverage of the intervals, features one by one.

    ``later`` are cells that are not in the table, of the folder ``later``.
    """
    found: dict[str, Any] = {"cells": len(frame), "sets": frame["set"].nunique(), "families": frame["family"].nunique()}
    tables = {f"without its {by}": left_out(frame, by) for by in ("set", "family")}
    for recipe, own in tables["without its family"].groupby("recipe"):
        tables[f"without its family, {recipe}"] = own
    if len(later):
        predicted, low, high = Calibration.of(frame).predict(later["linear"].to_numpy(float))
        tables["measured after the table was made"] = later.assign(predicted=predicted, low=low, high=high)
    for name, table in tables.items():
        sets = table.groupby("set")[["predicted", "effect"]].mean()
        found[name] = {
            "cells": len(table),
            "sets": len(sets),
            "correlation": round(float(np.corrcoef(table["predicted"], table["effect"])[0, 1]), 3),
            "rank correlation": round(rank_correlation(table["predicted"].to_numpy(), table["effect"].to_numpy()), 3),
            "rank correlation of set means": round(
                rank_correlation(sets["predicted"].to_numpy(), sets["effect"].to_numpy()), 3
            ),
            "mean error, nats": round(float((table["predicted"] - table["effect"]).abs().mean()), 3),
            f"in the {LEVEL:.0%} interval": round(
                float(((table["effect"] >= table["low"]) & (table["effect"] <= table["high"])).mean()), 3
            ),
            "sign right where |effect| > 2 se": round(
                float(
                    (np.sign(table["predicted"]) == np.sign(table["effect"]))[
                        table["effect"].abs() > 2 * table["se"]
                    ].mean()
                ),
                3,
            ),
        }
    own = frame[~frame["shuffled"]]
    found["rank correlation with the effect"] = {
        name: [
            round(rank_correlation(part[name].to_numpy(float), part["effect"].to_numpy(float)), 3)
            for part in (frame, own)
        ]
        for name in FEATURES
    }
    return found


def fit(out: Path) -> None:
    """Write the table into the package, and print what it is worth."""
    frame = load(out)
    about = {
        "what": "first-order and measured effects of vectors, nats, at a KL of 0.05; from studies/will_it_steer.py",
        "columns": COLUMNS,
    }
    rows = frame[COLUMNS].round({"linear": 3, "effect": 3}).to_numpy().tolist()
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(about)[:-1] + ', "rows": [\n' + lines + "\n]}\n"
    write_atomically(TABLE, text.encode())
    found = worth(frame, load(out / "later"))
    write_atomically(out / "worth.txt", (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    fit(Path("studies/results/will_it_steer"))
