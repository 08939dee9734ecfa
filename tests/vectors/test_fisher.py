"""Fisher samples against enumeration over the vocabulary; F^-1 g against the closed form of a linear softmax."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.vectors import fisher_samples
from grains_tl.vectors import gradients as gradients_module
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.kl_optimal import SHRINKAGES, held_out_gain
from tests.conftest import tiny_model
from tests.helpers.oracles import edited
from tests.helpers.planted import COPY, LAYER, planted_model, planted_pairs

TEXTS = ("the soup was cold but the room was warm .", "we liked this film and they hated it", "is the hotel very bad ?")
LAYERS = (0, 2)


@pytest.fixture
def rows(model: Any) -> list[list[int]]:
    return [prompt_ids(model, text) for text in TEXTS]


def exact_fisher(hf: Any, row: list[int], layer: int, scope: str = "all", renorm: bool = False) -> Tensor:
    """sum_t sum_y p(y) s s' by a plain Jacobian of all log-probabilities; ``[d_model, d_model]``."""
    begin, end = {"all": (0, 99), "prompt": (0, len(row) // 2), "generated": (len(row) // 2, 99)}[scope]

    def logprobs(v: Tensor) -> Tensor:
        def edit(act: Tensor) -> Tensor:
            step = torch.zeros_like(act)
            step[:, begin:end] = 1
            moved = act + step * v
            return moved / moved.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True) if renorm else moved

        with edited(hf, layer, edit):
            return hf(torch.tensor([row])).logits[0, :-1].log_softmax(-1)

    zero = torch.zeros(hf.config.hidden_size)
    jacobian = torch.autograd.functional.jacobian(logprobs, zero).double()
    return torch.einsum("ty,tyi,tyj->ij", logprobs(zero).exp().double(), jacobian, jacobian)


@pytest.mark.parametrize(("scope", "operator"), [("all", "add"), ("generated", "add"), ("all", "add_renorm")])
def test_equals_enumeration_within_sampling_error(
    model: Any, hf: Any, rows: list[list[int]], scope: Any, operator: Any
) -> None:
    fisher = gr.vectors.Fisher.estimate(model, rows, layers=LAYERS, n_samples=3000, scope=scope, operator=operator)
    n_tokens = sum(len(row) - 1 for row in rows)
    for layer in LAYERS:
        parts = [exact_fisher(hf, row, layer, scope, operator == "add_renorm") for row in rows]
        wanted = torch.stack(parts).sum(0) / n_tokens
        found = fisher.matrix(layer)
        # an entry of a mean of n outer products of near-Gaussian samples has variance (F_ii F_jj + F_ij^2) / n at one text
        size = wanted.diagonal()
        error = ((size[:, None] * size + wanted**2) / 1000).sqrt().clamp(min=1e-12)
        z = (found - wanted) / error
        assert float(z.abs().max()) < 6
        assert 0.5 < float(z.std()) < 1.6
        assert abs(float(found.trace() / wanted.trace()) - 1) < 0.1


def test_predicts_the_cost_of_small_steps(model: Any) -> None:
    """v'Fv / 2 against the measured KL of steering with it, on the same texts."""
    rows = [prompt_ids(model, text) for text in TEXTS]
    fisher = gr.vectors.Fisher.estimate(model, rows, layers=[1], n_samples=3000)
    raw = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    vector = gr.SteeringVectors.from_raw(raw, [1], torch.tensor([1.0]))
    settings = gr.evaluate.grid({"v": vector}, [1], [0.02], operator="add")
    costs = gr.evaluate.text_costs(model, settings, list(TEXTS))
    measured = float((costs["kl"] * costs["n_tokens"]).sum() / costs["n_tokens"].sum())
    assert float(fisher.predicted_kl(0.02 * vector.directions)[0]) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_does_not_depend_on_batches(bridge: Any, max_tokens: int) -> None:
    rows = [prompt_ids(bridge, text) for text in TEXTS]
    wanted = gr.vectors.Fisher.estimate(bridge, rows, layers=LAYERS, n_samples=9)
    with gr.settings(max_tokens=max_tokens), torch.inference_mode():
        found = gr.vectors.Fisher.estimate(bridge, rows, layers=LAYERS, n_samples=9)
    assert torch.allclose(found.samples, wanted.samples, atol=1e-4 * float(wanted.samples.abs().max()))
    assert found.text.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not found.samples.is_inference()
    other = gr.vectors.Fisher.estimate(bridge, rows, layers=LAYERS, n_samples=9, seed=1)
    assert not torch.allclose(other.samples, wanted.samples, atol=1e-3)


# -- a linear softmax, where everything is known ----------------------------------------------------------------------


class Toy:
    """Logits W v: F = W'(diag p - pp')W exactly, and a margin g'v of two words."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.unembed = torch.randn(40, 8, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(40, generator=generator, dtype=torch.float64)
        self.p = self.bias.softmax(-1)
        self.g = self.unembed[3] - self.unembed[7]
        self.matrix = self.unembed.T @ (self.p.diag() - torch.outer(self.p, self.p)) @ self.unembed
        scores = (40 * self.p).sqrt()[:, None] * (self.unembed - self.p @ self.unembed)
        self.fisher = gr.vectors.Fisher(
            scores[:, None].float(), torch.zeros(40, dtype=torch.long), torch.tensor([1]), (0,)
        )

    def kl(self, v: Tensor) -> Tensor:
        steered = (self.bias + v @ self.unembed.T).log_softmax(-1)
        return (steered.exp() * (steered - self.bias.log_softmax(-1))).sum(-1)


def test_closed_form_and_ceiling_of_a_linear_softmax() -> None:
    toy = Toy()
    g = toy.g[None].float()
    assert torch.allclose(toy.fisher.matrix(0), toy.matrix, atol=1e-5)
    best = toy.fisher.solve(g, 1e-9)[0]
    closed = torch.linalg.solve(toy.matrix, toy.g)
    assert torch.allclose(best, closed, atol=1e-3 * float(closed.norm()))
    budget = 1e-4
    ceiling = float(toy.fisher.ceiling(g, budget, 1e-9)[0])

    def effect(v: Tensor) -> Tensor:
        """The margin of v scaled to the budget, by the measured KL."""
        for _ in range(3):
            v = v * (budget / toy.kl(v))[..., None].sqrt()
        assert torch.allclose(toy.kl(v), torch.tensor(budget, dtype=torch.float64), rtol=1e-3)
        return v @ toy.g

    random = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert float(effect(1e-3 * best[None])[0]) == pytest.approx(ceiling, rel=0.02)
    assert float(effect(1e-3 * random).max()) < 1.02 * ceiling
    assert float(effect(1e-3 * random).max()) > 0.8 * ceiling  # the draws come near, so the comparison says something


def test_shrinkage() -> None:
    toy = Toy()
    g = toy.g[None].float()
    mean = float(toy.matrix.trace()) / 8
    for s in (0.01, 0.5, 0.99):
        wanted = torch.linalg.solve((1 - s) * toy.matrix + s * mean * torch.eye(8, dtype=torch.float64), toy.g)
        assert torch.allclose(toy.fisher.solve(g, s)[0], wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(toy.fisher.solve(g, 1.0)[0], toy.g / mean, rtol=1e-5)
    few = gr.vectors.Fisher(toy.fisher.samples[:5], torch.zeros(5, dtype=torch.long), torch.tensor([1]), (0,))
    mean = float(few.matrix(0).trace()) / 8
    wanted = torch.linalg.solve(0.7 * few.matrix(0) + 0.3 * mean * torch.eye(8, dtype=torch.float64), toy.g)
    assert torch.allclose(few.solve(g, 0.3)[0], wanted, rtol=1e-5)  # singular F: five samples in eight dimensions
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="singular"):
            few.solve(g, bad)


def test_more_samples_ask_for_less_shrinkage() -> None:
    """The held-out choice: few samples are shrunk more than many, and it is near the best choice for the true F."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(-0.4, 0.4, 60)
    g = torch.ones(60)
    gradients = g + 0.1 * torch.randn(20, 1, 60, generator=generator)
    chosen, truth = [], torch.diag(scale**2).double()
    for n in (40, 4000):
        samples = torch.randn(n, 1, 60, generator=generator) * scale
        fisher = gr.vectors.Fisher(samples, torch.arange(n) % 20, torch.ones(20, dtype=torch.long), (0,))
        scores = held_out_gain(fisher, gradients, gr.vectors.MarginGradient())[:, 0]
        chosen.append(SHRINKAGES[int(scores.argmax())])

        def gain(shrinkage: float, fisher: Any = fisher) -> float:
            v = fisher.solve(g[None], shrinkage)[0]
            return float(g.double() @ v / (v @ truth @ v).sqrt())

        assert gain(chosen[-1]) > 0.95 * max(gain(s) for s in SHRINKAGES)
    assert chosen[1] < 0.1 < chosen[0]


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_build(model: Any, pairs: list[gr.PreferencePair]) -> None:
    recipe = gr.vectors.KLOptimal(n_samples=60, texts=TEXTS, shrinkage=0.4)
    vectors = gr.build_vectors(model, pairs, recipe=recipe, layers=[0, 2])
    records = BuildingRecords(model, tokenize_pairs(model, pairs), (0, 2))
    fisher = gr.vectors.Fisher.estimate(model, [prompt_ids(model, t) for t in TEXTS], layers=[0, 2], n_samples=60)
    g = recipe.gradient.per_record(records).mean(0).double()
    for row, layer in enumerate((0, 2)):
        matrix = fisher.matrix(layer)
        shrunk = 0.6 * matrix + 0.4 * matrix.trace() / 32 * torch.eye(32, dtype=torch.float64)
        wanted = torch.linalg.solve(shrunk, g[row])
        assert torch.allclose(vectors.raw[row].double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.norm()))
        ceiling = float((2 * 0.05 * g[row] @ wanted).sqrt())
        assert vectors.info["linear_ceiling_kl_0.05"]["chosen"][row] == pytest.approx(ceiling, rel=1e-3)
    assert vectors.info["shrinkage"] == [0.4, 0.4]


def test_default_texts_leave_some_for_the_cost(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.build_vectors(bridge, pairs, recipe="kl_optimal", n_samples=22, layers=[1])
    assert "texts 13 to 30" in vectors.info["fisher_texts"] and "4 building prompts" in vectors.info["fisher_texts"]
    assert len(vectors.info["fisher"]["texts"]) == 22
    assert vectors.info["shrinkage"][0] in SHRINKAGES and len(vectors.info["held_out_gain"]) == len(SHRINKAGES)
    best = max(gains[0] for gains in vectors.info["held_out_gain"].values())
    assert vectors.info["predicted_effect_kl_0.05"][0] == pytest.approx((2 * 0.05) ** 0.5 * best)


def test_planted_direction() -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()
    vectors = gr.build_vectors(planted, pairs[:12], recipe="kl_optimal", n_samples=120, layers=[LAYER], texts=TEXTS)
    assert float(vectors.directions[0, COPY]) > 0.5


def test_file_is_reused_and_refused_for_another_model(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fisher.safetensors"
    options: dict[str, Any] = {"recipe": "kl_optimal", "n_samples": 22, "fisher": file}
    first = gr.build_vectors(bridge, pairs, layers=[0, 1], **options)
    read = gr.vectors.Fisher.load(file, bridge)
    assert read.layers == (0, 1) and read.info["scope"] == "all"
    monkeypatch.setattr(gr.vectors.Fisher, "estimate", None)  # nothing is estimated again
    assert torch.equal(gr.build_vectors(bridge, pairs, layers=[1], **options).raw[0], first.raw[1])
    with pytest.raises(ValueError, match="layers \\[0, 1\\].*\\[2\\] are missing"):
        gr.build_vectors(bridge, pairs, layers=[2], **options)
    with pytest.raises(ValueError, match="scope='all', the gradient 'last'"):
        gr.build_vectors(bridge, pairs, layers=[1], gradient=gr.vectors.MarginGradient(scope="last"), **options)
    with pytest.raises(ValueError, match="these Fisher samples are of"):
        gr.build_vectors(tiny_model(architecture="gpt2"), pairs, layers=[1], **options)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        gr.vectors.Fisher.load(file)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "no neutral texts"),
        ({"texts": ["the film"[:3], TEXTS[0]]}, "text 1.*fewer than two tokens"),
        ({"texts": TEXTS[:1]}, "at least two"),
        ({"shrinkage": 0}, "singular"),
        ({"shrinkage": 1.5}, "at most 1"),
        ({"n_samples": 0}, "n_samples"),
        ({"gradient": "sum"}, "MarginGradient"),
    ],
)
def test_refusals(bridge: Any, pairs: list[gr.PreferencePair], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.build_vectors(bridge, pairs, recipe="kl_optimal", layers=[1], **options)


def test_a_step_without_effect_is_an_error(bridge: Any, rows: list[list[int]]) -> None:
    samples = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match=r"zero at layers \[4\]"):
        gr.vectors.Fisher(samples, torch.arange(3), torch.ones(3, dtype=torch.long), (4,))
    with pytest.raises(ValueError, match="no neutral texts"):
        gr.vectors.Fisher.estimate(bridge, [], layers=[0])


def test_half_precision(pairs: list[gr.PreferencePair]) -> None:
    wanted = gr.build_vectors(tiny_model(), pairs, recipe="kl_optimal", n_samples=22, shrinkage=0.5, layers=[1])
    half = tiny_model().to(torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gr.build_vectors(half, pairs, recipe="kl_optimal", n_samples=22, shrinkage=0.5, layers=[1])
    assert float(found.cosine(wanted).min()) > 0.9


def test_costs_on_the_texts_of_f_are_pointed_out(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    built = gr.build_vectors(
        bridge, pairs, recipe="kl_optimal", n_samples=4, texts=TEXTS[:2], shrinkage=0.5, layers=[1]
    )
    vectors = gr.load_vectors(built.save(tmp_path / "v.safetensors"))
    with pytest.warns(UserWarning, match="1 of the 2 neutral texts"):
        gr.evaluate.sweep_records(bridge, {"v": vectors}, pairs, neutral=list(TEXTS[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.evaluate.sweep_records(bridge, {"v": vectors}, pairs, neutral=[TEXTS[2]])


def test_checkpoint_keeps_gradients_and_samples(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recipe": "kl_optimal", "n_samples": 6, "texts": TEXTS, "layers": [0, 1]}
    wanted = gr.build_vectors(bridge, pairs, **options)
    plain, drawn = fisher_samples.target_logits, [0]

    def dying(model: Any, batch: Any, hooks: Any) -> Any:
        drawn[0] += 1
        if drawn[0] == 2:
            raise KeyboardInterrupt
        return plain(model, batch, hooks)

    monkeypatch.setattr(fisher_samples, "target_logits", dying)
    file = tmp_path / "kl.jsonl"
    with pytest.raises(KeyboardInterrupt):
        gr.build_vectors(bridge, pairs, checkpoint=file, max_tokens=1, **options)
    found = gr.build_vectors(bridge, pairs, checkpoint=file, max_tokens=1, **options)
    assert drawn[0] == 4 and torch.allclose(found.raw, wanted.raw, rtol=1e-3)  # three texts, and the one that died
    monkeypatch.setattr(fisher_samples, "target_logits", None)  # nothing is drawn again, nor run for gradients
    monkeypatch.setattr(gradients_module, "batch_logprobs", None)
    again = gr.build_vectors(bridge, pairs, checkpoint=file, **{**options, "layers": [1]})
    assert torch.equal(again.raw[0], found.raw[1])


def test_contributions_add_up_to_the_vector(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    recipe = gr.vectors.KLOptimal(n_samples=30, texts=TEXTS)
    differences = recipe.differences(BuildingRecords(bridge, tokenize_pairs(bridge, pairs), LAYERS))
    built = gr.build_vectors(bridge, pairs, recipe=recipe, layers=LAYERS)
    assert torch.allclose(gr.vectors.reduce_vectors(differences).raw, built.raw, rtol=1e-4)
