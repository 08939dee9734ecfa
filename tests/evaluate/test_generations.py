"""Generated texts beside each other: what the table says against plain Hugging Face, and what the page shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from tests.evaluate.test_sweep import vectors_of
from tests.helpers.oracles import edited, steered

PROMPTS = ["the film was", "the food in this hotel <b> was very"]


def test_figures_are_those_of_plain_runs(bridge: Any, hf: Any) -> None:
    vectors = vectors_of()
    steering = vectors.steering(9.0, 1, positions="generated")
    found = gr.evaluate.compare_generations(bridge, steering, PROMPTS, [0.4, -0.4], max_new_tokens=6).table
    assert found["alpha"].tolist() == [-0.4, 0.0, 0.4] * 2
    for _, row in found.iterrows():
        step = vectors.steering(row["alpha"], 1, positions="generated")
        assert row["text"] == gr.generate(bridge, row["prompt"], step, max_new_tokens=6)[0]
        prompt, both = (bridge.tokenizer(t)["input_ids"] for t in (row["prompt"], row["prompt"] + row["text"]))
        ids, n = torch.tensor([both]), len(prompt)
        push = row["alpha"] * vectors.resid_norms[1] * vectors.directions[1]

        def edit(act: Any, push: Any = push, n: int = n) -> Any:
            late = torch.arange(act.shape[1])[None, :, None] >= n
            return torch.where(late, steered(act, push, renorm=True), act)

        with torch.no_grad():
            base = hf(ids).logits.log_softmax(-1)[0, n - 1 : -1]
            with edited(hf, 1, edit):
                moved = hf(ids).logits.log_softmax(-1)[0, n - 1 : -1]
        target = ids[0, n:, None]
        assert row["logprob_change"] == pytest.approx((moved - base).gather(1, target).mean().item(), abs=1e-4)
        assert row["kl"] == pytest.approx((moved.exp() * (moved - base)).sum(-1).mean().item(), abs=1e-4)
    unsteered = found[found["alpha"] == 0]
    assert (unsteered[["changed", "logprob_change", "kl"]].abs() < 1e-6).all(axis=None)


def test_the_page_marks_new_words_and_escapes_data(bridge: Any) -> None:
    found = gr.evaluate.compare_generations(bridge, vectors_of().steering(0.1, 1), PROMPTS, [0.5], max_new_tokens=6)
    page = found._repr_html_()
    assert "&lt;b&gt;" in page and "<b> was" not in page and "<script" not in page
    assert "unsteered" in page and "alpha +0.5" in page and page.count("KL ") == 3
    changed = found.table[found.table["alpha"] == 0.5]["changed"]
    assert (changed > 0).any() and "background:" in page


def test_words_are_compared_in_their_order() -> None:
    from grains_tl.evaluate.generations import _changed_words, _share_changed

    assert _changed_words("a good film", "a very good old film") == [
        ("a", False), ("very", True), ("good", False), ("old", True), ("film", False),
    ]  # fmt: skip
    assert (_share_changed("a b", "a b"), _share_changed("a b", "c"), _share_changed("", ""), _share_changed("a", "")) == (
        0.0, 1.0, 0.0, 1.0,
    )  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_compared_is_refused(bridge: Any) -> None:
    steering = vectors_of().steering(0.1, 1)
    compare: Any = gr.evaluate.compare_generations
    with pytest.raises(ValueError, match="expected vectors.steering"):
        compare(bridge, steering.hooks(), PROMPTS, [0.1])
    with pytest.raises(ValueError, match="no alphas"):
        compare(bridge, steering, PROMPTS, [])
    with pytest.raises(ValueError, match="alpha"):
        compare(bridge, steering, PROMPTS, [float("nan")])
    with pytest.raises(ValueError, match="clamp"):
        compare(bridge, vectors_of().steering(0.1, 1, operator="clamp"), PROMPTS, [0.1])
