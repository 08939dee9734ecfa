"""Edges of a steering circuit: against exact ablation of each edge in plain PyTorch, against nodes, on a planted circuit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.analysis import circuit_faithfulness, circuit_overlap, steering_circuit
from tests.analysis.test_circuits import PAIRS, TEXTS, mood
from tests.analysis.test_freezing import random_vectors
from tests.conftest import KINDS, WORDS, tiny_hf, tiny_model
from tests.helpers.architectures import CONFIGS, architecture
from tests.helpers.planted import HEAD, LAYER, planted_model

N_LAYERS, N_HEADS = 3, 4
PLACE = ["part", "layer", "head"]


class PlainLlama:
    """A Hugging Face model that is steered after block 0, in which one edge can be cut by PyTorch hooks alone."""

    def __init__(self, prompt: str, step: Any) -> None:
        self.hf, self.step = tiny_hf(), step
        tokenizer = tiny_model("bridge").tokenizer
        self.ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        plain, steered = self.writers(False), self.writers(True)
        self.change = {name: steered[name] - plain[name] for name in plain}

    def writers(self, steered: bool) -> dict[Any, torch.Tensor]:
        """What the step, each head and each MLP write."""
        found: dict[Any, torch.Tensor] = {}
        handles = []
        for layer in range(1, N_LAYERS):
            block = self.hf.model.layers[layer]
            heads = self._keep_heads(found, layer, block.self_attn.o_proj.weight)
            handles.append(block.self_attn.o_proj.register_forward_pre_hook(heads))
            handles.append(block.mlp.register_forward_hook(self._keep(found, ("MLP", layer, -1))))
        first = self.hf.model.layers[1].register_forward_pre_hook(
            lambda m, args, kwargs: found.__setitem__(("step", 0, -1), (args or (kwargs["hidden_states"],))[0]),
            with_kwargs=True,
        )
        self.margin(steered)
        for handle in (*handles, first):
            handle.remove()
        return found

    @staticmethod
    def _keep(found: dict[Any, torch.Tensor], name: Any) -> Any:
        return lambda module, args, out: found.__setitem__(name, out)

    @staticmethod
    def _keep_heads(found: dict[Any, torch.Tensor], layer: int, matrix: torch.Tensor) -> Any:
        def hook(module: Any, args: Any) -> None:
            parts = args[0].unflatten(-1, (N_HEADS, -1))
            rows = matrix.T.unflatten(0, (N_HEADS, -1))
            found.update({("head", layer, h): parts[..., h, :] @ rows[h] for h in range(N_HEADS)})

        return hook

    def margin(self, steered: bool) -> float:
        with torch.no_grad():
            if not steered:
                logits = self.hf(self.ids).logits
            else:
                with self.step.torch_hooks(self.hf):
                    logits = self.hf(self.ids).logits
        return float(logits[0, -1, WORDS.index("great")] - logits[0, -1, WORDS.index("awful")])

    @contextmanager
    def cut(self, writer: Any, to: str, to_layer: int) -> Iterator[None]:
        """The reader's norm, which nothing else reads, sees the stream without the change that the writer made."""
        blocks = self.hf.model.layers
        norms = {"attention": "input_layernorm", "MLP": "post_attention_layernorm"}
        norm = self.hf.model.norm if to == "logits" else getattr(blocks[to_layer], norms[to])
        handle = norm.register_forward_pre_hook(lambda module, args: (args[0] - self.change[writer],))
        yield
        handle.remove()


def test_scores_follow_exact_ablation_of_each_edge() -> None:
    """All 33 edges of a random model with grouped queries: correlation 0.997."""
    steering = random_vectors().steering(0.5, 0)
    plain = PlainLlama("the film was", steering)
    pair = gr.PreferencePair("the film was", " great", " awful")
    steered = plain.margin(True)
    edges = steering_circuit(tiny_model("bridge"), steering, [pair], method="edges", n_steps=20, n_random=0)
    assert len(edges) == 5 + N_HEADS * (4 + 2) + (3 + 1)
    exact = []
    for row in edges.itertuples():
        with plain.cut((row.part, row.layer, row.head), row.to, row.to_layer):
            exact.append(steered - plain.margin(True))
    assert np.corrcoef(edges["score"], exact)[0, 1] > 0.99
    # integrated gradients are complete: all of the effect leaves the step
    assert edges[edges.part == "step"].score.sum() == pytest.approx(steered - plain.margin(False), rel=0.01)
    assert edges["effect"].iloc[0] == pytest.approx(steered - plain.margin(False), abs=2e-4)


def check_sums(model: Any) -> None:
    steering = random_vectors().steering(0.5, 0)
    nodes = steering_circuit(model, steering, PAIRS, n_random=1, texts=TEXTS, n_steps=3)
    edges = steering_circuit(model, steering, PAIRS, method="edges", n_random=1, texts=TEXTS, n_steps=3)
    sums = edges[edges.part != "step"].groupby(["vector", *PLACE]).score.sum()
    wanted = nodes.set_index(["vector", *PLACE]).score
    np.testing.assert_allclose(sums, wanted.reindex(sums.index), atol=1e-4)
    assert edges[edges.part == "step"].groupby("vector").score.sum()["steering"] != 0
    total = edges.groupby("vector")["effect"].first()
    assert total.to_dict() == pytest.approx(nodes.groupby("vector")["effect"].first().to_dict(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_edges_out_of_a_node_add_up_to_its_score(kind: str) -> None:
    """Nodes are scored by gradients of what heads write, edges by gradients of the residual stream: they meet in W_O."""
    check_sums(tiny_model(kind))


def test_half_precision_rounds_and_is_not_refused() -> None:
    steering = random_vectors().steering(0.5, 0)
    options: dict[str, Any] = {"method": "edges", "n_random": 0, "n_steps": 3}
    place = [*PLACE, "to", "to_layer"]
    whole, half = (
        steering_circuit(model, steering, PAIRS, **options).set_index(place).score
        for model in (tiny_model("bridge"), tiny_model("bridge").to(torch.bfloat16))
    )
    assert np.corrcoef(whole, half.reindex(whole.index))[0, 1] > 0.95
    with pytest.raises(ValueError, match="method='integrated'"):
        steering_circuit(architecture("Gemma 3").to(torch.bfloat16), steering, PAIRS, **options)


#: Norms after attention and MLP, or attention and MLP side by side.
REFUSED = {"Gemma 2", "Gemma 3", "OLMo 2", "Pythia (GPT-NeoX)"}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_families_add_up_or_are_refused(name: str) -> None:
    model = architecture(name)
    if name not in REFUSED:
        check_sums(model)
        return
    with pytest.raises(ValueError, match="method='integrated'"):
        steering_circuit(model, random_vectors().steering(0.5, 0), PAIRS, method="edges", n_random=0)


def test_the_edges_of_the_planted_circuit_come_first() -> None:
    """The step reaches the head's block, and the head reaches the logits."""
    edges = steering_circuit(planted_model("bridge"), mood(), PAIRS, method="edges", n_random=0)
    first = {(r.part, r.layer, r.head, r.to, r.to_layer) for r in edges.head(2).itertuples()}
    assert first == {("step", LAYER - 1, -1, "attention", LAYER), ("head", LAYER, HEAD, "logits", -1)}
    assert edges["share"].iloc[:2].min() > 0.8 and edges["share"].iloc[2:].abs().max() < 0.15
    overlap = circuit_overlap({"a": edges, "b": edges}, n_top=2)
    assert overlap["jaccard"].tolist() == [1.0] and overlap["correlation"][0] == pytest.approx(1)
    labels = [t.get_text() for t in gr.plotting.plot_circuit(edges, n_top=2).axes[0].get_yticklabels()]
    assert f"step \N{RIGHTWARDS ARROW} block {LAYER}, attention" in labels
    with pytest.raises(ValueError, match="ranks edges"):
        circuit_faithfulness(planted_model("bridge"), mood(), PAIRS, edges)


def test_what_has_no_edges_is_refused(pairs: Any, unchecked: None) -> None:
    model, steering = tiny_model("bridge"), random_vectors().steering(0.5, 0)
    raw = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    both = gr.SteeringVectors.from_raw(raw, [0, 1], torch.tensor([3.0, 3.0])).steering(0.5, [0, 1])
    for options, words in (
        ({"method": "edge"}, "method='edge'"),
        ({"steering": both}, "one layer"),
    ):
        with pytest.raises(ValueError, match=words):
            steering_circuit(
                **{"model": model, "steering": steering, "pairs": pairs, "n_random": 0, "method": "edges", **options}  # type: ignore[arg-type]
            )
