"""Real shapes with RANDOM weights, for whoever has a GPU: build time, tokens a second, peak memory.

    python -m benchmarks.gpu_shapes --shape llama-3.1-8b --device cuda --dtype bfloat16

Time and memory depend on the shape alone, so no weights are needed; scores and texts mean nothing. The paper gives 96 s
for building from 50 examples on a 7B-8B model (integrated gradients, 20 steps).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import grains_tl as gr
from benchmarks.common import random_model
from benchmarks.steering import random_vectors

#: Shapes from the models' published configurations; LLaVA-1.6-7B (Mistral) is a language model behind a vision tower, and
#: its image of up to 2880 tokens stands for itself here as that many words.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "prompt_tokens": 40,
    },
    "llava-1.6-7b": {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "prompt_tokens": 2920,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "prompt_tokens": 40,
    },
}


def measure(
    shape: str, *, device: str, dtype: torch.dtype, records: int, steps: int, max_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Figures of one shape; memory is the accelerator's, ``None`` on a CPU."""
    from transformers import LlamaConfig

    sizes = dict(SHAPES[shape])
    n_prompt = sizes.pop("prompt_tokens")
    config = LlamaConfig(**sizes, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = random_model(config, device=device, dtype=dtype)
    on_gpu = torch.device(device).type == "cuda"

    def timed(job: Any) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        job()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    bundled = gr.load_bundled("sentiment", "build")
    words = " ".join(str(p.prompt) for p in bundled).split()
    long_text = words * (1 + (n_prompt + records) // len(words))
    pairs = [
        gr.PreferencePair(prompt=" ".join(long_text[i : i + n_prompt]), chosen=" great", rejected=" awful")
        for i in range(records)
    ]
    vectors = random_vectors(model)
    layer = int(model.cfg.n_layers) // 2
    hooks = vectors.hooks(0.1, [layer])
    prompts = [str(p.prompt) for p in pairs[:8]]
    common: dict[str, Any] = {"top_k": 3, "max_tokens": max_tokens, "progress": False}

    def generation(fwd_hooks: Any = None) -> Any:
        return gr.generate(model, prompts, fwd_hooks, max_new_tokens=new_tokens)

    jobs = {
        "build, integrated gradients": lambda: gr.build_vectors(
            model, pairs, method="integrated_gradients", n_steps=steps, **common
        ),
        "build, gradient x input": lambda: gr.build_vectors(model, pairs, method="gradient_x_input", **common),
        "generate, unsteered": generation,
        "generate, steered": lambda: generation(hooks),
    }
    if n_prompt < 200:  # one run per token: quadratic in the length
        jobs["build, leave-one-out"] = lambda: gr.build_vectors(model, pairs, **common)
    settings = model.original_model.generation_config
    settings.min_new_tokens = new_tokens
    generation()  # the first run pays for what later ones find ready
    found: dict[str, Any] = {"shape": shape, "weights": "random", "device": device, "dtype": str(dtype), "jobs": {}}
    for name, job in jobs.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(job)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        found["jobs"][name] = {"seconds": seconds, "peak_gib": peak}
        if name.startswith("generate"):
            found["jobs"][name]["tokens_per_second"] = len(prompts) * new_tokens / seconds
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--max-tokens", type=int, default=16384, help="token budget of one pass; a GPU wants large ones"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    options = {k: v for k, v in vars(args).items() if k not in ("shape", "dtype")}
    found = measure(args.shape, dtype=getattr(torch, args.dtype), **options)
    print(f"{args.shape}, RANDOM weights, {args.device}, {args.dtype}, {args.records} records, {args.steps} IG steps")
    for name, figures in found["jobs"].items():
        rate = f"  {figures['tokens_per_second']:8.1f} tokens/s" if "tokens_per_second" in figures else ""
        memory = "" if figures["peak_gib"] is None else f"  {figures['peak_gib']:6.1f} GiB"
        print(f"  {name:<28} {figures['seconds']:8.2f} s{memory}{rate}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
