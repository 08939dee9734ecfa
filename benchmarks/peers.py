"""The same work by other packages, on a plain Hugging Face model: CAA vectors, leave-one-out, integrated gradients.

captum is a dependency of the benchmarks. repeng and steering-vectors ask for versions of numpy and transformers that do
not go with ours; ``pip install --no-deps repeng steering-vectors gguf`` into an environment of their own, and the rows of
those that import appear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grains_tl as gr
from benchmarks.common import timed
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.reference import References
from grains_tl.hooks.mask import replacement_embedding
from grains_tl.tokens.pairs import TokenizedPair

#: One job's figures: CPU seconds by package, and how far the results agree with ours.
Figures = dict[str, Any]


def margin_of(hf_model: Any, pair: TokenizedPair) -> Callable[[Tensor], Tensor]:
    """f of the prompt's embeddings ``[batch, pos, d_model]``, as one writes it first: a pass per response, all logits."""
    embed = hf_model.get_input_embeddings()

    def log_likelihood(prompt: Tensor, response: Sequence[int]) -> Tensor:
        target = torch.tensor(response)
        full = torch.cat([prompt, embed(target[:-1])[None].expand(len(prompt), -1, -1)], dim=1)
        logprobs = hf_model(inputs_embeds=full, use_cache=False).logits[:, prompt.shape[1] - 1 :].log_softmax(-1)
        return logprobs.gather(-1, target.expand(len(full), -1)[..., None]).sum((1, 2))

    return lambda prompt: log_likelihood(prompt, pair.chosen) - log_likelihood(prompt, pair.rejected)


def leave_one_out(model: Any, hf_model: Any, *, records: int, repeats: int) -> Figures:
    """Leave-one-out against captum's ``FeatureAblation``, one token or eight at a time."""
    from captum.attr import FeatureAblation

    tokenized = gr.tokens.tokenize_pairs(model, gr.load_bundled("sentiment", "build")[:records])
    embed, stand_in = hf_model.get_input_embeddings(), replacement_embedding(model, "mean_embedding")

    def captum(at_a_time: int) -> list[Tensor]:
        scores = []
        for pair in tokenized:
            x = embed(torch.tensor([pair.prompt])).detach()
            tokens = torch.arange(x.shape[1])[None, :, None].expand_as(x)
            with torch.no_grad():
                found = FeatureAblation(margin_of(hf_model, pair)).attribute(
                    x, baselines=stand_in.expand_as(x), feature_mask=tokens, perturbations_per_eval=at_a_time
                )
            scores.append(found[0, :, 0])
        return scores

    def ours(**options: Any) -> list[Tensor]:
        return [a.scores for a in attribute_all(model, tokenized, method="leave_one_out", progress=False, **options)]

    jobs = {"grains_tl": ours, "captum, 8 at a time": lambda: captum(8), "captum, 1 at a time": lambda: captum(1)}
    return _figures(jobs, repeats, f"leave-one-out, {records} records")


def integrated_gradients(model: Any, hf_model: Any, *, records: int, steps: int, repeats: int) -> Figures:
    """Integrated gradients with given nodes and baseline against captum's, a record at a time."""
    from captum.attr import IntegratedGradients

    tokenized = gr.tokens.tokenize_pairs(model, gr.load_bundled("sentiment", "build")[:records])
    embed, baselines = hf_model.get_input_embeddings(), References(model)

    def captum() -> list[Tensor]:
        scores = []
        for pair in tokenized:
            x = embed(torch.tensor([pair.prompt])).detach()
            found = IntegratedGradients(margin_of(hf_model, pair)).attribute(
                x, baselines=baselines.point("function_words", x[0])[None], n_steps=steps, method="gausslegendre"
            )
            scores.append(found[0].sum(-1))
        return scores

    def ours() -> list[Tensor]:
        found = attribute_all(
            model,
            tokenized,
            method="integrated_gradients",
            n_steps=steps,
            nodes="gauss_legendre",
            reference="function_words",
            progress=False,
        )
        return [a.scores for a in found]

    return _figures(
        {"grains_tl": ours, "captum": captum}, repeats, f"integrated gradients, {records} records, {steps} nodes"
    )


def caa(model: Any, hf_model: Any, *, records: int, repeats: int) -> Figures:
    """CAA vectors at all layers against repeng and steering-vectors, where they can be imported."""
    pairs = gr.load_bundled("sentiment", "build")[:records]
    layers = list(range(int(model.cfg.n_layers)))
    texts = [(str(p.prompt) + str(p.chosen), str(p.prompt) + str(p.rejected)) for p in pairs]

    def ours() -> list[Tensor]:
        with gr.settings(progress=False):
            return [gr.baselines.baseline_vectors(model, pairs, ["caa"], layers=layers)["caa"].raw[:-1]]

    jobs: dict[str, Callable[[], list[Tensor]]] = {"grains_tl": ours}
    if util.find_spec("repeng") is not None:
        np.__dict__.setdefault("float_", np.float64)  # repeng 0.4 names it, numpy 2 does not
        from repeng import ControlVector, DatasetEntry

        entries = [DatasetEntry(*both) for both in texts]

        def repeng() -> list[Tensor]:
            found = ControlVector.train(hf_model, model.tokenizer, entries, batch_size=2 * records, method="pca_diff")
            return [torch.tensor(np.stack([found.directions[layer] for layer in layers if layer in found.directions]))]

        jobs["repeng"] = repeng
    if util.find_spec("steering_vectors") is not None:
        from steering_vectors import train_steering_vector

        def steering_vectors() -> list[Tensor]:
            found = train_steering_vector(hf_model, model.tokenizer, texts, batch_size=8)
            return [torch.stack([found.layer_activations[layer] for layer in layers[:-1]])]

        jobs["steering-vectors, batch 8"] = steering_vectors
    return _figures(jobs, repeats, f"CAA vectors, {records} pairs, {len(layers)} layers")


def _figures(jobs: dict[str, Any], repeats: int, what: str) -> Figures:
    seconds, results = timed(jobs, repeats)
    own = results["grains_tl"]
    cosine = {
        name: min(
            float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(own, found, strict=True)
        )
        for name, found in results.items()
        if name != "repeng"  # principal components, not means
    }
    times = {name: s / seconds["grains_tl"] for name, s in seconds.items() if name != "grains_tl"}
    return {"what": what, "seconds": seconds, "times": times, "cosine": cosine}


def run(model: Any, hf_model: Any, *, repeats: int, records: tuple[int, int, int] = (8, 3, 8)) -> list[Figures]:
    """All three jobs, on so many records each: CAA, leave-one-out, integrated gradients with 10 nodes."""
    return [
        caa(model, hf_model, records=records[0], repeats=repeats),
        leave_one_out(model, hf_model, records=records[1], repeats=repeats),
        integrated_gradients(model, hf_model, records=records[2], steps=10, repeats=repeats),
    ]


def rows(figures: Sequence[Figures]) -> list[tuple[str, str]]:
    """Lines of the table."""
    found = []
    for job in figures:
        found.append((job["what"], f"{job['seconds']['grains_tl']:.2f} s"))
        for name, times in job["times"].items():
            found.append((f"the same, {name}", f"{job['seconds'][name]:.2f} s: {times:.2f} times ours"))
    return found
