"""Tiny random text models of the usual families, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from grains_tl.models import building as gr_models
from tests.conftest import WORDS, tiny_tokenizer

COMMON = {
    "vocab_size": len(WORDS),
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Any] = {
    "GPT-2": lambda: hf.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "Llama": lambda: hf.LlamaConfig(**LLAMA),
    "Llama 3.1 (scaled rotary positions)": lambda: hf.LlamaConfig(**LLAMA, rope_parameters=LLAMA_31),
    "Mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=16),
    "Qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "Qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=8),
    "Gemma 2": lambda: hf.Gemma2Config(**GEMMA, layer_types=LAYERS),
    "Gemma 3": lambda: hf.Gemma3TextConfig(**GEMMA, layer_types=LAYERS),
    "Pythia (GPT-NeoX)": lambda: hf.GPTNeoXConfig(
        **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, rotary_pct=0.25
    ),
    "OLMo 2": lambda: hf.Olmo2Config(**LLAMA),
    "Phi-3": lambda: hf.Phi3Config(**LLAMA),
    "Mixtral (mixture of experts)": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4),
}
#: What HookedTransformer (TransformerLens 3) can be rebuilt from in memory.
HOOKED = tuple(name for name in CONFIGS if name not in ("GPT-2", "Gemma 2", "Gemma 3", "OLMo 2"))


def plain(name: str) -> Any:
    """The Hugging Face model of a family; every call gives the same weights."""
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def architecture(name: str, kind: str = "bridge") -> Any:
    """The same with TransformerLens around it and the tiny tokenizer."""
    model = plain(name)
    tokenizer = tiny_tokenizer()
    gr_models.keep_tokenizer_as_is(tokenizer, name)
    make = gr_models.hooked_of if kind == "hooked" else gr_models.bridge_of
    return make(model, tokenizer, name).eval().requires_grad_(False)
