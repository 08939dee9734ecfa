"""Response words out of a vector: against the logits that steering with it gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import grains_tl as gr
from tests.conftest import WORDS, tiny_model
from tests.helpers.planted import COPY, LAYER, axis, planted_model, planted_pairs

LAST = 2


def pairs_of(*responses: str) -> list[gr.PreferencePair]:
    return [gr.PreferencePair("the film was", f" {a}", f" {b}") for a, b in pairwise(responses)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_small_step_after_the_last_block_leaves_the_words_alone(architecture: str) -> None:
    """The logits of the words move together (by what every logit moves), those of other words do not."""
    model = tiny_model(architecture=architecture)
    raw = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    vectors = gr.SteeringVectors.from_raw(raw, [LAST], torch.tensor([3.0]))
    words = ("great", "awful", "good", "bad")
    rest = gr.vectors.without_words(model, vectors, pairs_of(*words))
    taken = [WORDS.index(w) for w in words]
    assert sorted(rest.info["without_tokens"]) == sorted(taken)
    assert 0 < rest.info["length_left"][0] < 1 and rest.magnitudes[0] < vectors.magnitudes[0]

    def spreads(v: gr.SteeringVectors) -> tuple[float, float]:
        logits = gr.analysis.lens_logits(model, v)[0]
        others = logits[[i for i in range(len(WORDS)) if i not in taken]]
        return float(logits[taken].std()), float(others.std())

    assert spreads(vectors)[0] > 0.1
    assert spreads(rest)[0] < 1e-3 and spreads(rest)[1] > 0.1


def test_what_is_left_is_the_nearest_vector_without_them(bridge: Any) -> None:
    """A projection: nothing changes the second time, and what went is at right angles to what is left."""
    raw = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    vectors = gr.SteeringVectors.from_raw(raw, [0, LAST], torch.ones(2))
    pairs = pairs_of("great", "awful", "warm")
    rest = gr.vectors.without_words(bridge, vectors, pairs)
    assert torch.allclose(gr.vectors.without_words(bridge, rest, pairs).raw, rest.raw, atol=1e-5)
    gone = vectors.raw - rest.raw
    assert float((gone * rest.raw).sum(-1).abs().max()) < 1e-4


def test_number_of_tokens(bridge: Any) -> None:
    vectors = gr.SteeringVectors.from_raw(torch.ones(1, 32), [1], torch.ones(1))
    rest = gr.vectors.without_words(bridge, vectors, pairs_of(*WORDS[5:30]), n_tokens=100)
    assert len(rest.info["without_tokens"]) == 8  # a quarter of d_model
    rest = gr.vectors.without_words(bridge, vectors, pairs_of("good", "bad", "good", "cold"), n_tokens=1)
    assert rest.info["without_tokens"] == [WORDS.index("good")]


def test_refusals(bridge: Any) -> None:
    vectors = gr.SteeringVectors.from_raw(torch.ones(1, 32), [1], torch.ones(1))
    with pytest.raises(ValueError, match="n_tokens"):
        gr.vectors.without_words(bridge, vectors, pairs_of("good", "bad"), n_tokens=0)
    with pytest.raises(ValueError, match="no records"):
        gr.vectors.without_words(bridge, vectors, [])
    wide = gr.SteeringVectors.from_raw(torch.ones(1, 31), [1], torch.ones(1))
    with pytest.raises(ValueError, match="31"):
        gr.vectors.without_words(bridge, wide, pairs_of("good", "bad"))
    planted = planted_model("bridge")
    with pytest.raises(ValueError, match="nothing is left"):  # this axis does nothing but say great or awful
        gr.vectors.without_words(planted, axis(COPY, [LAYER]), planted_pairs()[:4])
