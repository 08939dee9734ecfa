"""torch.autocast around the package: what is rounded, what is not, and what is written down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.attribution import sharing
from grains_tl.inference.logprobs import score_batches, target_logits
from grains_tl.inference.restart import prepare_restart
from grains_tl.models.identity import model_identity
from grains_tl.models.precision import autocast_dtype
from grains_tl.models.running import forward_logits
from tests.conftest import tiny_model


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def is_rounded(x: torch.Tensor) -> bool:
    """Whether every number is one that bfloat16 can hold; of random float32 numbers one in 65536 is."""
    return torch.equal(x.float(), x.bfloat16().float())


def test_blocks_are_rounded_and_logits_are_not(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    _, batch = next(iter(score_batches(model, tokenized)))
    seen: dict[str, torch.Tensor] = {}
    names = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    hooks = [(name, lambda act, hook, name=name: seen.update({name: act})) for name in names]
    with torch.no_grad(), bfloat16():
        logits = target_logits(model, batch, hooks)
        kept = forward_logits(model, batch.ids, batch.attention_mask, torch.tensor([1, 2]))
    assert [seen[name].dtype for name in names] == [torch.bfloat16, torch.float32]
    assert logits.dtype == kept.dtype == torch.float32
    assert not is_rounded(logits) and not is_rounded(kept)


def test_margins_are_those_of_hugging_face_under_autocast(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with bfloat16():
        found = gr.score_pairs(bridge, tokenized)
    for row, pair in zip(found, tokenized, strict=True):
        for value, response in zip(row, (pair.chosen, pair.rejected), strict=True):
            ids = torch.tensor([[*pair.prompt, *response]])
            with torch.no_grad():
                with bfloat16():
                    hidden = hf.model(ids).last_hidden_state.float()
                logprobs = (hidden @ hf.lm_head.weight.T)[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
            wanted = logprobs.gather(1, torch.tensor(response)[:, None]).sum()
            assert float(value) == pytest.approx(float(wanted), abs=0.05)  # attention is rounded in another place


def test_an_exception_in_the_unembedding_leaves_everything_as_it_was(
    bridge: Any, pairs: list[gr.PreferencePair]
) -> None:
    def fail(act: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("stop")

    ids, tokenized = torch.tensor([[3, 4, 5]]), gr.tokens.tokenize_pairs(bridge, pairs)
    with torch.no_grad(), bfloat16():
        before = bridge(ids)
        with pytest.raises(RuntimeError, match="stop"):
            gr.score_pairs(bridge, tokenized, [("unembed.hook_out", fail)])
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(bridge(ids), before)  # rounded as before: no hook of ours is left
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("operator", ["add", "add_renorm", "ablate", "clamp"])
def test_hooks_are_exact(operator: Any) -> None:
    act, direction = torch.randn(2, 5, 16), torch.randn(16)
    ((_, fn),) = gr.hooks.steer_hook(0, direction, 0.3, operator=operator)
    weights, store = torch.rand(2, 5), torch.zeros(2, 2, 16)
    hooks = [gr.hooks.cache_hook([0], weights, store[:, i : i + 1])[0][1] for i in range(2)]
    outside = fn(act, hook=None)
    hooks[0](act, hook=None)
    with bfloat16():
        assert torch.equal(fn(act, hook=None), outside)
        hooks[1](act, hook=None)
    assert torch.equal(store[:, 0], store[:, 1])


@pytest.mark.parametrize("method", ["leave_one_out", "integrated_gradients", "attention_aware"])
def test_scores_keep_their_ranks(model: Any, pairs: list[gr.PreferencePair], method: Any) -> None:
    options: dict[str, Any] = {"method": method, "reference": "zero" if method == "integrated_gradients" else None}
    full = [gr.attribute(model, pair, **options) for pair in pairs]
    with bfloat16():
        half = [gr.attribute(model, pair, **options) for pair in pairs]
    assert any(not torch.equal(a.scores, b.scores) for a, b in zip(full, half, strict=True))
    assert (
        gr.faithfulness.rank_agreement({"float32": full, "bfloat16": half})["spearman"].min() > 0.9
    )  # a few tokens: ties swap


def test_fast_paths_stay_on(bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Round-off larger than float32's does not send shared rows and restarts back to plain runs; faults still do."""
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    _, batch = next(iter(score_batches(bridge, tokenized)))
    half = tiny_model("bridge").to(torch.bfloat16)
    with bfloat16():
        assert prepare_restart(bridge, batch, [0], copies=True).exact
        assert sharing.shares_prompts(bridge, tokenized, "sum")
    assert prepare_restart(half, batch, [0]).exact
    assert sharing.shares_prompts(half, tokenized, "sum")
    monkeypatch.setattr(sharing, "_sees", lambda pos, *_: pos[:, None, :] <= pos[:, :, None])
    with bfloat16():
        assert not sharing.shares_prompts(bridge, tokenized, "sum")


def test_what_is_written_down(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    file = tmp_path / "partial.jsonl"
    full = gr.build_vectors(bridge, pairs, top_k=1, checkpoint=file)
    with bfloat16():
        assert autocast_dtype(bridge) == "bfloat16"
        half = gr.build_vectors(bridge, pairs, top_k=1, checkpoint=file)
        identity = model_identity(bridge)
        half.require_match(bridge)
    assert len(file.read_text().splitlines()) == 2 * len(pairs)  # not taken from the float32 rows
    assert (full.info["autocast"], half.info["autocast"]) == (None, "bfloat16")
    assert identity == model_identity(bridge)
    assert torch.cosine_similarity(full.raw, half.raw, dim=-1).min() > 0.99


def test_one_table_has_one_precision(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    for first, second in ((None, "bfloat16"), ("bfloat16", None)):
        file = tmp_path / f"{first}.jsonl"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first is not None):
            gr.sweep(bridge, vectors, pairs, alphas=[0.2], checkpoint=file)
            found = file.read_bytes()
            gr.sweep(bridge, vectors, pairs, alphas=[0.2], checkpoint=file)  # goes on
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=second is not None),
            pytest.raises(ValueError, match="autocast, and this run is with|autocast, and this run is under"),
        ):
            gr.sweep(bridge, vectors, pairs, alphas=[0.2], checkpoint=file)
        assert file.read_bytes() == found


@pytest.fixture(scope="module")
def overflowing() -> Any:
    """A tiny Llama in float16 whose residual stream leaves float16's range after block 1, and float32's does not."""
    model = tiny_model("bridge")
    with torch.no_grad():
        model.original_model.model.layers[1].mlp.down_proj.weight *= 1e6
    return model.to(torch.float16)


CALLS: dict[str, Any] = {
    "score_pairs": lambda m, p: gr.score_pairs(m, p),
    "attribute": lambda m, p: gr.attribute(m, p[0]),
    "attribute, gradients": lambda m, p: gr.attribute(m, p[0], method="gradient_x_input"),
    "build_vectors": lambda m, p: gr.build_vectors(m, p),
    "generate": lambda m, p: gr.generate(m, ["the film was"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_overflow_of_float16_is_named(call: str, overflowing: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="float16|bfloat16") as error:
        CALLS[call](overflowing, pairs)
    assert "NaN or inf" in str(error.value)
    assert call != "score_pairs" or "from block 1 on" in str(error.value)


def test_overflow_by_a_step_is_named(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    half = tiny_model("bridge").to(torch.float16)
    far = gr.hooks.steer_hook(1, torch.ones(32), 1e6, operator="add")
    assert gr.score_pairs(half, pairs).isfinite().all()
    with pytest.raises(ValueError, match="from block 1 on with these hooks"):
        gr.score_pairs(half, pairs, far)
    assert gr.score_pairs(bridge, pairs, far).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_model_knows_the_dtype(dtype: torch.dtype, overflowing: Any) -> None:
    """The wiring is the same in half precision; what overflows is not."""
    frame = gr.check_model(tiny_model("bridge").to(dtype))
    assert frame["ok"].all(), frame.to_string()
    frame = gr.check_model(overflowing)
    assert "65504" in frame.set_index("check").loc["left padding equals right padding", "detail"]


@pytest.mark.real
@pytest.mark.parametrize(("method", "least"), [("leave_one_out", 0.9), ("integrated_gradients", 0.98)])
def test_vectors_of_smollm2(smollm2: SimpleNamespace, method: Any, least: float) -> None:
    """Scores keep their order; a vector may differ by a token that was chosen by a hair's breadth."""
    pairs = gr.load_bundled("sentiment", "build")[:3]
    options = {"method": method, "n_steps": 8, "progress": False, "layers": [12, 24]}
    full = gr.build_vectors(smollm2.bridge, pairs, **options)
    with bfloat16():
        half = gr.build_vectors(smollm2.bridge, pairs, **options)
    assert torch.cosine_similarity(full.raw, half.raw, dim=-1).min() > least
