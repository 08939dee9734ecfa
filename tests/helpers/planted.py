"""A small Llama with a known circuit: words carry a mood along one axis, one head copies it to another, which is read.

Everything else in the model is random but blind to both axes and writes to neither. Only the norms couple them a little.
"""

from __future__ import annotations

from typing import Any

import torch

import grains_tl as gr
from grains_tl.models import building as gr_models
from tests.conftest import WORDS, tiny_hf, tiny_tokenizer

MOOD, COPY = 0, 1  # axes of the residual stream
LAYER, HEAD, NEURON = 1, 2, 5
GOOD, BAD = ("good", "warm", "liked"), ("bad", "cold", "hated")


def planted_hf() -> Any:
    """The circuit's weights, in a plain Hugging Face model."""
    hf = tiny_hf()
    axes = [MOOD, COPY]
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, axes] = 0
        for words, mood in ((GOOD, 1.0), (BAD, -1.0)):
            for word in words:
                hf.model.embed_tokens.weight[WORDS.index(word), MOOD] = mood
        for block in hf.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reads.weight[:, axes] = 0
            for writes in (attention.o_proj, mlp.down_proj):
                writes.weight *= 0.3
                writes.weight[axes] = 0
        attention = hf.model.layers[LAYER].self_attn
        d_head = attention.head_dim
        for projection in (attention.q_proj, attention.k_proj):  # the head looks at all positions alike
            projection.weight[:] = 0
        shared = HEAD // 2 * d_head  # two heads read one value head; only one of them writes what it finds there
        attention.v_proj.weight[shared] = 0
        attention.v_proj.weight[shared, MOOD] = 1
        first = attention.o_proj.weight[:, ::d_head]
        first[:, [HEAD, HEAD + 1]] = 0
        attention.o_proj.weight[COPY, HEAD * d_head] = 8
        great, awful = WORDS.index("great"), WORDS.index("awful")
        hf.lm_head.weight[:, axes] = 0
        hf.lm_head.weight[[great, awful]] = 0
        hf.lm_head.weight[great, COPY], hf.lm_head.weight[awful, COPY] = 1.0, -1.0
    return hf


def planted_neuron_hf() -> Any:
    """The same with a neuron of block ``LAYER``'s MLP in place of the head: it fires at a good mood."""
    hf = planted_hf()
    with torch.no_grad():
        hf.model.layers[LAYER].self_attn.o_proj.weight[COPY] = 0
        mlp = hf.model.layers[LAYER].mlp
        for reads in (mlp.gate_proj, mlp.up_proj):
            reads.weight[NEURON] = 0
            reads.weight[NEURON, MOOD] = 1
        mlp.down_proj.weight[:, NEURON] = 0
        mlp.down_proj.weight[COPY, NEURON] = 0.5
    return hf


def planted_model(kind: str, hf: Any = None) -> Any:
    """The same as a TransformerLens model."""
    tokenizer = tiny_tokenizer()
    gr_models.keep_tokenizer_as_is(tokenizer, "planted")
    make = gr_models.hooked_of if kind == "hooked" else gr_models.bridge_of
    return make(planted_hf() if hf is None else hf, tokenizer, "planted").eval().requires_grad_(False)


def planted_pairs() -> list[gr.PreferencePair]:
    """Prompts of several lengths with one good and one bad word, in either order."""
    frames = [
        "the soup was {} but the room was {} . overall it was",
        "this film was {} and {} , it was",
        "we {} the hotel but they {} it . the food was",
        "question : was the film {} or {} ? answer : it was",
    ]
    words = [(g, b) for g in GOOD for b in BAD]
    fills = [(f, *(w if i % 2 else w[::-1])) for i, w in enumerate(words) for f in frames]
    return [gr.PreferencePair(prompt=f.format(a, b), chosen=" great", rejected=" awful") for f, a, b in fills]


def axis(index: int, layers: list[int], d_model: int = 32) -> gr.SteeringVectors:
    """One axis of the residual stream as a vector at some layers; a typical residual norm of 3."""
    raw = torch.zeros(len(layers), d_model)
    raw[:, index] = 1
    return gr.SteeringVectors.from_raw(raw, layers, torch.full((len(layers),), 3.0))
