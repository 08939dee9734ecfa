"""The share of the reachable, by hand and on a planted circuit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.reachable import with_share
from tests.helpers.planted import LAYER, planted_model, planted_pairs

TEXTS = ("the soup was cold but the room was warm .", "we liked this film and they hated it", "is the hotel bad ?")


def table_of(*rows: tuple[int, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["layer", "effect", "kl"])


def stating(held: float, plain: float, scope: str = "all") -> gr.SteeringVectors:
    info = {"scope": scope, "predicted_effect_kl_0.05": [held], "linear_ceiling_kl_0.05": {"chosen": [plain]}}
    return gr.SteeringVectors.from_raw(torch.ones(1, 4), [3], torch.ones(1), info)


def test_by_hand() -> None:
    table = table_of((3, 2.0, 0.05), (3, 1.0, 0.05), (5, 4.0, 0.05))
    assert with_share(table)["share"].tolist()[:2] == [1.0, 0.5] and np.isnan(with_share(table)["share"][2])
    known = with_share(table, [stating(4.0, 8.0)])
    assert known["share"].tolist()[:2] == pytest.approx([0.5, 0.25])
    assert known["share_low"].tolist()[:2] == pytest.approx([0.25, 0.125])
    # what was reached counts where the estimate is below it
    assert with_share(table, [stating(1.0, 1.5)])["share"].tolist()[:2] == [1.0, 0.5]
    assert with_share(table, [stating(4.0, 8.0, "last")])["share"].tolist()[:2] == [1.0, 0.5]  # of another scope


def test_per_root_of_the_kl() -> None:
    table = table_of((3, 2.0, 0.2), (3, 2.0, 0.05))  # the first pays four times as much for the same
    assert with_share(table)["share"].tolist() == pytest.approx([0.5, 1.0])
    assert with_share(table, [stating(4.0, 4.0)])["share"].tolist() == pytest.approx([0.25, 0.5])


def test_controls_and_missing_effects() -> None:
    table = table_of((3, 2.0, 0.05), (3, 9.0, 0.05), (3, float("nan"), 0.05), (3, -1.0, 0.05))
    found = with_share(table.assign(control=[False, True, False, False]))["share"]
    assert found[0] == 1.0 and np.isnan(found[1]) and np.isnan(found[2]) and found[3] == -0.5


def test_in_the_tables_of_equal_cost_and_of_a_search() -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()
    options: dict[str, Any] = {"n_samples": 60, "texts": TEXTS}
    optimal = gr.build_vectors(planted, pairs[:12], recipe="kl_optimal", layers=[LAYER], **options)
    caa = gr.build_vectors(planted, pairs[:12], recipe="caa", layers=[LAYER])
    tables = gr.evaluate.sweep_records(
        planted,
        {"kl_optimal": optimal, "caa": caa},
        pairs[12:24],
        alphas=[0.05, 0.1, 0.3],
        neutral=["the food was very good and warm", "one two three four"],
    )
    found = gr.evaluate.effect_at_kl(*tables, kl=0.01, n=50, ceiling=optimal).set_index("vector")
    stated = optimal.info["predicted_effect_kl_0.05"][0] * (0.01 / 0.05) ** 0.5
    best = max(stated, found["effect"].max())
    assert found["share"].to_numpy() == pytest.approx(found["effect"].to_numpy() / best)
    assert (found["share_low"] <= found["share"] + 1e-9).all()
    search = gr.find_vector(
        planted,
        pairs,
        [gr.vectors.KLOptimal(**options), "caa", "random_direction"],
        layers=[LAYER],
        neutral=["the food was very good and warm", "one two three four"],
        n_examples=0,
        n_draws=2,
    ).table
    own = search[~search["control"]]
    assert own["share"].notna().all() and own["share"].max() <= 1 + 1e-9
    assert search[search["control"]]["share"].isna().all()
