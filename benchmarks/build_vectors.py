"""Building vectors, against a plain per-record Hugging Face + captum loop with the same steps and the same result.

Both sides score the whole responses at the right positions, use Gauss-Legendre nodes from the same baseline, mask with
the end-of-text token, read the last prompt token at every layer, and reduce by the mean. The loop is what one writes
first: a record at a time, chosen and rejected apart, full logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.attr import IntegratedGradients
from torch import Tensor

import grains_tl as gr
from benchmarks.common import matrix_rate, timed
from grains_tl._util.settings import RunSettings
from grains_tl.attribution.reference import References
from grains_tl.attribution.sharing import branch_length
from grains_tl.models.operations import Operations, count_operations, floating_point_operations
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules


def fewest(tokenized: Sequence[TokenizedPair], n_steps: int, n_layers: int) -> Operations:
    """The least the method needs: each prompt and each distinct response once per step and at both ends, three prompts for
    the caching, and logits where a response token is predicted."""
    rows = sum(branch_length(t, 0) for t in tokenized)
    prompts = sum(len(t.prompt) for t in tokenized)
    # one position predicts the first token of both responses where they share a row
    positions = sum(len(t.chosen) + len(t.rejected) - (len(t.inputs) == 1) for t in tokenized)
    return Operations(
        forward=((n_steps + 2) * rows + 3 * prompts) * n_layers,
        backward=n_steps * rows * n_layers,
        unembedded=(n_steps + 2) * positions,
    )


def plain_loop(
    hf_model: Any,
    tokenized: Sequence[TokenizedPair],
    n_steps: int,
    top_k: int,
    eos: int,
    start: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> Tensor:
    """The recipe, one record at a time: ``[layer, d_model]`` mean(d+) - mean(d-); ``start`` makes x' from x."""
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
            found = ig.attribute(x, baselines=start(x[0])[None], n_steps=n_steps, method="gausslegendre")
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


def run(
    model: Any,
    *,
    records: int,
    steps: int,
    baseline: str = "zero",
    max_tokens: int = RunSettings().max_tokens,
    top_k: int = 3,
    repeats: int = 3,
) -> dict[str, Any]:
    """Seconds, operations and agreement of both sides."""
    pairs = gr.load_bundled("sentiment", "build")[:records]
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    eos = token_rules(model).eos
    options: dict[str, Any] = {"mask": "eos", "n_steps": steps, "top_k": top_k, "progress": False}
    references = References(model)
    options |= {"reference": baseline, "nodes": "gauss_legendre"}  # as the plain loop
    options["max_tokens"] = max_tokens
    runs_plain(model)  # compared once per model, not once per build
    counted: list[Operations] = []

    def ours_counted() -> gr.SteeringVectors:  # counting costs microseconds a pass
        with count_operations(model) as counts:
            found = gr.build_vectors(model, pairs, method="integrated_gradients", **options)
        counted.append(counts)
        return found

    def ours() -> gr.SteeringVectors:
        return gr.build_vectors(model, pairs, method="integrated_gradients", **options)

    def theirs_whole() -> Tensor:
        return plain_loop(model.original_model, tokenized, steps, top_k, eos, lambda x: references.point(baseline, x))

    def autocast(job: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return job()

    jobs: dict[str, Any] = {
        "grains_tl": ours_counted,
        "plain loop": theirs_whole,
        "grains_tl, autocast": lambda: autocast(ours),
        "plain loop, autocast": lambda: autocast(theirs_whole),
    }
    seconds, results = timed(jobs, repeats)
    done = counted[-1]
    with count_operations(model) as theirs:
        plain_loop(model.original_model, tokenized[:1], steps, top_k, eos)
    rate = matrix_rate(model)
    least = fewest(tokenized, steps, int(model.cfg.n_layers))
    floor = floating_point_operations(model.original_model, least) / rate
    # Hugging Face's last hidden state comes after the final norm: the residual stream ends one layer earlier
    cosine = torch.cosine_similarity(results["grains_tl"].raw[:-1], results["plain loop"][:-1], dim=-1)
    half = torch.cosine_similarity(results["grains_tl"].raw, results["grains_tl, autocast"].raw, dim=-1)
    fastest = seconds["grains_tl, autocast"]
    return {
        "records": len(pairs),
        "steps": steps,
        "baseline": baseline,
        "max_tokens": max_tokens,
        "seconds": seconds,
        "times_faster": seconds["plain loop"] / seconds["grains_tl"],
        "operations": vars(done),
        "operations_plain_first_record": vars(theirs),
        "fewest_operations": vars(least),
        "share_of_fewest": {k: vars(least)[k] / max(vars(done)[k], 1) for k in ("forward", "backward", "unembedded")},
        "matrix_gflops": rate / 1e9,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds["grains_tl"],
        "smallest_cosine": cosine.min().item(),
        "times_faster_autocast": seconds["plain loop"] / fastest,
        "times_faster_both_autocast": seconds["plain loop, autocast"] / fastest,
        "smallest_cosine_autocast": half.min().item(),
    }


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    s, share = figures["seconds"], figures["share_of_fewest"]
    what = f"{figures['records']} records, {figures['steps']} IG steps from {figures['baseline']}"
    return [
        (f"build, {what}", f"{s['grains_tl']:.2f} s"),
        ("the same, plain Hugging Face + captum loop", f"{s['plain loop']:.2f} s"),
        ("times faster", f"{figures['times_faster']:.2f}"),
        ("smallest cosine of the vectors over layers", f"{figures['smallest_cosine']:.6f}"),
        ("build under bfloat16 autocast", f"{s['grains_tl, autocast']:.2f} s"),
        ("times faster than the float32 loop", f"{figures['times_faster_autocast']:.2f}"),
        ("times faster than the loop under autocast too", f"{figures['times_faster_both_autocast']:.2f}"),
        ("smallest cosine with the float32 build over layers", f"{figures['smallest_cosine_autocast']:.4f}"),
        ("fewest forward token-layers / done", f"{share['forward']:.2f}"),
        ("fewest backward token-layers / done", f"{share['backward']:.2f}"),
        ("fewest unembedded positions / done", f"{share['unembedded']:.2f}"),
        ("matrix rate of this machine at these shapes", f"{figures['matrix_gflops']:.1f} GFLOP/s"),
        ("share of the floor (matrix products alone) reached", f"{figures['share_of_floor']:.2f}"),
    ]
