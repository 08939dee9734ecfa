"""Steering hooks: exact effects on the residual stream, scopes, precision, and plain PyTorch hooks as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grains_tl as gr
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.oracles import edited, steered

LOGIT_ATOL = 1e-4  # float32 round-off of logits of size 10
NORM_RTOL = 1e-5  # float32: one square root and one division per token
PROJECTION_ATOL = 2e-5  # float32 dot products of 32 entries of size 5
IDS = torch.tensor([[5, 8, 12, 18, 13], [6, 8, 13, 19, 10]])
LAYERS = [0, 1, 2]
OPERATORS: list[Any] = ["add_renorm", "add", "rotate", "clip", "ablate", "clamp"]


def direction(seed: int = 0, d_model: int = 32) -> Tensor:
    return torch.randn(d_model, generator=torch.Generator().manual_seed(seed))


def unit(seed: int = 0) -> Tensor:
    return direction(seed) / direction(seed).norm()


def activations(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))).to(dtype)


def hook_of(*args: Any, **kwargs: Any) -> Any:
    ((_, fn),) = gr.hooks.steer_hook(*args, **kwargs)
    return lambda act: fn(act, hook=None)


def record(model: Any, ids: Tensor, hooks: Any) -> list[Tensor]:
    """resid_post of every layer under the hooks (which run before the recording ones)."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def fn(act: Tensor, hook: Any) -> None:
            found[layer] = act.clone()

        return fn

    with torch.no_grad():
        recording = [(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in LAYERS]
        model.run_with_hooks(ids, fwd_hooks=[*hooks, *recording])
    return [found[layer] for layer in LAYERS]


# -- operators on activations -----------------------------------------------------------------------------------------


def test_add_is_exactly_one_addition() -> None:
    act = activations(2, 5)
    assert torch.equal(hook_of(1, direction(), 2.5, operator="add")(act), act + 2.5 * unit())


def test_only_the_direction_of_the_vector_counts() -> None:
    act = activations(2, 5)
    for operator in OPERATORS:
        one, other = (hook_of(1, direction() * size, 2.0, operator=operator)(act) for size in (1.0, 64.0))
        torch.testing.assert_close(one, other, rtol=NORM_RTOL, atol=PROJECTION_ATOL)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), amount=st.floats(-50, 50), size=st.floats(1e-2, 1e3))
def test_renorm_keeps_every_norm_and_the_plane(seed: int, amount: float, size: float) -> None:
    act = size * activations(1, 4, seed=seed)
    new = hook_of(0, direction(), amount)(act)
    torch.testing.assert_close(new.norm(dim=-1), act.norm(dim=-1), rtol=NORM_RTOL, atol=0)
    moved = act + amount * unit()
    torch.testing.assert_close(torch.cosine_similarity(new, moved, dim=-1), torch.ones(1, 4), rtol=NORM_RTOL, atol=0)


def test_renorm_of_a_step_that_cancels_the_activation_is_finite() -> None:
    act = torch.stack([-2 * unit(), activations(1)[0], torch.zeros(32)])[None]
    new = hook_of(0, direction(), 2.0)(act)
    assert torch.isfinite(new).all()
    assert not new[0, 2].any()  # norm 0 is kept too
    torch.testing.assert_close(new[0].norm(dim=-1), act[0].norm(dim=-1), rtol=NORM_RTOL, atol=1e-6)


def test_ablation_leaves_no_component_and_nothing_else_changes() -> None:
    act = activations(2, 5)
    new = hook_of(0, direction(), 1.0, operator="ablate")(act)
    assert (new @ unit()).abs().max() < PROJECTION_ATOL
    torch.testing.assert_close(act - new, (act @ unit())[..., None] * unit(), atol=PROJECTION_ATOL, rtol=0)
    torch.testing.assert_close(hook_of(0, direction(), 1.0, operator="ablate")(new), new, atol=PROJECTION_ATOL, rtol=0)
    half = hook_of(0, direction(), 0.5, operator="ablate")(act)
    torch.testing.assert_close(half @ unit(), (act @ unit()) / 2, atol=PROJECTION_ATOL, rtol=0)


@pytest.mark.parametrize("value", [-3.0, 0.0, 7.5])
def test_clamp_sets_the_component_and_nothing_else_changes(value: float) -> None:
    act = activations(2, 5)
    new = hook_of(0, direction(), value, operator="clamp")(act)
    torch.testing.assert_close(new @ unit(), torch.full((2, 5), value), atol=PROJECTION_ATOL, rtol=0)
    rest = act - (act @ unit())[..., None] * unit()
    torch.testing.assert_close(new - value * unit(), rest, atol=PROJECTION_ATOL, rtol=0)


@pytest.mark.parametrize("operator", ["add", "add_renorm", "rotate", "clip", "ablate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_changes_no_bit(operator: Any, dtype: torch.dtype) -> None:
    act = activations(2, 5, dtype=dtype)
    act[0, 0] = float("inf")  # not even what arithmetic would turn into NaN
    assert torch.equal(hook_of(0, direction(), 0.0, operator=operator)(act), act)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_kept_and_the_input_is_not_written_to(operator: Any, positions: Any, dtype: torch.dtype) -> None:
    act = activations(2, 5, dtype=dtype)
    copy = act.clone()
    new = hook_of(0, direction(), 2.0, operator=operator, positions=positions)(act)
    assert new.dtype == dtype and new.shape == act.shape
    assert torch.equal(act, copy) and new.data_ptr() != act.data_ptr()
    wanted = hook_of(0, direction(), 2.0, operator=operator, positions=positions)(act.float())
    eps = torch.finfo(dtype).eps  # one rounding of the result, and for "add" one of the step
    torch.testing.assert_close(new.float(), wanted, rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("operator", ["add_renorm", "rotate", "clip", "ablate", "clamp"])
def test_large_half_precision_activations_do_not_overflow(operator: Any) -> None:
    act = 200 * activations(1, 3).half()  # the sum of squares is beyond float16
    assert torch.isfinite(act).all() and torch.isinf(act.pow(2).sum(-1)).any()
    new = hook_of(0, direction(), 50.0, operator=operator)(act)
    assert torch.isfinite(new).all()


# -- scopes -----------------------------------------------------------------------------------------------------------

SCOPES: list[tuple[Any, Any, list[list[int]]]] = [
    ("all", 3, [[1, 1, 1, 1, 1]] * 2),
    ("prompt", 3, [[1, 1, 1, 0, 0]] * 2),
    ("generated", 3, [[0, 0, 0, 1, 1]] * 2),
    ("last", 3, [[0, 0, 1, 1, 1]] * 2),
    ("prompt", [2, 4], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]),
    ("generated", [2, 4], [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]),
    ("last", [2, 4], [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]),
    ("prompt", None, [[1, 1, 1, 1, 1]] * 2),
    ("generated", None, [[0, 0, 0, 0, 0]] * 2),
    ("last", None, [[0, 0, 0, 0, 1]] * 2),
]


@pytest.mark.parametrize(("positions", "prompt_len", "where"), SCOPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_scopes(operator: Any, positions: Any, prompt_len: Any, where: list[list[int]]) -> None:
    act = activations(2, 5)
    prompt_len = torch.tensor(prompt_len) if isinstance(prompt_len, list) else prompt_len
    new = hook_of(0, direction(), 2.0, operator=operator, positions=positions, prompt_len=prompt_len)(act)
    everywhere = hook_of(0, direction(), 2.0, operator=operator)(act)
    inside = torch.tensor(where, dtype=torch.bool)
    assert torch.equal(new[inside], everywhere[inside])
    assert torch.equal(new[~inside], act[~inside])


@pytest.mark.parametrize(
    ("positions", "prompt_len", "steers"),
    [("all", 4, 1), ("prompt", 4, 0), ("generated", 4, 1), ("last", 4, 1), ("generated", None, 1), ("prompt", None, 0)],
)
def test_scopes_of_a_decoding_step(positions: Any, prompt_len: Any, steers: int) -> None:
    """With a key-value cache the hook sees one new position."""
    act = activations(2, 1)
    new = hook_of(0, direction(), 2.0, positions=positions, prompt_len=prompt_len)(act)
    assert torch.equal(new, act) == (not steers)


def test_mask_as_scope() -> None:
    act = activations(2, 5)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    new = hook_of(0, direction(), 2.0, operator="add", positions=mask)(act)
    assert torch.equal(new[mask], (act + 2.0 * unit())[mask]) and torch.equal(new[~mask], act[~mask])
    row = hook_of(0, direction(), 2.0, operator="add", positions=mask[:1])(act)  # one row for the whole batch
    assert torch.equal(row[:, [1, 2, 4]], act[:, [1, 2, 4]]) and not torch.equal(row[1, 0], act[1, 0])
    step = activations(2, 1)
    assert torch.equal(hook_of(0, direction(), 2.0, positions=mask)(step), step)  # decoded positions are left alone


@pytest.mark.usefixtures("unchecked")
def test_mask_of_another_shape() -> None:
    for shape in ((2, 4), (3, 5)):
        fn = hook_of(0, direction(), 2.0, positions=torch.ones(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match="does not fit activations"):
            fn(activations(2, 5))


# -- in the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_steering_touches_one_layer_and_what_follows(model: Any, layer: int) -> None:
    plain = record(model, IDS, [])
    under = record(model, IDS, gr.hooks.steer_hook(layer, direction(), 2.5, operator="add"))
    for earlier in range(layer):
        assert torch.equal(plain[earlier], under[earlier])
    assert torch.equal(plain[layer] + 2.5 * unit(), under[layer])
    for later in range(layer + 1, len(LAYERS)):
        assert not torch.allclose(plain[later], under[later], atol=1e-3)


@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_steered_logits_equal_a_plain_hook(model: Any, hf: Any, layer: int, renorm: bool) -> None:
    hooks = gr.hooks.steer_hook(layer, direction(), 2.5, operator="add_renorm" if renorm else "add")
    with torch.no_grad(), edited(hf, layer, lambda act: steered(act, 2.5 * unit(), renorm=renorm)):
        wanted = hf(IDS).logits.log_softmax(-1)
        torch.testing.assert_close(
            model.run_with_hooks(IDS, fwd_hooks=hooks).log_softmax(-1), wanted, atol=LOGIT_ATOL, rtol=0
        )
        with model.hooks(fwd_hooks=hooks):
            torch.testing.assert_close(model(IDS).log_softmax(-1), wanted, atol=LOGIT_ATOL, rtol=0)
    assert (wanted - hf(IDS).logits.log_softmax(-1)).abs().max() > 100 * LOGIT_ATOL


def test_steered_logits_with_learned_positions() -> None:
    model, hf = tiny_model("bridge", "gpt2"), tiny_hf("gpt2")
    found = model.run_with_hooks(IDS, fwd_hooks=gr.hooks.steer_hook(1, direction(), 2.5))
    with torch.no_grad(), edited(hf, 1, lambda act: steered(act, 2.5 * unit(), renorm=True)):
        torch.testing.assert_close(found.log_softmax(-1), hf(IDS).logits.log_softmax(-1), atol=LOGIT_ATOL, rtol=0)


def test_zero_steering_gives_the_same_bits(model: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=gr.hooks.steer_hook(1, direction(), 0.0)), model(IDS))


def test_hooks_are_gone_after_an_exception(model: Any) -> None:
    def fail(act: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with torch.no_grad():
        before = model(IDS)
        hooks = [*gr.hooks.steer_hook(0, direction(), 2.5), ("blocks.2.hook_resid_post", fail)]
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(IDS, fwd_hooks=hooks)
        with pytest.raises(RuntimeError, match="on purpose"), model.hooks(fwd_hooks=hooks):
            model(IDS)
        with pytest.raises(ValueError, match="does not fit"):
            gr.score_pairs(
                model,
                gr.tokens.tokenize_pairs(model, [gr.PreferencePair("film was", " good", " bad")]),
                gr.hooks.steer_hook(1, direction(d_model=8), 1.0),
            )
        assert torch.equal(model(IDS), before)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("ours_first", [True, False])
def test_composition_with_a_users_patch(model: Any, hf: Any, ours_first: bool) -> None:
    """Hooks at one point run in list order: patch then steer, or steer then patch, each as by hand."""
    patch = activations(1)[0]

    def users(act: Tensor, hook: Any) -> Tensor:
        new = act.clone()
        new[:, 2] = patch
        return new

    def by_hand(act: Tensor) -> Tensor:
        act = act.clone()
        if ours_first:
            act = steered(act, 2.5 * unit(), renorm=True)
        act[:, 2] = patch
        return act if ours_first else steered(act, 2.5 * unit(), renorm=True)

    ours = gr.hooks.steer_hook(1, direction(), 2.5)
    theirs: Any = [("blocks.1.hook_resid_post", users)]
    with torch.no_grad(), edited(hf, 1, by_hand):
        wanted = hf(IDS).logits.log_softmax(-1)
        found = model.run_with_hooks(IDS, fwd_hooks=ours + theirs if ours_first else theirs + ours)
    torch.testing.assert_close(found.log_softmax(-1), wanted, atol=LOGIT_ATOL, rtol=0)


def test_the_two_orders_differ(model: Any) -> None:
    """The negative control of the composition test."""
    clamp, add = (
        gr.hooks.steer_hook(1, direction(), 0.0, operator="clamp"),
        gr.hooks.steer_hook(1, direction(), 5.0, operator="add"),
    )
    with torch.no_grad():
        one, other = (model.run_with_hooks(IDS, fwd_hooks=h) for h in (clamp + add, add + clamp))
    assert (one - other).abs().max() > 100 * LOGIT_ATOL


def test_cached_activations_show_the_steering(model: Any) -> None:
    with torch.no_grad(), model.hooks(fwd_hooks=gr.hooks.steer_hook(1, direction(), 2.5, operator="add")):
        _, cache = model.run_with_cache(IDS)
    plain = record(model, IDS, [])
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], plain[1] + 2.5 * unit(), atol=1e-6, rtol=0)


def test_gradients_flow_through(model: Any) -> None:
    """Steering is differentiable: the gradient of a later sum with respect to the activation is not cut."""
    for operator in OPERATORS:
        act = activations(1, 3).requires_grad_()
        hook_of(0, direction(), 2.0, operator=operator)(act).pow(2).sum().backward()
        assert act.grad is not None and torch.isfinite(act.grad).all() and act.grad.abs().sum() > 0


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((-1, direction(), 1.0), {}, "layer=-1"),
        ((0, torch.zeros(4), 1.0), {}, "layer 0 has norm 0"),
        ((3, torch.tensor([1.0, float("nan")]), 1.0), {}, "layer 3 has norm nan"),
        ((0, torch.tensor([1.0, float("inf")]), 1.0), {}, "norm inf"),
        ((0, direction(), float("nan")), {}, "amount=nan"),
        ((0, direction(), float("inf")), {}, "amount=inf"),
        ((0, direction(), 1.0), {"operator": "multiply"}, "multiply"),
        ((0, direction(), 1.0), {"positions": "first"}, "first"),
    ],
)
def test_refused(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.hooks.steer_hook(*arguments, **options)


def test_direction_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"d_model 8 at resid_post does not fit activations \(1, 2, 32\)"):
        hook_of(0, direction(d_model=8), 1.0)(activations(1, 2))
