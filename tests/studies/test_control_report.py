"""The tables of the study of control, on effects and costs whose figures at one KL can be written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from studies.control_report import GENERATED_KL, NEUTRAL_KL, gate_tables, strength_at_one_alpha, strength_table

ALPHAS = np.linspace(0.02, 1.0, 50)


def rising(slopes: dict[str, float], item: str, n_items: int, value: str) -> pd.DataFrame:
    """``slope`` nats for each unit of alpha, the same for every item."""
    rows = [
        {"vector": name, "alpha": a, item: i, value: slope * a}
        for name, slope in slopes.items()
        for a in ALPHAS
        for i in range(n_items)
    ]
    return pd.DataFrame(rows)


def effects(gains: dict[str, float]) -> pd.DataFrame:
    """What every record gains."""
    return rising(gains, "record", 3, "change")


def costs(prices: dict[str, float]) -> pd.DataFrame:
    """What every text costs."""
    return rising(prices, "text", 4, "kl")


def number(cell: str) -> float:
    return float(cell.partition(" ")[0])


def test_gates_at_one_kl_of_each_kind(tmp_path: Path) -> None:
    """A gate with the whole effect, a tenth of the neutral KL and none on neutral prompts."""
    stem = tmp_path / "m_draw0"
    effects({"no gate": 2.0, "probe": 2.0}).to_csv(f"{stem}_gated_effects.csv", index=False)
    for kind, price in (("neutral_text", 0.02), ("neutral_prompts", 0.0), ("target_prompts", 0.2)):
        costs({"no gate": 0.2, "probe": price}).to_csv(f"{stem}_gated_{kind}.csv", index=False)
    fires = [{"gate": "probe", "kind": k, "prompt": 0, "opened": x} for k, x in (("targets", 1.0), ("neutral", 0.25))]
    pd.DataFrame(fires).to_csv(f"{stem}_fires.csv", index=False)
    tables = {name: table.set_index("gate") for name, table in gate_tables(tmp_path, "m").items()}
    free = NEUTRAL_KL / 0.2
    same = tables["same_alpha"]
    assert number(same.loc["probe", "effect, nats"]) == pytest.approx(2 * free)
    assert number(same.loc["probe", "KL neutral text"]) == pytest.approx(0.02 * free)
    assert number(same.loc["probe", "KL neutral prompts"]) == 0
    assert same.loc["probe", "opens for neutral"] == 0.25 and same.loc["no gate", "opens for neutral"] == 1
    assert tables["equal_kl"].loc["probe", "effect, nats"] == "not reached"  # it would take alpha 2.5
    equal = tables["equal_generated_kl"]
    assert number(equal.loc["no gate", "effect, nats"]) == pytest.approx(2 * GENERATED_KL / 0.2)
    assert number(equal.loc["probe", "effect, nats"]) == pytest.approx(2 * GENERATED_KL / 0.1)
    assert number(equal.loc["probe", "KL target_prompts"]) == pytest.approx(2 * GENERATED_KL)
    assert number(equal.loc["probe", "minus no gate"]) == pytest.approx(2 * GENERATED_KL / 0.2)


def test_random_places_get_an_alpha_of_their_own(tmp_path: Path) -> None:
    """Weights at random places that cost and do half as much are no worse at one KL."""
    stem = tmp_path / "m_draw0_weighted"
    gains = {"uniform": 2.0, "leave-one-out": 1.0, "random 0": 0.5, "random 1": 1.5, "random, half 0": 1.0}
    effects(gains).to_csv(f"{stem}_effects.csv", index=False)
    costs({name: gain / 10 for name, gain in gains.items() if "half" not in name}).to_csv(
        f"{stem}_costs.csv", index=False
    )
    table = strength_table(tmp_path, "m").set_index("weights")
    for name in ("uniform", "leave-one-out", "random 0", "random 1"):
        assert number(table.loc[name, "effect, nats"]) == pytest.approx(10 * GENERATED_KL, rel=1e-3)
    assert number(table.loc["leave-one-out", "minus random"]) == pytest.approx(0, abs=1e-3)
    at_one = strength_at_one_alpha(tmp_path, "m", float(ALPHAS[4])).set_index("weights")
    assert number(at_one.loc["leave-one-out", "minus random"]) == pytest.approx(0, abs=1e-9)
    assert number(at_one.loc["leave-one-out", "minus uniform"]) == pytest.approx(-ALPHAS[4], rel=1e-2)
