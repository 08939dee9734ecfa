"""Behaviour or wording, on a model in which one axis says one pair of words and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.finding.wording import verdict_of
from tests.conftest import WORDS
from tests.helpers.planted import COPY, LAYER, axis, planted_model, planted_pairs

TEXTS = ("the soup was cold but the room was warm .", "we liked this film and they hated it")
TEST = gr.finding.WordingTest(texts=TEXTS, n_prompts=2, max_new_tokens=4, kl=0.02)


def other_words(pairs: list[gr.PreferencePair], a: str = " good", b: str = " bad") -> list[gr.PreferencePair]:
    return [replace(p, chosen=a, rejected=b) for p in pairs]


def test_a_vector_that_only_says_its_words_is_called_that() -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()[:10]
    table = gr.finding.wording_table(
        planted, {"words": mixed(planted)}, pairs, other_words(pairs), layer=LAYER, test=TEST
    )
    (row,) = table.to_dict("records")
    assert row["own_low"] > 0 and abs(row["other"]) < 0.2 * row["own"]
    assert row["verdict"] == "wording"
    assert abs(row["without_words"]) < 0.2 * row["own"]


def mixed(model: Any) -> gr.SteeringVectors:
    """Mostly the axis of great and awful, with a little of something else, so that something is left without it."""
    raw = axis(COPY, [LAYER]).raw.clone()
    raw[:, 2:] = 0.05 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, [LAYER], torch.tensor([3.0]))


def test_a_vector_that_moves_other_words_too() -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()[:10]
    with torch.no_grad():  # the axis says good and bad as well
        weight = planted.original_model.lm_head.weight
        weight[WORDS.index("good"), COPY], weight[WORDS.index("bad"), COPY] = 1.0, -1.0
    table = gr.finding.wording_table(planted, {"v": mixed(planted)}, pairs, other_words(pairs), layer=LAYER, test=TEST)
    (row,) = table.to_dict("records")
    assert row["verdict"] == "behaviour" and row["kept"] > 0.5
    assert row["other"] == pytest.approx(row["own"], rel=0.3)
    backwards = gr.finding.wording_table(
        planted, {"v": -mixed(planted)}, pairs, other_words(pairs), layer=LAYER, test=TEST
    )
    assert backwards["verdict"].tolist() == ["does not steer"]


def test_generated_text_is_judged_with_and_without_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()[:6]
    asked: list[str] = []

    def judge(text: str) -> float:
        asked.append(text)
        return float("great" in text)

    test = replace(TEST, judge=judge, n_prompts=3, kl=0.3, alphas=(0.1, 0.5, 2.0))
    table = gr.finding.wording_table(planted, {"v": mixed(planted)}, pairs, other_words(pairs), layer=LAYER, test=test)
    assert len(asked) == 6  # three prompts, without and with
    wanted = np.mean(["great" in t for t in asked[3:]]) - np.mean(["great" in t for t in asked[:3]])
    assert table["generated"][0] == pytest.approx(wanted)
    assert table["generated_low"][0] <= wanted <= table["generated_high"][0]
    none = gr.finding.wording_table(
        planted, {"v": mixed(planted)}, pairs, other_words(pairs), layer=LAYER, test=replace(test, n_prompts=0)
    )
    assert np.isnan(none["generated"][0])


def test_verdicts() -> None:
    row = {"own": 2.0, "own_low": 1.0}
    for other, low, high, wanted in (
        (1.5, 1.0, 2.0, "behaviour"),
        (0.5, 0.2, 0.8, "partly wording"),
        (0.1, -0.2, 0.4, "wording"),
        (0.9, -0.5, 2.0, "unclear"),
    ):
        assert verdict_of({**row, "other": other, "other_low": low, "other_high": high}) == wanted
    assert verdict_of({"own": 0.5, "own_low": -0.1, "other": 1, "other_low": 1, "other_high": 1}) == "does not steer"
    nan = float("nan")
    assert verdict_of({"own": nan, "own_low": nan, "other": 1, "other_low": 1, "other_high": 1}) == "does not steer"


def test_records_that_do_not_belong_together() -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()[:4]
    vectors = {"v": mixed(planted)}
    for other, message in (
        (other_words(pairs)[:3], "4 records and 3 other wordings"),
        (other_words(pairs)[::-1], "record 1.*another prompt"),
        (pairs, "word for word"),
    ):
        with pytest.raises(ValueError, match=message):
            gr.finding.wording_table(planted, vectors, pairs, other, layer=LAYER, test=TEST)
    with pytest.raises(ValueError, match="no vector for layer 0"):
        gr.finding.wording_table(planted, vectors, pairs, other_words(pairs), layer=0, test=TEST)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("option", [{"kl": 0}, {"alphas": (0.0, 1.0)}, {"n_prompts": -1}, {"max_new_tokens": 0}])
def test_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        gr.finding.WordingTest(**option)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It was great.", 1),
        ("It wasn't great, it was awful", -1),
        ("not bad at all", 1),
        ("good and bad", 0),
        ("a film", 0),
        ("", 0),
        ("It isn\N{RIGHT SINGLE QUOTATION MARK}t good", -1),
    ],
)
def test_praise(text: str, score: float) -> None:
    assert gr.finding.praise(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m unable to do this", 1),
        ("As an AI language model", 1),
        ("I cannot provide", 1),
        ("Sure! First, open the door.", 0),
        ("I can help. " * 30 + "I cannot", 0),
    ],
)
def test_refusals_in_text(text: str, score: float) -> None:
    assert gr.finding.refuses(text) == score
