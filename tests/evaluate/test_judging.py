"""What judges attributions: groups, curves, agreement, randomised weights, the comparison and its page; a planted word."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import grains_tl as gr
from grains_tl.attribution.removal import values_without
from grains_tl.attribution.words import groups_of
from grains_tl.cli.compare import pretty
from grains_tl.cli.main import main
from grains_tl.faithfulness.agreement import random_attributions, random_weights
from grains_tl.faithfulness.compare import compare_attributions
from grains_tl.faithfulness.deletion import removal_table
from grains_tl.models import building as gr_models
from tests.attribution.test_attribution import PolynomialModel
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer

ATOL = 1e-5  # sums of float32 values of size 1


def attribution(
    scores: list[float], tokens: list[str], content: list[bool] | None = None, **more: Any
) -> gr.Attribution:
    """Hand-made scores."""
    flags = torch.tensor([True] * len(tokens) if content is None else content)
    return gr.Attribution(
        torch.tensor(scores),
        tokens,
        flags,
        torch.zeros(len(tokens), dtype=torch.bool),
        None,
        1.0,
        None,
        "by hand",
        **more,
    )


# -- groups -----------------------------------------------------------------------------------------------------------

TOKENS = ["The", " wait", "er", " was", " rude", ".", " Ever", "y", " one", " left", "!", "\n", "Over", "all"]


def test_words_sentences_and_spans() -> None:
    words = ["".join(TOKENS[p] for p in own) for own in groups_of(TOKENS, (), "word")]
    assert words == ["The", " waiter", " was", " rude", ".", " Every", " one", " left", "!", "\n", "Overall"]
    sentences = ["".join(TOKENS[p] for p in own) for own in groups_of(TOKENS, (), "sentence")]
    assert sentences == ["The waiter was rude.", " Every one left!", "\n", "Overall"]
    assert groups_of(TOKENS, (), ["The waiter", (8, 10)])[:2] == [(0, 1, 2), (3,)]
    assert (8, 9) in groups_of(TOKENS, (), ["The waiter", (8, 10)])


@pytest.mark.parametrize("by", ["word", "sentence", [(1, 3)]])
def test_groups_hold_every_token_once_and_keep_the_total(by: Any) -> None:
    scores = torch.randn(len(TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    found = gr.attribution.group(attribution(scores, TOKENS), by=by)
    assert sorted(p for own in found.positions for p in own) == list(range(len(TOKENS)))
    assert float(found.scores.sum()) == pytest.approx(sum(scores), abs=ATOL) and "".join(found.texts) == "".join(TOKENS)


def test_word_starts_where_the_tokenizer_hides_its_spaces(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """The tiny tokenizer decodes single tokens without a space: joined by text alone, a prompt would be one word."""
    a = gr.attribute(bridge, pairs[1], method="gradient_x_input")
    assert gr.attribution.group(a, by="word").texts == ["the", " film", " was", " good"]
    assert (
        len(gr.attribution.group(attribution([1.0] * 4, list(a.tokens)), by="word").texts) == 1
    )  # without that knowledge


def test_selection_by_group_takes_all_content_pieces() -> None:
    a = attribution([0.0, 1.0, 1.0, -3.0, 1.5], ["<s>", " ser", "vice", " bad", " ok"], [False, True, True, True, True])
    assert gr.attribution.select_groups(gr.attribution.group(a), 1) == gr.attribution.Selection((1, 2), (3,))
    assert gr.attribution.select_tokens(a, 1) == gr.attribution.Selection((4,), (3,))


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ([(3, 99)], "positions 0 to 13"),
        ([(0, 3), (2, 4)], "overlap"),
        (["nowhere"], "is not in the prompt"),
        ("line", "'line'"),
    ],
)
def test_spans_that_cannot_be(by: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of(TOKENS, (), by)


def test_vectors_by_words(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Every token of the tiny tokenizer is a word: the same vectors, by fewer or as many passes; and it is written down."""
    tokens = gr.build_vectors(bridge, pairs, top_k=2, progress=False)
    words = gr.build_vectors(bridge, pairs, top_k=2, group_by="word", progress=False)
    torch.testing.assert_close(words.directions, tokens.directions)
    assert words.info["group_by"] == "word" and tokens.info["group_by"] is None
    with pytest.raises(ValueError, match="record 1: top_k=4.*content groups"):
        gr.build_vectors(bridge, pairs, top_k=4, group_by="sentence", progress=False)


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def additive() -> SimpleNamespace:
    """A model whose f is a sum over tokens, its records, and leave-one-out with the zero mask: the true shares."""
    model: Any = PolynomialModel(1)
    model.matrix = torch.zeros(6, 6)
    records = [
        gr.PreferencePair(p, " good", " bad") for p in ("film was cold but room warm", "we liked this hotel and food")
    ]
    tokenized = gr.tokens.tokenize_pairs(model, records)
    true = [gr.attribute(model, r, method="leave_one_out", mask="zero") for r in records]
    assert len({len(t.prompt) for t in tokenized}) == 1  # this model reads f at the last place of a batch
    return SimpleNamespace(model=model, tokenized=tokenized, true=true)


def test_curves_of_an_additive_function_are_cumulative_sums(additive: Any) -> None:
    found = gr.faithfulness.curves(additive.model, additive.tokenized, additive.true, shares=[0.5], mask="zero")
    for r, a in enumerate(additive.true):
        scores = a.scores.sort(descending=True).values
        half = round(0.5 * len(scores))
        total, first = float(scores.sum()), float(scores[:half].sum())
        torch.testing.assert_close(found.deleted[r], torch.tensor([total, total - first, 0.0]), atol=ATOL, rtol=0)
        torch.testing.assert_close(found.inserted[r], torch.tensor([0.0, first, total]), atol=ATOL, rtol=0)
        area = (0 + first) / 2 * 0.5 + (first + total) / 2 * 0.5
        assert float(found.deletion_area[r]) == pytest.approx(area, abs=ATOL)
        assert float(found.insertion_area[r]) == pytest.approx(area, abs=ATOL)


def test_no_order_beats_the_true_one_on_an_additive_function(additive: Any) -> None:
    def areas(found: list[gr.Attribution]) -> Tensor:
        return gr.faithfulness.curves(additive.model, additive.tokenized, found, mask="zero").deletion_area

    best = areas(additive.true)
    for seed in range(10):
        drawn = random_attributions(additive.tokenized, torch.Generator().manual_seed(seed))
        assert bool((areas(drawn) <= best + ATOL).all())


def test_removal_table_against_explicit_sums(additive: Any) -> None:
    selections = [gr.attribution.select_tokens(a, 2) for a in additive.true]
    found = removal_table(additive.model, additive.tokenized, selections, mask="zero")
    for r, (a, s) in enumerate(zip(additive.true, selections, strict=True)):
        up, down = (float(a.scores[list(side)].sum()) for side in (s.toward_chosen, s.toward_rejected))
        assert found[:, r].tolist() == pytest.approx([up, -down, float(a.scores.sum()) - up], abs=ATOL)


@pytest.mark.parametrize("masker", ["mean_embedding", "eos", "attention"])
def test_values_without_in_any_batching(bridge: Any, pairs: list[gr.PreferencePair], masker: Any) -> None:
    t = gr.tokens.tokenize_pairs(bridge, pairs)
    removals: list[Any] = [(0, ()), (1, (1, 2)), (0, (3,)), (3, (0,))]
    alone = [float(values_without(bridge, t, [one], mask=masker)) for one in removals]
    assert values_without(bridge, t, removals, mask=masker).tolist() == pytest.approx(alone, abs=1e-4)
    with gr.settings(max_tokens=1):
        assert values_without(bridge, t, removals, mask=masker).tolist() == pytest.approx(alone, abs=1e-4)
    assert alone[0] == pytest.approx(gr.attribute(bridge, pairs[0], method="gradient_x_input").objective, abs=1e-4)


def test_curves_refuse_what_does_not_belong_together(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    t = gr.tokens.tokenize_pairs(bridge, pairs)
    with pytest.raises(ValueError, match="one attribution per record"):
        gr.faithfulness.curves(bridge, t, [attribution([1.0], ["a"])])
    with pytest.raises(ValueError, match="between 0 and 1"):
        gr.faithfulness.curves(bridge, t[:1], [gr.attribute(bridge, pairs[0])], shares=[1.5])


# -- agreement --------------------------------------------------------------------------------------------------------


def test_rank_agreement_is_scipys_mean() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    names = list("uvwxyz")
    frame = gr.faithfulness.rank_agreement(
        {k: [attribution(row.tolist(), names) for row in v] for k, v in (("a", a), ("b", b))}
    )
    wanted = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert frame["spearman"][0] == pytest.approx(np.mean(wanted)) and frame["n"][0] == 3
    assert frame["se"][0] == pytest.approx(np.std(wanted, ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match="numbers of records differ"):
        gr.faithfulness.rank_agreement({"a": [attribution([1.0], ["a"])], "b": []})


def test_seeds_of_a_method_that_draws_nothing_agree(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    assert gr.faithfulness.seed_agreement(bridge, pairs, method="leave_one_out")["spearman"].tolist() == pytest.approx(
        [1.0] * 3
    )
    few, many = (
        gr.faithfulness.seed_agreement(bridge, pairs, method="leave_k_out", seeds=(0, 1), n_steps=n, k=2)["spearman"][0]
        for n in (3, 60)
    )
    assert few < many <= 1.0 and many > 0.8
    with pytest.raises(ValueError, match="two different"):
        gr.faithfulness.seed_agreement(bridge, pairs, method="smoothgrad", seeds=(1, 1))
    named = gr.faithfulness.seed_agreement(bridge, pairs, method="leave_k_out", seeds=(0, 1), n_steps=8, k=2)
    value = gr.attribution.LeaveKOut(n_steps=8, k=2)
    assert gr.faithfulness.seed_agreement(bridge, pairs, method=value, seeds=(0, 1)).equals(named)


# -- a planted word ---------------------------------------------------------------------------------------------------

YES, NO = ("great", "good", "liked"), ("awful", "bad", "hated")
FILLER = "a film food hotel was is warm soup room and but it this that we cold one two".split()


def planted_prompts(n: int, seed: int) -> list[tuple[str, int, bool]]:
    """Prompts of filler with one word that decides between yes and no: text, the word's position, which."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        words = rng.choices(FILLER, k=rng.randint(6, 10))
        at, yes = rng.randrange(len(words)), rng.random() < 0.5
        words[at] = rng.choice(YES if yes else NO)
        found.append((" ".join([*words, "answer", ":"]), at, yes))
    return found


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    """A tiny Llama trained for some seconds to answer by that word, and records it has not seen."""
    tokenizer = tiny_tokenizer()
    hf = tiny_hf().train().requires_grad_(True)
    optimiser = torch.optim.Adam(hf.parameters(), lr=3e-3)
    yes, no = tokenizer("yes no")["input_ids"]
    deciding = torch.tensor(tokenizer(" ".join(YES + NO))["input_ids"])
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for step in range(250):
            batch = planted_prompts(48, seed=step)
            rows = tokenizer([t for t, _, _ in batch], padding=True, padding_side="left", return_tensors="pt")
            embeds = hf.get_input_embeddings()(rows["input_ids"])
            # some words are blank already in training, so that a blank is nothing strange and says nothing; where the
            # deciding word itself is blank, both answers are as good: no answer is the default one
            decides, unknown = torch.isin(rows["input_ids"], deciding), torch.rand(len(batch)) < 0.3
            blank = torch.where(decides, unknown[:, None], torch.rand(decides.shape) < 0.2)
            embeds = torch.where(blank[..., None], hf.get_input_embeddings().weight.mean(0), embeds)
            logits = hf(inputs_embeds=embeds, attention_mask=rows["attention_mask"]).logits[:, -1, [yes, no]]
            is_yes = torch.tensor([float(y) for _, _, y in batch])
            p_yes = torch.where(unknown, 0.5, is_yes)
            loss = torch.nn.functional.cross_entropy(logits, torch.stack([p_yes, 1 - p_yes], dim=-1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    gr_models.keep_tokenizer_as_is(tokenizer, "planted")
    model = gr_models.bridge_of(hf.eval().requires_grad_(False), tokenizer, "planted").eval().requires_grad_(False)
    test = planted_prompts(40, seed=10_000)
    records = [gr.PreferencePair(t, *((" yes", " no") if y else (" no", " yes"))) for t, _, y in test]
    return SimpleNamespace(model=model, pairs=records, places=[at for _, at, _ in test])


def share_first(found: list[gr.Attribution], places: list[int]) -> float:
    """How often the planted word has the largest score."""
    return float(np.mean([int(a.scores.nan_to_num(-9.0).argmax()) == at for a, at in zip(found, places, strict=True)]))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"method": "leave_k_out", "n_steps": 60},
    {"method": "integrated_gradients", "n_steps": 64},
    {"method": "gradient_x_input"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_planted_word_comes_first_where_f_is_known(options: dict[str, Any]) -> None:
    """f is a sum over words in which one word counts far more than all the others."""
    model: Any = PolynomialModel(1)
    model.matrix = torch.zeros(6, 6)
    ids = torch.tensor(tiny_tokenizer()(" ".join(YES + NO))["input_ids"])
    sign = torch.tensor([1.0] * len(YES) + [-1.0] * len(NO))
    model.table[ids] += 12 * sign[:, None] * model.vector / model.vector.norm() ** 2
    prompts = planted_prompts(20, seed=3)
    answers = [(" good", " bad") if yes else (" bad", " good") for _, _, yes in prompts]
    pairs = [gr.PreferencePair(t, *a) for (t, _, _), a in zip(prompts, answers, strict=True)]
    found = [gr.attribute(model, pair, **options) for pair in pairs]
    assert share_first(found, [at for _, at, _ in prompts]) == 1.0


def test_the_default_finds_the_word_a_trained_model_uses(planted: Any) -> None:
    """Leave-one-out is exact here; 1 in 10 by chance."""
    tokenized = gr.tokens.tokenize_pairs(planted.model, planted.pairs)
    logprobs = gr.score_pairs(planted.model, tokenized)
    assert bool((logprobs[:, 0] - logprobs[:, 1] > 1).all())  # it has learned the task
    assert share_first(gr.attribution.attribute_all(planted.model, tokenized), planted.places) >= 0.9


def test_scores_change_when_the_weights_are_random(planted: Any) -> None:
    model = planted.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    frame = gr.faithfulness.random_weights_check(
        model, planted.pairs[:12], methods=["leave_one_out", "gradient_x_input"]
    )
    assert frame["method"].tolist() == ["leave_one_out", "gradient_x_input"]
    assert bool((frame["spearman"].abs() < 0.5).all()) and bool((frame["n"] == 12).all())
    same = gr.faithfulness.random_weights_check(model, planted.pairs[:4], methods=["leave_one_out"], layers=[])
    assert same["spearman"][0] == pytest.approx(1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_random_weights_keep_mean_and_spread_and_go_away(bridge: Any) -> None:
    old = {name: p.clone() for name, p in bridge.blocks[1].named_parameters()}
    other = [p.clone() for p in bridge.blocks[0].parameters()]
    with pytest.raises(KeyboardInterrupt), random_weights(bridge, [1], seed=0):
        new = {name: p.clone() for name, p in bridge.blocks[1].named_parameters()}
        assert all(torch.equal(a, b) for a, b in zip(bridge.blocks[0].parameters(), other, strict=True))
        raise KeyboardInterrupt
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed and all((old[name].ndim >= 2) == (name in changed) for name in old)
    for name in changed:
        assert float(new[name].std()) == pytest.approx(float(old[name].std()), rel=0.15)
    assert all(torch.equal(p, old[name]) for name, p in bridge.blocks[1].named_parameters())


def test_comparison_tells_the_right_method_from_chance(planted: Any) -> None:
    frame: Any = compare_attributions(
        planted.model,
        planted.pairs[:10],
        methods={"LOO": {"method": "leave_one_out"}, "IG": {"method": "integrated_gradients", "n_steps": 64}},
        top_k=1,
        eval_pairs=planted.pairs[10:20],
        judging=gr.faithfulness.Judging(layer=1),
        progress=False,
    ).set_index("method")
    assert list(frame.index) == ["LOO", "IG", "random_tokens"]
    for column in ("removed_chosen", "deletion_area", "insertion_area"):
        assert (
            frame.loc["LOO", column]
            > frame.loc["random_tokens", column] + 2 * frame.loc["random_tokens", f"{column}_se"]
        )
    assert frame.loc["LOO", "sufficiency"] < frame.loc["random_tokens", "sufficiency"]
    assert frame.loc["IG", "relative_gap"] < 0.05 and frame.loc["IG", "steps"] <= 64
    assert frame.loc["LOO", "agreement"] == 1.0 and frame["kl"].gt(0).all() and frame["effect_se"].gt(0).all()


# -- convergence is told ----------------------------------------------------------------------------------------------


def test_vectors_from_scores_that_did_not_converge_say_so(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    options: dict[str, Any] = {"top_k": 2, "method": "integrated_gradients", "progress": False}
    with pytest.warns(UserWarning, match="4 of 4 records: the integrated_gradients scores miss completeness"):
        poor = gr.build_vectors(bridge, pairs, n_steps=1, reference="zero", **options)
    assert poor.info["converged_share"] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = gr.build_vectors(bridge, pairs, n_steps=64, **options)
        none = gr.build_vectors(bridge, pairs, top_k=2, progress=False)
    assert good.info["converged_share"] == 1.0 and good.info["median_relative_gap"] < 0.05
    assert none.info["converged_share"] is None
    with pytest.raises(ValueError, match="takes no steps"):
        gr.build_vectors(bridge, pairs, steps=3, **options)


def test_checkpoint_keeps_steps(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    from tests.helpers.attributing import attribute_records

    t = gr.tokens.tokenize_pairs(bridge, pairs)
    options = {"method": "integrated_gradients", "n_steps": 16}
    one, again = (attribute_records(bridge, t, options, checkpoint=tmp_path / "c.jsonl") for _ in range(2))
    assert [a.steps for a in again] == [a.steps for a in one] and all(a.steps for a in one)
    assert [gr.attribution.group(a).texts for a in again] == [gr.attribution.group(a).texts for a in one]


# -- pictures and the command line ------------------------------------------------------------------------------------


def table() -> pd.DataFrame:
    """Two methods and chance; one value missing."""
    return pd.DataFrame(
        {
            "method": ["a<b>", "$x$", "random_tokens"],
            "relative_gap": [0.0123, float("nan"), float("nan")],
            "deletion_area": [1.0, 0.5, 0.1],
            "deletion_area_se": [0.1, float("nan"), 0.2],
            "effect": [1.0, float("nan"), 0.0],
            "effect_se": [0.1, 0.1, 0.1],
        }
    )


def test_comparison_plot_has_a_panel_for_each_measure() -> None:
    fig = gr.plotting.plot_comparison(table())
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["deletion area, nats", "effect of the vector, nats"]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["a<b>", "$x$", "random_tokens"]
    assert not any(t.get_parse_math() for t in fig.axes[0].get_yticklabels())
    assert gr.plotting.figure_png(fig)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="deletion_area"):
        gr.plotting.plot_comparison(table()[["method", "relative_gap"]])


def test_printed_numbers_have_intervals() -> None:
    rows = pretty(table())
    assert rows["deletion area"].tolist() == ["+1.00 \u00b1 0.20", "+0.50", "+0.10 \u00b1 0.39"]
    assert rows["median gap / |f(x) - f(x')|"].tolist() == ["1.2 %", "-", "-"]


@pytest.mark.usefixtures("unchecked")
def test_compare_attributions_from_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *a, **k: tiny_model())
    rows = [{"prompt": t, "chosen": " yes", "rejected": " no"} for t, _, _ in planted_prompts(8, seed=1)]
    files = []
    for name in ("one<b>", "two"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    out = tmp_path / "out"
    argv = [
        "compare-attributions",
        "--pairs",
        str(files[0]),
        "--pairs",
        str(files[1]),
        "--limit",
        "3",
        "--eval-limit",
        "2",
    ]
    argv += ["--methods", "leave_one_out,gradient_x_input", "--draws", "2", "--out", str(out)]
    assert main(argv) == 0
    frame = pd.read_csv(out / "comparison.csv")
    assert frame["set"].tolist() == ["one<b>"] * 3 + ["two"] * 3 and frame["n"].tolist() == [3] * 6
    assert frame["effect"].notna().all() and (frame["relative_seconds"].dropna() >= 0).all()
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "one&lt;b&gt;" in page and "<b>" not in page and "http:" not in page and "https:" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "leave_one_out" in capsys.readouterr().out
    assert main([*argv[:5], "--limit", "0"]) == 2
    assert main([*argv[:5], "--methods", "magic", "--limit", "2"]) == 2 and "magic" in capsys.readouterr().err
