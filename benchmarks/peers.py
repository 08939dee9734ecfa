"""The same work by other packages, on a plain Hugging Face model: CAA vectors, attribution, steered generation.

captum is a dependency of the benchmarks. repeng and steering-vectors ask for versions of numpy and transformers that do
not go with ours: make an environment with everything that the benchmarks need, add ``pip install --no-deps repeng
steering-vectors`` there, and name its Python (``python -m benchmarks --peers .../bin/python``).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grains_tl as gr
from benchmarks.common import timed
from benchmarks.rows import Row, torch_shares
from benchmarks.steering import ALPHAS, PROMPTS, random_vectors, sweep_jobs
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.reference import References
from grains_tl.hooks.mask import replacement_embedding
from grains_tl.inference.batches import pad_rows
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.tokens.rules import token_rules


def margin_of(hf_model: Any, pair: TokenizedPair) -> Callable[[Tensor], Tensor]:
    """f of the prompt's embeddings ``[batch, pos, d_model]``, as one writes it first: a pass per response, all logits."""
    embed = hf_model.get_input_embeddings()

    def log_likelihood(prompt: Tensor, response: Sequence[int]) -> Tensor:
        target = torch.tensor(response)
        full = torch.cat([prompt, embed(target[:-1])[None].expand(len(prompt), -1, -1)], dim=1)
        logprobs = hf_model(inputs_embeds=full, use_cache=False).logits[:, prompt.shape[1] - 1 :].log_softmax(-1)
        return logprobs.gather(-1, target.expand(len(full), -1)[..., None]).sum((1, 2))

    return lambda prompt: log_likelihood(prompt, pair.chosen) - log_likelihood(prompt, pair.rejected)


def leave_one_out(model: Any, hf_model: Any, *, records: int, repeats: int) -> list[Row]:
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
    return _rows(jobs, repeats, f"leave-one-out, {records} records", aim="5")


def integrated_gradients(model: Any, hf_model: Any, *, records: int, steps: int, repeats: int) -> list[Row]:
    """Integrated gradients with given nodes and baseline against captum's, a record at a time.

    Ours come with f at both ends, which the completeness gap needs; captum gives the gap on demand.
    """
    from captum.attr import IntegratedGradients

    tokenized = gr.tokens.tokenize_pairs(model, gr.load_bundled("sentiment", "build")[:records])
    embed, baselines = hf_model.get_input_embeddings(), References(model)

    def captum(gap: bool) -> list[Tensor]:
        scores = []
        for pair in tokenized:
            x = embed(torch.tensor([pair.prompt])).detach()
            start = baselines.point("function_words", x[0])[None]
            method = IntegratedGradients(margin_of(hf_model, pair))
            found = method.attribute(
                x, baselines=start, n_steps=steps, method="gausslegendre", return_convergence_delta=gap
            )
            found = found[0] if gap else found
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

    jobs = {
        "grains_tl": ours,
        "captum with the gap, as ours": lambda: captum(True),
        "captum, the integral alone": lambda: captum(False),
    }
    return _rows(jobs, repeats, f"integrated gradients, {records} records, {steps} nodes", aim="2.6")


def caa(model: Any, hf_model: Any, *, records: int, repeats: int) -> list[Row]:
    """CAA vectors at all layers against repeng and steering-vectors, where they can be imported."""
    pairs = gr.load_bundled("sentiment", "build")[:records]
    layers = list(range(int(model.cfg.n_layers)))
    texts = [(str(p.prompt) + str(p.chosen), str(p.prompt) + str(p.rejected)) for p in pairs]

    def ours() -> list[Tensor]:
        with gr.settings(progress=False):
            return [gr.baselines.baseline_vectors(model, pairs, ["caa"], layers=layers)["caa"].raw[:-1]]

    jobs: dict[str, Callable[[], list[Tensor]]] = {"grains_tl": ours}
    if util.find_spec("repeng") is not None:
        ControlVector, DatasetEntry = _repeng().ControlVector, _repeng().DatasetEntry
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
    return _rows(jobs, repeats, f"CAA vectors, {records} pairs, {len(layers)} layers", aim="1.5")


def generation(model: Any, hf_model: Any, *, new_tokens: int, repeats: int) -> list[Row]:
    """Steered generation at one layer, four prompts, beside plain Hugging Face without steering and others with it."""
    vectors, layer = random_vectors(model), int(model.cfg.n_layers) // 2
    ids, mask, _ = pad_rows(model, [prompt_ids(model, p) for p in PROMPTS], padding_side="left", at_least=2)
    step = 0.5 * vectors.directions[layer]

    def plain() -> Tensor:
        with torch.no_grad():
            return hf_model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=token_rules(model).pad,
            )  # fmt: skip

    jobs: dict[str, Callable[[], Any]] = {
        "grains_tl": lambda: gr.generate(model, PROMPTS, vectors.hooks(0.01, [layer]), max_new_tokens=new_tokens),
        "plain transformers, unsteered": plain,
    }
    if util.find_spec("steering_vectors") is not None:
        from steering_vectors import SteeringVector

        def steering_vectors() -> Tensor:
            names = {"decoder_block": "model.layers.{num}"}
            with SteeringVector({layer: step}).apply(hf_model, layer_config=names):
                return plain()

        jobs["steering-vectors"] = steering_vectors
    if util.find_spec("repeng") is not None:
        ControlModel = _repeng().ControlModel

        def repeng() -> Tensor:
            controlled = ControlModel(hf_model, [layer])
            try:
                controlled.set_raw_control({layer: step})
                return plain()
            finally:
                controlled.unwrap()

        jobs["repeng"] = repeng
    configs = [m.generation_config for m in (model.original_model, hf_model)]
    before = [c.min_new_tokens for c in configs]
    try:
        for c in configs:  # every run is of the same length
            c.min_new_tokens = new_tokens
        what = f"generation, {new_tokens} tokens after {len(PROMPTS)} prompts, steered"
        return _rows(jobs, repeats, what, aim="0.97", agreement=lambda ours, theirs: "")
    finally:
        for c, own in zip(configs, before, strict=True):
            c.min_new_tokens = own


def sweep(model: Any, hf_model: Any, *, records: int, repeats: int) -> list[Row]:
    """All layers, two alphas, beside a run for each setting: with our batches, and as one writes it first."""
    pairs, vectors = gr.load_bundled("sentiment", "choose")[:records], random_vectors(model)
    tokenized, embed = gr.tokens.tokenize_pairs(model, pairs), hf_model.get_input_embeddings()
    ours, batched = sweep_jobs(model, vectors, pairs)

    def loop() -> Tensor:
        found = []
        for layer in vectors.layers:
            for alpha in ALPHAS:
                with torch.no_grad(), vectors.torch_hooks(hf_model, alpha, layer):
                    own = [margin_of(hf_model, pair)(embed(torch.tensor([pair.prompt]))) for pair in tokenized]
                found.append(torch.cat(own).mean())
        return torch.stack(found)

    jobs = {
        "grains_tl": ours,
        "a record and a response at a time, plain transformers": loop,
        "a run for each setting, our batches": batched,
    }
    what = f"sweep, {len(vectors.layers)} layers x {len(ALPHAS)} alphas, {records} records"
    return _rows(jobs, repeats, what, aim="5", agreement=_apart)


def _apart(ours: Tensor, theirs: Tensor) -> str:
    return f"within {float((ours - theirs).abs().max()):.0e} nats"


def _cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    pairs = zip(ours, theirs, strict=True)
    return f"cosine {min(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs):.4f}"


def _repeng() -> Any:
    np.__dict__.setdefault("float_", np.float64)  # repeng 0.4 names it, numpy 2 does not
    import repeng

    return repeng


def _rows(
    jobs: dict[str, Callable[[], Any]],
    repeats: int,
    what: str,
    *,
    aim: str,
    agreement: Callable[[Any, Any], str] = _cosine,
) -> list[Row]:
    jobs["grains_tl"]()  # what is made once per model, such as the comparison with the model's own modules
    seconds, results = timed(jobs, repeats)
    rest = torch_shares(jobs["grains_tl"])
    found = []
    for name in [name for name in jobs if name != "grains_tl"]:
        # repeng gives principal components, not means
        same = "" if name == "repeng" else agreement(results["grains_tl"], results[name])
        found.append(Row(what, seconds["grains_tl"], name, seconds[name], aim, agreement=same, rest=rest))
    return found


def missing(python: str) -> str | None:
    """Why this Python cannot run the comparison, or ``None``.

    Args:
        python: path of an interpreter.
    """
    needed = ["torch", "transformers", "transformer_lens", "captum", "repeng", "steering_vectors"]
    code = f"from importlib.util import find_spec\nprint(*[name for name in {needed} if find_spec(name) is None])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"--peers {python}: expected the path of a Python interpreter, but {error.strerror or error}"
    if done.returncode:
        reason = done.stderr.strip()[-200:] or done.returncode
        return f"--peers {python}: expected a Python interpreter; it stopped with {reason}"
    absent = done.stdout.split()
    if absent:
        return (
            f"--peers {python}: expected an environment with {', '.join(needed)}; {', '.join(absent)} cannot be imported "
            "there; install into it what is missing (pip install --no-deps for repeng and steering-vectors)"
        )
    return None
