"""Several steerings at once: sums, orthogonal ones, one for each row; plain PyTorch hooks as the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.evaluate.equal_kl import at_kl
from grains_tl.hooks import CosineGate, FunctionGate, ProbeGate, ThresholdGate
from grains_tl.models.running import forward_logits
from grains_tl.vectors import CombinedSteering
from grains_tl.vectors.engines import export_steered
from tests.conftest import tiny_hf
from tests.helpers.oracles import edited, greedy, steered

ATOL = 1e-4
IDS = torch.tensor([[3, 5, 8, 12, 6]])
LEFT = torch.tensor([[0, 0, 3, 5, 8, 12, 6], [4, 7, 9, 10, 11, 12, 13], [0, 4, 6, 3, 5, 9, 8]])
LEFT_MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])


def vectors(seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0), {"method": f"v{seed}"})


def total(steerings: list[Any]) -> Any:
    """``sum`` begins with 0."""
    return sum(steerings)


def logits(model: Any, steering: Any, ids: Tensor = IDS, prompt_len: Any = None) -> Tensor:
    hooks = None if steering is None else steering.for_prompt(prompt_len)
    return forward_logits(model, ids, torch.ones_like(ids), torch.arange(ids.shape[1]), hooks)


def acts(seed: int = 1) -> Tensor:
    return 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def through(steering: Any, act: Tensor, layer: int) -> Tensor:
    for name, fn in steering.hooks():
        if name == f"blocks.{layer}.hook_resid_post":
            act = fn(act, hook=None)
    return act


# -- sums -------------------------------------------------------------------------------------------------------------


def test_a_sum_is_both_hooks_in_order_on_a_bridge_and_on_the_torch_model(model: Any, hf: Any) -> None:
    a, b = vectors(0).steering(0.7, 1), vectors(1).steering(0.6, [1, 2], operator="add")
    first, second, last = 3.5 * vectors(0).directions[1], 3 * vectors(1).directions[1], 3 * vectors(1).directions[2]
    cases: list[tuple[Any, Any]] = [
        (a + b, lambda act: steered(act, first, renorm=True) + second),
        (b + a, lambda act: steered(act + second, first, renorm=True)),
    ]
    found = []
    for both, edit in cases:
        with torch.no_grad(), edited(hf, 1, edit), edited(hf, 2, lambda act: act + last):
            wanted = hf(IDS).logits
        torch.testing.assert_close(logits(model, both), wanted, atol=ATOL, rtol=ATOL)
        with torch.no_grad(), both.torch_hooks(hf):
            torch.testing.assert_close(hf(IDS).logits, wanted, atol=ATOL, rtol=ATOL)
        found.append(wanted)
    assert (found[0] - found[1]).abs().max() > 1e-3  # the order counts
    add = [v.steering(0.5, 1, operator="add") for v in (vectors(0), vectors(1))]
    torch.testing.assert_close(logits(model, add[0] + add[1]), logits(model, add[1] + add[0]), atol=ATOL, rtol=ATOL)


@pytest.mark.usefixtures("unchecked")
def test_sums_are_associative_and_sum_works() -> None:
    a, b, c = (vectors(seed).steering(0.3, 1) for seed in range(3))
    assert ((a + b) + c).key == (a + (b + c)).key == total([a, b, c]).key == CombinedSteering((a, b, c)).key
    assert (a + b).key != (b + a).key and (a + b).key != a.key
    assert (a + b).layers == (1,) and (a + vectors().steering(0.1, [0, 2])).layers == (0, 1, 2)
    assert not (a + b).idle and (a.scaled(0) + b.scaled(0)).idle
    assert (a + replace(b, positions="generated")).needs_prompt and not (a + b).needs_prompt
    assert [part.alpha for part in (a + b).scaled(2).parts] == [0.6, 0.6]
    for wrong in (1, [a], vectors()):
        with pytest.raises((TypeError, ValueError)):
            a + wrong  # type: ignore[operator]
    for parts in ((), (a, vectors()), (a + b,)):
        with pytest.raises(ValueError, match="Steering"):
            CombinedSteering(parts)


def test_alpha_zero_changes_no_bit(model: Any) -> None:
    nothing = vectors(0).steering(0, 1) + vectors(1).steering(0.0, [0, 2], operator="rotate")
    assert torch.equal(logits(model, nothing), logits(model, None))


def test_generation_of_a_sum_in_a_padded_batch_with_a_cache_and_without(model: Any) -> None:
    scoped = vectors(1).steering(0.9, 2, operator="add", positions="generated")
    both = vectors(0).steering(0.8, 1) + scoped
    hf = tiny_hf()
    hf.config.eos_token_id = -1
    alone = []
    for row, mask in zip(LEFT, LEFT_MASK, strict=True):
        prompt = row[mask.bool()].tolist()

        def later(act: Tensor, n: int = len(prompt)) -> Tensor:
            where = (torch.arange(act.shape[1]) >= n)[None, :, None]
            return torch.where(where, act + 4.5 * vectors(1).directions[2], act)

        with edited(hf, 2, later):
            alone.append(greedy(hf, prompt, 5, 1, lambda act: steered(act, 4 * vectors(0).directions[1], renorm=True)))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    for cached in (True, False):
        with both.torch_hooks(hf, prompt_len=7):
            out = hf.generate(input_ids=LEFT, attention_mask=LEFT_MASK, use_cache=cached, **options)
        assert out[:, 7:].tolist() == alone


def test_a_gate_of_a_sum_reads_what_nothing_has_changed(model: Any, hf: Any) -> None:
    seen: list[Tensor] = []

    def keep(resid: Tensor) -> Tensor:
        seen.append(resid)
        return torch.ones(resid.shape[:-1], dtype=torch.bool, device=resid.device)

    gate = FunctionGate(keep, 1)
    both = vectors(0).steering(0.8, 1) + vectors(1).steering(0.5, 2, gate=gate)
    logits(model, both, prompt_len=4)
    with torch.no_grad(), both.torch_hooks(hf, prompt_len=4):
        hf(IDS)
    logits(model, vectors(1).steering(0.5, 2, gate=gate), prompt_len=4)
    for other in seen[:2]:
        torch.testing.assert_close(other, seen[2], atol=ATOL, rtol=ATOL)
    with pytest.raises(ValueError, match="layer 1"):
        vectors(0).steering(0.8, 0) + vectors(1).steering(0.5, 2, gate=gate)


def test_sums_are_measured_and_scaled_to_a_kl(model: Any, pairs: Any, tmp_path: Path) -> None:
    both = vectors(0).steering(0.3, 1) + vectors(1).steering(0.2, 2, operator="add")
    frame = gr.evaluate.record_effects(model, pairs, [both], checkpoint=tmp_path / "r.jsonl")
    wanted = gr.score_pairs(model, pairs, both) - gr.score_pairs(model, pairs)
    torch.testing.assert_close(
        torch.tensor(frame["change"].to_numpy()).float(), wanted[:, 0] - wanted[:, 1], atol=1e-3, rtol=1e-3
    )
    again = gr.evaluate.record_effects(model, pairs, [both], checkpoint=tmp_path / "r.jsonl")
    assert again["change"].tolist() == frame["change"].tolist()
    assert set(frame["vector"]) == {"v0 + v1"}
    texts = ["the film was good and the room was warm .", "we liked the soup ."]
    (step,), spent = at_kl(model, [both], 0.02, texts)
    assert spent[0] == pytest.approx(0.02, rel=0.2)
    ratio = {round(part.alpha / old.alpha, 4) for part, old in zip(step.parts, both.parts, strict=True)}
    assert len(ratio) == 1


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_hold_a_sum_says_so(model: Any, tmp_path: Path) -> None:
    both = vectors(0).steering(0.3, 1, operator="add") + vectors(1).steering(0.2, 2, operator="add")
    with pytest.raises(ValueError, match="expected a Steering"):
        export_steered(both, tmp_path / "v.pt")  # type: ignore[arg-type]


# -- orthogonal -------------------------------------------------------------------------------------------------------


def test_orthogonal_steps_are_one_operation_on_the_subspace() -> None:
    """Projection, and matching of means, in the span of three directions."""
    vs = [vectors(seed).at([1]) for seed in range(3)]
    basis = torch.linalg.qr(torch.stack([v.directions[0].double() for v in vs]).T).Q
    act = acts()
    inside = (act.double() @ basis) @ basis.T
    taken = total([v.steering(1.0, 1, operator="ablate") for v in vs]).orthogonal()
    once = through(taken, act, 1)
    torch.testing.assert_close(once, (act - inside).float(), atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(through(taken, once, 1), once, atol=ATOL, rtol=ATOL)
    back = CombinedSteering(tuple(reversed(taken.parts)))
    torch.testing.assert_close(through(back, act, 1), once, atol=ATOL, rtol=ATOL)
    plain = total([v.steering(1.0, 1, operator="ablate") for v in vs])
    assert (through(plain, act, 1) - once).abs().max() > 1e-2  # without it the projections disturb one another


def test_matching_in_a_subspace_moves_the_class_mean_there(model: Any, pairs: Any) -> None:
    start = total([vectors(seed).steering(0.5, 1) for seed in range(3)]).orthogonal()
    parts = [part.vectors.with_means(model, pairs) for part in start.parts]
    both = total([v.steering(0.5, 1, operator="match") for v in parts])
    basis = torch.stack([v[1].directions[0] for v in parts], dim=1)
    target = basis @ torch.tensor([v.info["means"]["1"]["chosen"] for v in parts])
    act = acts()
    wanted = act + 0.5 * ((target - act) @ basis) @ basis.T
    torch.testing.assert_close(through(both, act, 1), wanted, atol=ATOL, rtol=ATOL)


def test_orthogonal_keeps_the_first_and_refuses_what_vanishes() -> None:
    a, b = vectors(0).steering(0.3, [0, 1]), vectors(1).steering(0.2, [1, 2], positions="generated")
    made = (a + b).orthogonal()
    assert made.parts[0] is a and made.parts[1].alpha == 0.2 and made.parts[1].positions == "generated"
    assert made.parts[1].layers == (1, 2)
    assert abs(float(made.parts[1].vectors.directions[0] @ vectors(0).directions[1])) < 1e-6
    torch.testing.assert_close(made.parts[1].vectors.directions[1], vectors(1).directions[2])  # nothing before it there
    assert (made.orthogonal()).key == made.key
    twice = a + vectors(0).steering(-0.5, 1)
    with pytest.raises(ValueError, match="span"):
        twice.orthogonal()


# -- one for each row -------------------------------------------------------------------------------------------------


def greedy_of(hf: Any, seed: int | None, row: int) -> list[int]:
    prompt = LEFT[row][LEFT_MASK[row].bool()].tolist()
    if seed is None:
        return greedy(hf, prompt, 5)
    return greedy(hf, prompt, 5, 1, lambda act: steered(act, 6 * vectors(seed).directions[1], renorm=True))


def test_every_row_is_generated_as_if_alone(model: Any) -> None:
    requests = [vectors(0).steering(1.2, 1), None, vectors(1).steering(1.2, 1)]
    both = CombinedSteering.per_row(requests)
    hf = tiny_hf()
    hf.config.eos_token_id = -1
    alone = [greedy_of(hf, seed, row) for row, seed in enumerate((0, None, 1))]
    assert alone[0] != greedy_of(hf, None, 0) and alone[2] != greedy_of(hf, None, 2)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    for cached in (True, False):
        with both.torch_hooks(hf):
            out = hf.generate(input_ids=LEFT, attention_mask=LEFT_MASK, use_cache=cached, **options)
        assert out[:, 7:].tolist() == alone
    texts = ["the film was", "the soup", "we liked the room and"]
    wanted = [gr.generate(model, [t], s, max_new_tokens=4)[0] for t, s in zip(texts, requests, strict=True)]
    assert gr.generate(model, texts, both, max_new_tokens=4) == wanted


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
def test_rows_keep_their_own_gates_and_scopes(model: Any, decide: Any) -> None:
    def probe(threshold: float) -> Any:
        return ProbeGate(vectors(2).directions[0], 0, threshold, decide)

    gates: list[Any] = [probe(0.3), probe(-0.5), CosineGate(vectors(2).directions[0], 0, 0.05, decide), None]
    gates += [ThresholdGate(vectors(2).directions[1], 0.0), lambda act: act[..., 0] > 0]
    ids = torch.randint(3, 14, (len(gates), 5), generator=torch.Generator().manual_seed(3))
    own = [vectors(n % 2).steering(0.9, 1, gate=g, positions=("all", "prompt")[n % 2]) for n, g in enumerate(gates)]
    found = logits(model, CombinedSteering.per_row(own), ids, 3)
    for row, steering in enumerate(own):
        wanted = logits(model, steering, ids[row : row + 1], 3)
        torch.testing.assert_close(found[row : row + 1], wanted, atol=ATOL, rtol=ATOL)


def test_rows_that_are_not_steered_are_the_base_bit_for_bit_and_sums_are_allowed(model: Any) -> None:
    pair = vectors(0).steering(0.6, 1) + vectors(1).steering(0.4, 2, operator="add")
    found = logits(model, CombinedSteering.per_row([None, pair, None]), LEFT)
    base = logits(model, None, LEFT)
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(found[1], logits(model, pair, LEFT)[1], atol=ATOL, rtol=ATOL)
    shared = CombinedSteering.per_row([pair.parts[0], pair.parts[0], None])
    assert len(shared.parts) == 1


@pytest.mark.usefixtures("unchecked")
def test_batches_of_another_size_and_wrong_rows_are_refused(model: Any) -> None:
    both = CombinedSteering.per_row([vectors(0).steering(0.6, 1), None])
    with pytest.raises(ValueError, match=r"\(2,\)"):
        logits(model, both, LEFT)
    gated = CombinedSteering.per_row(
        [vectors(0).steering(0.6, 1, gate=ProbeGate(vectors(2).directions[0], 0, 0.0)), None]
    )
    with pytest.raises(ValueError, match="2 rows"):
        logits(model, gated, LEFT)
    for rows in ([1, 0], [], "yes", [[True]]):
        with pytest.raises(ValueError, match="boolean"):
            vectors().steering(0.5, 1).at_rows(rows)  # type: ignore[arg-type]
    for wrong in ([vectors()], [None, None], []):
        with pytest.raises(ValueError, match="Steering"):
            CombinedSteering.per_row(wrong)
    assert (
        vectors().steering(0.5, 1).at_rows([True, False]).key != vectors().steering(0.5, 1).at_rows([False, True]).key
    )
    assert math.isnan(gr.evaluate.Setting.of(both).alpha)
