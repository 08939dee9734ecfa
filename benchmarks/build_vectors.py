"""Building vectors, against a plain per-record Hugging Face + captum loop with the same steps and the same result.

    python -m benchmarks.build_vectors --records 50 --steps 20 --threads 2

Both sides score the whole responses at the right positions, use Gauss-Legendre nodes from the zero embedding, mask with
the end-of-text token, read the last prompt token at every layer, and reduce by the mean. The loop is what one writes
first: a record at a time, chosen and rejected apart, full logits. Timed twice each, alternating; the table gives the
faster of each. Tokens that pass through the embedding are counted and set beside the fewest that the job can do with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import IntegratedGradients
from torch import Tensor

import grains_tl as gr
from grains_tl.tokens import TokenizedPair, token_rules


@contextmanager
def count_tokens(model: Any) -> Iterator[dict[str, int]]:
    """Token positions that run forward, and those that also run backward (padding included)."""
    counts = {"forward": 0, "backward": 0}

    def note(module: Any, args: Any, output: Tensor) -> None:
        counts["forward"] += output.shape[0] * output.shape[1]

    def note_gradient(act: Tensor, hook: Any) -> None:
        counts["backward"] += act.shape[0] * act.shape[1] if act.requires_grad else 0

    handle = model.embed.register_forward_hook(note)
    try:
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", note_gradient)]):
            yield counts
    finally:
        handle.remove()


def fewest_tokens(tokenized: Sequence[TokenizedPair], n_steps: int) -> dict[str, int]:
    """The least the method needs: every distinct row once per step and at both ends, three prompts for the caching."""
    rows = [sum(map(len, t.inputs)) for t in tokenized]
    prompts = sum(len(t.prompt) for t in tokenized)
    return {"forward": (n_steps + 2) * sum(rows) + 3 * prompts, "backward": n_steps * sum(rows)}


def plain_loop(hf_model: Any, tokenized: Sequence[TokenizedPair], n_steps: int, top_k: int, eos: int) -> Tensor:
    """The recipe, one record at a time: ``[layer, d_model]`` mean(d+) - mean(d-)."""
    embed = hf_model.get_input_embeddings()
    differences = []
    for pair in tokenized:
        prompt = torch.tensor([pair.prompt])
        scores = torch.zeros(len(pair.prompt))
        for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
            target = torch.tensor(response)
            tail = embed(target[None])

            def log_likelihood(prompt_embeds: Tensor, tail: Tensor = tail, target: Tensor = target) -> Tensor:
                full = torch.cat([prompt_embeds, tail.expand(len(prompt_embeds), -1, -1)], dim=1)
                logits = hf_model(inputs_embeds=full).logits[:, prompt_embeds.shape[1] - 1 : -1]
                logprobs = logits.log_softmax(-1)
                return logprobs.gather(-1, target.expand(len(full), -1)[..., None]).sum((1, 2))

            x = embed(prompt).detach()
            ig = IntegratedGradients(log_likelihood)
            found = ig.attribute(x, baselines=torch.zeros_like(x), n_steps=n_steps, method="gausslegendre")
            scores += sign * found[0].sum(-1)
        order = scores.argsort(descending=True).tolist()
        up = [i for i in order if pair.content[i] and scores[i] > 0][:top_k]
        down = [i for i in reversed(order) if pair.content[i] and scores[i] < 0][:top_k]
        hidden = []
        for masked in ([], up, down):
            ids = prompt.clone()
            ids[0, masked] = eos
            with torch.no_grad():
                hidden.append(torch.stack(hf_model(ids, output_hidden_states=True).hidden_states[1:])[:, 0, -1])
        differences.append(hidden[2] - hidden[1])  # (h - h without I+) - (h - h without I-)
    return torch.stack(differences).mean(0)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", default="sentiment", choices=["sentiment", "misconceptions"])
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = gr.load_model("smollm2")
    pairs = gr.load_bundled(args.set, "build")[: args.records]
    tokenized = gr.tokenize_pairs(model, pairs)
    eos = token_rules(model).eos
    seconds: dict[str, list[float]] = {"grains_tl": [], "plain loop": []}
    for _ in range(args.repeats):
        with count_tokens(model) as counts:
            started = time.perf_counter()
            ours = gr.build_vectors(
                model,
                pairs,
                method="integrated_gradients",
                masker="eos",
                n_steps=args.steps,
                top_k=args.top_k,
                progress=False,
            )
            seconds["grains_tl"].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs = plain_loop(model.original_model, tokenized, args.steps, args.top_k, eos)
        seconds["plain loop"].append(time.perf_counter() - started)

    # Hugging Face's last hidden state comes after the final norm: the residual stream ends one layer earlier
    cosine = torch.cosine_similarity(ours.raw[:-1], theirs[:-1], dim=-1)
    fewest = fewest_tokens(tokenized, args.steps)
    best = {name: min(found) for name, found in seconds.items()}
    figures = {
        "records": len(pairs),
        "set": args.set,
        "steps": args.steps,
        "threads": args.threads,
        "seconds": seconds,
        "ratio": best["plain loop"] / best["grains_tl"],
        "tokens": counts,
        "fewest_tokens": fewest,
        "smallest_cosine": cosine.min().item(),
    }
    print(f"{len(pairs)} {args.set} records, {args.steps} steps, {args.threads} threads")
    for name, value in best.items():
        print(f"  {name:<12} {value:8.1f} s")
    print(f"  {figures['ratio']:.2f} times faster; smallest cosine of the vectors over layers {cosine.min():.6f}")
    for kind in ("forward", "backward"):
        print(f"  {kind} tokens {counts[kind]}, fewest possible {fewest[kind]} ({fewest[kind] / counts[kind]:.2f})")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
