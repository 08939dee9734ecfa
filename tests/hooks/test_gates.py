"""Gates that read at a layer of their own: what is steered, in scoring, generation, sweeps and files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.hooks import CosineGate, FunctionGate, ProbeGate
from grains_tl.models.running import forward_logits
from grains_tl.tokens.prompts import prompt_inputs
from tests.conftest import tiny_hf
from tests.helpers.oracles import block, first_tensor, pair_logprobs, residuals, steered

ATOL = 1e-4  # nats, float32 round-off
PROMPTS = [
    "the film was", "the food in this hotel was very", "question : was the soup cold ? answer :", "we liked this room",
    "two three four five", "it was bad and we hated it .",
]  # fmt: skip
ALPHA, NORM = 0.9, 20.0
NORMS: Any = torch.linalg.norm
NUMBER: Any = 3
ROW: Any = "row"


def vectors() -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), NORM), {})


def direction() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(5))


def prompt_ids(model: Any) -> list[list[int]]:
    return [prompt_inputs(model, prompt)[0] for prompt in PROMPTS]


def end_readings(hf: Any, rows: list[list[int]], layer: int = 0) -> list[float]:
    """What a linear gate reads at each prompt's end, from the plain model."""
    return [float(residuals(hf, row)[layer, -1] @ direction()) for row in rows]


def some_gate(hf: Any, rows: list[list[int]], decide: Any = "prompt_end", layer: int = 0) -> ProbeGate:
    """One that opens for about half of the prompts (or of their tokens)."""
    if decide == "prompt_end":
        values = sorted(end_readings(hf, rows, layer))
    else:
        values = sorted(float(x) for row in rows for x in residuals(hf, row)[layer] @ direction())
    middle = len(values) // 2
    return ProbeGate(direction(), layer, (values[middle - 1] + values[middle]) / 2, decide)


@contextmanager
def gated_model(hf: Any, gate: ProbeGate, layer: int, prompt_len: int) -> Iterator[None]:
    """Plain PyTorch hooks on one uncached row: read at the gate's layer, step at the other."""
    step, opened = ALPHA * NORM * vectors().directions[layer], [torch.tensor(False)]

    def read(module: Any, args: Any, output: Any) -> None:
        over = first_tensor(output)[0] @ direction() > gate.threshold
        opened[0] = over if gate.decide == "token" else over[prompt_len - 1].expand(len(over))

    def push(module: Any, args: Any, output: Any) -> Any:
        act = first_tensor(output)
        new = torch.where(opened[0][None, :, None], steered(act, step, renorm=True), act)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [block(hf, gate.layer).register_forward_hook(read), block(hf, layer).register_forward_hook(push)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_greedy(hf: Any, row: list[int], gate: ProbeGate, layer: int, n_new: int) -> list[int]:
    ids = list(row)
    for _ in range(n_new):
        with torch.no_grad(), gated_model(hf, gate, layer, len(row)):
            ids.append(int(hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(row) :]


# -- against plain hooks on the Hugging Face model --------------------------------------------------------------------


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (1, 1)])
def test_scores_are_those_of_plain_hooks(model: Any, hf: Any, pairs: Any, decide: Any, layers: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    gate = some_gate(hf, [list(t.prompt) for t in tokenized], decide, layers[0])
    steering = vectors().steering(ALPHA, layers[1], gate=gate)
    found = gr.score_pairs(model, pairs, steering)
    base = gr.score_pairs(model, pairs)
    for row, plain, t in zip(found, base, tokenized, strict=True):
        with torch.no_grad(), gated_model(hf, gate, layers[1], len(t.prompt)):
            wanted = [float(x) for x in pair_logprobs(hf, t)]
        assert row.tolist() == pytest.approx(wanted, abs=ATOL)
        open_ = float(residuals(hf, t.prompt)[layers[0], -1] @ direction()) > gate.threshold
        if decide == "prompt_end":
            assert torch.equal(row, plain) is not open_
    frame = gr.evaluate.record_effects(model, pairs, [steering])  # restarts from cached residuals
    np.testing.assert_allclose(frame["margin"], (found[:, 0] - found[:, 1]).numpy(), atol=ATOL)
    assert frame["layer"].unique().tolist() == [layers[1]]


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
def test_generation_decides_per_row(model: Any, hf: Any, decide: Any) -> None:
    """Cached batches of left-padded rows against single rows decoded without a cache; one list serves many runs."""
    rows = prompt_ids(model)
    gate = some_gate(hf, rows, decide)
    steering = vectors().steering(ALPHA, 1, gate=gate)
    wanted = [plain_greedy(hf, row, gate, 1, 8) for row in rows]
    decoded = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    plain = [text.strip() for text in gr.generate(model, PROMPTS, max_new_tokens=8)]
    assert decoded != plain, "some row is steered"
    for size in (8, 2, 1):
        found = gr.generate(model, PROMPTS, steering, max_new_tokens=8, batch_size=size)
        assert [text.strip() for text in found] == decoded
    again = steering.hooks()  # one list for every run: the state of the last text must not stay
    for prompt, text in zip(PROMPTS, decoded, strict=True):
        assert gr.generate(model, prompt, again, max_new_tokens=8)[0].strip() == text


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
def test_torch_hooks_do_the_same(bridge: Any, decide: Any) -> None:
    hf, rows = tiny_hf(), prompt_ids(bridge)
    gate = some_gate(hf, rows, decide)
    wanted = [plain_greedy(hf, row, gate, 1, 6) for row in rows]
    steering = vectors().steering(ALPHA, 1, gate=gate)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    with steering.torch_hooks(hf):
        for _ in range(2):
            out = hf.generate(input_ids=ids, **options)[:, width:].tolist()
            assert [row[: len(w)] for row, w in zip(out, wanted, strict=True)] == wanted
    with steering.torch_hooks(hf, prompt_len=width):
        out = hf.generate(input_ids=ids, use_cache=False, **options)[:, width:].tolist()
        assert [row[: len(w)] for row, w in zip(out, wanted, strict=True)] == wanted
    if decide == "prompt_end":
        with steering.torch_hooks(hf), pytest.raises(ValueError, match="prompt_len"):
            hf.generate(input_ids=ids, use_cache=False, **options)


def test_a_sweep_shares_passes_and_costs_take_gates(model: Any, hf: Any, pairs: Any) -> None:
    """Several alphas and gates in one pass: each setting keeps its own decision."""
    rows = [list(t.prompt) for t in gr.tokens.tokenize_pairs(model, pairs)]
    gates = [some_gate(hf, rows, decide) for decide in ("prompt_end", "token")]
    steps = [vectors().steering(alpha, 1, gate=g) for alpha in (0.2, 0.5, 0.9) for g in (*gates, None)]
    frame = gr.evaluate.record_effects(model, pairs, steps)
    together = frame["margin"].to_numpy().reshape(len(steps), -1)
    alone = [gr.score_pairs(model, pairs, step) for step in steps]
    np.testing.assert_allclose(together, [(x[:, 0] - x[:, 1]).numpy() for x in alone], atol=ATOL)
    texts = ["the film was good and we liked it .", "question : was the soup cold ? answer : no"]
    costs = gr.evaluate.text_costs(model, steps, texts)
    for number, step in enumerate(steps):
        one = gr.evaluate.text_costs(model, [step], texts)
        np.testing.assert_allclose(costs["kl"][2 * number : 2 * number + 2], one["kl"], atol=1e-5)


# -- gates that always or never open ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
@pytest.mark.parametrize("kind", [ProbeGate, CosineGate])
@pytest.mark.parametrize("operator", ["add_renorm", "add", "rotate", "clip", "ablate", "clamp"])
def test_always_is_no_gate_and_never_is_the_base_bit_for_bit(
    model: Any, pairs: Any, kind: Any, decide: Any, operator: Any
) -> None:
    v = vectors()
    always, never = (kind(direction(), 0, t, decide) for t in (-math.inf, math.inf))
    plain = v.steering(ALPHA, [1, 2], operator=operator)
    steps = [v.steering(ALPHA, [1, 2], operator=operator, gate=g) for g in (always, never)]
    assert torch.equal(gr.score_pairs(model, pairs, steps[0]), gr.score_pairs(model, pairs, plain))
    assert torch.equal(gr.score_pairs(model, pairs, steps[1]), gr.score_pairs(model, pairs))
    ids = torch.tensor([[3, 5, 8, 12, 6]])
    mask, keep = torch.ones_like(ids), torch.arange(5)
    logits = [forward_logits(model, ids, mask, keep, h.for_prompt(3) if h else None) for h in (*steps, plain, None)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])


def test_alpha_zero_changes_no_bit(model: Any, hf: Any, pairs: Any) -> None:
    gate = ProbeGate(direction(), 0, -math.inf)
    assert torch.equal(gr.score_pairs(model, pairs, vectors().steering(0, 1, gate=gate)), gr.score_pairs(model, pairs))
    frame = gr.evaluate.record_effects(model, pairs, [vectors().steering(0, 1, gate=gate)])
    assert frame["change"].tolist() == [0.0] * len(pairs)


def test_user_functions_and_users_own_hooks(model: Any, hf: Any, pairs: Any) -> None:
    gate = some_gate(hf, [list(t.prompt) for t in gr.tokens.tokenize_pairs(model, pairs)])
    own = FunctionGate(lambda resid: resid @ direction() > gate.threshold, 0)
    wanted = gr.score_pairs(model, pairs, vectors().steering(ALPHA, 1, gate=gate))
    torch.testing.assert_close(gr.score_pairs(model, pairs, vectors().steering(ALPHA, 1, gate=own)), wanted)
    seen: list[str] = []

    def users(act: Tensor, hook: Any) -> None:
        seen.append("user")

    ids = torch.tensor([[3, 5, 8, 12, 6]])
    hooks = vectors().hooks(ALPHA, [1], gate=ProbeGate(direction(), 0, -math.inf))
    point = "blocks.0.hook_resid_post"
    both = model.run_with_hooks(ids, fwd_hooks=[(point, users), *hooks, ("blocks.2.hook_resid_post", users)])
    alone = model.run_with_hooks(ids, fwd_hooks=vectors().hooks(ALPHA, [1]))
    assert torch.equal(both, alone) and seen == ["user", "user"]


# -- fitting and calibrating ------------------------------------------------------------------------------------------

TARGETS = [f"the {a} was {b}" for a in ("film", "food", "hotel", "soup") for b in ("great", "awful", "good", "bad")]
OTHERS = [f"question : {a} {b} ?" for a in ("one", "two", "three", "four") for b in ("five", "six", "is", "it", "we")]


@pytest.mark.parametrize("decide", ["prompt_end", "token"])
def test_a_fitted_probe_is_scikit_learns(model: Any, hf: Any, decide: Any) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    gate = ProbeGate.fit(model, TARGETS, OTHERS, 1, decide=decide, strength=0.5)
    rows = [[residuals(hf, prompt_inputs(model, p)[0])[1] for p in side] for side in (TARGETS, OTHERS)]
    sides = [torch.cat([r if decide == "token" else r[-1:] for r in side]) for side in rows]
    x, y = torch.cat(sides).double().numpy(), [1] * len(sides[0]) + [0] * len(sides[1])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, class_weight="balanced", max_iter=2000, tol=1e-8))
    probe.fit(x, y)
    readings = torch.cat([*gate.readings(model, TARGETS), *gate.readings(model, OTHERS)]).numpy()
    np.testing.assert_allclose(readings, probe.decision_function(x), atol=2e-2, rtol=1e-2)


def test_a_cosine_gate_reads_cosines(model: Any, hf: Any) -> None:
    gate = CosineGate.fit(model, TARGETS, OTHERS, 1)
    yes, no = (torch.stack([residuals(hf, prompt_inputs(model, p)[0])[1, -1] for p in x]) for x in (TARGETS, OTHERS))
    centre, apart = (yes.mean(0) + no.mean(0)) / 2, yes.mean(0) - no.mean(0)
    wanted = torch.cosine_similarity(yes - centre, apart[None])
    torch.testing.assert_close(torch.cat(gate.readings(model, TARGETS)), wanted, atol=1e-4, rtol=1e-4)


def test_the_threshold_keeps_the_rate() -> None:
    """Over many draws the share of further neutral readings that exceed it is at most the rate, and close to it."""
    from grains_tl.hooks.gate_fitting import threshold_at

    generator = torch.Generator().manual_seed(0)
    for rate, n in ((0.05, 19), (0.1, 30), (0.25, 11)):
        draws = torch.randn(4000, n + 1, generator=generator)
        fires = [float(row[-1]) > threshold_at(row[:-1], rate, "prompts") for row in draws]
        assert rate - 1 / (n + 1) - 0.02 < np.mean(fires) < rate + 0.015


def test_calibration_on_other_prompts(model: Any) -> None:
    gate = ProbeGate.fit(model, TARGETS[::2], OTHERS[::2], 1).calibrated(
        model, OTHERS[1::2], 0.1, targets=TARGETS[1::2]
    )
    fires = [bool((r > gate.threshold).any()) for r in gate.readings(model, OTHERS[1::2])]
    assert sum(fires) <= 1
    with pytest.raises(ValueError, match="used to fit"):
        gate.calibrated(model, OTHERS, 0.1)
    with pytest.raises(ValueError, match="at least 99"):
        gate.calibrated(model, OTHERS[1::2], 0.01)
    opposite = ProbeGate(-gate.direction, gate.layer)
    with pytest.raises(ValueError, match="none of the"):
        opposite.calibrated(model, OTHERS[1::2], 0.1, targets=TARGETS[1::2])


def test_records_are_read_by_their_prompts(model: Any, pairs: Any) -> None:
    gate = ProbeGate(direction(), 1)
    texts = gate.readings(model, [p.prompt for p in pairs])
    torch.testing.assert_close(torch.cat(gate.readings(model, pairs)), torch.cat(texts))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ProbeGate.fit(m, TARGETS, [], 1), "neutral: 0"),
        (lambda m: ProbeGate.fit(m, TARGETS[:1], OTHERS, 1), "targets: 1"),
        (lambda m: CosineGate.fit(m, TARGETS, [*OTHERS, TARGETS[0]], 1), "each has one kind"),
        (lambda m: ProbeGate.fit(m, TARGETS, OTHERS, 7), "do not exist"),
        (lambda m: ProbeGate.fit(m, "the film", OTHERS, 1), "list of texts"),
        (lambda m: ProbeGate(direction(), 1, decide=ROW), "decide"),
        (lambda m: ProbeGate(direction(), -1), "layers count from 0"),
        (lambda m: ProbeGate(torch.zeros(32), 1), "norm 0"),
        (lambda m: ProbeGate(direction(), 1, math.nan), "threshold"),
        (lambda m: CosineGate(direction(), 1, centre=torch.zeros(3)), "centre"),
        (lambda m: FunctionGate(NUMBER, 1), "function"),
        (lambda m: vectors().steering(0.2, [0, 2], gate=ProbeGate(direction(), 1)), "below it are steered"),
        (lambda m: gr.hooks.steer_hook(0, direction(), 1.0, gate=ProbeGate(direction(), 1)), "below it are steered"),
    ],
)
def test_what_cannot_be_meant_is_refused(bridge: Any, unchecked: None, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(bridge)


def test_runs_without_the_prompt_or_the_reading_hook_are_refused(model: Any) -> None:
    steering = vectors().steering(ALPHA, 1, gate=ProbeGate(direction(), 0, -math.inf))
    with pytest.raises(ValueError, match="prompt_len=1"):
        model.run_with_hooks(torch.tensor([[3]]), fwd_hooks=steering.hooks())
    model.run_with_hooks(torch.tensor([[3]]), fwd_hooks=steering.for_prompt(1))
    with pytest.raises(ValueError, match="did not run"):
        model.run_with_hooks(torch.tensor([[3, 4]]), fwd_hooks=steering.hooks()[1:])
    hooks = steering.hooks()
    model.run_with_hooks(torch.tensor([[3, 4], [5, 6]]), fwd_hooks=hooks)
    with pytest.raises(ValueError, match="decided for 2 rows"):
        model.run_with_hooks(torch.tensor([[3]]), fwd_hooks=hooks)
    bad = vectors().steering(ALPHA, 1, gate=FunctionGate(lambda resid: resid.sum(-1), 0))
    with pytest.raises(ValueError, match="expected booleans"):
        model.run_with_hooks(torch.tensor([[3, 4]]), fwd_hooks=bad.hooks())


# -- keys and files ---------------------------------------------------------------------------------------------------


def test_keys_tell_gates_apart() -> None:
    v, d = vectors(), direction()
    gates = [ProbeGate(d, 0), ProbeGate(d, 1), ProbeGate(d, 0, 0.5), ProbeGate(d, 0, decide="token"),
             ProbeGate(d, 0, bias=1.0), CosineGate(d, 0), CosineGate(d, 0, centre=d), FunctionGate(NORMS, 0, name="a"),
             FunctionGate(NORMS, 0, name="b")]  # fmt: skip
    keys = {v.steering(0.2, 1, gate=g).key for g in gates}
    assert len(keys) == len(gates) and "" not in keys
    assert v.steering(0.2, 1, gate=FunctionGate(NORMS, 0)).key == ""


@pytest.mark.parametrize("threshold", [0.3, -math.inf])
def test_gates_are_saved_with_vectors(tmp_path: Path, threshold: float) -> None:
    d = direction()
    for gate in (
        ProbeGate(d, 0, threshold, "token", frozenset({"a"}), 0.1),
        CosineGate(d, 1, threshold, centre=d / 3),
    ):
        path = vectors().with_gate(gate).save(tmp_path / "v.safetensors")
        again = gr.load_vectors(path).gate
        assert type(again) is type(gate) and again.key == gate.key and again.fitted_on == gate.fitted_on
        assert torch.equal(again.direction, gate.direction)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(again(x), gate(x))
    assert vectors().gate is None
    with pytest.raises(ValueError, match="cannot be saved"):
        vectors().with_gate(FunctionGate(NORMS, 0))
    broken = gr.SteeringVectors(**{**vars(vectors()), "info": {"gate": {"kind": "probe"}}})
    with pytest.raises(ValueError, match="broken"):
        _ = broken.gate
