"""What one call does must not show in the next: models, hooks, threads, random state, interruptions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grains_tl as gr
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from tests.conftest import tiny_model

PROMPT = ["the film was very"]


def vectors(seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 8, 9, 14]])).clone()


def interrupted(act: Any, hook: Any) -> Any:
    raise KeyboardInterrupt


def failing(act: Any, hook: Any) -> Any:
    raise RuntimeError("on purpose")


LAST = "blocks.2.hook_resid_post"
BREAKS: dict[str, tuple[type[BaseException], Callable[[Any, Any], Any]]] = {
    "interrupt in generate": (
        KeyboardInterrupt,
        lambda m, p: gr.generate(m, PROMPT, [*vectors().hooks(0.5, [0]), (LAST, interrupted)]),
    ),
    "error in generate": (
        RuntimeError,
        lambda m, p: gr.generate(m, PROMPT, [*vectors().hooks(0.5, [0]), (LAST, failing)]),
    ),
    "NaN in generate": (
        ValueError,
        lambda m, p: gr.generate(m, PROMPT, [(LAST, lambda act, hook: act * float("nan"))]),
    ),
    "error in a nested context": (RuntimeError, lambda m, p: nested(m)),
    "error in score_pairs": (
        RuntimeError,
        lambda m, p: gr.score_pairs(m, gr.tokens.tokenize_pairs(m, p), [(LAST, failing)]),
    ),
}


def nested(model: Any) -> None:
    with model.hooks(fwd_hooks=vectors(0).hooks(0.5, [0])), model.hooks(fwd_hooks=[(LAST, failing)]):
        model(torch.tensor([[3, 5]]))


@pytest.mark.parametrize("name", BREAKS)
def test_the_model_is_what_it_was(name: str, model: Any, pairs: list[gr.PreferencePair]) -> None:
    before, (error, call) = logits(model), BREAKS[name]
    n_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(error):
        call(model, pairs)
    assert torch.equal(logits(model), before)
    assert n_hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert torch.is_grad_enabled()


def test_two_vectors_at_once_and_one_inside_the_other(model: Any) -> None:
    one, two = vectors(0).hooks(0.3, [0]), vectors(1).hooks(-0.4, [1])
    before, ids = logits(model), torch.tensor([[3, 5, 8, 9, 14]])
    with torch.no_grad():
        together = model.run_with_hooks(ids, fwd_hooks=[*one, *two])
        with model.hooks(fwd_hooks=one):
            alone = model(ids).clone()
            with model.hooks(fwd_hooks=two):
                inside = model(ids).clone()
            assert torch.equal(model(ids), alone)
    assert torch.equal(inside, together) and not torch.equal(alone, together)
    assert torch.equal(logits(model), before)


def test_two_models_in_two_threads(pairs: list[gr.PreferencePair]) -> None:
    """One model per thread is safe; one model in two threads is not promised (hooks belong to the model)."""
    models = [tiny_model("bridge"), tiny_model("bridge", "gpt2")]

    def work(model: Any) -> tuple[torch.Tensor, list[str]]:
        built = gr.build_vectors(model, pairs, top_k=1, progress=False)
        return built.raw, gr.generate(model, PROMPT * 3, built.hooks(0.3, [1]), max_new_tokens=6)

    wanted = [work(model) for model in models]
    found: list[Any] = [None, None]

    def keep(i: int) -> None:
        found[i] = work(models[i])

    for _ in range(2):
        threads = [threading.Thread(target=keep, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for (raw, texts), (raw2, texts2) in zip(wanted, found, strict=True):
            assert torch.equal(raw, raw2) and texts == texts2


def test_global_random_states_are_left_alone(model: Any, pairs: list[gr.PreferencePair]) -> None:
    """Python's own state is not asked here: the run-time type checks of these tests draw from it."""
    torch.manual_seed(5), np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    built = gr.build_vectors(model, pairs, top_k=1, progress=False)
    gr.generate(model, PROMPT, built.hooks(0.2, [1]), temperature=1.0, max_new_tokens=3)
    gr.sweep(model, built, pairs, layers=[1], progress=False)
    gr.check_model(model)
    after = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


WORDS = st.lists(st.sampled_from("the film soup was very bad good and not cold".split()), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(WORDS, min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_order_and_padding_of_a_batch_do_not_matter(prompts: list[list[str]], order: Any, bridge: Any) -> None:
    records = gr.tokens.tokenize_pairs(
        bridge, [gr.PreferencePair(" ".join(p), " great", " awful but warm") for p in prompts]
    )
    rows = [batch_logprobs(bridge, scoring_batch(bridge, [r])) for r in records]
    shuffled = list(range(len(records)))
    order.shuffle(shuffled)
    for side in ("left", "right"):
        batch = scoring_batch(bridge, [records[i] for i in shuffled], padding_side=side)  # type: ignore[arg-type]
        found = batch_logprobs(bridge, batch)
        torch.testing.assert_close(found, torch.cat([rows[i] for i in shuffled]), atol=2e-4, rtol=0)
