"""The sentences at the top of the report say what the figures below them do."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from grains_tl.demo.verdicts import headline, verdict
from grains_tl.evaluate.controls import RANDOM_TOKENS, SIGN_TUNED, Comparison


def compared(low: float, high: float, caa: float, above: tuple[float, int]) -> Comparison:
    rows = {"vector": ["ours", "CAA"], "effect": [1.53, caa], "low": [low, 0.0], "high": [high, 9.0]}
    difference = {"difference": 0.4, "low": above[0], "high": 1.2, "beaten": above[1], "n_draws": 20}
    return Comparison(pd.DataFrame(rows), {}, torch.zeros(2), {RANDOM_TOKENS: difference})


@pytest.mark.parametrize(
    ("low", "high", "caa", "above", "said"),
    [
        (
            0.58,
            3.06,
            3.51,
            (-0.2, 20),
            "The vector steers: +1.53 nats (+0.58 to +3.06). Over random tokens: not shown, +0.40",
        ),
        (0.58, 3.06, 3.51, (0.1, 20), "Over random tokens: +0.40 (+0.10 to +1.20). CAA is stronger: +3.51."),
        (0.58, 3.06, 0.2, (0.1, 18), "not shown, +0.40 (+0.10 to +1.20). CAA is weaker: +0.20."),
        (-0.1, 3.06, 1.0, (0.1, 20), "Not shown that it steers: +1.53 nats (-0.10 to +3.06)."),
        (-3.0, -0.1, 1.0, (0.1, 20), "The vector works backwards"),
    ],
)
def test_sentences(low: float, high: float, caa: float, above: tuple[float, int], said: str) -> None:
    assert said in headline(compared(low, high, caa, above), None, method="ours")


def test_costs_that_were_measured_decide_about_caa() -> None:
    rows = [
        {"vector": "ours", "effect": 2.0, "difference_low": -1.4, "difference_high": -0.1},
        {"vector": "CAA", "effect": 2.8, "difference_low": 0.0, "difference_high": 0.0},
    ]
    found = compared(0.58, 3.06, 0.2, (0.1, 20))
    assert headline(found, {"at_kl": rows}, method="ours").endswith("At equal KL CAA is stronger: +2.80 against +2.00.")
    rows[0]["effect"] = None  # type: ignore[assignment]
    assert headline(found, {"at_kl": rows}, method="ours").endswith("CAA is weaker: +0.20.")


@pytest.mark.parametrize(
    ("low", "high", "beaten", "word"),
    [(0.1, 1.2, 20, "yes"), (0.1, 1.2, 18, "not shown"), (-0.2, 1.2, 20, "not shown"), (-1.2, -0.1, 0, "no")],
)
def test_an_open_question_is_not_answered_with_no(low: float, high: float, beaten: int, word: str) -> None:
    """It read "no, by +0.38 nats" where the interval held 0."""
    found = compared(0.5, 3, 1, (0.1, 20))
    row = {"difference": (low + high) / 2, "low": low, "high": high, "beaten": beaten, "n_draws": 20}
    found.against.update(dict.fromkeys((RANDOM_TOKENS, SIGN_TUNED), row))  # type: ignore[attr-defined]
    first, second, *_ = verdict(found, [], None, method="ours", layer=3, alpha=0.2).splitlines()
    assert first.startswith(f"attribution beats random tokens: {word}, {row['difference']:+.2f} nats")
    assert f": {word}, " in second
