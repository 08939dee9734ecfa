"""Shapes of published models, and models of any shape without their weights: random, or on no device at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grains_tl._util.errors import OptionError
from grains_tl.models.building import bridge_of, keep_tokenizer_as_is, with_prompts_of_the_tokenizer
from grains_tl.types import BridgeModel

_LLAMA_31: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

#: From the models' published configurations: what decides sizes and costs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_31
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": _LLAMA_31
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    # the language model behind LLaVA-1.6's tower, whose image takes up to 2880 tokens
    "llava-1.6-7b": {
        "model_type": "mistral",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}

#: Words of ``random_bridge``'s tokenizer: w3, w4, ...; the ids below are padding, BOS and end.
N_WORDS = 2000


def shape_config(shape: str | Path | Mapping[str, Any]) -> Any:
    """The configuration of a model, of which no weights are needed.

    Args:
        shape: one of ``SHAPES``, a ``config.json`` or its folder, or the contents of one.

    Raises:
        OptionError: an unknown name, or a configuration that transformers does not know.
    """
    from transformers import AutoConfig

    if isinstance(shape, Mapping):
        known = dict(shape)
    elif str(shape) in SHAPES:
        known = dict(SHAPES[str(shape)])
    elif Path(shape).exists():
        file = Path(shape) / "config.json" if Path(shape).is_dir() else Path(shape)
        try:
            return AutoConfig.from_pretrained(str(file))
        except (OSError, ValueError) as error:
            raise OptionError(f"{file} is no configuration that transformers reads: {error}") from None
    else:
        raise OptionError(
            f"{str(shape)!r} is no known shape and no file; expected one of {', '.join(SHAPES)}, or a config.json"
        )
    kind = known.pop("model_type", None)
    if kind is None:
        raise OptionError("the configuration has no model_type; give the model's whole config.json")
    return AutoConfig.for_model(kind, **known)


def random_hugging_face(config: Any, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, made where they will stay and in the dtype they will have.

    Args:
        config: from ``shape_config``.
        device: ``"meta"`` makes no weights at all, only their shapes.
        dtype: of the weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = getattr(config, "vision_config", None) is not None
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


def random_bridge(hf_model: Any, label: str = "random") -> BridgeModel:
    """A bridge around a model of ``random_hugging_face``, with a tokenizer of made-up words: ``w3 w4 w5 ...``."""
    tokenizer = _word_tokenizer(min(N_WORDS, int(hf_model.config.get_text_config().vocab_size)))
    keep_tokenizer_as_is(tokenizer, label)
    model = bridge_of(hf_model, tokenizer, label).eval().requires_grad_(False)
    return with_prompts_of_the_tokenizer(model)


def _word_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, size))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
