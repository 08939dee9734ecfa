"""The gradient recipe against plain Hugging Face gradients, finite differences of steering itself, and a known circuit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.inference.objectives import margins
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.vectors import gradients as module
from grains_tl.vectors.building import BuildingRecords
from tests.conftest import KINDS, tiny_model
from tests.helpers.oracles import edited, margin
from tests.helpers.planted import COPY, LAYER, planted_model, planted_pairs

SCOPES = ["all", "prompt", "last", "generated"]
LAYERS = (0, 1, 2)


def building(model: Any, pairs: list[gr.PreferencePair], layers: tuple[int, ...] = LAYERS) -> BuildingRecords:
    return BuildingRecords(model, tokenize_pairs(model, pairs), layers)


def hf_gradient(hf: Any, pair: TokenizedPair, layer: int, scope: str, objective: str, renorm: bool = False) -> Tensor:
    """df/dv at v = 0 from one plain run per response."""
    v = torch.zeros(hf.config.hidden_size, requires_grad=True)
    n = len(pair.prompt)
    begin, end = {"all": (0, 99), "prompt": (0, n), "last": (n - 1, 99), "generated": (n, 99)}[scope]

    def edit(act: Tensor) -> Tensor:
        step = torch.zeros_like(act)
        step[:, begin:end] = 1
        moved = act + step * v
        return moved / moved.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True) if renorm else moved

    with torch.enable_grad(), edited(hf, layer, edit):
        found = torch.autograd.grad(margin(hf, pair, objective).sum(), v, allow_unused=True)[0]
    assert found is not None
    return found


@pytest.mark.parametrize("objective", ["sum", "mean"])
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_a_plain_hugging_face_gradient(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], scope: Any, objective: Any
) -> None:
    records = building(model, pairs)
    found = gr.vectors.MarginGradient(scope=scope, objective=objective).per_record(records)
    for i, pair in enumerate(records.tokenized):
        for layer in LAYERS:
            wanted = hf_gradient(hf, pair, layer, scope, objective)
            assert torch.allclose(found[i, layer], wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-5)


def test_without_the_part_along_the_residual(model: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    records = building(model, pairs)
    found = gr.vectors.MarginGradient(operator="add_renorm").per_record(records)
    for i, pair in enumerate(records.tokenized):
        for layer in LAYERS:
            wanted = hf_gradient(hf, pair, layer, "all", "sum", renorm=True)
            assert torch.allclose(found[i, layer], wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-5)


@pytest.mark.parametrize("operator", ["add", "add_renorm"])
@pytest.mark.parametrize("scope", SCOPES)
def test_predicts_what_small_steering_does(
    model: Any, pairs: list[gr.PreferencePair], scope: Any, operator: Any
) -> None:
    """Finite differences of the margin under the package's steering with the same scope and operator."""
    records = building(model, pairs)
    gradients = gr.vectors.MarginGradient(scope=scope, operator=operator).per_record(records)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    for layer in LAYERS:

        def steered(amount: float, layer: int = layer) -> Tensor:
            def hooks(batch: Any) -> Any:
                return gr.hooks.steer_hook(
                    layer, direction, amount, operator=operator, positions=scope, prompt_len=batch.prompt_len
                )

            return margins(gr.inference.score_pairs(model, records.tokenized, hooks))

        slope = (steered(0.01) - steered(-0.01)) / 0.02
        assert torch.allclose(gradients[:, layer] @ direction, slope, atol=2e-2 * float(slope.abs().max()) + 1e-3)


def test_vectors(model: Any, pairs: list[gr.PreferencePair]) -> None:
    records = building(model, pairs, (0, 2))
    each = gr.vectors.MarginGradient().per_record(records)
    vectors = gr.build_vectors(model, pairs, recipe="margin_gradient", layers=[0, 2])
    assert vectors.layers == (0, 2)
    assert torch.allclose(vectors.raw, each.mean(0), atol=1e-6)
    assert torch.allclose(vectors.resid_norms, records.resid_norms)
    assert vectors.info["method"] == "margin_gradient" and vectors.info["scope"] == "all"
    units = torch.nn.functional.normalize(each, dim=-1)
    cosines = torch.stack([(units[i] * units[j]).sum(-1) for i in range(4) for j in range(i)]).mean(0)
    assert torch.allclose(torch.tensor(vectors.info["mean_cosine"]), cosines, atol=1e-3)


def test_reductions(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    each = gr.vectors.MarginGradient().per_record(building(bridge, pairs, (1,)))
    units = torch.nn.functional.normalize(each, dim=-1)
    built = {
        (how, unit): gr.build_vectors(bridge, pairs, recipe="margin_gradient", reduce=how, normalize=unit, layers=[1])
        for how in ("mean", "median", "svd")
        for unit in (False, True)
    }
    for unit, data in ((False, each), (True, units)):
        assert torch.allclose(built["mean", unit].raw, data.mean(0), atol=1e-5)
        assert torch.allclose(built["median", unit].raw, data.sort(0).values[1:3].mean(0), atol=1e-5)  # of four
        eigen = torch.linalg.eigh(data[:, 0].double().T @ data[:, 0].double()).eigenvectors[:, -1].float()
        svd = built["svd", unit].directions[0]
        assert abs(float(svd @ eigen)) > 0.9999 and float(svd @ data.mean((0, 1))) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_recovers_a_planted_direction(kind: str) -> None:
    """After the copying head, only one axis of the residual says great or awful; before it, the gradient reads the mood."""
    planted, pairs = planted_model(kind), planted_pairs()
    vectors = gr.build_vectors(planted, pairs[:12], recipe="margin_gradient", layers=[LAYER, 2])
    for direction in vectors.directions:
        assert int(direction.abs().argmax()) == COPY and float(direction[COPY]) > 0.8
    table, _ = gr.evaluate.sweep_records(planted, vectors, pairs[12:24], layers=[LAYER], alphas=[0.1, -0.1])
    effects = table.groupby("alpha")["change"].min(), table.groupby("alpha")["change"].max()
    assert effects[0][0.1] > 0 > effects[1][-0.1]


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
@pytest.mark.parametrize("shared", [True, False])
def test_does_not_depend_on_batches(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch, max_tokens: int, shared: bool
) -> None:
    records = building(bridge, pairs)
    alone = torch.cat([gr.vectors.MarginGradient(scope="last").per_record(building(bridge, [p])) for p in pairs])
    monkeypatch.setattr(module, "shares_prompts", lambda *args: shared)
    with gr.settings(max_tokens=max_tokens):
        found = gr.vectors.MarginGradient(scope="last").per_record(records)
    assert torch.allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_mode_of_the_caller(model: Any, pairs: list[gr.PreferencePair], mode: Any) -> None:
    wanted = gr.build_vectors(model, pairs, recipe="margin_gradient").raw
    with mode():
        found = gr.build_vectors(model, pairs, recipe="margin_gradient")
    assert torch.allclose(found.raw, wanted, atol=1e-5)
    assert not found.directions.is_inference()


def test_weights_that_take_gradients_get_none(pairs: list[gr.PreferencePair]) -> None:
    free, frozen = tiny_model(), tiny_model()
    free.requires_grad_(True)
    found = gr.build_vectors(free, pairs, recipe="margin_gradient").raw
    assert torch.allclose(found, gr.build_vectors(frozen, pairs, recipe="margin_gradient").raw, atol=1e-5)
    assert all(p.grad is None for p in free.parameters())
    assert not any(point._forward_hooks for point in free.hook_dict.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_direction(pairs: list[gr.PreferencePair], dtype: torch.dtype) -> None:
    wanted = gr.build_vectors(tiny_model(), pairs, recipe="margin_gradient")
    found = gr.build_vectors(tiny_model().to(dtype), pairs, recipe="margin_gradient")
    assert found.directions.dtype == torch.float32
    assert float(found.cosine(wanted).min()) > 0.98


def test_overflow_is_an_error(pairs: list[gr.PreferencePair]) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.original_model.lm_head.weight *= float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        gr.vectors.MarginGradient().per_record(building(broken, pairs))


def test_nothing_to_learn_is_an_error(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="no records"):
        gr.build_vectors(bridge, [], recipe="margin_gradient")
    with pytest.raises(ValueError, match="scope='generated'.*zero"):
        gr.build_vectors(bridge, pairs[:1], recipe="margin_gradient", scope="generated")
    started = gr.PreferencePair(prompt="the film was", chosen=" good", rejected=" good and cold")
    with pytest.raises(ValueError, match="record 2"):
        gr.build_vectors(bridge, [pairs[0], started], recipe="margin_gradient", objective="single")


@pytest.mark.parametrize(
    "option",
    [{"scope": "response"}, {"reduce": "pca"}, {"objective": "max"}, {"normalize": 1}, {"operator": "clamp"}],
)
@pytest.mark.usefixtures("unchecked")
def test_unknown_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        gr.vectors.MarginGradient(**option)


def test_weights_of_inference_mode_are_refused(pairs: list[gr.PreferencePair]) -> None:
    with torch.inference_mode():
        made = tiny_model()
    with pytest.raises(ValueError, match=r"inference_mode\(\)"):
        gr.build_vectors(made, pairs, recipe="margin_gradient")


def test_warns_of_letters_in_unequal_numbers(bridge: Any) -> None:
    def answers(*chosen: str) -> list[gr.PreferencePair]:
        prompts = ("was the film good ?", "was the food cold ?", "was the room bad ?")
        other = {" yes": " no", " no": " yes"}
        return [gr.PreferencePair(prompt=p, chosen=c, rejected=other[c]) for p, c in zip(prompts, chosen, strict=False)]

    with pytest.warns(UserWarning, match="'yes' 2 times chosen, 1 rejected"):
        gr.build_vectors(bridge, answers(" yes", " yes", " no"), recipe="margin_gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.build_vectors(bridge, answers(" yes", " no"), recipe="margin_gradient")
        gr.build_vectors(bridge, answers(" yes", " yes"), recipe="margin_gradient")  # one side only: what is asked for


def test_oracle_is_not_constant(hf: Any, bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """The plain gradient differs between scopes, so that agreeing with it means something."""
    pair = tokenize_pairs(bridge, pairs)[1]
    found = [hf_gradient(hf, pair, 1, scope, "sum") for scope in SCOPES]
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(found) for b in found[:i])


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the records whose gradients are computed."""
    counted = [0]
    plain = module.batch_logprobs

    def counting(model: Any, batch: Any, hooks: Any) -> Any:
        counted[0] += batch.n_records
        return plain(model, batch, hooks)

    monkeypatch.setattr(module, "batch_logprobs", counting)
    return counted


def test_finished_records_come_from_the_checkpoint(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, counted = tmp_path / "gradients.jsonl", count_passes(monkeypatch)
    wanted = gr.build_vectors(bridge, pairs, recipe="margin_gradient").raw
    counted[0] = 0
    options: dict[str, Any] = {"recipe": "margin_gradient", "checkpoint": file}
    gr.build_vectors(bridge, pairs[:2], **options)
    with file.open("a") as torn:
        torn.write('{"key": "torn')
    assert torch.equal(gr.build_vectors(bridge, pairs, **options).raw, wanted)
    assert counted[0] == 4  # two records each time
    again = gr.build_vectors(bridge, pairs, layers=[2, 0], normalize=True, reduce="median", **options)
    assert counted[0] == 4 and again.layers == (0, 2)
    gr.build_vectors(bridge, pairs, scope="last", **options)
    assert counted[0] == 8
    gr.build_vectors(tiny_model(architecture="gpt2"), pairs, **options)
    assert counted[0] == 12
    lines = file.read_text().splitlines()
    damaged = [line.replace('"shape": [3, 32]', '"shape": [3, 31]') for line in lines]
    file.write_text("\n".join(damaged) + "\n")
    assert torch.equal(gr.build_vectors(bridge, pairs, **options).raw, wanted) and counted[0] == 16


def test_a_run_that_dies_keeps_what_it_had(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, plain = tmp_path / "gradients.jsonl", module.batch_logprobs
    runs = [0]

    def dying(*args: Any) -> Any:
        runs[0] += 1
        if runs[0] == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(module, "batch_logprobs", dying)
    options: dict[str, Any] = {"recipe": "margin_gradient", "checkpoint": file, "max_tokens": 1}
    with pytest.raises(KeyboardInterrupt):
        gr.build_vectors(bridge, pairs, **options)
    found = gr.build_vectors(bridge, pairs, **options)
    assert runs[0] == 5  # records 1 and 2, the one that died, 3 and 4
    assert torch.equal(found.raw, gr.build_vectors(bridge, pairs, recipe="margin_gradient", max_tokens=1).raw)


def test_one_file_serves_grains_and_gradients(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    for _ in range(2):
        for recipe in ("grains", "margin_gradient"):
            found = gr.build_vectors(bridge, pairs, recipe=recipe, layers=[1], checkpoint=file)
            assert torch.equal(found.raw, gr.build_vectors(bridge, pairs, recipe=recipe, layers=[1]).raw)
    assert len(file.read_text().splitlines()) == 8


@pytest.mark.parametrize("normalize", [False, True])
def test_contributions_serve_a_bootstrap_without_another_pass(
    bridge: Any, pairs: list[gr.PreferencePair], normalize: bool
) -> None:
    recipe = gr.vectors.MarginGradient(normalize=normalize)
    differences = recipe.differences(building(bridge, pairs))
    assert torch.allclose(
        gr.vectors.reduce_vectors(differences).raw, gr.build_vectors(bridge, pairs, recipe=recipe).raw
    )
    some = gr.vectors.reduce_vectors(differences.subset([0, 2]))
    assert torch.allclose(some.raw, gr.build_vectors(bridge, [pairs[0], pairs[2]], recipe=recipe).raw, atol=1e-5)
    assert len(gr.baselines.bootstrap_vectors(differences, n_draws=3)) == 3
