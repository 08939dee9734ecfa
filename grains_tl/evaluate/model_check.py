"""A few seconds of checks on a new model or architecture, before trusting any number that comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from grains_tl.hooks.mask import mask_hook
from grains_tl.hooks.steer import steer_hook
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.restart import prepare_restart
from grains_tl.models.precision import precision_hint, round_off
from grains_tl.models.running import (
    attribution_point,
    device_of,
    forward_logits,
    hooked,
    is_bridge,
    resid_post,
    without_image_tokens,
)
from grains_tl.models.state import autograd, require_ready
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel

# what must be exact but for round-off in float32; where precision matters round_off(model) is used
TOLERANCE = 2e-3


def check_model(model: HookedModel) -> pd.DataFrame:
    """What of the package works on this model: runs it on a few random tokens.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.

    Returns:
        One row per check: ``check``, ``ok``, ``detail`` (what was measured, with its unit: nats or a share; or the
        error) and ``needed_for``: what not to rely on where ``ok`` is False. What counts as equal depends on the dtype
        (2e-3 nats in float32, 0.2 in float16, 0.5 in bfloat16). Nothing is raised. A restart that is not
        exact costs time, not accuracy: sweeps then run the whole model.

    Examples:
        >>> check_model(model)                       # doctest: +SKIP
        >>> check_model(model).query("not ok")       # doctest: +SKIP
    """
    checks: list[tuple[str, str, Callable[[], tuple[bool, str]]]] = [
        ("eval mode", "anything", lambda: _eval_mode(model)),
        ("tokenizer", "anything with text", lambda: _tokenizer(model)),
        ("hook points", "attribution, steering", lambda: _hook_points(model)),
        ("logits at kept positions only", "scoring", lambda: _kept_logits(model)),
        ("residual parts sum up", "direct effects of heads and MLPs", lambda: _residual_sum(model)),
        ("an edit at a layer changes nothing before it", "steering, patching", lambda: _edit_is_local(model)),
        ("an edit at a position changes nothing before it", "scopes, masking", lambda: _edit_is_causal(model)),
        ("steering at alpha 0 and after a run is bit-exact", "steering", lambda: _leaves_no_trace(model)),
        ("gradients at the attribution point", "gradient methods", lambda: _gradients(model)),
        ("left padding equals right padding", "batches", lambda: _padding(model)),
        ("cached decoding equals uncached", "generation", lambda: _decoding(model)),
        ("restart from a cached residual", "fast sweeps", lambda: _restart(model)),
        ("attention knock-out", 'mask="attention"', lambda: _knock_out(model)),
    ]
    rows = []
    for name, needed_for, check in checks:
        try:
            ok, detail = check()
        except Exception as error:  # the table is the place for any failure of a new architecture
            ok, detail = False, f"{type(error).__name__}: {error}"
        rows.append({"check": name, "ok": ok, "detail": detail, "needed_for": needed_for})
    return pd.DataFrame(rows)


def _eval_mode(model: HookedModel) -> tuple[bool, str]:
    require_ready(model)
    bad = [name for name, p in model.named_parameters() if not _finite(p)]
    absent = sum(p.device.type == "meta" for p in model.parameters())
    said = f"no dropout, {'weights in memory' if absent else 'all weights'} finite"
    return not bad, f"NaN or inf in {bad[:3]}" if bad else said + (f"; {absent} are offloaded" if absent else "")


def _finite(parameter: Tensor) -> bool:
    if parameter.device.type == "meta":  # offloaded: it comes for each pass
        return True
    try:
        return bool(torch.isfinite(parameter).all())
    except NotImplementedError:  # quantised weights are whole numbers behind an interface that may lack this
        return True


def _tokenizer(model: HookedModel) -> tuple[bool, str]:
    return True, token_rules(model).describe()


def _ids(model: HookedModel, n: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    low = min(100, int(model.cfg.d_vocab) // 3)  # early ids are often special tokens
    ids = torch.randint(low, int(model.cfg.d_vocab), (1, n), generator=generator)
    return without_image_tokens(model, ids.to(device_of(model)))


def _direction(model: HookedModel) -> Tensor:
    """Any direction but one that a LayerNorm takes out again, as it does with equal numbers."""
    return torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(0))


def _record(model: HookedModel, n: int) -> TokenizedPair:
    ids = _ids(model, n + 5)[0].tolist()
    chosen, rejected = tuple(ids[n : n + 2]), tuple(ids[n + 2 : n + 5])
    return TokenizedPair(tuple(ids[:n]), chosen, rejected, (True,) * n, ("",) * n)


def _capture(model: HookedModel, names: list[str], hooks: Any = ()) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> None:
            seen[name] = act.detach().clone()

        return hook_fn

    ids = _ids(model)
    every = torch.arange(ids.shape[1], device=ids.device)
    with torch.no_grad():
        logits = forward_logits(model, ids, torch.ones_like(ids), every, [*hooks, *((n, keep(n)) for n in names)])
    return seen, logits


def _all_layers(model: HookedModel) -> list[str]:
    return [resid_post(layer) for layer in range(int(model.cfg.n_layers))]


def _hook_points(model: HookedModel) -> tuple[bool, str]:
    wanted = [attribution_point(model), *_all_layers(model)]
    seen, _ = _capture(model, wanted)
    silent = [name for name in wanted if name not in seen]
    return not silent, f"{len(wanted)} fire" if not silent else f"silent: {silent}"


def _kept_logits(model: HookedModel) -> tuple[bool, str]:
    ids = _ids(model)
    with torch.no_grad():
        part = forward_logits(model, ids, torch.ones_like(ids), torch.tensor([2, 5], device=ids.device))
        return _close(model, part, model(ids)[:, [2, 5]])


def _residual_sum(model: HookedModel) -> tuple[bool, str]:
    errors = []
    for layer in range(int(model.cfg.n_layers)):
        names = [f"blocks.{layer}.hook_{part}" for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        seen, _ = _capture(model, names)
        pre, attn, mlp, post = (seen[name].float() for name in names)
        errors.append(((pre + attn + mlp - post).norm() / post.norm()).item())
    share = round_off(model)[1]
    return all(e < share for e in errors), f"largest relative error {max(errors):.1e}"  # NaN is not small


def _edit_is_local(model: HookedModel) -> tuple[bool, str]:
    layer = int(model.cfg.n_layers) // 2
    base, _ = _capture(model, _all_layers(model))
    edit = steer_hook(layer, _direction(model), 1.0, operator="add")
    seen, _ = _capture(model, _all_layers(model), edit)
    before = all(torch.equal(base[resid_post(i)], seen[resid_post(i)]) for i in range(layer))
    after = not torch.equal(base[resid_post(layer)], seen[resid_post(layer)])
    return before and after, f"edited after layer {layer}"


def _edit_is_causal(model: HookedModel) -> tuple[bool, str]:
    ids = _ids(model)
    at = ids.shape[1] // 2
    here = torch.zeros_like(ids, dtype=torch.bool)
    here[0, at] = True
    edit = steer_hook(0, _direction(model), 1.0, operator="add", positions=here)
    _, base = _capture(model, [])
    _, moved = _capture(model, [], edit)
    before = (base[:, :at] - moved[:, :at]).abs().max().item()
    after = (base[:, at:] - moved[:, at:]).abs().max().item()
    return before < TOLERANCE < after, f"logits before move by up to {before:.1e}, from there on by {after:.2g}"


def _decoding(model: HookedModel) -> tuple[bool, str]:
    ids, n_new = _ids(model), 4
    edit = steer_hook(0, _direction(model), 1.0)
    with torch.no_grad(), torch.random.fork_rng(), hooked(model, edit):
        runs = [_greedy(model, ids, n_new, cache)[0, ids.shape[1] :].tolist() for cache in (True, False)]
    return runs[0] == runs[1] and bool(runs[0]), f"steered greedy tokens {runs[0]} and {runs[1]}"


def _greedy(model: HookedModel, ids: Tensor, n_new: int, cache: bool) -> Tensor:
    if is_bridge(model):
        inner = model.original_model
        mask = torch.ones_like(ids)
        return inner.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, use_cache=cache
        )
    return model.generate(
        ids, max_new_tokens=n_new, do_sample=False, use_past_kv_cache=cache, stop_at_eos=False, verbose=False
    )


def _leaves_no_trace(model: HookedModel) -> tuple[bool, str]:
    unit = _direction(model)
    _, base = _capture(model, [])
    _, zero = _capture(model, [], steer_hook(0, unit, 0.0))
    _, moved = _capture(model, [], steer_hook(0, unit, 50.0))
    _, again = _capture(model, [])
    ok = torch.equal(base, zero) and torch.equal(base, again) and not torch.equal(base, moved)
    return ok, f"steered logits move by up to {(moved - base).abs().max():.2g}"


def _gradients(model: HookedModel) -> tuple[bool, str]:
    ids = _ids(model)
    leaf: list[Tensor] = []

    def hook_fn(act: Tensor, hook: Any) -> Tensor:
        leaf.append(act.detach().requires_grad_(True))
        return leaf[0]

    with autograd(model):
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits = forward_logits(model, ids, torch.ones_like(ids), last, [(attribution_point(model), hook_fn)])
        (grad,) = torch.autograd.grad(logits.max(), leaf[0])
    ok = bool(torch.isfinite(grad).all()) and bool((grad[0].norm(dim=-1) > 0).all())
    return ok, f"norms {grad[0].norm(dim=-1).min():.2g} to {grad[0].norm(dim=-1).max():.2g}"


def _padding(model: HookedModel) -> tuple[bool, str]:
    records = [_record(model, 4), _record(model, 8)]
    with torch.no_grad():
        left, right = (
            batch_logprobs(model, scoring_batch(model, records, padding_side=side)) for side in ("left", "right")
        )
    return _close(model, left, right)


def _restart(model: HookedModel) -> tuple[bool, str]:
    batch = scoring_batch(model, [_record(model, 4), _record(model, 8)])
    exact = prepare_restart(model, batch, [int(model.cfg.n_layers) // 2]).exact
    return exact, "exact" if exact else "not exact: sweeps use full runs instead"


def _knock_out(model: HookedModel) -> tuple[bool, str]:
    ids = _ids(model)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[0, 3] = True
    _, base = _capture(model, [])
    other = ids.clone()
    other[0, 3] = ids[0, 4]
    hooks = mask_hook(model, masked, "attention")
    every = torch.arange(ids.shape[1], device=ids.device)
    with torch.no_grad(), hooked(model, []):
        a, b = (forward_logits(model, x, torch.ones_like(x), every, hooks) for x in (ids, other))
    # with the token hidden, what it is must not matter to any later position
    difference = (a[:, 4:] - b[:, 4:]).abs().max().item()
    changed = not torch.equal(a[:, 4:], base[:, 4:])
    return difference < TOLERANCE and changed, f"a hidden token still moves logits by {difference:.1e}"


def _close(model: HookedModel, a: Tensor, b: Tensor) -> tuple[bool, str]:
    bad = [int((~torch.isfinite(x)).sum()) for x in (a, b)]
    if any(bad):
        return False, f"{sum(bad)} of {a.numel() + b.numel()} numbers are NaN or inf; {precision_hint(model)}"
    difference = (a.float() - b.float()).abs().max().item()
    return difference < round_off(model)[0], f"largest difference {difference:.1e}"
