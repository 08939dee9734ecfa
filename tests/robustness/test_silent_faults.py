"""Input that once gave a wrong number, or none, without a word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.attribution.removal import leave_k_out_scores
from grains_tl.cli.main import main
from grains_tl.demo.one_set import DemoSettings, _layers
from grains_tl.evaluate.records import _rows
from grains_tl.inference.logprobs import batch_logprobs, score_batches
from grains_tl.inference.restart import prepare_restart, restart_logprobs

STRANGE = ("<eos> <pad>", " great", " awful")  # a prompt of special tokens alone


@pytest.fixture
def tokenized(bridge: Any, pairs: list[gr.PreferencePair]) -> list[gr.tokens.TokenizedPair]:
    return gr.tokens.tokenize_pairs(bridge, pairs)


@pytest.fixture
def vectors() -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, [0, 1, 2], torch.full((3,), 6.0))


# -- layers in another order than rising ------------------------------------------------------------------------------


def test_layers_keep_their_labels_in_any_order(bridge: Any, tokenized: list[gr.tokens.TokenizedPair]) -> None:
    """Rows were sorted by layer while the labels and the norms beside them were not."""
    norms = torch.tensor([1.0, 2.0])
    down, up = (
        gr.baselines.caa_differences(bridge, tokenized, layers=layers, resid_norms=scale)
        for layers, scale in (([2, 0], norms), ([0, 2], norms.flip(0)))
    )
    assert torch.equal(down.at([0, 2]).toward_chosen, up.toward_chosen)
    assert torch.equal(down.at([0, 2]).resid_norms, up.resid_norms)
    selections = [gr.attribution.Selection((0,), (1,))] * len(tokenized)
    one, other = (
        gr.baselines.random_token_differences(
            bridge, tokenized, selections, layers=layers, resid_norms=norms, n_draws=1
        )[0]
        for layers in ([2, 0], [0, 2])
    )
    assert torch.equal(one.at([0, 2]).toward_chosen, other.toward_chosen)
    found = gr.analysis.residuals(bridge, tokenized, layers=[2, 0], readout="response_end")
    every = gr.analysis.residuals(bridge, tokenized, readout="response_end")
    assert torch.equal(found, every[:, :, [2, 0]])


def test_norms_come_in_the_order_of_the_layers(model: Any, tokenized: list[gr.tokens.TokenizedPair]) -> None:
    found = []
    for layers in ([2, 0, 2], [0, 1, 2]):
        norms: list[torch.Tensor] = []
        gr.vectors.read_out(model, tokenized, layers=layers, norms=norms)
        found.append(torch.cat(norms, dim=1))
    assert torch.equal(found[0], found[1][[2, 0, 2]])


# -- lists that do not belong together --------------------------------------------------------------------------------


def test_masked_positions_are_those_of_the_records(bridge: Any, tokenized: list[gr.tokens.TokenizedPair]) -> None:
    some = [gr.attribution.Selection((0,), (1,))] * 2
    with pytest.raises(ValueError, match="2 selections for 4 records"):  # the others counted as nothing masked
        gr.vectors.collect_differences(bridge, tokenized, some, layers=[1])
    with pytest.raises(ValueError, match="masked has 3 lists of positions for 4 records"):
        gr.vectors.read_out(bridge, tokenized, [[0]] * 3, layers=[1])
    with pytest.raises(ValueError, match=r"record 2: masked has positions \[9\]; its prompt has positions 0 to 3"):
        gr.vectors.read_out(
            bridge, tokenized, [[0], [9], [0], [0]], layers=[1], readout="response_end"
        )  # a response's token


@pytest.mark.usefixtures("unchecked")
def test_questions_are_not_dropped(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    question = gr.MultipleChoice("the film was", (" good", " bad"), (True, False))
    with pytest.raises(ValueError, match=r"\['MultipleChoice', 'PreferencePair'\]"):
        gr.inference.score_choices(bridge, [question, pairs[0]])  # type: ignore[arg-type]


# -- hooks that never run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_function", [False, True])
def test_hooks_below_their_setting_are_refused(
    bridge: Any,
    pairs: list[gr.PreferencePair],
    tokenized: list[gr.tokens.TokenizedPair],
    vectors: gr.SteeringVectors,
    as_function: bool,
) -> None:
    """They were left out, and the setting measured as one without any effect."""
    for hooks in (vectors.hooks(0.5, [0]), [("blocks.1.hook_mlp_out", lambda act, hook: act * 2)]):
        given: Any = (lambda batch, hooks=hooks: hooks) if as_function else hooks
        setting = gr.evaluate.Setting(1, given, key="mine")
        with pytest.raises(ValueError, match=r"setting of layer 1 has a hook on blocks\.\d\.hook_\w+, .* never run"):
            gr.evaluate.measure(bridge, tokenized, [setting])
        with pytest.raises(ValueError, match="never run"):
            gr.evaluate.record_effects(bridge, pairs, [setting])
        with pytest.raises(ValueError, match="never run"):
            gr.evaluate.text_costs(bridge, [setting], ["the film was good"])
    inside = [("blocks.1.hook_mlp_out", lambda act, hook: act * 2)]
    _, found = gr.evaluate.measure(bridge, tokenized, [gr.evaluate.Setting(0, inside)])
    wanted = gr.score_pairs(bridge, tokenized, inside)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=0)


def test_rows_told_apart_beside_a_huge_token(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Rows of one prompt are packed unless a hook tells them apart, whatever the size of the first token."""
    _, batch = next(iter(score_batches(bridge, gr.tokens.tokenize_pairs(bridge, pairs[1:2]))))
    step = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def apart(act: torch.Tensor, hook: Any) -> torch.Tensor:
        new = act.clone()
        new[:, 0, 3] += 30_000.0  # a massive activation
        new[1:, 1:] += 0.5 * step
        return new

    hooks = [("blocks.0.hook_resid_post", apart)]
    restart = prepare_restart(bridge, batch, [0])
    assert restart.packing is not None
    wanted = batch_logprobs(bridge, batch, hooks)
    torch.testing.assert_close(restart_logprobs(bridge, restart, 0, hooks), wanted, atol=1e-3, rtol=0)


# -- files ------------------------------------------------------------------------------------------------------------


def test_costs_of_hooks_without_a_key_are_not_taken_from_a_file(
    bridge: Any, vectors: gr.SteeringVectors, tmp_path: Path
) -> None:
    """They were called by their place in the list, so that other hooks got the costs of the first ones."""
    path, texts = tmp_path / "costs.jsonl", ["the film was good and the room was warm"]
    with pytest.raises(ValueError, match="a key, which grid"):
        gr.evaluate.text_costs(bridge, [gr.evaluate.Setting(0, vectors.hooks(0.5, [0]))], texts, checkpoint=path)
    named = gr.evaluate.grid({"v": vectors}, [0], [0.5])
    assert gr.evaluate.text_costs(bridge, named, texts, checkpoint=path).equals(
        gr.evaluate.text_costs(bridge, named, texts)
    )


def test_vectors_with_one_tensor_for_both_norms_can_be_saved(tmp_path: Path) -> None:
    norms = torch.tensor([2.0, 3.0])
    path = gr.SteeringVectors(torch.eye(2), (4, 5), norms, norms).save(tmp_path / "v.safetensors")
    assert torch.equal(gr.load_vectors(path).resid_norms, norms)


@pytest.mark.parametrize(("method", "given", "wanted"), [("leave_k_out", {"seed": 5}, 5), ("smoothgrad", {}, 0)])
def test_the_manifest_has_the_seed_of_methods_that_draw(
    bridge: Any, pairs: list[gr.PreferencePair], method: Any, given: dict[str, Any], wanted: int
) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1, method=method, n_steps=4, **given, layers=[1], progress=False)
    assert vectors.info["seed"] == wanted


def test_comparison_of_files_called_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were drawn and tabled as one set."""
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files += ["--pairs", str(tmp_path / folder / "reviews.jsonl")]
    assert main(["compare-attributions", *files]) == 2
    assert "share a name (reviews, reviews)" in capsys.readouterr().err


# -- tables -----------------------------------------------------------------------------------------------------------


def test_missing_cells_of_a_table_are_no_text() -> None:
    """A template made the word "nan" of them."""
    table = pd.DataFrame({"q": ["soup?", np.nan], "c": [" good", " bad"], "r": [" bad", " good"]})
    columns = {"prompt": "Q: {q}", "chosen": "c", "rejected": "r"}
    with pytest.raises(ValueError, match=r"row 2: prompt: the cells \['q'\] are missing"):
        gr.load_pairs(table, columns)
    assert gr.load_pairs(table[:1], columns)[0].prompt == "Q: soup?"
    numbers = pd.DataFrame({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"], "n": [3], "list": [["x", "y"]]})
    assert gr.load_pairs(numbers)[0].meta == {"n": 3, "list": ["x", "y"]}


def test_a_choice_from_joined_tables(bridge: Any, pairs: list[gr.PreferencePair], vectors: gr.SteeringVectors) -> None:
    parts = [gr.sweep(bridge, vectors, pairs, layers=[layer], alphas=[0.2], progress=False) for layer in (0, 1)]
    best = max(parts, key=lambda frame: frame["effect"][0])
    assert gr.choose(pd.concat(parts), records=pairs).layer == best["layer"][0]


def test_mc2_of_long_answers_does_not_overflow() -> None:
    logprobs = np.array([[-900.0, -1.0], [-1.0, -900.0]])
    pair = gr.PreferencePair("a", " b", " c")
    found = _rows(0, pair, logprobs, [(1,), (1,), (1,)], "sum", [gr.evaluate.Setting(0, [], alpha=0.1)])
    assert found["base_mc2"][0] == pytest.approx(0.0) and found["mc2"][0] == 1.0
    short = _rows(
        0, pair, np.array([[-2.0, -1.0]] * 2), [(1,), (1,), (1,)], "sum", [gr.evaluate.Setting(0, [], alpha=0.1)]
    )
    assert short["mc2"][0] == pytest.approx(1 / (1 + math.e))


def test_effect_at_kl_without_costs(bridge: Any, pairs: list[gr.PreferencePair], vectors: gr.SteeringVectors) -> None:
    found, costs = gr.evaluate.sweep_records(bridge, vectors, pairs, layers=[1], alphas=[0.2], progress=False)
    with pytest.raises(ValueError, match="give neutral texts to sweep_records"):
        gr.evaluate.effect_at_kl(found, costs)


@pytest.mark.parametrize("n", [0, -1])
def test_comparison_with_no_records_for_the_draws(
    bridge: Any, tokenized: list[gr.tokens.TokenizedPair], vectors: gr.SteeringVectors, n: int
) -> None:
    one = vectors.at([1])
    with pytest.raises(ValueError, match=f"n_test_draws={n}"):
        gr.compare_with_controls(
            bridge, tokenized, tokenized, {"v": one}, {"v": [one]}, name="v", alpha=0.2, n_test_draws=n
        )


@pytest.mark.usefixtures("unchecked")
def test_shares_of_curves_as_an_array(bridge: Any, tokenized: list[gr.tokens.TokenizedPair]) -> None:
    found = gr.attribution.attribute_all(bridge, tokenized[:1])
    given: list[Any] = [np.array([0.2, 0.5]), [0.2, 0.5]]
    one, other = (gr.faithfulness.curves(bridge, tokenized[:1], found, shares=shares) for shares in given)
    assert torch.equal(one.deleted, other.deleted)


# -- conversations whose messages are lists of parts ------------------------------------------------------------------


def test_messages_of_parts_stay_parts() -> None:
    """They became the text of a Python list."""
    system = {"role": "system", "content": [{"type": "text", "text": "old"}]}
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "2 + 2?"}]}
    pair = gr.baselines.with_system_prompt([gr.PreferencePair([system, user], "4", "5")], "new")[0]
    messages: Any = pair.prompt
    texts = [part["text"] for part in messages[0]["content"]]
    assert texts == ["new\n\n", "old"] and messages[1] == user
    letters: Any = gr.records.letters(gr.MultipleChoice([user], ("4", "5"), (True, False))).prompt
    asked = letters[0]["content"]
    assert asked[:2] == user["content"] and asked[2]["text"] == "\nA. 4\nB. 5\nAnswer:"


# -- prompts without content, models of another depth -----------------------------------------------------------------


def test_a_prompt_without_content(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """leave_k_out drew from an empty list for ever."""
    strange = gr.PreferencePair(*STRANGE)
    alone = gr.attribute(bridge, strange, method="leave_k_out", n_steps=4, content_only=True)
    assert alone.scores.isnan().all()
    options: Any = {"method": "leave_k_out", "n_steps": 8, "content_only": True}
    mixed = gr.attribution.attribute_all(
        bridge, gr.tokens.tokenize_pairs(bridge, [pairs[0], strange, pairs[1]]), **options
    )
    for found, pair in zip(mixed, (pairs[0], strange, pairs[1]), strict=True):
        wanted = gr.attribute(bridge, pair, **options)
        torch.testing.assert_close(found.scores, wanted.scores, equal_nan=True, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no prompt has a content token"):
        gr.vectors.collect_differences(
            bridge, gr.tokens.tokenize_pairs(bridge, [strange]), [gr.attribution.Selection((), ())], layers=[1]
        )


def test_no_units_no_draws(bridge: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, [gr.PreferencePair(*STRANGE)])
    shared: Any = {"objective": "sum", "mask": "zero"}
    scores, values = leave_k_out_scores(bridge, tokenized, [[]], [torch.Generator()], k=3, n_draws=4, **shared)
    whole = gr.score_pairs(bridge, tokenized)
    assert scores[0].isnan().all() and values[0] == pytest.approx(float(whole[0, 0] - whole[0, 1]), abs=1e-5)


def test_the_demo_finds_layers_in_a_small_model(bridge: Any) -> None:
    assert _layers(bridge, DemoSettings(layers=(0, 2, 24))) == [0, 2]
    assert _layers(bridge, DemoSettings(layers=(12, 18, 24))) == [1, 2]


# -- half precision ---------------------------------------------------------------------------------------------------


def test_means_are_not_rounded_in_half_precision() -> None:
    """1/n is no bfloat16 number, and sums of that type are rounded: means were 0.4 % off, and differences of means more."""
    act = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    store = torch.zeros(2, 1, 64)
    ((_, fn),) = gr.hooks.cache_hook([0], torch.full((2, 7), 1 / 7), store)
    fn(act, hook=None)
    torch.testing.assert_close(store[:, 0], act.float().mean(1), atol=1e-6, rtol=1e-5)


def test_reading_a_vector_is_exact_under_autocast(
    bridge: Any, tokenized: list[gr.tokens.TokenizedPair], vectors: gr.SteeringVectors
) -> None:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        neighbours = [gr.analysis.embedding_neighbours(bridge, vectors, space=s, n_top=3) for s in ("embed", "unembed")]
        return gr.analysis.lens_logits(bridge, vectors), torch.tensor(pd.concat(neighbours)["cosine"].to_numpy())

    plain = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = read()
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_writers_and_heads_under_autocast(
    bridge: Any, pairs: list[gr.PreferencePair], tokenized: list[gr.tokens.TokenizedPair], vectors: gr.SteeringVectors
) -> None:
    """The run itself is rounded; what is made of it is not: parts add up, and what a head writes is its weights' product."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = gr.analysis.writers(bridge, tokenized, vectors, layer=1)
        whole = gr.vectors.read_out(bridge, tokenized, layers=[1])[:, 0]
        heads = gr.baselines.head_vectors(bridge, pairs, layers=[1], n_heads=2)
    along = (whole.double() * vectors.directions[1].double()).sum(-1).mean()
    assert parts["projection"].sum() == pytest.approx(float(along), rel=1e-4)
    assert heads.writes.dtype == heads.sigmas.dtype == torch.float32
    for (layer, head), direction, write in zip(heads.heads, heads.directions, heads.writes, strict=True):
        weights = bridge.blocks[layer].attn.W_O[head].double()
        torch.testing.assert_close(write.double(), direction.double() @ weights, atol=1e-5, rtol=1e-5)
