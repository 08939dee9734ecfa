"""A direction for a word: against the model's own weights, and against TransformerLens' lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from tests.conftest import TL_MAJOR, WORDS, tiny_hf, tiny_model

LAST = 2
GREAT, AWFUL = WORDS.index("great"), WORDS.index("awful")
needs_lens = pytest.mark.skipif(TL_MAJOR < 4, reason="Jacobian lenses came with TransformerLens 4.3")


def unit(row: torch.Tensor) -> torch.Tensor:
    return row / row.norm()


def test_it_is_the_row_of_the_unembedding_behind_the_norm(model: Any) -> None:
    hf = tiny_hf()
    weight = hf.lm_head.weight.detach() * hf.model.norm.weight.detach()
    rows = weight - weight.mean(0)
    vectors = gr.vectors.word_vectors(model, "great")
    assert vectors.layers == (LAST,)
    torch.testing.assert_close(vectors.directions[0], unit(rows[GREAT]), atol=1e-4, rtol=0)
    both = gr.vectors.word_vectors(model, "great", [0, LAST], against="awful")
    expected = unit(unit(rows[GREAT]) - unit(rows[AWFUL]))
    for row in both.directions:
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert both.info["tokens"] == [GREAT] and both.info["against"] == [AWFUL]
    assert "output of block" in both.info["layer_convention"]


def test_a_small_step_raises_the_word_most(model: Any) -> None:
    ids = torch.tensor([[1, 3, 5, 8]])
    vectors = gr.vectors.word_vectors(model, "great")
    assert bool((vectors.resid_norms > 0).all())
    with torch.no_grad():
        before = model(ids)[0, -1].log_softmax(-1)
        after = model.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.1))[0, -1].log_softmax(-1)
    assert int((after - before).argmax()) == GREAT


def test_the_file_keeps_it(model: Any, tmp_path: Path) -> None:
    vectors = gr.vectors.word_vectors(model, ["great", "good"], 1)
    again = gr.load_vectors(vectors.save(tmp_path / "v.safetensors"), model)
    assert torch.equal(again.directions, vectors.directions) and again.info["words"] == ["great", "good"]
    with pytest.raises(ValueError, match="d_model|fingerprint"):
        gr.load_vectors(tmp_path / "v.safetensors", tiny_model(architecture="gpt2"))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {}, "empty"),
        ("great film", {}, "2 tokens"),
        ("", {}, "as text"),
        ("great", {"against": "great"}, "cancel"),
        ("great", {"layers": 7}, "layer"),
    ],
)
def test_refused(bridge: Any, words: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.vectors.word_vectors(bridge, words, **options)


@pytest.fixture(scope="module")
def lens() -> Any:
    from transformer_lens.tools.analysis import JacobianLens

    texts = ["the film was great and we liked it but the soup was cold", "no the hotel was bad and they hated the food"]
    return JacobianLens.fit(
        tiny_model("bridge"), texts, corpus="tests", skip_first_positions=1, dim_batch=16, show_progress=False
    )


@needs_lens
def test_a_lens_gives_its_own_vectors(lens: Any, tmp_path: Path) -> None:
    model, column = tiny_model("bridge"), tiny_hf().lm_head.weight.detach()[GREAT]
    lens.save(str(tmp_path / "lens.pt"), dtype=torch.float32)
    vectors = gr.vectors.word_vectors(model, "great", lens=tmp_path / "lens.pt")
    assert vectors.layers == (0, 1)  # the last block's output is read by the unembedding itself
    for layer, row in zip(vectors.layers, vectors.directions, strict=True):
        torch.testing.assert_close(row, unit(lens.jacobians[layer].T @ column), atol=1e-4, rtol=0)
    assert vectors.info["method"] == "Jacobian lens" and vectors.info["lens"]["n_prompts"] == 2


@needs_lens
def test_a_lens_that_does_not_fit(lens: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not fitted for layers \[2\]"):
        gr.vectors.word_vectors(tiny_model("bridge"), "great", LAST, lens=lens)
    narrow = type(lens)({0: torch.eye(16)}, n_prompts=1, d_model=16)
    with pytest.raises(ValueError, match="d_model=16"):
        gr.vectors.word_vectors(tiny_model("bridge"), "great", 0, lens=narrow)
    (tmp_path / "bad.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for name in ("bad.pt", "other.pt", "list.pt"):
        with pytest.raises(ValueError, match="Jacobian lens"):
            gr.vectors.word_vectors(tiny_model("bridge"), "great", lens=tmp_path / name)
    with pytest.raises(FileNotFoundError):
        gr.vectors.word_vectors(tiny_model("bridge"), "great", lens=tmp_path / "none.pt")
