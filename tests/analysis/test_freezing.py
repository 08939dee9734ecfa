"""Freezing finds a planted head, adds up, and equals plain PyTorch where that can be computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.analysis.freezing import PARTS, mechanism
from tests.conftest import KINDS, WORDS, tiny_hf, tiny_model
from tests.helpers.planted import COPY, HEAD, LAYER, MOOD, axis, planted_model, planted_neuron_hf, planted_pairs

ATOL = 2e-4


def random_vectors(d_model: int = 32, layer: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(1, d_model, generator=torch.Generator().manual_seed(3))
    return gr.SteeringVectors.from_raw(raw, [layer], torch.tensor([3.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_effect_of_plain_runs(kind: str, pairs: Any) -> None:
    model = tiny_model(kind)
    steering = random_vectors().steering(0.5, 0)
    table = mechanism(model, steering, pairs, n_random=0).set_index("part")
    before, after = (gr.score_pairs(model, pairs, hooks) for hooks in (None, steering))
    change = ((after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])).mean().item()
    assert table.effect["total"] == pytest.approx(change, abs=ATOL)
    assert table.effect[["direct", *PARTS]].sum() == pytest.approx(change, abs=ATOL)
    assert table.share[["direct", *PARTS]].sum() == pytest.approx(1, abs=1e-3)
    assert table.effect[list(PARTS)].abs().min() > 0.01, "every part does something in a random model"


def test_with_everything_frozen_only_the_step_itself_reaches_the_unembedding(pairs: Any) -> None:
    """Closed form: the step, divided as the final norm divided the unsteered residual, through the unembedding."""
    hf, steering = tiny_hf(), random_vectors().steering(0.5, 0, operator="add")
    step = 0.5 * 3.0 * steering.vectors.directions[0]
    model = tiny_model("bridge")
    pair = gr.PreferencePair("the film was", " great", " awful")
    ids = torch.tensor([model.tokenizer("the film was")["input_ids"]])
    with torch.no_grad():
        resid = hf.model.layers[-1](
            hf(ids, output_hidden_states=True).hidden_states[-2],
            position_embeddings=hf.model.rotary_emb(ids.float()[..., None], torch.arange(ids.shape[1])[None]),
        )
        resid = resid[0] if isinstance(resid, tuple) else resid
        scale = (resid[0, -1].pow(2).mean() + hf.config.rms_norm_eps).sqrt()
        logits = hf.lm_head(hf.model.norm.weight * (step / scale))
    expected = (logits[WORDS.index("great")] - logits[WORDS.index("awful")]).item()
    table = mechanism(model, steering, [pair], n_random=0).set_index("part")
    assert table.effect["direct"] == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_that_reads_the_vector_is_named(kind: str) -> None:
    """The planted head looks at all positions alike and copies the mood axis: all of the effect is in its values."""
    model, steering = planted_model(kind), axis(MOOD, [LAYER - 1]).steering(0.3, LAYER - 1)
    pairs = planted_pairs()[:6]
    table = mechanism(
        model, steering, pairs, n_random=2, texts=["the film was good", "we liked the soup but not the room"]
    )
    own = table[table.vector == "steering"].set_index("part")
    assert own.share["OV"] > 0.9
    assert abs(own.share["direct"]) < 0.02 and abs(own.share["QK"]) < 0.05
    random = table[table.vector == "random direction"].set_index("part")
    assert random.kl["total"] == pytest.approx(own.kl["total"], rel=0.2)

    heads = mechanism(model, steering, pairs, by="head", n_random=0)
    best = heads[heads.part == "head"].sort_values("lost", ascending=False).iloc[0]
    assert (best["layer"], best["head"]) == (LAYER, HEAD)
    assert best["lost"] > 0.9 * own.effect["total"] and best["alone"] > 0.9 * own.effect["total"]
    others = heads[~((heads.layer == LAYER) & (heads["head"] == HEAD))]
    assert others.lost.abs().max() < 0.1 * own.effect["total"]
    layers = mechanism(model, steering, pairs, by="layer", n_random=0)
    assert tuple(layers.sort_values("lost").iloc[-1][["layer", "part"]]) == (LAYER, "OV")


@pytest.mark.parametrize("kind", KINDS)
def test_the_neuron_that_reads_the_vector_is_in_the_named_mlp(kind: str) -> None:
    model, steering = planted_model(kind, planted_neuron_hf()), axis(MOOD, [LAYER - 1]).steering(0.3, LAYER - 1)
    pairs = planted_pairs()[:6]
    own = mechanism(model, steering, pairs, n_random=0).set_index("part")
    assert own.share["MLP"] > 0.9 and own.share[["direct", "QK", "OV"]].abs().max() < 0.06
    layers = mechanism(model, steering, pairs, by="layer", n_random=0).sort_values("lost", ascending=False)
    first, total = layers.iloc[0], own.effect["total"]
    assert (first["layer"], first["part"]) == (LAYER, "MLP")
    assert first["lost"] > 0.9 * total and first["alone"] > 0.9 * total
    assert layers["lost"].iloc[1:].abs().max() < 0.15 * total


def test_a_vector_that_is_read_directly_needs_no_later_part(bridge: Any) -> None:
    model = planted_model("bridge")
    table = mechanism(model, axis(COPY, [LAYER]).steering(0.3, LAYER), planted_pairs()[:4], n_random=0).set_index(
        "part"
    )
    assert table.share["direct"] > 0.9
    assert table.share[["QK", "OV", "MLP"]].abs().max() < 0.05


def test_without_keys_and_queries_nothing_goes_through_patterns(pairs: Any) -> None:
    model = tiny_model("bridge")
    with torch.no_grad():
        for block in model.original_model.model.layers[1:]:
            block.self_attn.q_proj.weight.zero_()
    table = mechanism(model, random_vectors().steering(0.5, 0), pairs, n_random=0).set_index("part")
    assert table.effect["QK"] == pytest.approx(0, abs=1e-5)
    assert abs(table.effect["OV"]) > 0.01


@pytest.mark.parametrize("architecture", ["gpt2"])
def test_other_architectures(architecture: str, pairs: Any) -> None:
    model = tiny_model("bridge", architecture)
    table = mechanism(model, random_vectors().steering(0.5, 0), pairs, n_random=0).set_index("part")
    assert table.effect[["direct", *PARTS]].sum() == pytest.approx(table.effect["total"], abs=1e-4)


@pytest.mark.parametrize("by", ["all", "layer", "head"])
def test_the_picture_shows_the_numbers(by: Any, pairs: Any) -> None:
    table = mechanism(
        tiny_model("bridge"), random_vectors().steering(0.5, 0), pairs, by=by, n_random=1, texts=["the film was good"]
    )
    axes = gr.plotting.plot_mechanism(table).axes[0]
    if by == "all":
        own = table[table.vector == "steering"]
        assert list(axes.lines[1].get_xdata()) == pytest.approx(own.effect.tolist())
        assert [t.get_text() for t in axes.get_yticklabels()][1:3] == ["norms", "attention patterns (QK)"]


def test_nothing_is_left_on_the_model_and_bad_calls_are_refused(pairs: Any, unchecked: None) -> None:
    model = tiny_model("bridge")
    before = gr.score_pairs(model, pairs)
    mechanism(model, random_vectors().steering(0.5, 0), pairs, n_random=0)
    assert torch.equal(gr.score_pairs(model, pairs), before)
    with pytest.raises(ValueError, match="last"):
        mechanism(model, random_vectors(layer=2).steering(0.5, 2), pairs)
    with pytest.raises(ValueError, match="by='neuron'"):
        mechanism(model, random_vectors().steering(0.5, 0), pairs, by="neuron")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no records"):
        mechanism(model, random_vectors().steering(0.5, 0), [])
