"""What steering costs: against plain Hugging Face losses and divergences, and curves that are known exactly."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn.functional import kl_div

import grains_tl as gr
from grains_tl.evaluate.settings import grid
from tests.conftest import tiny_model
from tests.evaluate.test_sweep import vectors_of
from tests.helpers.oracles import edited, steered

ATOL = 1e-5  # nats, means over some ten tokens in float32
TEXTS = ["the film was good and warm", "we hated it . it was very bad and cold", "one two three"]


def test_against_plain_hugging_face(model: Any, hf: Any) -> None:
    vectors, alphas = vectors_of(), [-0.3, 0.3]
    costs = gr.evaluate.text_costs(model, grid({"v": vectors}, [0, 2], alphas), TEXTS)
    assert len(costs) == 2 * 2 * len(TEXTS)
    rows: Any = costs.itertuples()
    for row in rows:
        ids = torch.tensor([model.tokenizer(TEXTS[row.text])["input_ids"]])
        step = row.alpha * vectors.resid_norms[row.layer] * vectors.directions[row.layer]
        with torch.no_grad():
            base = hf(ids, labels=ids)
            with edited(hf, row.layer, partial(steered, step=step, renorm=True)):
                new = hf(ids, labels=ids)
        p, q = (x.logits[0, :-1].log_softmax(-1) for x in (base, new))
        assert row.n_tokens == ids.shape[1] - 1
        assert row.kl == pytest.approx(kl_div(p, q, reduction="sum", log_target=True).item() / row.n_tokens, abs=ATOL)
        assert (row.base_nll, row.nll) == pytest.approx((base.loss.item(), new.loss.item()), abs=ATOL)
        assert row.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert costs["kl"].max() > 0.01


@pytest.mark.parametrize("max_tokens", [1, 25])
def test_batches_do_not_matter(bridge: Any, max_tokens: int) -> None:
    settings = grid({"v": vectors_of()}, [0, 1], [0.0, 0.2, 0.4], positions=["all", "generated", "prompt"])
    with gr.settings(max_tokens=4000):
        whole = gr.evaluate.text_costs(bridge, settings, TEXTS)
    with gr.settings(max_tokens=max_tokens):
        pd.testing.assert_frame_equal(gr.evaluate.text_costs(bridge, settings, TEXTS), whole, atol=ATOL, rtol=0)


def test_scopes_split_a_text_in_two(bridge: Any) -> None:
    """Steering the second half leaves the predictions of the first half alone, so it costs less."""
    settings = grid({"v": vectors_of()}, [1], [0.4], positions=["all", "prompt", "generated"])
    kl = gr.evaluate.text_costs(bridge, settings, TEXTS).groupby("positions")["kl"].mean()
    assert 0 < kl["generated"] < kl["all"]
    assert kl["prompt"] > 0


def test_summary_of_costs_weighs_tokens(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    settings = grid({"v": vectors_of()}, [1], [0.3])
    costs = gr.evaluate.text_costs(bridge, settings, TEXTS)
    row = gr.evaluate.summarize(gr.evaluate.record_effects(bridge, pairs, settings), costs).iloc[0]
    n = costs["n_tokens"]
    assert row["kl"] == pytest.approx((costs["kl"] * n).sum() / n.sum())
    assert row["perplexity"] == pytest.approx(np.exp((costs["nll"] * n).sum() / n.sum()))
    assert row["base_perplexity"] == pytest.approx(np.exp((costs["base_nll"] * n).sum() / n.sum()))
    same_length = costs.assign(n_tokens=7)
    plain = gr.evaluate.summarize(gr.evaluate.record_effects(bridge, pairs, settings), same_length).iloc[0]
    assert plain["kl_se"] == pytest.approx(stats.sem(costs["kl"]))


def test_bundled_texts() -> None:
    texts = gr.records.neutral_texts()
    assert len(texts) == len(set(texts)) == 30
    assert all(len(text.split()) > 15 for text in texts)
    assert gr.records.neutral_texts(3) == texts[:3]


# -- knowledge and generations ----------------------------------------------------------------------------------------


def test_retention_by_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that is one letter's unembedding answers that letter, which half of the questions want."""
    model = tiny_model()
    items = [gr.MultipleChoice("was it good ?", (" yes", " no"), (first, not first)) for first in (True, False)] * 4
    asked = gr.records.letters(items[0])
    assert asked.prompt == "was it good ?\nA. yes\nB. no\nAnswer:"
    assert asked.choices == (" A", " B")
    chat = gr.records.letters(
        gr.MultipleChoice([{"role": "user", "content": "was it good ?"}], ("yes", "no"), (True, False))
    )
    assert chat.prompt[-1] == {"role": "user", "content": asked.prompt}
    # this tokenizer has no letters: words of the vocabulary of one letter's length stand for them
    monkeypatch.setattr("grains_tl.evaluate.quality.ascii_uppercase", "a?")
    items = [gr.MultipleChoice(i.prompt, (" a", " ?"), i.labels) for i in items]
    unembed = model.original_model.lm_head.weight
    a, other = model.tokenizer("a ?")["input_ids"]
    planted = gr.SteeringVectors.from_raw((unembed[a] - unembed[other])[None], [2], torch.tensor([6.0]))
    frame = gr.evaluate.retention(model, items, grid({"v": planted}, alphas=[3.0]))
    assert frame["correct"].tolist() == [True, False] * 4
    row = gr.evaluate.summarize(frame).iloc[0]
    assert row["accuracy"] == 0.5
    assert row["accuracy_se"] == pytest.approx(stats.sem(frame["correct"].astype(float) - frame["base_correct"]))


def test_degenerate_text() -> None:
    texts = [
        "the room was clean and the view was good",
        "very very very very very very",
        "good",
        "",
        "a b c a b c a b c",
    ]
    found = gr.evaluate.text_quality(texts)
    assert found["degenerate"].tolist() == [False, True, True, True, True]
    assert found["words"].tolist() == [9, 6, 1, 0, 9]
    assert found["repetition"].tolist() == pytest.approx([0, 3 / 4, 0, 0, 4 / 7])  # runs of three words
    assert found["distinct_1"].tolist() == pytest.approx([7 / 9, 1 / 6, 1, 1, 1 / 3])
    assert found["distinct_2"].tolist() == pytest.approx([1, 1 / 5, 1, 1, 3 / 8])


def test_a_huge_step_degenerates(bridge: Any) -> None:
    """Pushed far along one word's unembedding, the model says only that word."""
    raw = bridge.original_model.lm_head.weight[bridge.tokenizer("very")["input_ids"][0]]
    vectors = gr.SteeringVectors.from_raw(raw[None], [2], torch.tensor([6.0]))
    found = gr.evaluate.generation_quality(bridge, ["the film was", "we liked"], vectors.hooks(50.0), max_new_tokens=12)
    assert found["text"].tolist() == [" very" * 12] * 2
    assert found["degenerate"].all()
    assert found["base_text"].tolist() == gr.generate(bridge, ["the film was", "we liked"], max_new_tokens=12)


# -- equal cost -------------------------------------------------------------------------------------------------------


def curves(
    gain: dict[str, float], price: dict[str, float], *, noise: float = 0.0, alphas: Any = (0.1, 0.2, 0.4), n: int = 40
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """effect = gain * alpha, KL = price * alpha^2: at a budget b the effect is gain * sqrt(b / price)."""
    rng = np.random.default_rng(0)
    own = noise * rng.standard_normal(n)
    rows, costs = [], []
    for name in gain:
        for alpha in (-0.1, *alphas):
            about = {"vector": name, "positions": "all", "layer": 3, "alpha": alpha, "draw": -1}
            rows += [{**about, "record": i, "change": (gain[name] + own[i]) * alpha} for i in range(n)]
            costs += [{**about, "text": t, "n_tokens": 10 + t, "kl": price[name] * alpha**2} for t in range(8)]
    return pd.DataFrame(rows), pd.DataFrame(costs)


def test_effect_at_equal_kl_is_exact_where_it_is_known() -> None:
    found = gr.evaluate.effect_at_kl(*curves({"a": 5.0, "b": 8.0}, {"a": 1.0, "b": 4.0}), kl=0.05, against="a", n=50)
    assert found["effect"].tolist() == pytest.approx([5 * 0.05**0.5, 8 * (0.05 / 4) ** 0.5])
    assert found["alpha"].tolist() == pytest.approx([0.05**0.5, (0.05 / 4) ** 0.5])
    # b moves more per alpha, but a more per nat of KL
    assert found["difference"].tolist() == pytest.approx([0, 8 * (0.05 / 4) ** 0.5 - 5 * 0.05**0.5])
    assert found["low"].tolist() == pytest.approx(found["effect"].tolist())  # no noise, no width


def test_effect_at_equal_kl_has_the_standard_error_of_its_records() -> None:
    frame, costs = curves({"a": 5.0, "b": 8.0}, {"a": 1.0, "b": 4.0}, noise=2.0)
    found = gr.evaluate.effect_at_kl(frame, costs, kl=0.05, against="a")
    alphas = found["alpha"].to_numpy()
    per_alpha = frame.query("alpha == 0.2 and vector == 'a'")["change"] / 0.2
    np.testing.assert_allclose(found["se"], stats.sem(per_alpha) * alphas, rtol=0.1)  # 2000 resamples
    assert (found["low"] < found["effect"]).all()
    assert (found["effect"] < found["high"]).all()
    b = found.set_index("vector").loc["b"]
    # the records are the same: their noise mostly cancels in the difference
    assert b["difference_high"] - b["difference_low"] < b["high"] - b["low"]


def test_a_budget_that_is_not_reached() -> None:
    frame, costs = curves({"a": 5.0, "b": 8.0}, {"a": 1.0, "b": 0.001})
    found = gr.evaluate.effect_at_kl(frame, costs, kl=0.05, n=50).set_index("vector")
    assert found["effect"].notna().to_dict() == {"a": True, "b": False}
    assert found.loc["b", "largest_kl"] == pytest.approx(0.001 * 0.16)


def test_effect_at_equal_kl_of_a_model(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """At the KL of a measured alpha the interpolation gives that alpha's effect."""
    named = {"a": vectors_of(0), "b": vectors_of(1)}
    found, costs = gr.evaluate.sweep_records(
        bridge, named, pairs, layers=[1], alphas=[0.1, 0.2, 0.4], neutral=TEXTS, progress=False
    )
    assert costs is not None
    table = gr.evaluate.summarize(found, costs).query("vector == 'b' and alpha == 0.2").iloc[0]
    row = gr.evaluate.effect_at_kl(found, costs, kl=table["kl"], n=20).query("vector == 'b'").iloc[0]
    assert (row["alpha"], row["effect"]) == pytest.approx((0.2, table["effect"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": 0.0}, "a budget above 0"),
        ({"against": "c"}, "there are \\['a', 'b'\\]"),
    ],
)
def test_bad_budgets_are_refused(change: dict[str, Any], message: str) -> None:
    frame, costs = curves({"a": 5.0, "b": 8.0}, {"a": 1.0, "b": 4.0})
    with pytest.raises(ValueError, match=message):
        gr.evaluate.effect_at_kl(frame, costs, n=10, **change)
    with pytest.raises(ValueError, match="no costs for the alphas"):
        gr.evaluate.effect_at_kl(frame, costs.query("alpha != 0.2"), n=10)
    with pytest.raises(ValueError, match="no positive alphas"):
        gr.evaluate.effect_at_kl(frame.query("alpha < 0"), costs, n=10)


def test_each_vector_at_its_own_best_layer() -> None:
    """a is best at layer 5, b at layer 3; one half of the records chooses, the other reports."""
    frames, costs = [], []
    for layer, gain in ((3, {"a": 1.0, "b": 4.0}), (5, {"a": 3.0, "b": 2.0})):
        frame, cost = curves(gain, {"a": 1.0, "b": 1.0}, noise=0.5)
        frames.append(frame.assign(layer=layer))
        costs.append(cost.assign(layer=layer))
    found = gr.evaluate.effect_at_kl(pd.concat(frames), pd.concat(costs), 0.04, against="a", best_layer=True, n=200)
    best = found.set_index("vector")
    assert best["layer"].to_dict() == {"a": 5, "b": 3}
    assert best["n"].tolist() == [20, 20]  # half of 40 records; the other half chose
    assert best.loc["b", "difference"] == pytest.approx(0.2, abs=1e-6)  # (4 - 3) * sqrt(0.04), the noise is paired
    assert found["estimand"].unique().tolist() == ["change"]
    with pytest.raises(ValueError, match="two records"):
        one = [f[f["record"] == 0] for f in frames]
        gr.evaluate.effect_at_kl(pd.concat(one), pd.concat(costs), 0.04, best_layer=True)


def test_texts_that_built_a_vector_are_pointed_out(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    texts = ["the soup was cold", "we liked this film", "is the hotel bad ?"]
    options: dict[str, Any] = {"layers": [1], "texts": texts[:2]}
    for recipe, more in (("trained", {"n_steps": 1}), ("kl_optimal", {"n_samples": 4, "shrinkage": 0.5})):
        vectors = gr.build_vectors(bridge, pairs, recipe=recipe, **options, **more)
        settings = [vectors.steering(0.1, 1)]
        with pytest.warns(UserWarning, match=f"2 of the 3 neutral texts were used to build '{recipe}'"):
            gr.evaluate.text_costs(bridge, settings, texts)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gr.evaluate.text_costs(bridge, settings, texts[2:])
