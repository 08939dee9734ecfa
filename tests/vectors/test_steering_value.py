"""Steering as a value: the effect of plain hooks wherever it is used, its key, its gate, vectors without direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl._util.files import hash_of
from tests.helpers.oracles import edited, pair_logprobs, steered

ATOL = 1e-4  # nats, float32 round-off
SCOPES: list[Any] = ["all", "prompt", "generated", "last"]


def vectors(n_layers: int = 3, d_model: int = 32, **info: Any) -> gr.SteeringVectors:
    raw = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(n_layers), torch.full((n_layers,), 20.0), info)


def scope_mask(positions: str, n: int, prompt: int) -> Tensor:
    place = torch.arange(n)
    return {
        "all": place >= 0, "prompt": place < prompt, "generated": place >= prompt, "last": place >= prompt - 1,
    }[positions]  # fmt: skip


# -- the same effect everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCOPES)
def test_scores_are_those_of_plain_hooks(model: Any, hf: Any, pairs: Any, positions: Any) -> None:
    v = vectors()
    steering = v.steering(0.4, 1, positions=positions)
    found = gr.score_pairs(model, pairs, steering)
    step = 0.4 * 20.0 * v.directions[1]
    for row, t in zip(found.tolist(), gr.tokens.tokenize_pairs(model, pairs), strict=True):

        def edit(act: Tensor, n: int = len(t.prompt)) -> Tensor:
            where = scope_mask(positions, act.shape[1], n)
            return torch.where(where[None, :, None], steered(act, step, renorm=True), act)

        with torch.no_grad(), edited(hf, 1, edit):
            wanted = [float(x) for x in pair_logprobs(hf, t)]
        assert row == pytest.approx(wanted, abs=ATOL)


@pytest.mark.parametrize("positions", SCOPES)
def test_sweeps_costs_and_choices_take_it(model: Any, pairs: Any, positions: Any) -> None:
    steering = vectors().steering(0.4, 1, positions=positions)
    frame = gr.evaluate.record_effects(model, pairs, [steering])
    whole = gr.score_pairs(model, pairs, steering)
    np.testing.assert_allclose(frame["margin"], (whole[:, 0] - whole[:, 1]).numpy(), atol=ATOL)
    assert frame["positions"].unique().tolist() == [positions] and frame["alpha"].unique().tolist() == [0.4]
    _, one = gr.evaluate.measure(model, pairs, [steering])
    torch.testing.assert_close(one[0], whole, atol=ATOL, rtol=0)
    items = [gr.MultipleChoice(p.prompt, (p.chosen, p.rejected), (True, False)) for p in pairs]
    choices = gr.inference.score_choices(model, items, steering)
    torch.testing.assert_close(choices, whole, atol=ATOL, rtol=0)
    kl = gr.evaluate.next_token_kl(model, pairs, steering)
    assert (kl.max() < 1e-5) if positions == "generated" else bool((kl > 1e-3).all())
    costs = gr.evaluate.text_costs(model, [steering], ["the film was good and we liked it"])
    assert costs["kl"].item() > 1e-3


@pytest.mark.parametrize("positions", SCOPES)
def test_generation_knows_where_the_prompts_end(model: Any, positions: Any) -> None:
    v, prompts = vectors(), ["the film was", "the food in this hotel was very"]
    steering = v.steering(0.9, 1, positions=positions)
    wanted = gr.generate(model, prompts, lambda n: v.hooks(0.9, [1], positions=positions, prompt_len=n))
    assert gr.generate(model, prompts, steering) == wanted
    assert gr.generate(model, prompts, steering, batch_size=1) == wanted
    assert (wanted == gr.generate(model, prompts)) is False


def test_patching_and_token_scores_take_it(bridge: Any, pairs: Any) -> None:
    steering = vectors().steering(0.4, 1)
    frame = gr.analysis.patch(bridge, pairs, steering)
    plain = gr.analysis.patch(bridge, pairs, steering.hooks())
    np.testing.assert_allclose(frame["effect"], plain["effect"], atol=ATOL)
    tokens = gr.inference.response_logprobs(bridge, pairs[1].prompt, pairs[1].chosen, steering)
    assert tokens["after"].sum() == pytest.approx(gr.score_pairs(bridge, pairs, steering)[1, 0].item(), abs=ATOL)


@pytest.mark.usefixtures("unchecked")
def test_a_run_that_does_not_know_the_prompt_is_refused(bridge: Any) -> None:
    ids = torch.tensor([[5, 8, 12]])
    v = vectors()
    from grains_tl.models.running import forward_logits

    with pytest.raises(ValueError, match="for_prompt"):
        forward_logits(bridge, ids, torch.ones_like(ids), torch.tensor([2]), v.steering(0.2, 1, positions="generated"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SteeringVectors is not a list of hooks"):
        gr.generate(bridge, ["the film was"], v)  # type: ignore[arg-type]


def test_applied_steers_the_block_and_leaves_no_trace(model: Any) -> None:
    ids, v = torch.tensor([[5, 8, 12, 9]]), vectors()
    steering = v.steering(0.4, [0, 2])
    with torch.no_grad():
        base = model(ids)
        wanted = model.run_with_hooks(ids, fwd_hooks=v.hooks(0.4, [0, 2]))
        with steering.applied(model) as inside:
            assert inside is model
            torch.testing.assert_close(model(ids), wanted)
            assert gr.generate(model, ["the film was"]) == gr.generate(model, ["the film was"])
            torch.testing.assert_close(model(ids), wanted)  # hooks inside did not take it off
        assert torch.equal(model(ids), base)
        with pytest.raises(RuntimeError, match="stop"), steering.applied(model):
            raise RuntimeError("stop")
        assert torch.equal(model(ids), base)


def test_applied_refuses_what_hooks_refuse(bridge: Any) -> None:
    with pytest.raises(KeyError, match="blocks.7"), vectors(8).steering(0.2, 7).applied(bridge):
        pass


def test_the_adapter_needs_no_second_list(bridge: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    steering = vectors().steering(0.9, 1, positions="generated")
    request = Instance("generate_until", {}, ("the film was", {"max_gen_toks": 5, "until": []}), 0)
    assert gr.evaluate.harness.adapter(bridge, steering).generate_until([request]) == gr.generate(
        bridge, "the film was", steering, max_new_tokens=5
    )


# -- the value --------------------------------------------------------------------------------------------------------


def test_key_of_one_layer_is_that_of_existing_checkpoints() -> None:
    v = vectors()
    steering = v.steering(0.2, 1, positions="last", operator="add")
    assert steering.key == hash_of([[v.directions[1].tolist(), 20.0], 0.2, 1, "add", "last"])
    assert gr.evaluate.grid(v, [1], [0.2], positions="last", operator="add")[0].key == steering.key


def test_keys_tell_apart_whatever_the_hooks_do() -> None:
    v, probe = vectors(), torch.ones(32)
    gate = gr.hooks.ThresholdGate(probe, 1.0)
    several = [
        v.steering(0.2, 1), v.steering(0.3, 1), v.steering(0.2, 2), v.steering(0.2, [1, 2]), v.steering(0.2, [0, 1]),
        v.steering(0.2, 1, operator="add"), v.steering(0.2, 1, positions="last"), v.steering(0.2, 1, scale="raw"),
        v.steering(0.2, 1, gate=gate), v.steering(0.2, 1, gate=gr.hooks.ThresholdGate(probe, 2.0)), (-v).steering(0.2, 1),
        v.steering(0.2, 1, positions=torch.ones(1, 4, dtype=torch.bool)), v.steering(0.2, 1, gate=torch.tensor([True])),
    ]  # fmt: skip
    assert len({s.key for s in several}) == len(several)
    assert v.steering(0.2, 1, gate=gr.hooks.ThresholdGate(probe.clone(), 1.0)).key == several[8].key
    assert v.steering(0.2, 1, gate=lambda act: act[..., 0] > 0).key == ""


def test_labels() -> None:
    v = vectors(method="caa")
    assert v.steering(-0.2, 1).label == "caa, alpha -0.2, layer 1"
    full = v.steering(0.5, [0, 2], operator="add", positions="last", gate=torch.tensor([True]))
    assert str(full) == "caa, alpha +0.5, layers 0, 2, add, last, gated"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": float("nan")}, "alpha"), ({"layers": []}, "no layers"), ({"layers": [1, 1]}, "twice"),
        ({"layers": None}, "name the layers"), ({"layers": 9}, "no vector for layer 9"), ({"layers": "1"}, "layers"),
        ({"operator": "push"}, "push"), ({"positions": "end"}, "end"), ({"positions": [1, 2]}, "boolean"),
        ({"gate": 0.5}, "gate"), ({"gate": torch.ones(2)}, "gate"), ({"scale": "metres"}, "metres"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vectors().steering(**{"alpha": 0.2, "layers": 1, **options})


def test_a_choice_steers_with_all_of_its_options(bridge: Any, pairs: Any) -> None:
    v = vectors()
    frame = gr.sweep(bridge, {"a": v, "b": -v}, pairs, layers=[1], alphas=[0.3], positions="last", operator="add")
    choice = gr.choose(frame)
    steering = choice.steering({"a": v, "b": -v})
    assert (steering.operator, steering.positions, steering.alpha, steering.layers) == ("add", "last", 0.3, (1,))
    margins = gr.score_pairs(bridge, pairs, steering) @ torch.tensor([1.0, -1.0])
    row = frame[frame["vector"] == choice.vector].iloc[0]
    assert margins.mean().item() == pytest.approx(row["margin"], abs=ATOL)
    assert choice.steering(v).key == v.steering(0.3, 1, operator="add", positions="last").key
    with pytest.raises(ValueError, match="no vector"):
        choice.steering({"other": v})


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_opens_where_the_probe_exceeds_the_threshold() -> None:
    act = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    v, probe = vectors(), torch.linspace(-1, 1, 32)
    gate = gr.hooks.ThresholdGate(probe, 0.5)
    ((_, fn),) = v.hooks(0.4, 1, operator="add", gate=gate)
    expected = act.clone()
    for row in range(2):
        for pos in range(5):
            if sum(a * p for a, p in zip(act[row, pos].tolist(), probe.tolist(), strict=True)) > 0.5:
                expected[row, pos] += 8.0 * v.directions[1]
    torch.testing.assert_close(fn(act, hook=None), expected)
    assert not torch.equal(expected, act)


def test_gates_by_row_by_position_and_with_a_scope() -> None:
    act, v = torch.ones(2, 4, 32), vectors()
    rows = torch.tensor([True, False])
    where = torch.tensor([[True, False, True, False], [False, False, False, True]])
    for gate, wanted in (
        (rows, rows[:, None].expand(2, 4)),
        (where, where),
        (lambda a: rows, rows[:, None].expand(2, 4)),
    ):
        ((_, fn),) = v.hooks(0.4, 1, operator="add", gate=gate)  # type: ignore[arg-type]
        assert torch.equal((fn(act, hook=None) != act).any(-1), wanted)
    ((_, fn),) = v.hooks(0.4, 1, operator="add", positions="generated", prompt_len=2, gate=where)
    assert torch.equal((fn(act, hook=None) != act).any(-1), where & (torch.arange(4) >= 2))
    step = act[:, :1]  # a decoding step: a mask of the prompt's positions says nothing about it, a row's gate does
    ((_, fn),) = v.hooks(0.4, 1, gate=where)
    assert torch.equal(fn(step, hook=None), step)
    ((_, fn),) = v.hooks(0.4, 1, gate=rows)
    assert (fn(step, hook=None) != step).any(-1)[:, 0].tolist() == [True, False]


def test_a_gate_that_is_shut_changes_no_bit(bridge: Any, pairs: Any) -> None:
    v = vectors()
    shut, wide = (gr.hooks.ThresholdGate(torch.ones(32), t) for t in (1e9, -1e9))
    assert torch.equal(gr.score_pairs(bridge, pairs, v.steering(9.0, 1, gate=shut)), gr.score_pairs(bridge, pairs))
    torch.testing.assert_close(
        gr.score_pairs(bridge, pairs, v.steering(0.4, 1, gate=wide)), gr.score_pairs(bridge, pairs, v.steering(0.4, 1))
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "gate", [torch.ones(3, dtype=torch.bool), lambda a: a[..., 0], lambda a: True, lambda a: a > 0]
)
def test_a_gate_that_does_not_fit_is_refused_in_the_run(gate: Any) -> None:
    ((_, fn),) = vectors().hooks(0.4, 1, gate=gate)
    with pytest.raises(ValueError, match="gate gave"):
        fn(torch.ones(2, 4, 32), hook=None)


# -- the obvious calls ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_layers_in_every_spelling() -> None:
    v = vectors()
    for layers in (2, [2], (2,), range(2, 3), np.int64(2), np.array([2]), torch.tensor(2), torch.tensor([2]), -1, [-1]):
        assert [name for name, _ in v.hooks(0.2, layers)] == ["blocks.2.hook_resid_post"]  # type: ignore[arg-type]
        assert v[layers].layers == (2,) == v.at(layers).layers  # type: ignore[index,arg-type]
    assert len(v) == 3 and [one.layers for one in v] == [(0,), (1,), (2,)] and bool(v)
    assert gr.evaluate.grid(v, -1, [0.2])[0].layer == 2


def test_negative_layers_count_from_the_models_last() -> None:
    some = gr.SteeringVectors(torch.eye(2), (4, 9), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="do not say how many layers"):
        some.at(-1)
    of_ten = gr.SteeringVectors(torch.eye(2), (4, 9), torch.ones(2), torch.ones(2), {"model": {"n_layers": 10}})
    assert of_ten.at([-1, -6]).layers == (9, 4)
    with pytest.raises(ValueError, match=r"no vector for layer 8 \(given as -2\)"):
        of_ten.at(-2)
    with pytest.raises(ValueError, match="no vector for layer -11"):
        of_ten.at(-11)


def test_division_sums_and_moves(tmp_path: Path) -> None:
    v, w = vectors(), vectors() * 3
    torch.testing.assert_close((v / 2).raw, v.raw / 2)
    torch.testing.assert_close(sum([v, w]).raw, v.raw + w.raw)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="divided by 0"):
        v / 0
    with pytest.raises(ValueError, match="expected SteeringVectors"):
        v + 1  # type: ignore[operator]
    half = v.to(torch.bfloat16)
    assert half.directions.dtype == torch.bfloat16 and v.to("cpu").layers == v.layers
    again = gr.SteeringVectors.load(half.save(tmp_path / "half.safetensors"))
    assert torch.equal(again.directions, half.directions)
    act = torch.ones(1, 2, 32)
    pair = [one.hooks(0.2, 1)[0][1](act, hook=None) for one in (v, half)]
    torch.testing.assert_close(*pair, atol=0.05, rtol=0)  # 20 residual units, rounded at the third digit


@pytest.mark.parametrize("operator", ["add_renorm", "add", "rotate", "clip", "ablate", "clamp"])
def test_no_direction_is_no_steering(model: Any, pairs: Any, operator: Any, tmp_path: Path) -> None:
    v = vectors()
    ids = torch.tensor([[5, 8, 12, 9]])
    noise = (0.1 * v + 0.2 * v) - 0.3 * v  # round-off of some 1e-8, and no direction
    for empty in (v * 0, v - v, noise, gr.SteeringVectors.load((v - v).save(tmp_path / "empty.safetensors"))):
        assert empty.magnitudes.tolist() == [0.0, 0.0, 0.0] and not empty.directions.any()
        for scale in ("residual", "raw"):
            steering = empty.steering(0.5, [0, 1, 2], operator=operator, scale=scale)  # type: ignore[arg-type]
            assert steering.idle
            with torch.no_grad():
                assert torch.equal(model.run_with_hooks(ids, fwd_hooks=steering.hooks()), model(ids))
    frame = gr.sweep(model, v - v, pairs, layers=[1], alphas=[0.5], operator=operator, progress=False)
    assert frame["effect"].tolist() == [0.0]
    assert torch.equal(((v - v) + v).raw, v.raw)
    assert (v - v).cosine(v).tolist() == [0.0, 0.0, 0.0]


def test_one_empty_layer_among_others() -> None:
    v, w = vectors(), vectors()
    partly = v - gr.SteeringVectors.from_raw(torch.cat([w.raw[:1], 2 * w.raw[1:]]), range(3), w.resid_norms)
    act = torch.ones(1, 2, 32)
    for (_, fn), moved in zip(partly.hooks(0.2, [0, 1, 2]), (False, True, True), strict=True):
        assert torch.equal(fn(act, hook=None), act) is not moved
    assert not partly.steering(0.2, [0, 1]).idle and partly.steering(0.2, 0).idle


def test_a_row_that_is_neither_unit_nor_empty_is_refused() -> None:
    for row, size in (([0.0, 0.0], 1.0), ([0.5, 0.0], 0.0), ([float("nan"), 0.0], 0.0)):
        with pytest.raises(ValueError, match=r"layers \[4\]"):
            gr.SteeringVectors(torch.tensor([row]), (4,), torch.tensor([size]), torch.ones(1))
