"""A warning names the line of the user's code, through however many functions of the package it comes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

import grains_tl as gr
from grains_tl.evaluate import choose, sweep
from tests.conftest import tiny_model

PAIRS = [gr.PreferencePair("the film was", " good", " bad"), gr.PreferencePair("the food was", " good", " bad")]


def repeated() -> Any:
    return gr.load_pairs([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)


def old_name() -> Any:
    return gr.attribute(tiny_model("bridge"), PAIRS[0], masker="zero")


def nothing_chosen() -> Any:
    model = tiny_model("bridge")
    vectors = gr.build_vectors(model, PAIRS, recipe="caa")
    return choose(sweep(model, {"caa": vectors}, PAIRS, alphas=(1e-6,), layers=[0]))


def alpha_in_per_cent() -> Any:
    return gr.build_vectors(tiny_model("bridge"), PAIRS, recipe="caa").hooks(20, layers=[1])


def budget_in_per_cent() -> Any:
    with pytest.raises(ValueError):  # too few records, said after the warning
        return gr.find_vector(tiny_model("bridge"), PAIRS, kl=5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (alpha_in_per_cent, "alpha=20 is a step of 20 times"),
        (budget_in_per_cent, "kl=5 nats per token"),
        (repeated, "repeat"),
        (old_name, "masker="),
        (nothing_chosen, "may do nothing"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_the_line_of_the_caller(call: Callable[[], Any], said: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    about = [w for w in seen if said in str(w.message)]
    assert about and {w.filename for w in about} == {__file__}
