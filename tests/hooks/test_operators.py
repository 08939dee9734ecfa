"""Rotation, clipping and matching of means: their theorems, and plain PyTorch on the Hugging Face model as the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grains_tl as gr
from grains_tl.inference.generation import continue_prompts
from grains_tl.models.running import forward_logits
from grains_tl.vectors.engines import export_easysteer, export_steered, vllm_lens_vector
from tests.conftest import tiny_hf
from tests.helpers.oracles import edited, greedy, residuals

RTOL, ATOL = 2e-5, 5e-5  # float32 of residuals of size 10
LEFT = torch.tensor([[0, 0, 3, 5, 8, 12, 6], [4, 7, 9, 10, 11, 12, 13]])  # padded on the left
LEFT_MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
ANGLES = st.floats(-4.0, 4.0)


def unit(seed: int = 0) -> Tensor:
    raw = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return raw / raw.norm()


def activations(seed: int = 1, size: float = 3.0) -> Tensor:
    """Of any seed but 0, which gives the direction itself."""
    return size * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def step(operator: Any, amount: float, target: float | None = None) -> Any:
    both = amount if target is None else (amount, target)
    ((_, fn),) = gr.hooks.steer_hook(0, unit(), both, operator=operator)
    return lambda act: fn(act, hook=None)


def angle(act: Tensor) -> Tensor:
    """To the direction, in float64."""
    return torch.acos(torch.cosine_similarity(act.double(), unit().double(), dim=-1).clamp(-1, 1))


def turned(act: Tensor, by: float) -> Tensor:
    """A rotation of each vector in its plane with the direction, as the exponential of a skew matrix."""
    rows, u = [], unit().double()
    for h in act.reshape(-1, act.shape[-1]).double():
        across = h - (h @ u) * u
        w = across / across.norm()
        far = math.atan2(float(across.norm()), float(h @ u))  # acos loses half its digits at 0
        by_here = far - min(max(far - by, 0.0), math.pi)
        rows.append(torch.matrix_exp(by_here * (torch.outer(u, w) - torch.outer(w, u))) @ h)
    return torch.stack(rows).reshape(act.shape).float()


def clipped(act: Tensor, by: float) -> Tensor:
    """One residual at a time."""
    new = act.clone()
    for h in new.reshape(-1, act.shape[-1]):
        missing = by - float(h @ unit())
        h += math.copysign(min(max(missing * math.copysign(1, by), 0.0), abs(by)), by) * unit()
    return new


# -- theorems ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(1, 1000), by=ANGLES, size=st.floats(1e-2, 1e3))
def test_rotation_keeps_norms_and_turns_by_the_angle(seed: int, by: float, size: float) -> None:
    act = activations(seed, size)
    new = step("rotate", by)(act)
    torch.testing.assert_close(new.norm(dim=-1), act.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(angle(new), (angle(act) - by).clamp(0, math.pi), atol=1e-3, rtol=0)
    torch.testing.assert_close(new, turned(act, by), rtol=1e-4, atol=1e-4 * size)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(1, 1000), first=st.floats(0, 1.0), second=st.floats(0, 1.0))
def test_rotations_compose_and_undo_each_other(seed: int, first: float, second: float) -> None:
    act = activations(seed)
    there = step("rotate", second)(step("rotate", first)(act))
    torch.testing.assert_close(there, step("rotate", first + second)(act), rtol=1e-4, atol=1e-4)
    short = min(first, 0.5)  # not as far as the direction itself, from where the way back is unknown
    torch.testing.assert_close(step("rotate", -short)(step("rotate", short)(act)), act, rtol=1e-4, atol=1e-4)


def test_a_full_turn_ends_at_the_direction_and_stays_there() -> None:
    act = activations()
    for by, sign in ((math.pi, 1.0), (-math.pi, -1.0)):
        new = step("rotate", by)(act)
        torch.testing.assert_close(new, sign * act.norm(dim=-1, keepdim=True) * unit(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(step("rotate", by)(new), new, rtol=1e-5, atol=1e-4)
    along = torch.stack([3.0 * unit(), -3.0 * unit(), torch.zeros(32)])[None]
    assert torch.equal(step("rotate", 0.5)(along), along)  # these have no plane


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(1, 1000), by=st.floats(-8, 8).filter(lambda x: abs(x) > 1e-3))
def test_clipping_never_passes_its_level_and_never_steps_further_than_add(seed: int, by: float) -> None:
    act = activations(seed)
    new, sign = step("clip", by)(act), math.copysign(1.0, by)
    before, after = sign * (act @ unit()), sign * (new @ unit())
    assert bool((after <= torch.maximum(before, torch.tensor(abs(by))) + ATOL).all())
    assert bool((after - before >= -ATOL).all() and (after - before <= abs(by) + ATOL).all())
    torch.testing.assert_close(new, clipped(act, by), rtol=RTOL, atol=ATOL)
    beyond, behind = before >= abs(by), before <= 0
    assert torch.equal(new[beyond], act[beyond])
    torch.testing.assert_close(new[behind], (act + by * unit())[behind], rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(step("clip", by)(new)[~behind], new[~behind], rtol=RTOL, atol=ATOL)  # idempotent there


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(1, 1000), one=st.floats(0, 1), two=st.floats(0, 1), target=st.floats(-9, 9))
def test_matching_moves_the_mean_by_its_share_and_composes(seed: int, one: float, two: float, target: float) -> None:
    act = activations(seed)
    new = step("match", one, target)(act)
    mean = float((act @ unit()).mean())
    assert float((new @ unit()).mean()) == pytest.approx(mean + one * (target - mean), abs=1e-4)
    torch.testing.assert_close(new - act, ((new - act) @ unit())[..., None] * unit(), atol=ATOL, rtol=RTOL)
    both = 1 - (1 - one) * (1 - two)
    torch.testing.assert_close(step("match", two, target)(new), step("match", both, target)(act), atol=ATOL, rtol=RTOL)
    whole = step("match", 1.0, target)(act)
    torch.testing.assert_close(step("match", 1.0, target)(whole), whole, atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(step("match", one, 0.0)(act), step("ablate", one)(act), atol=ATOL, rtol=RTOL)


def test_small_rotations_are_small_steps() -> None:
    """To first order the step is |h| times the angle, along the part of the direction across h."""
    act = activations()
    by = 1e-3
    across = unit() - (act @ unit())[..., None] * act / act.norm(dim=-1, keepdim=True) ** 2
    wanted = act + by * act.norm(dim=-1, keepdim=True) * across / across.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(step("rotate", by)(act), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("operator", ["rotate", "clip", "match"])
def test_zero_is_the_activation_itself(operator: Any) -> None:
    act = activations()
    act[0, 0] = float("inf")
    assert step(operator, 0.0, 1.0 if operator == "match" else None)(act) is act


def test_matching_alone_takes_two_numbers() -> None:
    for amount, operator in (
        (0.5, "match"),
        ((0.5, 1.0), "add"),
        ((0.5, math.nan), "match"),
        ((0.5, 1.0, 2.0), "match"),
    ):
        with pytest.raises((ValueError, TypeError)):
            gr.hooks.steer_hook(0, unit(), amount, operator=operator)  # type: ignore[arg-type]


# -- class means ------------------------------------------------------------------------------------------------------


def vectors() -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0))


def test_means_are_those_of_the_responses_tokens(model: Any, hf: Any, pairs: Any) -> None:
    v = vectors().with_means(model, pairs)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    for layer in range(3):
        for side in ("rejected", "chosen"):
            found = [
                residuals(hf, [*t.prompt, *getattr(t, side)])[layer, len(t.prompt) :].mean(0) @ v.directions[layer]
                for t in tokenized
            ]
            assert v.info["means"][str(layer)][side] == pytest.approx(float(torch.stack(found).mean()), abs=1e-4)


def test_signs_choose_the_class_and_changed_vectors_are_refused(model: Any, pairs: Any, tmp_path: Path) -> None:
    v = vectors()
    with pytest.raises(ValueError, match="with_means"):
        v.steering(0.5, 1, operator="match")
    v = v.with_means(model, pairs)
    again = gr.load_vectors(v.save(tmp_path / "v.safetensors"))
    act = activations()
    for alpha, side in ((1.0, "chosen"), (-1.0, "rejected")):
        ((_, fn),) = again.hooks(alpha, 1, operator="match")
        wanted = torch.full((2, 5), v.info["means"]["1"][side])
        torch.testing.assert_close(fn(act, hook=None) @ v.directions[1], wanted, atol=ATOL, rtol=RTOL)
    chosen = v.steering(0.5, 1, operator="match")
    read = gr.load_vectors(chosen.save(tmp_path / "c.safetensors")).chosen
    assert read is not None and read.key == chosen.key
    other = replace(v, directions=v.directions.flip(-1))
    for changed in (other, -v, v + v, 2 * v):
        with pytest.raises(ValueError, match="with_means"):
            changed.steering(0.5, 1, operator="match")
    assert (
        v.steering(0.5, 1, operator="match").key
        != v.with_means(model, pairs[:1]).steering(0.5, 1, operator="match").key
    )
    assert v.steering(0.0, 1, operator="match").idle
    with pytest.raises(ValueError, match="no records"):
        v.with_means(model, [])


# -- on a model -------------------------------------------------------------------------------------------------------


def cases(model: Any, pairs: Any) -> list[tuple[gr.Steering, Any]]:
    v = vectors().with_means(model, pairs)
    target, u = v.info["means"]["1"]["chosen"], v.directions[1]
    own = replace(v, directions=torch.stack([v.directions[0], unit(), v.directions[2]]))
    return [
        (own.steering(0.9, 1, operator="rotate"), lambda act: turned(act, 0.9)),
        (own.steering(0.7, 1, operator="clip"), lambda act: clipped(act, 3.5)),
        (v.steering(0.8, 1, operator="match"), lambda act: act + 0.8 * (target - act @ u)[..., None] * u),
    ]


def test_operators_are_the_plain_hook_on_a_bridge_and_on_the_torch_model(model: Any, hf: Any, pairs: Any) -> None:
    ids = torch.tensor([[3, 5, 8, 12, 6]])
    mask, keep = torch.ones_like(ids), torch.arange(5)
    with torch.no_grad():
        base = hf(ids).logits
    for steering, edit in cases(model, pairs):
        with torch.no_grad(), edited(hf, 1, edit):
            wanted = hf(ids).logits
        assert (wanted - base).abs().max() > 1e-2
        torch.testing.assert_close(
            forward_logits(model, ids, mask, keep, steering.hooks()), wanted, atol=1e-4, rtol=1e-4
        )
        with torch.no_grad(), steering.torch_hooks(hf):
            torch.testing.assert_close(hf(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert torch.equal(hf(ids).logits, base)
            zero = replace(steering, alpha=0.0)
            plain = forward_logits(model, ids, mask, keep, None)
            assert torch.equal(forward_logits(model, ids, mask, keep, zero.hooks()), plain)


def test_generation_with_a_cache_without_one_and_in_a_padded_batch(model: Any, pairs: Any) -> None:
    for steering, edit in cases(model, pairs):
        hf = tiny_hf()
        hf.config.eos_token_id = -1
        alone = [greedy(hf, row[mask.bool()].tolist(), 6, 1, edit) for row, mask in zip(LEFT, LEFT_MASK, strict=True)]
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
        with steering.torch_hooks(hf):
            for cached in (True, False):
                out = hf.generate(input_ids=LEFT, attention_mask=LEFT_MASK, use_cache=cached, **options)
                assert out[:, LEFT.shape[1] :].tolist() == alone
        prompts = ["the film was", "the food in this hotel was very", "we liked it"]
        rows = [t.prompt for t in continue_prompts(model, prompts, max_new_tokens=1)]
        wanted = [greedy(tiny_hf(), row, 6, 1, edit) for row in rows]
        assert wanted != [greedy(tiny_hf(), row, 6) for row in rows]
        for size in (1, 3):
            found = continue_prompts(model, prompts, steering, max_new_tokens=6, batch_size=size)
            assert [t.new for t in found] == wanted


@pytest.mark.parametrize("operator", ["rotate", "clip", "match"])
def test_no_engine_takes_them(model: Any, pairs: Any, operator: Any, tmp_path: Path) -> None:
    v = vectors().with_means(model, pairs)
    steering = v.steering(0.5, 1, operator=operator)
    for export in (
        lambda: export_steered(steering, tmp_path / "v.pt"),
        lambda: export_easysteer(steering, tmp_path / "v.gguf"),
        lambda: vllm_lens_vector(steering),
        lambda: gr.vectors.export.export_gguf(v, tmp_path / "v.gguf", alpha=0.5, layers=[1], operator=operator),
    ):
        with pytest.raises(ValueError, match=operator):
            export()
    assert not list(tmp_path.iterdir())


def test_units_are_radians_and_shares_whatever_the_residual_norm(model: Any, pairs: Any) -> None:
    v = vectors().with_means(model, pairs)
    unknown = replace(v, resid_norms=torch.zeros(3))
    for operator in ("rotate", "match"):
        act = activations()
        new = [one.hooks(0.3, 1, operator=operator)[0][1](act, hook=None) for one in (v, unknown)]
        assert torch.equal(*new)
    with pytest.raises(ValueError, match="residual norm"):
        unknown.steering(0.3, 1, operator="clip")
