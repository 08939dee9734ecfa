"""Read-outs at the ends of both responses: one run of the prompt for both, against a plain Hugging Face loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.attribution import sharing
from grains_tl.models.operations import count_operations
from grains_tl.vectors.readout import read_out_responses
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.architectures import CONFIGS, architecture
from tests.helpers.oracles import residuals

LAYERS = [2, 0, 1]
#: a response that begins the other, and one longer than the other on either side
MORE = [
    gr.PreferencePair("the film was", " good", " good and great"),
    gr.PreferencePair("the film was", " bad and good and great", " great"),
    gr.PreferencePair("the film was", " great", " bad and good and great"),
]


@pytest.mark.parametrize("max_tokens", [1, 60, 512])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.usefixtures("unchecked")
def test_ends_equal_a_plain_loop(name: str, max_tokens: int, pairs: list[gr.PreferencePair]) -> None:
    model, hf = tiny_model("bridge", name), tiny_hf(name)
    tokenized = gr.tokens.tokenize_pairs(model, [*pairs, *MORE])
    with count_operations(model) as counts, gr.settings(max_tokens=max_tokens):
        found = read_out_responses(model, tokenized, layers=LAYERS)
    for record, pair in zip(found, tokenized, strict=True):
        for end, response in zip(record, (pair.chosen, pair.rejected), strict=True):
            wanted = residuals(hf, pair.prompt + response)[LAYERS, -1]
            torch.testing.assert_close(end, wanted, atol=1e-4, rtol=1e-4)
    whole = sum(2 * len(t.prompt) + len(t.chosen) + len(t.rejected) for t in tokenized)
    if max_tokens == 1:  # nothing is padded: the prompts once, and one text of the longest record again
        assert counts.forward < 0.8 * whole * model.cfg.n_layers


def keep(kept: dict[int, torch.Tensor], layer: int, act: torch.Tensor, hook: Any) -> None:
    kept[layer] = act[0]


@pytest.mark.usefixtures("unchecked")
def test_both_classes_and_norms(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, [*pairs, *MORE])
    norms: list[torch.Tensor] = []
    found = read_out_responses(model, tokenized, layers=LAYERS, norms=norms)
    plain: list[torch.Tensor] = []
    for record, pair in zip(found, tokenized, strict=True):
        for end, response in zip(record, (pair.chosen, pair.rejected), strict=True):
            kept: dict[int, torch.Tensor] = {}
            hooks = [(f"blocks.{i}.hook_resid_post", partial(keep, kept, i)) for i in LAYERS]
            model.run_with_hooks(torch.tensor([pair.prompt + response]), fwd_hooks=hooks)
            torch.testing.assert_close(end, torch.stack([kept[i][-1] for i in LAYERS]), atol=1e-4, rtol=1e-4)
        prompt = torch.stack([kept[i][: len(pair.prompt)] for i in LAYERS])
        plain.append(prompt[:, torch.tensor(pair.content)].norm(dim=-1))
    # every content token once, in whatever order
    torch.testing.assert_close(
        torch.cat(norms, 1).sort(1).values, torch.cat(plain, 1).sort(1).values, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding windows, layouts of their own, state spaces: the same read-outs with shared rows and without."""
    model = architecture(family)
    long = gr.PreferencePair(prompt=" ".join([str(pairs[0].prompt)] * 2), chosen=" great", rejected=" awful and cold")
    tokenized = gr.tokens.tokenize_pairs(model, [*pairs, long])
    found = read_out_responses(model, tokenized, layers=[0, 1])
    monkeypatch.setattr("grains_tl.vectors.readout.can_share", lambda *_: False)
    wanted = read_out_responses(model, tokenized, layers=[0, 1])
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_a_wrong_mask_is_noticed(pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the second response to see the first, a plain run of it would not be matched, and plain runs answer."""
    model = tiny_model("bridge")
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    wanted = read_out_responses(model, tokenized, layers=LAYERS)
    monkeypatch.setattr(sharing, "_sees", lambda pos, *_: pos[:, None, :] <= pos[:, :, None])
    torch.testing.assert_close(read_out_responses(model, tokenized, layers=LAYERS), wanted, atol=1e-5, rtol=1e-5)


def test_caa_needs_one_pass(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """The norms come with the read-out: no second pass over the prompts (it took a third of the time)."""
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with gr.settings(max_tokens=1), count_operations(bridge) as counts:
        gr.baselines.baseline_vectors(bridge, pairs, ["caa"], layers=[0, 1, 2])
    once = sum(len(t.prompt) + len(t.chosen) + len(t.rejected) for t in tokenized)
    again = max(len(t.prompt) + max(len(t.chosen), len(t.rejected)) for t in tokenized)
    fingerprint = 6
    assert counts.forward <= (once + 2 * again + fingerprint) * bridge.cfg.n_layers
