"""Summaries and honest choices: planted effects are found, planted nulls called null, used records refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.evaluate.settings import grid
from grains_tl.records.splits import record_id
from tests.evaluate.test_sweep import vectors_of

N_SEEDS = 40
# of 40 true nulls at the 5 % level, more than 6 are rejected with probability 0.003
MOST_REJECTIONS = 6
WORDS = "the film food hotel soup room was is very not cold warm one two three four five six they we it".split()


def records(n: int, seed: int = 0, *, flip: bool = False) -> list[gr.PreferencePair]:
    """Random prompts, " great" against " awful"; with ``flip`` a coin says which of the two is the chosen one."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        sides = [" great", " awful"]
        if flip and rng.random() < 0.5:
            sides.reverse()
        found.append(gr.PreferencePair(" ".join(rng.choice(WORDS, 6)), sides[0], sides[1]))
    return found


def planted(model: Any) -> gr.SteeringVectors:
    """The direction whose unembedding is " great" minus " awful", at the last layer, and a random one before it."""
    good, bad = model.tokenizer("great awful")["input_ids"]
    unembed = model.W_U.T if hasattr(model, "W_U") else model.unembed.weight
    raw = vectors_of(3).raw.clone()
    raw[2] = unembed[good] - unembed[bad]
    return gr.SteeringVectors.from_raw(raw, (0, 1, 2), torch.full((3,), 6.0))


def test_a_planted_effect_is_found(model: Any) -> None:
    vectors = planted(model)
    frame = gr.sweep(
        model, {"planted": vectors, "random": vectors_of(4)}, records(12), alphas=[0.2, 0.4], progress=False
    )
    choice = gr.choose(frame)
    assert (choice.vector, choice.layer, choice.alpha) == ("planted", 2, 0.4)
    row = gr.report_choice(model, {"planted": vectors}, choice, records(30, seed=1)).iloc[0]
    assert row["verdict"] == "steers"
    assert row["low"] > 0
    assert (row["win"], row["wrong_way"]) == (1, 0)


def test_a_flipped_vector_is_reported_as_wrong_way(bridge: Any) -> None:
    flipped = -planted(bridge)
    choice = gr.choose(gr.sweep(bridge, flipped, records(12), layers=[2], alphas=[-0.4, 0.2, 0.4], progress=False))
    assert choice.alpha == 0.2  # not turned round: the least harm at a positive alpha
    assert "wrong way" in choice.why
    row = gr.report_choice(bridge, flipped, choice, records(30, seed=1)).iloc[0]
    assert row["verdict"] == "wrong way"
    assert row["high"] < 0
    assert (row["win"], row["wrong_way"]) == (0, 1)


def test_a_planted_null_is_called_null(bridge: Any) -> None:
    """Labels by coin flips: no vector can have an effect. On other records the chosen cell is rejected at the 5 % level,
    and its effect is zero on average; on the records it was chosen on it looks like an effect, so those are refused."""
    named = {str(seed): vectors_of(seed) for seed in range(3)}
    rejected, outside, inside = 0, [], []
    for seed in range(N_SEEDS):
        frame = gr.sweep(bridge, named, records(24, seed, flip=True), alphas=[0.3], progress=False)
        choice = gr.choose(frame)
        row = gr.report_choice(bridge, named, choice, records(24, 1000 + seed, flip=True)).iloc[0]
        rejected += row["verdict"] != "no effect"
        outside.append(row["effect"])
        inside.append(frame["effect"].max())
    assert rejected <= MOST_REJECTIONS
    assert abs(np.mean(outside)) < 3 * stats.sem(outside)
    assert np.mean(inside) > 3 * stats.sem(inside)


def test_records_used_for_choosing_are_refused(bridge: Any) -> None:
    used, new = records(6), records(6, seed=1)
    vectors = vectors_of()
    choice = gr.choose(gr.sweep(bridge, vectors, used, alphas=[0.2], progress=False))
    with pytest.raises(ValueError, match="2 of 8 records were used for choosing \\(the first is record 2\\)"):
        gr.report_choice(bridge, vectors, choice, [new[0], used[3], *new[1:], used[5]])
    swapped = gr.PreferencePair(used[0].prompt, used[0].rejected, used[0].chosen)
    assert record_id(swapped) == record_id(used[0])
    with pytest.raises(ValueError, match="used for choosing"):
        gr.report_choice(bridge, vectors, choice, [swapped])
    assert gr.report_choice(bridge, vectors, choice, new)["n"][0] == 6


def test_a_frame_without_its_records_is_refused(bridge: Any, tmp_path: Path) -> None:
    used = records(6)
    frame = gr.sweep(bridge, vectors_of(), used, alphas=[0.2], progress=False)
    frame.to_csv(tmp_path / "sweep.csv", index=False)
    read = pd.read_csv(tmp_path / "sweep.csv")
    with pytest.raises(ValueError, match="does not say which records"):
        gr.choose(read)
    assert gr.choose(read, records=used).records == gr.choose(frame).records


def test_a_table_from_a_csv_can_be_told_how_it_was_made(bridge: Any, tmp_path: Path) -> None:
    used = records(6)
    options: dict[str, Any] = {"operator": "add", "objective": "mean"}
    frame = gr.sweep(bridge, vectors_of(), used, alphas=[0.2], progress=False, **options)
    frame.to_csv(tmp_path / "sweep.csv", index=False)
    read = pd.read_csv(tmp_path / "sweep.csv")
    found, wanted = gr.choose(read, records=used, **options), gr.choose(frame)
    assert (found.operator, found.objective) == (wanted.operator, wanted.objective) == ("add", "mean")


def test_the_budget(bridge: Any) -> None:
    """The largest effect within the budget, by a plain search."""
    frame = gr.sweep(
        bridge,
        {"a": vectors_of(0), "b": planted(bridge)},
        records(8),
        alphas=[-0.2, 0.1, 0.2, 0.4],
        neutral=4,
        progress=False,
    )
    for budget in frame["kl"].quantile([0.2, 0.5, 1.0]):
        choice = gr.choose(frame, max_kl=budget)
        allowed = [r for r in frame.to_dict("records") if r["kl"] <= budget and r["alpha"] > 0]
        best = max(allowed, key=lambda r: r["effect"])
        assert (choice.vector, choice.layer, choice.alpha) == (best["vector"], best["layer"], best["alpha"])
    with pytest.raises(ValueError, match="add smaller alphas"):
        gr.choose(frame, max_kl=1e-9)
    assert gr.choose(frame, vector="a").vector == "a"
    with pytest.raises(ValueError, match="no cell with a positive alpha of vector 'c'"):
        gr.choose(frame, vector="c")
    with pytest.raises(ValueError, match="max_kl needs the cost"):
        gr.choose(frame.drop(columns="kl"), max_kl=0.1)


def test_a_choice_keeps_the_options_of_its_sweep(bridge: Any) -> None:
    vectors = vectors_of()
    options: dict[str, Any] = {"operator": "add", "positions": "last", "objective": "mean"}
    choice = gr.choose(gr.sweep(bridge, vectors, records(6), alphas=[0.3], progress=False, **options))
    test = records(5, seed=1)
    row = gr.report_choice(bridge, vectors, choice, test).iloc[0]
    wanted = gr.sweep(bridge, vectors, test, layers=[choice.layer], alphas=[0.3], progress=False, **options).iloc[0]
    assert row["effect"] == pytest.approx(wanted["effect"])
    assert (row["positions"], choice.operator) == ("last", "add")


def test_splits_keep_copies_together() -> None:
    pairs = [*records(20), *records(20)]
    choosing, reporting = gr.split_records(pairs, 0.3, seed=5)
    assert (len(choosing), len(reporting)) == (28, 12)
    assert not {record_id(r) for r in choosing} & {record_id(r) for r in reporting}
    assert gr.split_records(pairs, 0.3, seed=5)[0] == choosing
    assert gr.split_records(pairs, 0.3, seed=6)[0] != choosing
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="leaves one side"):
            gr.split_records(pairs, share)


# -- summaries --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_paired_t_test(bridge: Any) -> None:
    found, _ = gr.evaluate.sweep_records(bridge, vectors_of(), records(9), layers=[1], alphas=[0.4], progress=False)
    row = gr.evaluate.summarize(found).iloc[0]
    test = stats.ttest_rel(found["margin"], found["base_margin"])
    interval = test.confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["effect_se"] == pytest.approx(stats.sem(found["change"]))
    assert (row["verdict"] == "no effect") == (test.pvalue > 0.05)
    assert row["accuracy_se"] == pytest.approx(stats.sem(found["correct"].astype(float) - found["base_correct"]))


def test_one_record_has_no_interval(bridge: Any) -> None:
    row = gr.sweep(bridge, vectors_of(), records(1), layers=[1], alphas=[0.4], progress=False).iloc[0]
    assert row["verdict"] == "too few records"
    assert np.isnan(row[["effect_se", "low", "high"]].to_numpy(dtype=float)).all()


def test_uncertainty_over_building_draws(bridge: Any) -> None:
    """Draws that scatter widen the interval; draws that are the vector itself leave that of the records."""
    vectors, test = planted(bridge).at([2]), records(30, seed=1)
    choice = gr.choose(gr.sweep(bridge, vectors, records(6), alphas=[0.4], progress=False))
    noise = [vectors_of(seed).at([2]) for seed in range(10)]
    rows = [
        gr.report_choice(bridge, vectors, choice, test, draws=draws).iloc[0]
        for draws in ([vectors] * 10, [vectors + 0.7 * other for other in noise])
    ]
    widths = [row["draw_high"] - row["draw_low"] for row in rows]
    assert widths[0] == pytest.approx(rows[0]["high"] - rows[0]["low"], rel=0.15)  # 4000 resamples, t against normal
    assert widths[1] > 1.5 * widths[0]
    assert rows[0]["n_draws"] == 10
    assert rows[0]["effect"] == rows[1]["effect"]


def test_random_draws_without_a_vector_of_their_own(bridge: Any) -> None:
    like = vectors_of().at([1])
    settings = grid({}, [1], [0.3], draws={"random": gr.baselines.random_direction_vectors(like, n_draws=6)})
    found = gr.evaluate.record_effects(bridge, records(8), settings)
    row = gr.evaluate.summarize(found).iloc[0]
    assert (row["n_draws"], row["n"]) == (6, 8)
    assert row["effect"] == pytest.approx(found["change"].mean())


def test_both_signs(bridge: Any) -> None:
    found, _ = gr.evaluate.sweep_records(
        bridge, vectors_of(), records(6), layers=[1], alphas=[-0.3, 0.2, 0.3], progress=False
    )
    both = gr.evaluate.two_sided(found)
    up, down = (found[found["alpha"] == a]["change"].to_numpy() for a in (0.3, -0.3))
    assert both["alpha"].tolist() == [0.3] * 6
    np.testing.assert_allclose(both["change"], (up - down) / 2)
    assert gr.evaluate.summarize(both)["effect"][0] == pytest.approx(float((up - down).mean() / 2))
    with pytest.raises(ValueError, match="no setting with both signs"):
        gr.evaluate.two_sided(found[found["alpha"] > 0])


def test_a_frame_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="the frame lacks"):
        gr.evaluate.summarize(pd.DataFrame({"alpha": [0.1]}))


# -- from a shell -----------------------------------------------------------------------------------------------------


def test_the_command(bridge: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *args, **options: bridge)
    path = planted(bridge).save(tmp_path / "planted.safetensors")
    rows = pd.DataFrame([{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in records(16)])
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    out = tmp_path / "out" / "sweep.csv"
    command = ["sweep", "--vectors", str(path), "--pairs", str(tmp_path / "pairs.csv"), "--out", str(out)]
    assert main([*command, "--neutral", "2", "--max-kl", "5"]) == 0
    said = capsys.readouterr().out
    assert "chosen on 8 records: planted, layer 2, alpha +0.4" in said
    assert "on 8 other records: steers" in said
    assert "0 were there before" in said
    table = pd.read_csv(out)
    assert len(table) == 3 * 4
    assert main([*command, "--neutral", "2", "--max-kl", "5"]) == 0
    assert f"{8 * (3 * 4 + 1)} were there before" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(out), table)
    assert main([*command[:-2], "--neutral", "0", "--report-share", "0", "--alphas=-0.1"]) == 0
    said = capsys.readouterr().out
    assert "no cell is chosen" in said
    assert len(list((tmp_path / "out").iterdir())) == 2  # the table and its checkpoint
    assert main([*command, "--max-kl", "1e-9", "--neutral", "2"]) == 2
    assert "add smaller alphas" in capsys.readouterr().err


# -- the two estimands ------------------------------------------------------------------------------------------------


def test_change_and_swing_by_hand(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """change = margin at +alpha minus margin at 0; swing = half of margin at +alpha minus margin at -alpha."""
    vectors = gr.SteeringVectors.from_raw(torch.randn(1, 32), [1], torch.tensor([20.0]))
    frame = gr.sweep(bridge, vectors, pairs, alphas=[-0.2, 0.2, 0.4], progress=False)
    at = {
        a: gr.score_pairs(bridge, pairs, vectors.steering(a)) @ torch.tensor([1.0, -1.0]) for a in (-0.2, 0.0, 0.2, 0.4)
    }
    change, swing = (at[0.2] - at[0.0]).numpy(), ((at[0.2] - at[-0.2]) / 2).numpy()
    row = frame.set_index("alpha").loc[0.2]
    assert row["estimand"] == "change"
    assert row["effect"] == pytest.approx(change.mean(), abs=1e-4)
    assert row["swing"] == pytest.approx(swing.mean(), abs=1e-4)
    low, high = stats.t.interval(0.95, len(swing) - 1, swing.mean(), stats.sem(swing))
    assert (row["swing_low"], row["swing_high"]) == pytest.approx((low, high), abs=1e-4)
    assert row["swing_se"] == pytest.approx(stats.sem(swing), abs=1e-4)
    assert frame["swing"].isna().tolist() == [False, False, True]  # 0.4 has no -0.4
    assert "swing" not in gr.sweep(bridge, vectors, pairs, alphas=[0.2], progress=False)
    records, _ = gr.evaluate.sweep_records(bridge, vectors, pairs, progress=False)
    both = gr.evaluate.two_sided(records)
    assert both["swing"].to_numpy() == pytest.approx(swing, abs=1e-4)
    table = gr.evaluate.summarize(both)
    assert table["estimand"].tolist() == ["swing"] and table["effect"].item() == pytest.approx(swing.mean(), abs=1e-4)


def test_a_choice_that_may_do_nothing_says_so() -> None:
    cells = {"vector": "v", "positions": "all", "layer": [3, 4], "alpha": 0.2, "n": 8, "effect_se": 0.1}
    unsure = pd.DataFrame({**cells, "effect": [0.1, 0.2], "low": [-0.1, -0.05], "high": [0.3, 0.4]})
    unsure.attrs["records"] = ["a", "b"]
    with pytest.warns(UserWarning, match=r"-0.050 to \+0.400 nats, contains 0"):
        choice = gr.choose(unsure)
    assert choice.layer == 4 and "contains 0" in str(choice)
    sure = unsure.assign(low=0.01)
    sure.attrs = unsure.attrs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "contains 0" not in gr.choose(sure).why
