"""What the benchmarks share: medians, operation counts, the machine's matrix rate, models to run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import grains_tl as gr
from grains_tl.models import building as gr_models


def matrix_rate(model: Any, tokens: int = 512, seconds: float = 1.0) -> float:
    """Floating-point operations a second of products of this model's shapes, the best of many."""
    d_model, d_mlp = int(model.cfg.d_model), int(getattr(model.cfg, "d_mlp", None) or 4 * model.cfg.d_model)
    a, b = torch.randn(tokens, d_model), torch.randn(d_model, d_mlp)
    best, end = 1e9, time.process_time() + seconds
    while time.process_time() < end:
        started = time.process_time()
        for _ in range(10):
            torch.mm(a, b)
        best = min(best, (time.process_time() - started) / 10)
    return 2 * tokens * d_model * d_mlp / best


def timed(jobs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median CPU seconds and last result of each job.

    CPU time of this process, not time on the wall: other work on the machine then hardly shows. The jobs take turns, so that
    a slow spell hits all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.process_time()
            results[name] = job()
            seconds[name].append(time.process_time() - started)
    return {name: median(found) for name, found in seconds.items()}, results


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent p of the fit cost ~ size ** p (least squares of the logarithms)."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(costs, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def off_the_line(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Largest distance from the best straight line (with an offset), as a share of the largest cost; 0 is linear growth."""
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64)
    basis = torch.stack([torch.ones_like(x), x], dim=1)
    fit = basis @ torch.linalg.lstsq(basis, y[:, None]).solution
    return float((fit[:, 0] - y).abs().max() / y.max())


def load(name: str) -> Any:
    """``smollm2``, any Hugging Face name, or ``random:LAYERSxWIDTH`` or ``random:LAYERSxWIDTHxVOCABULARY``, a Llama with
    random weights.

    Raises:
        ValueError: a shape that is none, before anything is built.
    """
    return random_model(random_config(name)) if name.startswith("random:") else gr.load_model(name)


def load_plain(name: str) -> Any:
    """The same weights as a plain Hugging Face model, without TransformerLens around it."""
    random = name.startswith("random:")
    return random_weights(random_config(name)) if random else gr.models.load_hugging_face(name)[0]


def random_config(name: str) -> Any:
    """The configuration that ``random:...`` names."""
    from transformers import LlamaConfig

    shape = name.removeprefix("random:").split("x")
    if len(shape) not in (2, 3) or not all(part.isdigit() and int(part) for part in shape):
        raise ValueError(f"model {name!r}; a random one is random:LAYERSxWIDTH[xVOCABULARY], random:8x512 for instance")
    n_layers, d_model, d_vocab = (*map(int, shape), 8192)[:3]
    heads = max(1, d_model // 64)
    if d_model % (2 * heads):
        raise ValueError(f"width {d_model} in {name!r}; take a multiple of 64, or an even number below 128")
    return LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def random_weights(config: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A plain model with random weights, made where they will stay; every call gives the same."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return hf_model.eval().requires_grad_(False)


def random_model(config: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A bridge around random weights."""
    tokenizer = word_tokenizer(min(8192, config.vocab_size))
    gr_models.keep_tokenizer_as_is(tokenizer, "random")
    hf_model = random_weights(config, device=device, dtype=dtype)
    return gr_models.bridge_of(hf_model, tokenizer, "random").eval().requires_grad_(False)


def word_tokenizer(size: int) -> Any:
    """One token a word for the words of the bundled records; the rest of the vocabulary is never met."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [p for split in ("build", "choose", "test") for p in gr.load_bundled("sentiment", split)]
    words = {w for p in pairs for text in (p.prompt, p.chosen, p.rejected) for w in str(text).split()}
    entries = ["<pad>", "<bos>", "<eos>", *sorted(words)]
    if len(entries) > size:
        raise ValueError(f"a vocabulary of {size} has no room for the records' {len(entries)} words; take that many")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
