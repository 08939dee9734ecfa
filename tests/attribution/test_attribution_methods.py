"""Every attribution method against functions with a known answer, captum, and what a linear model must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import captum.attr as captum
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution import other_paths, paths, samples
from grains_tl.attribution.field import Run, Sample, in_order, real_inputs
from grains_tl.attribution.methods import METHODS
from grains_tl.attribution.paths import Ends, Scores
from grains_tl.attribution.reference import References, neutral_tokens
from grains_tl.attribution.removal import values_without
from grains_tl.tokens.pairs import TokenizedPair
from tests.conftest import KINDS, TL_MAJOR, tiny_hf, tiny_model
from tests.helpers.oracles import embeddings, margin, relative_error

ATOL = 1e-5  # closed forms of size 1 in float32, sums of some tens of terms
GRADIENT_RTOL = 1e-3  # float32 gradients of a network, two implementations
NO_HOOKED = pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")
CASES = [("bridge", "llama"), ("bridge", "gpt2"), pytest.param(("hooked", "llama"), marks=NO_HOOKED)]


class PlainField:
    """Any function of one prompt's embeddings in the place of a model: records are points ``[pos, d]``."""

    def __init__(self, f: Callable[[Tensor], Tensor], *x: Tensor) -> None:
        self.f, self.x, self.n_gradients = f, x, 0

    @property
    def lengths(self) -> list[int]:
        return [len(x) for x in self.x]

    def sample(self, runs: Sequence[Run], *, gradient: bool) -> Iterator[Sample]:
        for i, run in enumerate(runs):
            point = self.x[run.record].clone() if run.point is None else run.point()
            leaf = point.clone().requires_grad_()
            value = self.f(leaf)
            self.n_gradients += gradient
            found = torch.autograd.grad(value, leaf)[0] if gradient else None
            yield Sample(i, float(value), point, found)


X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.5]])
START = torch.tensor([[0.0, 1.0], [0.25, 0.0], [1.0, -0.5]])
WEIGHT = torch.tensor([[0.5, -1.0], [2.0, 0.25], [-0.5, 1.0]])


def linear(x: Tensor) -> Tensor:
    return (WEIGHT * x).sum()


def product(x: Tensor) -> Tensor:
    """The sums of the first two tokens, multiplied."""
    return x[0].sum() * x[1].sum()


def largest(x: Tensor) -> Tensor:
    """The largest of the tokens' sums: only the winner of each place of the path gets any."""
    return x.sum(-1).max()


def ends(field: PlainField, start: Tensor = START) -> Ends:
    x, values = real_inputs(field)
    return paths.ends_of(field, x, values, [start] * len(x))


def generators(n: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def by_path(name: str, f: Callable[[Tensor], Tensor], start: Tensor = START) -> Scores:
    field = PlainField(f, X)
    both = ends(field, start)
    if name == "adaptive":
        return paths.adaptive_path(field, both, budget=400, tolerance=1e-4)[0]
    if name == "along points":
        return other_paths.along_points(
            field, both, [torch.stack([paths.between(start, X, a) for a in torch.linspace(0, 1, 401).tolist()])]
        )[0]
    if name == "expected":
        return samples.expected(field, both.x, both.value, [[start]], generators(), n_samples=4000)[0]
    nodes, weights = paths.path_nodes(200, name)
    return paths.straight_path(field, both, nodes, weights)[0]


PATHS = ["gauss_legendre", "riemann", "adaptive", "along points", "expected"]
#: Of max, the exact integral has a step: the quadrature errs by half a node's weight times the slope (about 10).
MAX_ATOL = 0.05


@pytest.mark.parametrize("name", PATHS)
def test_linear_functions_are_attributed_exactly_by_every_path(name: str) -> None:
    found = by_path(name, linear)
    torch.testing.assert_close(found.scores, (WEIGHT * (X - START)).sum(-1), atol=1e-4, rtol=0)
    assert found.gap == pytest.approx(0, abs=1e-3)
    assert found.start_value == pytest.approx(float(linear(START)), abs=ATOL)


@pytest.mark.parametrize("name", PATHS)
def test_a_product_is_shared_along_the_straight_path(name: str) -> None:
    """For f = u v, token 1 gets (u - u')(v + v') / 2 and the other the same with u and v exchanged: complete."""
    u, v, u0, v0 = 3.0, -0.5, 1.0, 0.25
    wanted = torch.tensor([(u - u0) * (v + v0) / 2, (v - v0) * (u + u0) / 2, 0.0])
    found = by_path(name, product)
    # places drawn one per equal stretch: an error of about slope / n_samples^1.5, here 1e-5
    torch.testing.assert_close(found.scores, wanted, atol=1e-3, rtol=0)
    assert found.gap == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("name", PATHS)
def test_of_a_maximum_the_winner_takes_the_path_while_it_wins(name: str) -> None:
    """Token sums run 1 -> 3, 0.25 -> -0.5 and 0.5 -> 3.5: the third overtakes the first at alpha = 0.5."""
    found = by_path(name, largest)
    torch.testing.assert_close(found.scores, torch.tensor([1.0, 0.0, 1.5]), atol=MAX_ATOL, rtol=0)
    assert abs(found.gap or 0) < MAX_ATOL


def test_sequential_paths_end_at_leave_one_out() -> None:
    """On the product, moving one token alone gives (u - u') v: leave-one-out, and its sum is not f(x) - f(x')."""
    field = PlainField(product, X)
    (found,) = other_paths.one_at_a_time(field, ends(field), *paths.path_nodes(3))
    torch.testing.assert_close(found.scores, torch.tensor([2 * -0.5, -0.75 * 3.0, 0.0]), atol=ATOL, rtol=0)
    assert found.gap == pytest.approx(0, abs=ATOL) and found.steps == 9
    assert found.start_value == pytest.approx(-1.5 - float(found.scores.sum()), abs=ATOL)


def test_gradient_methods_on_a_product() -> None:
    field = PlainField(product, X)
    wanted = torch.tensor([3.0 * -0.5, -0.5 * 3.0, 0.0])
    (found,) = samples.at_the_input(field)
    torch.testing.assert_close(found.scores, wanted, atol=ATOL, rtol=0)
    assert found.gap is None and found.steps == 1 and found.value == pytest.approx(-1.5)
    # the noise of the other token averages out: the mean gradient of a product is the gradient
    (smooth,) = samples.smoothed(field, [X], [-1.5], generators(), n_samples=4000, noise=0.1)
    torch.testing.assert_close(smooth.scores, wanted, atol=0.05, rtol=0)
    (exact,) = samples.smoothed(field, [X], [-1.5], generators(), n_samples=3, noise=0.0)
    torch.testing.assert_close(exact.scores, wanted, atol=ATOL, rtol=0)


def test_expected_gradients_average_over_the_baselines() -> None:
    others = [START, torch.zeros(3, 2)]
    field = PlainField(product, X)
    (found,) = samples.expected(field, [X], [-1.5], [others], generators(), n_samples=4000)
    single = [by_path("gauss_legendre", product, start).scores for start in others]
    torch.testing.assert_close(found.scores, torch.stack(single).mean(0), atol=2e-3, rtol=0)
    assert found.start_value == pytest.approx(sum(float(product(s)) for s in others) / 2, abs=ATOL)


def test_adaptive_nodes_go_where_f_moves() -> None:
    """A step at alpha = 0.9: fixed nodes miss it, adaptive ones stand around it and stop when the gap is small."""
    ramp = torch.ones(3, 2)

    def step(x: Tensor) -> Tensor:
        return torch.sigmoid(150 * (x.mean() - 0.9))

    field = PlainField(step, ramp)
    both = ends(field, torch.zeros(3, 2))
    fixed = paths.straight_path(field, both, *paths.path_nodes(8))[0]
    field.n_gradients = 0
    found = paths.adaptive_path(field, both, budget=64, tolerance=0.05)[0]
    assert abs(fixed.gap or 0) > 0.3 and abs(found.gap or 0) < 0.05
    assert field.n_gradients == found.steps <= 64
    torch.testing.assert_close(found.scores, torch.full((3,), 1 / 3), atol=0.02, rtol=0)


@pytest.mark.parametrize("budget", [3, 5, 6, 17])
def test_adaptive_nodes_keep_to_their_budget(budget: int) -> None:
    field = PlainField(lambda x: torch.sin(40 * x.sum()), X, 2 * X)
    both = ends(field)
    field.n_gradients = 0
    found = paths.adaptive_path(field, both, budget=budget, tolerance=1e-9)
    assert all(s.steps <= budget for s in found) and field.n_gradients == sum(s.steps for s in found)


def test_a_walk_through_real_tokens_is_monotone_and_ends_where_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(200, 4, generator=generator)
    x, start = vocabulary[:3], vocabulary[3:6]
    path = other_paths.token_path(x, start, vocabulary, n_points=7)
    assert path.shape == (7, 3, 4) and torch.equal(path[0], start) and torch.equal(path[-1], x)
    steps = torch.diff(path, dim=0) * torch.sign(x - start)
    assert bool((steps >= -1e-6).all())
    # nearer to real tokens than the straight path is
    straight = torch.stack([paths.between(start, x, a) for a in torch.linspace(0, 1, 7).tolist()])

    def distance(points: Tensor) -> Tensor:
        return torch.cdist(points[1:-1].reshape(-1, 4), vocabulary).min(-1).values.mean()

    assert distance(path) < distance(straight)


# -- captum -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def both(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model and the plain Hugging Face model with the same weights."""
    kind, architecture = request.param
    return SimpleNamespace(
        model=tiny_model(kind, architecture), hf=tiny_hf(architecture), biases=architecture == "gpt2"
    )


def first(model: Any, pairs: Sequence[gr.PreferencePair], i: int = 1) -> TokenizedPair:
    return gr.tokens.tokenize_pairs(model, pairs)[i]


def test_riemann_equals_captum(both: Any, pairs: list[gr.PreferencePair]) -> None:
    t = first(both.model, pairs)
    x = embeddings(both.hf, t.prompt)
    ig = captum.IntegratedGradients(lambda e: margin(both.hf, t, prompt_embeds=e))
    wanted = ig.attribute(x, torch.zeros_like(x), n_steps=6, method="riemann_middle")[0].sum(-1)
    found = gr.attribute(
        both.model, pairs[1], method="integrated_gradients", reference="zero", nodes="riemann", n_steps=6
    )
    assert relative_error(found.scores, wanted) < GRADIENT_RTOL


def test_adaptive_converges_to_captum(both: Any, pairs: list[gr.PreferencePair]) -> None:
    """Against 400 Gauss-Legendre nodes from the same baseline."""
    t = first(both.model, pairs)
    x = embeddings(both.hf, t.prompt)
    start = References(both.model).point("neutral", x[0])[None]
    ig = captum.IntegratedGradients(lambda e: margin(both.hf, t, prompt_embeds=e))
    wanted = ig.attribute(x, start, n_steps=400, method="gausslegendre", internal_batch_size=50)[0].sum(-1)
    found = gr.attribute(both.model, pairs[1], method="integrated_gradients", n_steps=64)
    assert found.converged and found.steps is not None and found.steps <= 64
    torch.testing.assert_close(found.scores, wanted.float(), atol=0.05 * float(wanted.abs().sum()), rtol=0)


def test_input_x_gradient_equals_captum(both: Any, pairs: list[gr.PreferencePair]) -> None:
    t = first(both.model, pairs)
    x = embeddings(both.hf, t.prompt).requires_grad_()
    wanted = captum.InputXGradient(lambda e: margin(both.hf, t, prompt_embeds=e)).attribute(x)[0].sum(-1)
    assert (
        relative_error(gr.attribute(both.model, pairs[1], method="gradient_x_input").scores, wanted.detach())
        < GRADIENT_RTOL
    )


def test_leave_one_out_equals_captum_ablation(both: Any, pairs: list[gr.PreferencePair]) -> None:
    t = first(both.model, pairs)
    x = embeddings(both.hf, t.prompt)
    positions = torch.arange(len(t.prompt))[None, :, None].expand_as(x)
    ablation = captum.FeatureAblation(lambda e: margin(both.hf, t, prompt_embeds=e))
    wanted = ablation.attribute(x, baselines=torch.zeros_like(x), feature_mask=positions)[0, :, 0]
    found = gr.attribute(both.model, pairs[1], method="leave_one_out", mask="zero")
    torch.testing.assert_close(found.scores, wanted.float(), atol=1e-4, rtol=0)


def test_smoothgrad_equals_captum_up_to_its_draws(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """Both estimate the same mean; captum draws from the global state, so only the limit can be compared."""
    t = first(bridge, pairs)
    x = embeddings(hf, t.prompt)
    scale = 0.05 * x.pow(2).mean(-1, keepdim=True).sqrt()

    def f(e: Tensor) -> Tensor:  # noise of one size in captum's space, of a share of each token's in ours
        return margin(hf, t, prompt_embeds=x + (e - x) * scale)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tunnel = captum.NoiseTunnel(captum.Saliency(f))
        gradient = tunnel.attribute(
            x.clone(), nt_type="smoothgrad", nt_samples=600, nt_samples_batch_size=100, stdevs=1.0, abs=False
        )
    wanted = (gradient / scale * x)[0].sum(-1)
    found = gr.attribute(bridge, pairs[1], method="smoothgrad", n_steps=600, noise=0.05)
    # the standard error of 600 draws is a few percent of the scores' size
    assert relative_error(found.scores, wanted.detach()) < 0.1
    raw = gr.attribute(bridge, pairs[1], method="gradient_x_input").scores
    assert relative_error(found.scores, raw) > 0.0


def test_expected_gradients_equal_captum_up_to_their_draws(
    bridge: Any, hf: Any, pairs: list[gr.PreferencePair]
) -> None:
    t = first(bridge, pairs)
    x = embeddings(hf, t.prompt)
    starts = torch.cat([References(bridge).point(b, x[0])[None] for b in ("neutral", "uniform_prompt")])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        import numpy as np

        np_state = np.random.get_state()  # noqa: NPY002 - captum draws from numpy's global state
        np.random.seed(0)  # noqa: NPY002
        shap = captum.GradientShap(lambda e: margin(hf, t, prompt_embeds=e))
        wanted = shap.attribute(x, starts, n_samples=1500, stdevs=0.0)[0].sum(-1)
        np.random.set_state(np_state)  # noqa: NPY002
    found = gr.attribute(
        bridge, pairs[1], method="expected_gradients", n_steps=200, reference=["neutral", "uniform_prompt"]
    )
    assert relative_error(found.scores, wanted.float()) < 0.15  # 1500 free draws: about 5 % standard error
    assert found.relative_gap is not None and found.relative_gap < 0.1


# -- the linearised model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [None, 1])
def test_attention_aware_scores_of_one_token_responses_add_up_to_f(kind: str, layer: int | None) -> None:
    """Without biases the linearised model is linear in its input: conservation, exactly."""
    model = tiny_model(kind)
    pair = gr.PreferencePair("the soup was cold but the room was warm . overall it was", " great", " awful")
    a = gr.attribute(model, pair, method="attention_aware", layer=layer)
    assert float(a.scores.sum()) == pytest.approx(a.objective, abs=1e-3)
    plain = gr.attribute(model, pair, method="gradient_x_input", layer=layer)
    assert a.objective == pytest.approx(plain.objective, abs=1e-4)
    assert abs(float(plain.scores.sum()) - plain.objective) > 0.1  # which gradient x input does not give


def test_attention_aware_runs_on_layer_norms_and_plain_mlps(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model("bridge", "gpt2")
    a, plain = (gr.attribute(model, pairs[0], method=m) for m in ("attention_aware", "gradient_x_input"))  # type: ignore[arg-type]
    assert a.objective == pytest.approx(plain.objective, abs=1e-4)
    assert relative_error(a.scores, plain.scores) > 0.01


def test_attention_aware_says_when_a_hook_point_does_not_fire(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    from grains_tl.attribution.propagation import checked

    with (
        pytest.raises(ValueError, match="does not work on this model.*ln9"),
        checked([("blocks.0.ln9.hook_scale", print)]),
    ):
        pass


# -- inside the model -------------------------------------------------------------------------------------------------


def test_layer_zero_is_the_embedding_where_positions_come_later(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    for method in ("gradient_x_input", "integrated_gradients"):
        one, other = (gr.attribute(bridge, pairs[1], method=method, n_steps=16, layer=at) for at in (None, 0))  # type: ignore[arg-type]
        assert relative_error(other.scores, one.scores) < GRADIENT_RTOL


def test_a_layer_starts_from_what_the_baseline_prompt_gives_there(
    bridge: Any, hf: Any, pairs: list[gr.PreferencePair]
) -> None:
    """Against plain PyTorch: the residual after block 0 interpolated by a hook on the Hugging Face model."""
    from tests.helpers.oracles import block, edited, first_tensor

    t = first(bridge, pairs)
    x = embeddings(hf, t.prompt)
    held: list[Tensor] = []
    handle = block(hf, 0).register_forward_hook(lambda m, a, o: held.append(first_tensor(o).detach()))
    hf(inputs_embeds=x)
    hf(inputs_embeds=References(bridge).point("neutral", x[0])[None])
    handle.remove()
    real, start = held
    n, steps = len(t.prompt), 5
    total = torch.zeros_like(real)
    for node, weight in zip(*(v.tolist() for v in paths.path_nodes(steps)), strict=True):
        leaf = (start + node * (real - start)).clone().requires_grad_()
        with edited(hf, 0, lambda act, leaf=leaf: torch.cat([leaf.expand(act.shape[0], -1, -1), act[:, n:]], 1)):  # type: ignore[misc]
            total += weight * torch.autograd.grad(margin(hf, t).sum(), leaf)[0]
    wanted = ((real - start) * total)[0].sum(-1)
    found = gr.attribute(
        bridge, pairs[1], method="integrated_gradients", nodes="gauss_legendre", n_steps=steps, layer=1
    )
    assert relative_error(found.scores, wanted) < GRADIENT_RTOL


# -- taking out -------------------------------------------------------------------------------------------------------


def test_leave_k_out_recovers_additive_effects(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Enough draws of k = 1 are leave-one-out; for any k the fit explains the draws it was made from."""
    t = gr.tokens.tokenize_pairs(bridge, pairs)
    n = len(t[1].prompt)
    one = gr.attribute(bridge, pairs[1], method="leave_one_out")
    single = gr.attribute(bridge, pairs[1], method="leave_k_out", k=1, n_steps=n)
    torch.testing.assert_close(single.scores, one.scores, atol=1e-4, rtol=0)
    # two tokens at a time, all six pairs: the normal equations of the least squares, solved by hand
    several = gr.attribute(bridge, pairs[1], method="leave_k_out", k=2, n_steps=60)
    sets = [(i, j) for i in range(n) for j in range(i)]
    drops = one.objective - values_without(bridge, t, [(1, s) for s in sets])
    design = torch.zeros(len(sets), n)
    for row, s in enumerate(sets):
        design[row, list(s)] = 1
    wanted = torch.linalg.solve(design.T @ design, design.T @ drops)
    # 60 draws do not hold every pair equally often
    assert float(torch.corrcoef(torch.stack([several.scores, wanted]))[0, 1]) > 0.95


def test_groups_are_taken_out_whole_and_cost_fewer_passes(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    t = first(bridge, pairs, 0)
    spans = [(0, 3), (5, 9)]
    a = gr.attribute(bridge, pairs[0], group_by=spans)
    f = values_without(bridge, [t], [(0, ()), (0, range(3)), (0, range(5, 9))]).tolist()
    found = gr.attribution.group(a, by=spans)
    assert found.scores[0] == pytest.approx(f[0] - f[1], abs=1e-4)
    assert found.scores[found.positions.index((5, 6, 7, 8))] == pytest.approx(f[0] - f[2], abs=1e-4)
    assert a.steps == len(t.prompt) - 5 == len(found.texts)
    with pytest.raises(ValueError, match="takes no group_by"):
        gr.attribute(bridge, pairs[0], method="gradient_x_input", group_by="word")


# -- the same whatever the batch, the padding and the precision -------------------------------------------------------

DRAWING = ["leave_k_out", "smoothgrad", "expected_gradients"]


@pytest.mark.parametrize("method", DRAWING)
def test_draws_belong_to_the_record_and_the_seed(bridge: Any, pairs: list[gr.PreferencePair], method: Any) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (gr.attribute(bridge, pairs[0], method=method, n_steps=6, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.scores, same.scores) and not torch.equal(one.scores, other.scores)
    t = gr.tokens.tokenize_pairs(bridge, pairs)
    batched = gr.attribution.attribute_all(bridge, t, method=method, n_steps=6, seed=1)[0]
    assert relative_error(batched.scores, one.scores) < GRADIENT_RTOL
    assert torch.equal(torch.random.get_rng_state(), before)


BF16 = ["leave_one_out", "gradient_x_input", "integrated_gradients", "attention_aware", "smoothgrad"]


@pytest.mark.parametrize("method", BF16)
def test_bfloat16_keeps_the_ranks(pairs: list[gr.PreferencePair], method: Any) -> None:
    full, half = tiny_model(), tiny_model_bf16()
    long = gr.PreferencePair(
        "the soup was cold but the room was warm and the film was great . the hotel was", " good", " bad"
    )
    options: dict[str, Any] = (
        {"nodes": "gauss_legendre", "reference": "neutral"} if method == "integrated_gradients" else {}
    )
    a, b = (gr.attribute(m, long, method=method, n_steps=8, **options) for m in (full, half))
    assert gr.faithfulness.rank_agreement({"float32": [a], "bfloat16": [b]})["spearman"][0] > 0.95


def tiny_model_bf16() -> Any:
    from grains_tl.models import building as gr_models
    from tests.conftest import tiny_tokenizer

    hf_model, tokenizer = tiny_hf().to(torch.bfloat16), tiny_tokenizer()
    gr_models.keep_tokenizer_as_is(tokenizer, "tiny")
    return gr_models.bridge_of(hf_model, tokenizer, "tiny").eval().requires_grad_(False)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava() -> Any:
    from tests.helpers.vision_families import FAMILIES
    from tests.helpers.vision_families import bridge as vision_bridge

    return vision_bridge(FAMILIES[0])


@pytest.mark.skipif(TL_MAJOR < 4, reason="vision-language models are exact on TransformerLens 4 only")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_text_and_patches(llava: Any, method: Any) -> None:
    """A record with an image and one without, in one batch and alone; path methods start from the image's own mean patch."""
    from tests.helpers.vision_families import picture

    prompt = "question : what is this ? answer :"
    records = [gr.PreferencePair(prompt, " a cat", " a big dog", image) for image in (picture(0), None)]
    found = gr.attribution.attribute_all(llava, gr.tokens.tokenize_pairs(llava, records), method=method, n_steps=9)
    assert bool(found[0].is_image.any()) and not bool(found[1].is_image.any()) and found[0].spans
    for record, a in zip(records, found, strict=True):
        alone = gr.attribute(llava, record, method=method, n_steps=9)
        assert a.scores.shape == (len(a.tokens),) and bool(torch.isfinite(a.scores).all())
        assert relative_error(a.scores, alone.scores) < 5 * GRADIENT_RTOL
    assert float(found[0].scores[found[0].is_image].abs().max()) > 0


# -- baselines and options --------------------------------------------------------------------------------------------


def test_neutral_tokens_have_no_opinion(bridge: Any) -> None:
    words = [bridge.tokenizer.decode([i]) for i in neutral_tokens(bridge)]
    assert {"and", "it", ",", "."} <= set(words) and not {"great", "awful", "the"} & set(words)  # "the" is unknown here


def test_baseline_points(bridge: Any) -> None:
    ids = bridge.tokenizer("the soup was great and")["input_ids"]
    table = bridge.embed.weight if hasattr(bridge.embed, "weight") else bridge.W_E
    x = table[ids].detach().float()
    make = References(bridge)
    torch.testing.assert_close(make.point("uniform_prompt", x), x.mean(0).expand(5, -1))
    neutral = make.point("neutral", x)
    words = table[neutral_tokens(bridge)].detach()
    similarity = torch.nn.functional.cosine_similarity(x[:, None], words[None], dim=-1)
    assert torch.equal(neutral, words[similarity.argmax(-1)]) and torch.equal(
        neutral[4], x[4]
    )  # "and" is neutral itself


def test_a_model_without_neutral_words_starts_from_the_mean(
    pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr("grains_tl.attribution.reference.NEUTRAL", "")
    monkeypatch.setattr("grains_tl.attribution.reference.PUNCTUATION", ())
    by_default = gr.attribute(model, pairs[1], method="integrated_gradients", n_steps=4)
    from_mean = gr.attribute(model, pairs[1], method="integrated_gradients", n_steps=4, reference="mean_embedding")
    assert torch.equal(by_default.scores, from_mean.scores)
    with pytest.raises(ValueError, match="function_words.*tokenizer"):
        gr.attribute(model, pairs[1], method="integrated_gradients", reference="neutral")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"nodes": "simpson", "method": "integrated_gradients"}, "simpson"),
    ({"nodes": "adaptive", "n_steps": 2, "method": "integrated_gradients"}, "at least 3"),
    ({"nodes": "adaptive", "method": "sequential_ig"}, "sequential_ig; expected"),
    ({"layer": 1}, "takes no layer"),
    ({"layer": 3, "method": "gradient_x_input"}, "layers 0 to 2"),
    ({"k": 0, "method": "leave_k_out"}, "k=0"),
    ({"noise": -1.0, "method": "smoothgrad"}, "noise=-1"),
    ({"n_steps": 1, "method": "discretized_ig"}, "two ends"),
    ({"reference": ["zero"], "method": "integrated_gradients"}, "several references"),
    ({"reference": torch.zeros(5), "method": "integrated_gradients"}, r"shape \(5,\)"),
    ({"group_by": "paragraph"}, "paragraph"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_cannot_work(
    bridge: Any, pairs: list[gr.PreferencePair], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gr.attribute(bridge, pairs[0], **options)


def test_samples_come_back_in_order() -> None:
    field = PlainField(linear, X, START)
    found = in_order(reversed(list(field.sample([Run(0, None), Run(1, None)], gradient=False))))
    assert [s.value for s in found] == [float(linear(X)), float(linear(START))]
