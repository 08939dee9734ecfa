"""Variants in which attribution says where to look: against plain Hugging Face runs, and against their random control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.vectors.building import BuildingRecords
from tests.helpers.oracles import edited, embeddings, margin, residuals

LAYERS = (0, 2)
TEXTS = ("the soup was cold but the room was warm .", "we liked this film and they hated it")


@pytest.fixture
def records(model: Any, pairs: list[gr.PreferencePair]) -> BuildingRecords:
    return BuildingRecords(model, tokenize_pairs(model, pairs), LAYERS)


def grains(**options: Any) -> gr.vectors.Grains:
    return gr.vectors.Grains.of(top_k=2, **options)


def test_gradient_at_the_attributed_tokens_alone(hf: Any, records: BuildingRecords) -> None:
    tokens = grains()
    selections = tokens.select(tokens.attribute(records))
    found = gr.vectors.MarginGradient(tokens=tokens).per_record(records)
    for i, (pair, own) in enumerate(zip(records.tokenized, selections, strict=True)):
        places = sorted({*own.toward_chosen, *own.toward_rejected})
        assert places and max(places) < len(pair.prompt)
        for row, layer in enumerate(LAYERS):
            v = torch.zeros(32, requires_grad=True)

            def edit(act: Tensor, v: Tensor = v, places: list[int] = places) -> Tensor:
                here = torch.zeros(act.shape[1], 1)
                here[places] = 1
                return act + here * v

            with torch.enable_grad(), edited(hf, layer, edit):
                wanted = torch.autograd.grad(margin(hf, pair).sum(), v)[0]
            assert torch.allclose(found[i, row], wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-5)


def test_differences_read_at_the_attributed_tokens(hf: Any, records: BuildingRecords) -> None:
    recipe = gr.vectors.Grains.of(top_k=2, readout="attributed", reduce="svd")
    selections = recipe.select(recipe.attribute(records))
    found = recipe.differences(records, selections)
    mean = hf.get_input_embeddings().weight.mean(0)
    for i, (pair, own) in enumerate(zip(records.tokenized, selections, strict=True)):
        whole = residuals(hf, pair.prompt)[list(LAYERS)]
        for side in ("toward_chosen", "toward_rejected"):
            places = list(getattr(own, side))
            masked = embeddings(hf, pair.prompt).detach().clone()
            masked[0, places] = mean
            change = (whole - residuals(hf, pair.prompt, masked)[list(LAYERS)])[:, places]
            wanted = change.mean(1) if places else torch.zeros(2, 32)
            assert torch.allclose(getattr(found, side)[i], wanted, atol=1e-4)


@pytest.mark.parametrize("option", [{"readout": "attributed"}, {"weighted": True}, {"without_common": True}, {}])
def test_random_tokens_by_the_same_call(records: BuildingRecords, option: dict[str, Any]) -> None:
    built = {seed: grains(random=seed, **option).build(records) for seed in (None, 0, 1)}
    assert torch.equal(grains(random=0, **option).build(records).raw, built[0].raw)
    assert not torch.allclose(built[0].raw, built[1].raw) and not torch.allclose(built[0].raw, built[None].raw)
    attributed, drawn = grains(**option), grains(random=0, **option)
    scores = attributed.attribute(records)
    for a, b, t in zip(attributed.select(scores), drawn.select(scores), records.tokenized, strict=True):
        assert len(a.toward_chosen) == len(b.toward_chosen) and len(a.toward_rejected) == len(b.toward_rejected)
        assert all(t.content[p] for p in (*b.toward_chosen, *b.toward_rejected))
    assert built[0].info["random"] == 0 and "random" not in built[None].info


def test_gradient_at_random_tokens(records: BuildingRecords) -> None:
    attributed = gr.vectors.MarginGradient(tokens=grains())
    drawn = [gr.vectors.MarginGradient(tokens=grains(random=seed)) for seed in (0, 0, 1)]
    a, b, c, d = (r.per_record(records) for r in (attributed, *drawn))
    assert torch.equal(b, c) and not torch.allclose(b, d) and not torch.allclose(a, b)
    assert drawn[0].build(records).info["tokens"]["random"] == 0
    assert attributed.name != drawn[0].name
    assert gr.vectors.KLOptimal(drawn[0]).name == "kl_optimal at random tokens"


def test_checkpoint_tells_tokens_apart(model: Any, pairs: list[gr.PreferencePair], tmp_path: Any) -> None:
    for recipe in (grains(), grains(random=0), None):
        gradient = gr.vectors.MarginGradient(tokens=recipe)
        options: dict[str, Any] = {"recipe": gradient, "layers": [1]}
        found = gr.build_vectors(model, pairs, checkpoint=tmp_path / "c.jsonl", **options)
        assert torch.allclose(found.raw, gr.build_vectors(model, pairs, **options).raw)


def test_weights_are_the_scores_of_the_masked_tokens(records: BuildingRecords) -> None:
    plain, weighted = grains(reduce="svd"), grains(weighted=True)
    scores = plain.attribute(records)
    selections = plain.select(scores)
    found = plain.differences(records, selections)
    mean: Tensor = torch.zeros(2, 32)
    for side, sign in (("toward_chosen", 1), ("toward_rejected", -1)):
        sums = [abs(sum(float(a.scores[p]) for p in getattr(s, side))) for a, s in zip(scores, selections, strict=True)]
        each = zip(sums, getattr(found, side), strict=True)
        mean = mean + sign * sum((w * d for w, d in each), torch.zeros(2, 32)) / sum(sums)
    assert torch.allclose(weighted.build(records).raw, mean, atol=1e-4)


def test_what_masking_does_in_general_is_taken_out(records: BuildingRecords) -> None:
    recipe = grains(reduce="svd")
    found = recipe.differences(records, recipe.select(recipe.attribute(records)))
    common = (found.toward_chosen + found.toward_rejected).mean(0)
    plain, without = grains().build(records), grains(without_common=True).build(records)
    assert float((plain.raw * common).sum(-1).abs().min()) > 1e-2
    assert float((without.raw * common).sum(-1).abs().max()) < 1e-4
    left = plain.raw - without.raw  # what went is along the common direction
    assert torch.allclose(torch.nn.functional.cosine_similarity(left, common, dim=-1).abs(), torch.ones(2), atol=1e-4)


def test_whitened_by_fisher_samples(model: Any, records: BuildingRecords, tmp_path: Any) -> None:
    rows = [prompt_ids(model, text) for text in TEXTS]
    fisher = gr.vectors.Fisher.estimate(model, rows, layers=LAYERS, n_samples=80)
    plain = grains().build(records)
    for given in (fisher, fisher.save(tmp_path / "f.safetensors")):
        found = grains(fisher=given, shrinkage=0.3).build(records)
        for row, layer in enumerate(LAYERS):
            matrix = fisher.matrix(layer)
            shrunk = 0.7 * matrix + 0.3 * matrix.trace() / 32 * torch.eye(32, dtype=torch.float64)
            wanted = torch.linalg.solve(shrunk, plain.raw[row].double()).float()
            assert torch.allclose(found.raw[row], wanted, rtol=1e-3, atol=1e-3 * float(wanted.norm()))
    with pytest.warns(UserWarning, match="2 of the 2 neutral texts"):
        gr.evaluate.text_costs(model, [found.steering(0.1, 0)], list(TEXTS))


@pytest.mark.usefixtures("unchecked")
def test_refusals(model: Any, pairs: list[gr.PreferencePair], tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="estimate the samples first"):
        gr.build_vectors(model, pairs, top_k=1, fisher=tmp_path / "none.safetensors")
    for option in ({"random": -1}, {"weighted": 1}, {"without_common": "yes"}, {"shrinkage": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            gr.build_vectors(model, pairs, top_k=1, **option)
    with pytest.raises(ValueError, match="tokens of the prompt"):
        gr.vectors.MarginGradient(tokens=grains(), scope="generated")
    with pytest.raises(ValueError, match="content tokens"):
        tokens = gr.vectors.Grains.of(top_k=50)
        gr.build_vectors(model, pairs, recipe=gr.vectors.MarginGradient(tokens=tokens))
    with pytest.raises(ValueError, match="places"):
        gr.vectors.read_out(model, pairs, layers=[0], readout="attributed")


def test_an_option_of_its_own_overrides_the_budget_value() -> None:
    budget = gr.attribution.TopK(2, spare_end=True)
    Grains = gr.vectors.Grains
    assert not Grains.of(top_k=budget, spare_end=False).top_k.spare_end
    assert Grains.of(top_k=budget).top_k.spare_end and Grains.of(top_k=2, spare_end=True).top_k.spare_end
