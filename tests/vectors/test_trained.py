"""Trained vectors against plain Hugging Face passes, the closed form of a linear model, and a planted circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.inference.objectives import margins
from grains_tl.models import building as gr_models
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.vectors import training_passes as passes
from grains_tl.vectors.building import BuildingRecords
from tests.conftest import KINDS, WORDS, tiny_hf, tiny_model, tiny_tokenizer
from tests.helpers.oracles import edited, pair_logprobs, steered
from tests.helpers.planted import COPY, LAYER, planted_model, planted_pairs

TEXTS = (
    "the soup was cold but the room was warm .",
    "we liked this film and they hated it",
    "is the hotel very bad ?",
    "one two three four five six .",
)
OTHER_TEXTS = ["we hated the food but they liked it .", "this is not a very good room"]
FAST: dict[str, Any] = {"recipe": "trained", "texts": TEXTS, "n_steps": 10, "layers": [1]}


def step_of(scope: str, operator: str, v: Tensor, n_prompt: int) -> Any:
    """A step at the scope's positions of one row, written out again."""
    begin, end = {"all": (0, 99), "prompt": (0, n_prompt), "last": (n_prompt - 1, 99), "generated": (n_prompt, 99)}[
        scope
    ]

    def edit(act: Tensor) -> Tensor:
        new = steered(act, v, renorm=operator == "add_renorm")
        here = torch.zeros(act.shape[:2], dtype=torch.bool)
        here[:, begin:end] = True
        return torch.where(here[..., None], new, act)

    return edit


def hf_logprobs(hf: Any, pair: TokenizedPair, layer: int, scope: str, operator: str, v: Tensor) -> Tensor:
    with edited(hf, layer, step_of(scope, operator, v, len(pair.prompt))):
        return torch.cat(pair_logprobs(hf, pair))


@pytest.mark.parametrize("operator", ["add", "add_renorm"])
@pytest.mark.parametrize("scope", ["all", "prompt", "last", "generated"])
def test_passes_and_their_gradients_equal_plain_ones(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], scope: Any, operator: Any
) -> None:
    tokenized = tokenize_pairs(model, pairs)
    v = 0.7 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for layer in (0, 2):
        (group,) = passes.record_passes(
            model, tokenized, [layer], [range(4)], scope=scope, operator=operator, objective="sum"
        )
        own, plain = v.clone().requires_grad_(), v.clone().requires_grad_()
        found = group.logprobs(layer, own, signs)
        pairs_of = zip(tokenized, signs, strict=True)
        wanted = torch.stack([hf_logprobs(hf, t, layer, scope, operator, sign * plain) for t, sign in pairs_of])
        assert torch.allclose(found, wanted, atol=1e-4)
        for loss in ("margin", "reps", "likelihood"):
            base = group.restart.base
            g = torch.autograd.grad(passes.preference_loss(found, base, signs, loss), own, retain_graph=True)[0]
            h = torch.autograd.grad(passes.preference_loss(wanted, base, signs, loss), plain, retain_graph=True)[0]
            assert torch.allclose(g, h, atol=1e-4 * float(h.abs().max()) + 1e-7)


def test_kl_equals_a_plain_one(model: Any, hf: Any) -> None:
    rows = [prompt_ids(model, text) for text in TEXTS]
    v = 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    (group,) = passes.text_passes(model, rows, [1], scope="all", operator="add_renorm")
    total, n = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        base = hf(ids).logits[0, :-1].log_softmax(-1)
        with edited(hf, 1, lambda act: steered(act, v, renorm=True)):
            new = hf(ids).logits[0, :-1].log_softmax(-1)
        total, n = total + float((new.exp() * (new - base)).sum()), n + len(base)
    assert float(group.kl(1, v)) == pytest.approx(total / n, rel=1e-3)


def test_losses_written_out() -> None:
    """The formulas of the papers for one record, by hand."""
    base, new = torch.tensor([[-3.0, -1.0]]), torch.tensor([[-2.0, -1.5]])
    up, down = torch.ones(1), -torch.ones(1)
    log_sigmoid = torch.nn.functional.logsigmoid
    found = {
        (loss, sign): passes.preference_loss(new, base, sign, loss)
        for loss in get_args(passes.TrainingLoss)
        for sign in (up, down)
    }
    assert torch.isclose(found["margin", up], -log_sigmoid(torch.tensor(0.1 * 1.5)))
    assert torch.isclose(found["margin", down], -log_sigmoid(torch.tensor(-0.1 * 1.5)))
    assert torch.isclose(found["reps", up], -log_sigmoid(torch.tensor(2 * -2.0 - -1.5)))  # max(-1 - -3, 1) = 2
    assert torch.isclose(found["reps", down], -log_sigmoid(torch.tensor(1 * -1.5 - -2.0)))  # max(-3 - -1, 1) = 1
    assert float(found["likelihood", up]) == 2.0 and float(found["likelihood", down]) == 1.5


# -- where the answer is known ----------------------------------------------------------------------------------------


def linear_model(kind: str) -> Any:
    """Logits are linear in the residual: one huge coordinate, which no logit reads, fixes what the last norm divides by."""
    hf = tiny_hf()
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, 31] = 1000.0
        hf.lm_head.weight[:, 31] = 0
        for block in hf.model.layers:
            for reads in (
                block.self_attn.q_proj,
                block.self_attn.k_proj,
                block.self_attn.v_proj,
                block.mlp.gate_proj,
                block.mlp.up_proj,
            ):
                reads.weight[:, 31] = 0
                reads.weight *= 1000 / 32**0.5  # undoes the norm
            block.self_attn.o_proj.weight[31], block.mlp.down_proj.weight[31] = 0, 0
            block.mlp.down_proj.weight *= 0.1
        hf.model.norm.weight *= 1000 / 32**0.5
        hf.lm_head.weight *= 2
    tokenizer = tiny_tokenizer()
    gr_models.keep_tokenizer_as_is(tokenizer, "linear")
    make = gr_models.hooked_of if kind == "hooked" else gr_models.bridge_of
    return make(hf, tokenizer, "linear").eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_fisher", [False, True])
def test_reaches_the_closed_form_of_a_linear_model(kind: str, with_fisher: bool) -> None:
    """After the last block: F from full enumeration over the vocabulary, g the difference of two unembedding rows."""
    model = linear_model(kind)
    words = [("great", "awful"), ("warm", "cold")]
    pairs = [
        gr.PreferencePair(prompt=f"the {noun} was", chosen=f" {a}", rejected=f" {b}")
        for noun in ("film", "food", "hotel", "room")
        for a, b in words
    ]
    weight = 2 * tiny_hf().lm_head.weight.detach().double().clone()
    weight[:, 31] = 0
    g = torch.stack([weight[WORDS.index(a)] - weight[WORDS.index(b)] for a, b in words]).mean(0)
    matrix, n = torch.zeros(32, 32, dtype=torch.float64), 0
    for text in TEXTS:
        ids = torch.tensor([prompt_ids(model, text)])
        for p in model(ids)[0, :-1].detach().double().softmax(-1):
            matrix, n = matrix + weight.T @ (p.diag() - torch.outer(p, p)) @ weight, n + 1
    wanted = torch.linalg.pinv(matrix / n, rtol=1e-8) @ g
    options: dict[str, Any] = {"texts": TEXTS, "held_out": 0.0, "batch_size": 8, "kl": 0.002, "operator": "add"}
    if with_fisher:
        rows = [prompt_ids(model, text) for text in TEXTS]
        options["fisher"] = gr.vectors.Fisher.estimate(model, rows, layers=[2], n_samples=400)
    vectors = gr.build_vectors(
        model, pairs, recipe="trained", layers=[2], n_steps=40 if with_fisher else 150, **options
    )
    # the huge coordinate is left out: a step there does next to nothing, and costs as little
    found = vectors.raw[0, :31].double()
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(g, wanted, dim=0)) < 0.7  # the optimum is not where training starts
    assert float(cosine(found, wanted[:31], dim=0)) > 0.999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["margin", "reps", "likelihood"])
def test_recovers_a_planted_direction(kind: str, loss: Any) -> None:
    planted, pairs = planted_model(kind), planted_pairs()
    options: dict[str, Any] = {**FAST, "layers": [LAYER], "n_steps": 25}
    vectors = gr.build_vectors(planted, pairs[:12], loss=loss, batch_size=9, **options)
    assert float(vectors.directions[0, COPY]) > 0.9
    history = vectors.info["history"][0]
    assert [row["step"] for row in history] == list(range(0, vectors.info["stopped_at"][0] + 1, 5))
    assert history[-1]["loss"] <= history[1]["loss"]
    table, _ = gr.evaluate.sweep_records(planted, vectors, pairs[12:24], layers=[LAYER], alphas=[0.1, -0.1])
    effects = table.groupby("alpha")["change"].mean()
    assert effects[0.1] > 0 > effects[-0.1]


def test_loss_falls_and_the_budget_holds(model: Any, pairs: list[gr.PreferencePair]) -> None:
    found = gr.build_vectors(
        model, pairs, recipe="trained", layers=[0, 2], texts=TEXTS, held_out=0, n_steps=40, batch_size=4, kl=0.05
    )
    assert found.info["stopped_at"] == [40, 40]
    for history in found.info["history"]:
        assert history[-1]["loss"] < history[1]["loss"]
    # both signs on the same texts, measured by the package's ordinary steering with the trained length
    for layer in (0, 2):
        settings = [found.steering(sign, layer, scale="raw") for sign in (1, -1)]
        costs = gr.evaluate.text_costs(model, settings, list(TEXTS))
        kl = float((costs["kl"] * costs["n_tokens"]).sum() / costs["n_tokens"].sum())
        assert kl == pytest.approx(0.05, rel=0.3)


def test_beats_its_own_start_on_the_building_records(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """At an equal measured KL, training must do better than the gradient it starts from."""
    tokenized = tokenize_pairs(bridge, pairs)
    trained = gr.build_vectors(
        bridge, pairs, recipe="trained", layers=[1], texts=TEXTS, held_out=0, n_steps=40, batch_size=4, kl=0.1
    )
    gradient = gr.build_vectors(bridge, pairs, recipe="margin_gradient", layers=[1])

    def effect(vectors: gr.SteeringVectors) -> float:
        alphas = torch.linspace(0.02, 1.0, 50).tolist()
        costs = gr.evaluate.text_costs(bridge, [vectors.steering(a, 1) for a in alphas], list(TEXTS))
        mean = costs.groupby("alpha")[["kl"]].mean()["kl"]
        alpha = next(a for a, kl in zip(alphas, mean, strict=True) if kl >= 0.1)
        new, old = (margins(gr.score_pairs(bridge, tokenized, h)) for h in (vectors.steering(alpha, 1), None))
        return float((new - old).mean())

    assert effect(trained) > 1.1 * effect(gradient)


# -- what must not depend on anything ---------------------------------------------------------------------------------


def test_same_seed_same_vector_and_the_model_stays(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model()
    model.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, again = (gr.build_vectors(model, pairs, **FAST) for _ in range(2))
    other = gr.build_vectors(model, pairs, **FAST, seed=1)
    assert torch.equal(first.raw, again.raw) and not torch.allclose(first.raw, other.raw, atol=1e-3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_layers_do_not_depend_on_each_other(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    both = gr.build_vectors(bridge, pairs, **{**FAST, "layers": [0, 1]})
    assert torch.allclose(gr.build_vectors(bridge, pairs, **FAST).raw[0], both.raw[1], atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_mode_of_the_caller(model: Any, pairs: list[gr.PreferencePair], mode: Any) -> None:
    wanted = gr.build_vectors(model, pairs, **FAST)
    with mode():
        found = gr.build_vectors(model, pairs, **FAST)
    assert torch.allclose(found.raw, wanted.raw, atol=1e-5) and not found.directions.is_inference()


def test_resumes_where_it_was_stopped(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "training.jsonl"
    wanted = gr.build_vectors(bridge, pairs, **FAST)
    counted, kl = [0], passes.Passes.kl

    def stop_after(n: int) -> Any:
        def counting(*args: Any) -> Any:
            if torch.is_grad_enabled():
                counted[0] += 1
                if counted[0] > n:
                    raise KeyboardInterrupt
            return kl(*args)

        return counting

    monkeypatch.setattr(passes.Passes, "kl", stop_after(7))
    with pytest.raises(KeyboardInterrupt):
        gr.build_vectors(bridge, pairs, **FAST, checkpoint=file)
    with file.open("a") as torn:
        torn.write('{"key": "torn')
    counted[0] = 0
    monkeypatch.setattr(passes.Passes, "kl", stop_after(5))  # steps 6 to 10, and no more
    found = gr.build_vectors(bridge, pairs, **FAST, checkpoint=file)
    assert counted[0] == 5
    assert torch.equal(found.raw, wanted.raw) and found.info["history"] == wanted.info["history"]
    again = gr.build_vectors(bridge, pairs, **FAST, checkpoint=file)
    assert counted[0] == 5 and torch.equal(again.raw, wanted.raw)
    counted[0] = -100
    other = gr.build_vectors(bridge, pairs, **FAST, checkpoint=file, loss="likelihood")
    assert not torch.allclose(other.raw, wanted.raw)


def test_stops_early_and_keeps_the_best(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    found = gr.build_vectors(bridge, pairs, **{**FAST, "n_steps": 400, "learning_rate": 0.8})
    (stopped,), (best,), (history,) = (found.info[name] for name in ("stopped_at", "best_step", "history"))
    assert stopped < 400 and stopped == best + 20
    effects = {row["step"]: row["held_out_effect"] for row in history}
    assert effects[best] == max(effects.values()) == found.info["held_out_effect"][0]


def test_equal_prompts_stay_on_one_side() -> None:
    prompts = [(1, 2), (1, 2), (3,), (4,), (3,), (1, 2)]
    for seed in range(5):
        kept, held = gr.vectors.Trained(seed=seed, held_out=0.4).split(prompts)
        assert sorted(kept + held) == list(range(6)) and held
        assert not {prompts[i] for i in kept} & {prompts[i] for i in held}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "loss='dpo'"),
        ({"kl": 0}, "kl=0"),
        ({"kl": float("nan")}, "kl=nan"),
        ({"scope": "response"}, "scope"),
        ({"operator": "clamp"}, "operator"),
        ({"objective": "max"}, "objective"),
        ({"bidirectional": 1}, "bidirectional"),
        ({"n_steps": 0}, "n_steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"held_out": 1}, "held_out"),
        ({"seed": -1}, "seed"),
        ({"texts": []}, "no neutral texts"),
        ({"texts": TEXTS[:1]}, "1 different neutral texts"),
        ({"texts": ["the", TEXTS[0]]}, "text 1.*fewer than two tokens"),
    ],
)
def test_unknown_options(bridge: Any, pairs: list[gr.PreferencePair], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.build_vectors(bridge, pairs, **{**FAST, **options})


def test_refused_before_anything_runs(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="no records"):
        gr.build_vectors(bridge, [], **FAST)
    with pytest.raises(ValueError, match="1 different prompts"):
        gr.build_vectors(bridge, pairs[:1], **FAST)
    with pytest.raises(ValueError, match="scope='generated'.*zero"):
        gr.build_vectors(bridge, pairs[:1], **FAST, scope="generated", held_out=0)
    assert gr.build_vectors(bridge, pairs[:1], **FAST, held_out=0).layers == (1,)
    with torch.inference_mode():
        made = tiny_model()
    with pytest.raises(ValueError, match=r"inference_mode\(\)"):
        gr.build_vectors(made, pairs, **FAST)


@pytest.mark.parametrize("recipe", ["trained", "margin_gradient", "kl_optimal"])
def test_weights_that_only_run_forward_are_refused(pairs: list[gr.PreferencePair], recipe: str) -> None:
    model = tiny_model()

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark_non_differentiable(y := x.clone())
            return y

    # as the kernels of quantised layers do
    handle = model.original_model.model.layers[2].register_forward_hook(lambda *a: Forward.apply(a[-1]))
    with pytest.raises(ValueError, match="no gradient passes.*'caa'"):
        gr.build_vectors(model, pairs, recipe=recipe, layers=[1])
    handle.remove()


def test_overflow_is_an_error(pairs: list[gr.PreferencePair]) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.original_model.lm_head.weight *= float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        gr.build_vectors(broken, pairs, **FAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_the_same(pairs: list[gr.PreferencePair], dtype: torch.dtype) -> None:
    wanted = gr.build_vectors(tiny_model(), pairs, **FAST, held_out=0)
    found = gr.build_vectors(tiny_model().to(dtype), pairs, **FAST, held_out=0)
    assert found.directions.dtype == torch.float32 and float(found.cosine(wanted)) > 0.9


def test_in_a_search(pairs: list[gr.PreferencePair]) -> None:
    planted = planted_model("bridge")
    recipe = gr.vectors.Trained(n_steps=5, texts=TEXTS)
    found = gr.find_vector(planted, planted_pairs(), [recipe, "caa"], layers=[LAYER], neutral=OTHER_TEXTS, n_examples=0)
    assert set(found.table["recipe"]) == {"trained", "caa"}


def test_records_of_one_side_of_a_build(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    records = BuildingRecords(bridge, tokenize_pairs(bridge, pairs), (1,))
    with pytest.raises(ValueError, match="Fisher samples are of layers"):
        gr.vectors.Trained(
            fisher=gr.vectors.Fisher.estimate(bridge, [[3, 4, 5], [5, 6, 7]], layers=[0], n_samples=4)
        ).check(records)
