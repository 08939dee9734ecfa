"""Steered generation against unsteered and against plain Hugging Face; a full-layer sweep against the naive loop."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch

import grains_tl as gr
from benchmarks.common import timed
from grains_tl.inference.batches import pad_rows
from grains_tl.inference.objectives import margins
from grains_tl.models.operations import count_operations
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.tokens.rules import token_rules

PROMPTS = ["The film was", "At the hotel, the room was", "Overall, the stay was", "The phone is"]


def random_vectors(model: Any) -> gr.SteeringVectors:
    """One random direction per layer; its cost is that of any other."""
    raw = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(model.cfg.n_layers), torch.full((model.cfg.n_layers,), 50.0))


def generation(model: Any, *, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second with and without steering, in a batch of four and alone."""
    vectors = random_vectors(model)
    middle = int(model.cfg.n_layers) // 2
    figures: dict[str, Any] = {"new_tokens": new_tokens}
    settings = model.original_model.generation_config
    before, settings.min_new_tokens = settings.min_new_tokens, new_tokens  # every run is of the same length
    for name, prompts in (("batch 4", PROMPTS), ("batch 1", PROMPTS[:1])):
        ids, mask, _ = pad_rows(model, [prompt_ids(model, p) for p in prompts], padding_side="left", at_least=2)

        def ours(hooks: Any = None, prompts: list[str] = prompts) -> Any:
            return gr.generate(model, prompts, hooks, max_new_tokens=new_tokens)

        def plain(ids: Any = ids, mask: Any = mask) -> Any:
            with torch.no_grad():
                return model.original_model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                    pad_token_id=token_rules(model).pad,
                )  # fmt: skip

        jobs: dict[str, Any] = {
            "unsteered": ours,
            "one layer": lambda ours=ours: ours(vectors.hooks(0.01, [middle])),
            "all layers": lambda ours=ours: ours(vectors.hooks(0.001, list(vectors.layers))),
            "generate() itself": plain,
        }
        jobs |= _other_packages(model, vectors, middle, plain)
        seconds, _ = timed(jobs, repeats)
        figures[name] = {"seconds": seconds, "overhead": {k: s / seconds["unsteered"] - 1 for k, s in seconds.items()}}
    settings.min_new_tokens = before
    return figures


def _other_packages(model: Any, vectors: gr.SteeringVectors, layer: int, plain: Any) -> dict[str, Any]:
    """steering-vectors on the same Hugging Face model, where it is installed."""
    if util.find_spec("steering_vectors") is None:
        return {}
    from steering_vectors import SteeringVector

    vector = SteeringVector({layer: 0.5 * vectors.directions[layer]})

    def steered() -> Any:
        with vector.apply(model.original_model, layer_config={"decoder_block": "model.layers.{num}"}):
            return plain()

    return {"steering-vectors, one layer": steered}


#: The sweep's strengths, fractions of the residual norm.
ALPHAS = (-0.2, 0.2)


def sweep_jobs(
    model: Any, vectors: gr.SteeringVectors, pairs: list[gr.PreferencePair]
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """``gr.sweep`` over all layers, and one full run per setting, in the same batches; mean margins, nats."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)

    def naive() -> torch.Tensor:
        settings = [(layer, alpha) for layer in vectors.layers for alpha in ALPHAS]
        runs = [gr.score_pairs(model, tokenized, vectors.hooks(alpha, [layer])) for layer, alpha in settings]
        return torch.stack([margins(run).mean() for run in runs])

    def ours() -> torch.Tensor:
        return torch.tensor(gr.sweep(model, vectors, pairs, alphas=ALPHAS, progress=False)["margin"].to_numpy())

    return ours, naive


def sweep(model: Any, *, records: int, repeats: int) -> dict[str, Any]:
    """All layers, two alphas: ``gr.sweep`` against one full run per setting."""
    pairs = gr.load_bundled("sentiment", "choose")[:records]
    ours, naive = sweep_jobs(model, random_vectors(model), pairs)
    seconds, results = timed({"grains_tl": ours, "naive": naive}, repeats)
    with count_operations(model) as few:
        ours()
    with count_operations(model) as many:
        naive()
    return {
        "records": len(pairs),
        "seconds": seconds,
        "share_of_naive_seconds": seconds["grains_tl"] / seconds["naive"],
        "share_of_naive_token_layers": few.forward / many.forward,
        "largest_difference_nats": (results["grains_tl"] - results["naive"]).abs().max().item(),
    }


def rows(generated: dict[str, Any], swept: dict[str, Any]) -> list[tuple[str, str]]:
    """Both as lines."""
    found = []
    for batch in ("batch 4", "batch 1"):
        n = generated["new_tokens"] * int(batch[-1])
        for name, seconds in generated[batch]["seconds"].items():
            change = generated[batch]["overhead"][name]
            found.append((f"generation, {batch}, {name}", f"{n / seconds:.1f} tokens/s ({change:+.1%} time)"))
    found += [
        (f"sweep of all layers, {swept['records']} records: token-layers / naive",
         f"{swept['share_of_naive_token_layers']:.2f}"),
        ("seconds / naive", f"{swept['share_of_naive_seconds']:.2f}"),
        ("largest difference of a margin", f"{swept['largest_difference_nats']:.1e} nats"),
    ]  # fmt: skip
    return found
