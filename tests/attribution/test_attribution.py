"""Attribution against closed forms, captum and autograd on a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution.methods import METHODS
from grains_tl.attribution.paths import path_nodes
from tests.conftest import KINDS, TL_MAJOR, tiny_hf, tiny_model, tiny_tokenizer
from tests.helpers.fakes import FakeModel
from tests.helpers.oracles import embeddings, margin, relative_error

EXACT_ATOL = 1e-6  # closed forms of size 1 in float32: a few units of 1.2e-7
GRADIENT_RTOL = 1e-3  # float32 gradients near the zero embedding, where RMSNorm blows round-off up
SCORE_ATOL = 1e-4  # differences of float32 log-probabilities of some nats
GL: Any = "gauss_legendre"
PAPER: dict[str, Any] = {"method": "integrated_gradients", "reference": "zero", "nodes": GL}
RECORD = gr.PreferencePair("this food was cold but", " good", " bad")


# -- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 2, 5, 8])
def test_quadrature_is_exact_for_polynomials(n_steps: int) -> None:
    nodes, weights = path_nodes(n_steps)
    for degree in range(2 * n_steps):
        assert abs(float((weights * nodes**degree).sum()) - 1 / (degree + 1)) < EXACT_ATOL
    beyond = 2 * n_steps
    error = abs(float((weights.double() * nodes.double() ** beyond).sum()) - 1 / (beyond + 1))
    assert error > EXACT_ATOL or n_steps > 4  # and not exact beyond: the bound is the theorem's
    assert bool((nodes > 0).all() and (nodes < 1).all() and (weights > 0).all())


# -- closed forms -----------------------------------------------------------------------------------------------------


class PolynomialModel(FakeModel):
    """A model whose margin is a known polynomial of the prompt's embeddings: sum of (a . x)^power + x_0 . b . x_last."""

    def __init__(self, power: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(power)
        self.tokenizer = tiny_tokenizer()
        self.cfg = SimpleNamespace(n_ctx=64, d_model=6, d_vocab=45, n_layers=1)
        self.table = torch.randn(45, 6, generator=generator) * 0.3
        self.vector, self.matrix = torch.randn(6, generator=generator), torch.randn(6, 6, generator=generator) * 0.3
        self.power = power
        self.original_model, self.processor = self, None  # make it a bridge
        self.hook_dict: Any = {"hook_embed": None, "unembed.hook_in": None}
        self.running: dict[str, Callable[..., Any]] = {}

    def parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter([self.table])

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    @contextmanager
    def hooks(self, fwd_hooks: Any) -> Iterator[None]:
        self.running = dict(fwd_hooks)
        yield
        self.running = {}

    def f(self, x: Tensor) -> Tensor:
        return ((x @ self.vector) ** self.power).sum(-1) + torch.einsum("bd,de,be->b", x[:, 0], self.matrix, x[:, -1])

    def __call__(self, ids: Tensor, *, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(ids)
        if "hook_embed" in self.running:
            x = self.running["hook_embed"](x, hook=None)
        logits = torch.zeros(*ids.shape, 45)
        chosen, rejected = self.tokenizer("good bad")["input_ids"]
        logits[:, -1, chosen], logits[:, -1, rejected] = self.f(x) / 2, -self.f(x) / 2  # the softmax's sum cancels
        return self.running["unembed.hook_in"](logits, hook=None)

    def exact_scores(self, x: Tensor, start: Tensor) -> Tensor:
        """The path integral, term by term, with 64 nodes in float64: far more than a polynomial of this degree needs."""
        nodes, weights = np.polynomial.legendre.leggauss(64)
        total = torch.zeros(x.shape, dtype=torch.float64)
        doubled = PolynomialModel(self.power)
        doubled.vector, doubled.matrix = self.vector.double(), self.matrix.double()
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            point = (start + node * (x - start)).double()[None].requires_grad_()
            total += weight * torch.autograd.grad(doubled.f(point).sum(), point)[0][0]
        return ((x - start).double() * total).sum(-1).float()


@pytest.mark.parametrize(("power", "n_steps"), [(2, 1), (2, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize("baseline", ["zero", "eos", "mean_embedding"])
def test_polynomial_margins_are_attributed_exactly(power: int, n_steps: int, baseline: str) -> None:
    """Gradients of degree p - 1 need p / 2 nodes; then scores are exact and complete."""
    model = PolynomialModel(power)
    a = gr.attribute(model, RECORD, method="integrated_gradients", n_steps=n_steps, reference=baseline, nodes=GL)
    x = model.table[model.tokenizer(RECORD.prompt)["input_ids"]]
    start = {"zero": torch.zeros(6), "eos": model.table[2], "mean_embedding": model.table.mean(0)}[baseline]
    scale = max(1.0, float(model.f(x[None]).abs()))
    torch.testing.assert_close(a.scores, model.exact_scores(x, start), atol=EXACT_ATOL * scale, rtol=0)
    assert a.gap is not None and abs(a.gap) < EXACT_ATOL * scale
    assert a.objective == pytest.approx(float(model.f(x[None])), abs=EXACT_ATOL * scale)
    assert a.baseline_objective == pytest.approx(float(model.f(start.expand_as(x)[None])), abs=EXACT_ATOL * scale)


def test_too_few_nodes_show_in_the_gap() -> None:
    a = gr.attribute(PolynomialModel(6), RECORD, method="integrated_gradients", n_steps=1, reference="zero")
    assert a.gap is not None and abs(a.gap) > 1000 * EXACT_ATOL
    assert a.relative_gap == pytest.approx(abs(a.gap) / abs(a.objective - (a.baseline_objective or 0)))


def test_leave_one_out_and_gradient_x_input_on_a_polynomial() -> None:
    model = PolynomialModel(2)
    x = model.table[model.tokenizer(RECORD.prompt)["input_ids"]]
    without = x.repeat(len(x), 1, 1)
    without[torch.arange(len(x)), torch.arange(len(x))] = 0
    a = gr.attribute(model, RECORD, method="leave_one_out", mask="zero")
    torch.testing.assert_close(a.scores, model.f(x[None]) - model.f(without), atol=EXACT_ATOL, rtol=0)
    a = gr.attribute(model, RECORD, method="gradient_x_input")
    point = x[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.f(point).sum(), point)
    torch.testing.assert_close(a.scores, (x * gradient[0]).sum(-1), atol=EXACT_ATOL, rtol=0)


# -- captum and autograd on the plain model ---------------------------------------------------------------------------

NO_HOOKED = pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")
CASES = [("bridge", "llama"), ("bridge", "gpt2"), pytest.param(("hooked", "llama"), marks=NO_HOOKED)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def both(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model and the plain Hugging Face model with the same weights."""
    kind, architecture = request.param
    return SimpleNamespace(model=tiny_model(kind, architecture), hf=tiny_hf(architecture))


def captum_scores(
    hf: Any, pair: gr.tokens.TokenizedPair, n_steps: int, start: Tensor | None = None, objective: str = "sum"
) -> Tensor:
    """captum's integrated gradients over the prompt's input embeddings, the responses held fixed."""
    x = embeddings(hf, pair.prompt)
    baseline = torch.zeros_like(x) if start is None else start.expand_as(x).clone()
    ig = IntegratedGradients(lambda embeds: margin(hf, pair, objective, embeds))
    found = ig.attribute(x, baseline, n_steps=n_steps, method="gausslegendre", internal_batch_size=None)
    return found[0].sum(-1)


@pytest.mark.parametrize("n_steps", [4, 9])
def test_integrated_gradients_equal_captum(both: Any, pairs: list[gr.PreferencePair], n_steps: int) -> None:
    for pair in pairs:
        tokenized = gr.tokens.tokenize_pairs(both.model, [pair])[0]
        found = gr.attribute(both.model, pair, **PAPER, n_steps=n_steps)
        assert relative_error(found.scores, captum_scores(both.hf, tokenized, n_steps)) < GRADIENT_RTOL


@pytest.mark.parametrize("objective", ["mean", "single"])
def test_integrated_gradients_of_other_objectives(both: Any, pairs: list[gr.PreferencePair], objective: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(both.model, pairs[1:2])[0]
    found = gr.attribute(both.model, pairs[1], **PAPER, n_steps=4, objective=objective)
    assert relative_error(found.scores, captum_scores(both.hf, tokenized, 4, objective=objective)) < GRADIENT_RTOL


@pytest.mark.parametrize("baseline", ["eos", "pad", "mean_embedding", "vector"])
def test_baselines(both: Any, pairs: list[gr.PreferencePair], baseline: str) -> None:
    table = both.hf.get_input_embeddings().weight
    start = {"eos": table[2], "pad": table[0], "mean_embedding": table.mean(0), "vector": 0.3 * torch.ones(32)}[
        baseline
    ]
    tokenized = gr.tokens.tokenize_pairs(both.model, pairs[1:2])[0]
    given: Any = start if baseline == "vector" else baseline
    found = gr.attribute(both.model, pairs[1], method="integrated_gradients", n_steps=4, reference=given)
    assert relative_error(found.scores, captum_scores(both.hf, tokenized, 4, start)) < GRADIENT_RTOL


@pytest.mark.parametrize("baseline", ["zero", "eos"])
def test_gap_is_what_completeness_lacks(both: Any, pairs: list[gr.PreferencePair], baseline: str) -> None:
    for pair in pairs:
        tokenized = gr.tokens.tokenize_pairs(both.model, [pair])[0]
        x = embeddings(both.hf, tokenized.prompt)
        start = torch.zeros_like(x) if baseline == "zero" else embeddings(both.hf, [2] * x.shape[1])
        real, base = float(margin(both.hf, tokenized)), float(margin(both.hf, tokenized, prompt_embeds=start))
        a = gr.attribute(both.model, pair, method="integrated_gradients", n_steps=3, reference=baseline)
        assert a.objective == pytest.approx(real, abs=SCORE_ATOL)
        assert a.baseline_objective == pytest.approx(base, abs=SCORE_ATOL)
        assert a.gap == pytest.approx(float(a.scores.sum()) - (real - base), abs=10 * SCORE_ATOL)


def test_gradient_x_input_equals_autograd(both: Any, pairs: list[gr.PreferencePair]) -> None:
    for pair in pairs:
        tokenized = gr.tokens.tokenize_pairs(both.model, [pair])[0]
        x = embeddings(both.hf, tokenized.prompt).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(margin(both.hf, tokenized, prompt_embeds=x).sum(), x)
        a = gr.attribute(both.model, pair, method="gradient_x_input")
        assert relative_error(a.scores, (x * gradient)[0].sum(-1).detach()) < GRADIENT_RTOL
        assert a.gap is None and a.baseline_objective is None and a.relative_gap is None


def test_leave_one_out_equals_another_prompt(both: Any, pairs: list[gr.PreferencePair]) -> None:
    """With the eos masker a left-out token is the same as a prompt that has eos there."""
    for pair in pairs:
        tokenized = gr.tokens.tokenize_pairs(both.model, [pair])[0]
        prompts = torch.tensor([tokenized.prompt]).repeat(len(tokenized.prompt), 1).fill_diagonal_(2)
        without = margin(both.hf, tokenized, prompt_embeds=both.hf.get_input_embeddings()(prompts))
        a = gr.attribute(both.model, pair, method="leave_one_out", mask="eos")
        torch.testing.assert_close(a.scores, margin(both.hf, tokenized) - without, atol=SCORE_ATOL, rtol=0)
        assert a.objective == pytest.approx(float(margin(both.hf, tokenized)), abs=SCORE_ATOL)


# -- batching and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_batching_gives_the_same(model: Any, pairs: list[gr.PreferencePair], method: Method) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    single = [gr.attribute(model, pair, method=method, n_steps=4) for pair in pairs]
    for max_tokens in (1, 60, 10_000):
        seen: list[int] = []
        found = gr.attribution.attribute_all(
            model,
            tokenized,
            method=method,
            n_steps=4,
            max_tokens=max_tokens,
            on_result=lambda index, a, seen=seen: seen.append(index),  # type: ignore[misc]
        )
        assert sorted(seen) == list(range(len(pairs)))
        for a, b in zip(found, single, strict=True):
            assert a.tokens == b.tokens
            torch.testing.assert_close(a.objective, b.objective, atol=SCORE_ATOL, rtol=0)
            assert relative_error(a.scores, b.scores) < GRADIENT_RTOL


@pytest.mark.parametrize("method", METHODS)
def test_result_describes_the_prompt(model: Any, pairs: list[gr.PreferencePair], method: Method) -> None:
    a = gr.attribute(model, pairs[1], method=method, n_steps=2)
    assert a.tokens == ["the", "film", "was", "good"]
    assert a.content.tolist() == [False, True, True, True]  # "the" is this tokenizer's unknown word
    assert a.is_image.tolist() == [False] * 4 and a.scores.shape == (4,)
    assert a.method == method and not a.scores.requires_grad


def test_content_only_leaves_the_rest_out(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    some = gr.attribution.attribute_all(model, tokenized, method="leave_one_out", content_only=True)
    every = gr.attribution.attribute_all(model, tokenized, method="leave_one_out")
    for a, b in zip(some, every, strict=True):
        assert torch.equal(a.scores.isnan(), ~a.content)
        torch.testing.assert_close(a.scores[a.content], b.scores[b.content], atol=SCORE_ATOL, rtol=0)
        assert not b.scores.isnan().any()


def test_attribution_leaves_the_model_alone(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    before = gr.score_pairs(model, tokenized)
    for method in METHODS:
        gr.attribution.attribute_all(model, tokenized, method=method, n_steps=2)
    assert torch.equal(gr.score_pairs(model, tokenized), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_attribution_works_inside_no_grad(model: Any, pairs: list[gr.PreferencePair]) -> None:
    outside = gr.attribute(model, pairs[1], method="gradient_x_input")
    with torch.no_grad():
        assert torch.equal(gr.attribute(model, pairs[1], method="gradient_x_input").scores, outside.scores)


def test_interpolation_hook_by_itself(model: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """Half way to eos at two positions, run by TransformerLens alone."""
    ids = torch.tensor([gr.tokens.tokenize_pairs(model, pairs)[1].prompt])
    mask = torch.tensor([[False, True, True, False]])
    start = hf.get_input_embeddings().weight[2]
    hooks = gr.hooks.interpolate_hook(model, torch.tensor([0.5]), mask, start)
    found = model.run_with_hooks(ids, fwd_hooks=hooks)
    x = embeddings(hf, ids[0].tolist())
    x[:, 1:3] = (x[:, 1:3] + start) / 2
    torch.testing.assert_close(
        found.log_softmax(-1), hf(inputs_embeds=x).logits.log_softmax(-1), atol=SCORE_ATOL, rtol=0
    )


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "shapley"}, "shapley"),
    ({"method": "integrated_gradients", "n_steps": 0}, "n_steps=0"),
    ({"method": "integrated_gradients", "reference": "ones"}, "ones"),
    ({"method": "integrated_gradients", "reference": "mask"}, "no mask token"),
    ({"objective": "product"}, "product"),
    ({"method": "leave_one_out", "mask": "noise"}, "noise"),
    ({"method": "leave_one_out", "mask": "mask"}, "no mask token"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(bridge: Any, pairs: list[gr.PreferencePair], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.attribute(bridge, pairs[0], **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_weights_are_noticed(kind: str, pairs: list[gr.PreferencePair], method: Method) -> None:
    model = tiny_model(kind)
    next(p for name, p in model.named_parameters() if "mlp" in name).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gr.attribute(model, pairs[0], method=method, n_steps=2)


@pytest.mark.usefixtures("unchecked")
def test_interpolation_hook_of_another_shape(bridge: Any) -> None:
    hooks = gr.hooks.interpolate_hook(bridge, torch.ones(1), torch.ones(1, 3, dtype=torch.bool), torch.zeros(32))
    with pytest.raises(ValueError, match=r"do not fit \(1, 2, 32\)"):
        bridge.run_with_hooks(torch.tensor([[5, 6]]), fwd_hooks=hooks)
