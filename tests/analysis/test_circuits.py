"""Circuits name planted heads and neurons; scores and freezing equal plain PyTorch and TransformerLens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.analysis import circuit_faithfulness, circuit_overlap, compare_patching, steering_circuit
from tests.analysis.test_freezing import random_vectors
from tests.conftest import KINDS, TL_MAJOR, WORDS, tiny_hf, tiny_model
from tests.helpers.planted import (
    HEAD,
    LAYER,
    MOOD,
    NEURON,
    axis,
    planted_hf,
    planted_model,
    planted_neuron_hf,
    planted_pairs,
)

PAIRS = planted_pairs()[:6]
TEXTS = ["the film was good", "we liked the soup but not the room"]


def mood() -> gr.vectors.Steering:
    return axis(MOOD, [LAYER - 1]).steering(0.3, LAYER - 1)


def total_effect(model: Any, steering: Any, pairs: Any = PAIRS) -> float:
    before, after = (gr.score_pairs(model, pairs, hooks) for hooks in (None, steering))
    return ((after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])).mean().item()


@pytest.mark.parametrize("method", ["integrated", "gradient", "exact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["head", "MLP"])
def test_the_planted_reader_is_the_circuit(kind: str, method: Any, part: str) -> None:
    model = planted_model(kind, planted_hf() if part == "head" else planted_neuron_hf())
    nodes = steering_circuit(model, mood(), PAIRS, method=method, n_random=2, texts=TEXTS)
    own = nodes[nodes.vector == "steering"]
    first = own.iloc[0]
    assert (first["part"], first["layer"], first["head"]) == (part, LAYER, HEAD if part == "head" else -1)
    assert own["effect"].iloc[0] == pytest.approx(total_effect(model, mood()), abs=2e-4)
    if method != "gradient":  # which does not see that the final norm flattens the effect
        assert 0.8 < first["share"] < 1.2
    assert own["score"].iloc[1:].abs().max() < 0.15 * abs(first["score"])
    assert len(own) == 2 * 5 and set(nodes["vector"]) == {"steering", "random direction 1", "random direction 2"}
    assert nodes.groupby("vector")["kl"].first().to_numpy() == pytest.approx(own["kl"].iloc[0], rel=0.2)

    curve = circuit_faithfulness(model, mood(), planted_pairs()[6:12], own, sizes=[0, 1, 10], n_random=0)
    curve = curve.set_index("size")
    assert abs(curve.kept_share[0]) < 0.05 and curve.left_share[0] == pytest.approx(1)
    assert curve.kept_share[1] > 0.8 and abs(curve.left_share[1]) < 0.1
    assert curve.kept_share[10] == pytest.approx(1) and abs(curve.left_share[10]) < 0.05


@pytest.mark.parametrize("part", ["head", "MLP"])
def test_taking_the_named_part_out_of_the_weights_removes_the_effect(part: str) -> None:
    hf = planted_hf() if part == "head" else planted_neuron_hf()
    whole = total_effect(planted_model("bridge", hf), mood())
    with torch.no_grad():
        if part == "head":
            d_head = hf.model.layers[LAYER].self_attn.head_dim
            hf.model.layers[LAYER].self_attn.o_proj.weight[:, HEAD * d_head : (HEAD + 1) * d_head] = 0
        else:
            hf.model.layers[LAYER].mlp.down_proj.weight[:, NEURON] = 0
    assert abs(total_effect(planted_model("bridge", hf), mood())) < 0.05 * abs(whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_integrated_scores_follow_exact_freezing(architecture: str) -> None:
    """In a random model nodes act together, so agreement is not perfect: how much is said in the how-to."""
    model, steering = tiny_model("bridge", architecture), random_vectors().steering(0.5, 0)
    tables = {
        method: steering_circuit(model, steering, PAIRS, method=method, n_random=0, n_steps=20)  # type: ignore[arg-type]
        for method in ("exact", "integrated", "gradient")
    }
    agreement = {}
    for name in ("integrated", "gradient"):
        exact, quick = (
            t.drop(columns="effect").rename(columns={"score": "effect", "part": "component"})
            for t in (tables["exact"], tables[name])
        )
        agreement[name] = compare_patching(exact, quick)
    assert agreement["integrated"]["correlation"] > 0.9
    assert agreement["integrated"]["mean_error"] <= agreement["gradient"]["mean_error"] * 1.2


@pytest.mark.skipif(TL_MAJOR < 4, reason="attribution patching came with TransformerLens 4")
def test_the_gradient_form_is_what_transformer_lens_gives() -> None:
    """Its cache of activations and gradients, with steering on by ``model.hooks``, for one prompt and one-token answers."""
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    model, steering = tiny_model("bridge").requires_grad_(True), random_vectors().steering(0.5, 0)
    ids = torch.tensor([model.tokenizer("the film was")["input_ids"]])
    great, awful = WORDS.index("great"), WORDS.index("awful")

    def margin(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, great] - logits[0, -1, awful]

    base = cache_activation_and_gradient(model, ids, margin)
    with model.hooks(steering.hooks()):
        steered = cache_activation_and_gradient(model, ids, margin, compute_gradient=False)
    nodes = steering_circuit(
        model, steering, [gr.PreferencePair("the film was", " great", " awful")], method="gradient", n_random=0
    )
    for row in nodes.itertuples():
        name = f"blocks.{row.layer}." + ("hook_mlp_out" if row.part == "MLP" else "attn.hook_z")
        gradient = base.gradients[name]
        assert gradient is not None
        product = (steered.activations[name] - base.activations[name]) * gradient
        expected = product.sum() if row.part == "MLP" else product[:, :, row.head].sum()
        assert row.score == pytest.approx(expected.item(), abs=1e-4)


def test_freezing_equals_plain_hugging_face_hooks() -> None:
    """One prompt through the plain model: o_proj's input and the MLP's output put back, head by head, by PyTorch hooks."""
    hf, model, steering = tiny_hf(), tiny_model("bridge"), random_vectors().steering(0.5, 0)
    pair = gr.PreferencePair("the film was", " great", " awful")
    nodes = steering_circuit(model, steering, [pair], n_random=0)
    kept_nodes = [(r.part, r.layer, r.head) for r in nodes.itertuples()][:4]
    ids, d_head = torch.tensor([model.tokenizer("the film was")["input_ids"]]), hf.model.layers[0].self_attn.head_dim
    store: dict[Any, torch.Tensor] = {}

    def margin() -> float:
        with torch.no_grad():
            logits = hf(ids).logits[0, -1].log_softmax(-1)
        return (logits[WORDS.index("great")] - logits[WORDS.index("awful")]).item()

    handles = []
    for layer in (1, 2):
        block = hf.model.layers[layer]
        handles.append(
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args, layer=layer: store.__setitem__(("head", layer), args[0])
            )
        )
        handles.append(
            block.mlp.register_forward_hook(lambda m, args, out, layer=layer: store.__setitem__(("MLP", layer), out))
        )
    base = margin()
    for handle in handles:
        handle.remove()
    base_store = dict(store)

    def put_heads(m: Any, args: Any, layer: int) -> Any:
        z = args[0].clone()
        for head in range(4):
            if ("head", layer, head) not in kept_nodes:
                part = slice(head * d_head, (head + 1) * d_head)
                z[..., part] = base_store["head", layer][..., part]
        return (z,)

    for layer in (1, 2):
        block = hf.model.layers[layer]
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a, layer=layer: put_heads(m, a, layer))
        if ("MLP", layer, -1) not in kept_nodes:
            block.mlp.register_forward_hook(lambda m, a, out, layer=layer: base_store["MLP", layer])
    with steering.torch_hooks(hf):
        expected = margin() - base
    curve = circuit_faithfulness(model, steering, [pair], nodes, sizes=[4], n_random=0)
    assert curve.kept[0] == pytest.approx(expected, abs=2e-4)


def test_random_nodes_carry_less_than_the_circuit_and_the_picture_shows_it() -> None:
    model = planted_model("bridge")
    nodes = steering_circuit(model, mood(), PAIRS, n_random=1, texts=TEXTS)
    curve = circuit_faithfulness(model, mood(), PAIRS, nodes, n_random=4)
    at = curve.set_index(["order", "size"])
    assert at.kept_share["circuit", 1] > 0.9 > at.kept_share["random nodes", 1] + 0.3
    fig = gr.plotting.plot_circuit(nodes, curve, n_top=5)
    left, right = fig.axes
    fig.canvas.draw()
    assert left.get_legend().get_window_extent().y1 < left.get_window_extent().y0  # it hides no row
    assert left.get_yticklabels()[0].get_text() == f"block {LAYER}, head {HEAD}"
    assert list(right.get_lines()[2].get_ydata()) == pytest.approx(curve[curve.order == "circuit"].kept_share.tolist())


def table_of(scores: list[float], vector: str = "steering") -> pd.DataFrame:
    table = pd.DataFrame({"part": "head", "layer": 1, "head": range(len(scores)), "score": scores, "vector": vector})
    return table.assign(rank=table["score"].abs().rank(ascending=False).astype(int))


def test_overlap_by_hand() -> None:
    a, b = table_of([4.0, 3.0, 2.0, 1.0]), table_of([4.0, 0.5, -3.0, 1.0])
    draws = [table_of([1.0, 2.0, 3.0, 4.0], f"random direction {i}") for i in (1, 2)]
    found = circuit_overlap({"a": pd.concat([a, *draws]), "b": b}, n_top=2).set_index(["a", "b"])
    assert found.jaccard["a", "b"] == pytest.approx(1 / 3)  # {0, 1} and {0, 2}
    assert found.correlation["a", "b"] == pytest.approx(0.4) and found.size_correlation["a", "b"] == pytest.approx(0.4)
    # of two nodes among four: both shared 1/6, one 4/6, none 1/6
    assert found.chance.iloc[0] == pytest.approx(1 / 6 + 4 / 6 / 3)
    assert found.jaccard["random direction", "random direction"] == 1
    assert found.n_pairs["a", "random direction"] == 2
    assert ("a", "a") not in found.index
    rng = np.random.default_rng(0)
    drawn = [
        circuit_overlap({"a": table_of(list(rng.normal(size=9))), "b": table_of(list(rng.normal(size=9)))}, n_top=3)
        for _ in range(300)
    ]
    mean = np.mean([d.jaccard.iloc[0] for d in drawn])
    assert drawn[0].chance.iloc[0] == pytest.approx(mean, abs=0.04)


def test_nothing_is_left_on_the_model_and_bad_calls_are_refused(pairs: Any, unchecked: None) -> None:
    model, steering = tiny_model("bridge"), random_vectors().steering(0.5, 0)
    before = gr.score_pairs(model, pairs)
    nodes = steering_circuit(model, steering, pairs, n_random=0, n_steps=1)
    circuit_faithfulness(model, steering, pairs, nodes, sizes=[1], n_random=1)
    assert torch.equal(gr.score_pairs(model, pairs), before)
    idle = steering_circuit(model, random_vectors().steering(0.0, 0), pairs, n_random=0, n_steps=1)
    assert idle["score"].abs().max() == 0 and idle["effect"].abs().max() == 0
    bad: list[tuple[dict[str, Any], str]] = [
        ({"steering": random_vectors(layer=2).steering(0.5, 2)}, "last"),
        ({"steering": steering.hooks()}, "expected vectors.steering"),
        ({"pairs": []}, "no records"),
        ({"method": "eap"}, "method='eap'"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"objective": "max"}, "objective='max'"),
    ]
    for wrong, words in bad:
        with pytest.raises(ValueError, match=words):
            steering_circuit(**{"model": model, "steering": steering, "pairs": pairs, "n_random": 0, **wrong})
    with pytest.raises(ValueError, match="ranks 9 nodes"):
        circuit_faithfulness(model, steering, pairs, nodes.head(9))
    with pytest.raises(ValueError, match="from 0 to 10"):
        circuit_faithfulness(model, steering, pairs, nodes, sizes=[11])
    with pytest.raises(ValueError, match="different nodes"):
        circuit_overlap({"a": nodes, "b": nodes.head(9)})
