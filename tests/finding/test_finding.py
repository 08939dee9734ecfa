"""A search finds a planted direction and nothing in mixed-up labels, goes on where it stopped, and refuses bad records."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import grains_tl as gr
from grains_tl._util.stats import mean_interval
from grains_tl.cli.main import main
from grains_tl.finding import measuring
from grains_tl.finding.records import split_for_search
from grains_tl.finding.verdict import above
from grains_tl.records.splits import record_id
from tests.conftest import KINDS
from tests.helpers.planted import COPY, axis, planted_model, planted_pairs

N_SEEDS = 10
# of 10 true nulls at the 5 % level, more than 3 are rejected with probability 0.001
MOST_REJECTIONS = 3
QUICK: dict[str, Any] = {"layers": [1, 2], "n_draws": 4, "neutral": 2, "n_examples": 1, "max_new_tokens": 4}


def copy_axis(records: Any, generator: torch.Generator) -> torch.Tensor:
    """The axis that the planted model reads " great" from."""
    return axis(COPY, list(records.layers)).raw


def wrong_axis(records: Any, generator: torch.Generator) -> torch.Tensor:
    return -copy_axis(records, generator)


def varied_pairs(n: int, seed: int = 0, *, flip: bool = False) -> list[gr.PreferencePair]:
    """Planted prompts with responses that differ from record to record; with ``flip`` a coin says which is chosen."""
    rng = np.random.default_rng(seed)
    pairs = [planted_pairs()[i] for i in rng.permutation(36)[:n]]
    sides = [(" great", " awful"), (" great film", " awful film"), (" great hotel", " awful hotel")]
    found = []
    for i, pair in enumerate(pairs):
        chosen, rejected = sides[i % 3]
        if flip and rng.random() < 0.5:
            chosen, rejected = rejected, chosen
        found.append(gr.PreferencePair(pair.prompt, chosen, rejected))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_direction_is_found(kind: str) -> None:
    model, pairs = planted_model(kind), varied_pairs(30)
    found = gr.find_vector(model, pairs, recipes=[copy_axis, "caa", "random_direction"], **QUICK)
    best = found.table.iloc[0]
    assert found.steers
    assert (best["recipe"], best["verdict"], found.best.layers) == ("copy_axis", "steers", (best["layer"],))
    assert 0 < best["low"] < best["effect"] < best["high"]
    assert best["above_low"] > 0 and best["beaten"] == best["n_draws"] == 4
    assert found.verdict.startswith("copy_axis steers")
    assert "random_direction" in found.verdict
    # by plain full runs with the hooks a user gets
    test = split_for_search(pairs, 0).report
    change = [
        (score := gr.score_pairs(model, test, found.best.hooks()))[:, 0]
        - score[:, 1]
        - (base := gr.score_pairs(model, test))[:, 0]
        + base[:, 1]
    ][0].numpy()
    assert len(test) == best["n"]
    assert change.mean() == pytest.approx(best["effect"], abs=1e-4)
    wanted = stats.t.interval(1 - 0.05 / 2, len(change) - 1, change.mean(), stats.sem(change))
    assert (best["low"], best["high"]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.real
def test_refusals_are_found_in_wordings_that_nothing_was_built_from(smollm2: Any) -> None:
    parts: dict[str, list[gr.PreferencePair]] = {}
    for pair in gr.load_pairs(Path(__file__).parents[1] / "data" / "refusal.jsonl"):
        parts.setdefault(pair.meta["split"], []).append(pair)
    quick = {**QUICK, "layers": [14], "n_draws": 3, "n_examples": 0}
    found = gr.find_vector(smollm2.bridge, parts, recipes=["margin_gradient", "random_direction"], **quick)
    assert found.table["verdict"][0] == "steers"
    assert found.table["low"][0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_run_on_every_model_class(kind: str) -> None:
    found = gr.find_vector(planted_model(kind), varied_pairs(12), **{**QUICK, "n_draws": 2})
    assert set(found.table["recipe"]) == {"grains", "caa", "kl_optimal", "random_direction"}
    assert found.table["recipe"][0] == found.best.vectors.info["method"]
    assert set(found.effects) == set(zip(found.table["recipe"], found.table["layer"], strict=True))


def test_effects_are_compared_at_the_same_kl(planted: Any) -> None:
    found = gr.find_vector(planted, varied_pairs(20), recipes=[copy_axis, "random_direction"], kl=0.02, **QUICK)
    spent = found.table["kl"]
    assert spent.between(0.5 * 0.02, 1.5 * 0.02).all() or found.table["alpha"].max() >= 0.4


def test_the_budget_can_be_that_of_generated_tokens(planted: Any) -> None:
    options: Any = {**QUICK, "n_draws": 2, "budget": "generated", "neutral": 3, "max_new_tokens": 6}
    found = gr.find_vector(planted, varied_pairs(20), recipes=[copy_axis, "random_direction"], kl=0.02, **options)
    assert "mean over generated tokens" in found.verdict.splitlines()[0] and "neutral text" not in found.verdict
    prompts = list(dict.fromkeys(r.prompt for r in split_for_search(varied_pairs(20), 0).choose))[:3]
    costs = gr.evaluate.text_costs(planted, [found.best], gr.inference.Continuations(prompts, 6))
    assert found.table["kl"][0] == pytest.approx(np.average(costs["kl"], weights=costs["n_tokens"]), abs=1e-6)


def test_a_direction_that_works_backwards_is_not_turned_round(planted: Any) -> None:
    found = gr.find_vector(planted, varied_pairs(30), recipes=[wrong_axis, "random_direction"], **QUICK)
    assert not found.steers
    assert found.table["verdict"][0] == "wrong way"
    assert found.verdict.startswith("Nothing steers")


def test_mixed_up_labels_find_nothing(planted: Any) -> None:
    steering = [
        gr.find_vector(
            planted,
            varied_pairs(24, seed, flip=True),
            recipes=["caa", "margin_gradient", "random_direction"],
            seed=seed,
            **QUICK,
        ).steers
        for seed in range(N_SEEDS)
    ]
    assert sum(steering) <= MOST_REJECTIONS


def test_a_search_goes_on_where_it_stopped(planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    call: dict[str, Any] = {"recipes": ["caa", "random_direction"], **QUICK}
    pairs = varied_pairs(16)
    whole = gr.find_vector(planted, pairs, **call)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grains_tl.finding.api.report", stopped)
        with pytest.raises(KeyboardInterrupt):
            gr.find_vector(planted, pairs, checkpoint=file, **call)
    kept = file.read_text()
    assert len(kept.splitlines()) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = gr.find_vector(planted, pairs, checkpoint=file, **call)
    assert file.read_text().startswith(kept)
    again = file.read_text()
    assert gr.find_vector(planted, pairs, checkpoint=file, **call).verdict == resumed.verdict == whole.verdict
    assert file.read_text() == again
    assert resumed.table.equals(whole.table)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pairs: pairs[:7], "7 different records; expected at least 8"),
        (lambda pairs: pairs[:4] * 4, "4 different records; expected at least 8"),
        (
            lambda pairs: [*pairs, gr.PreferencePair(pairs[0].prompt, pairs[0].rejected, pairs[0].chosen)],
            "records 1 and 17 are the same with chosen and rejected swapped",
        ),
        (lambda pairs: {"build": pairs, "choose": pairs[:4]}, "'build', 'choose'.*report"),
        (
            lambda pairs: {"build": pairs[:8], "choose": pairs[8:12], "report": pairs[11:]},
            "record 1 of report is in choose too",
        ),
        (
            lambda pairs: {"build": pairs[:8], "choose": pairs[8:14], "report": pairs[14:]},
            "2 different records to report",
        ),
        (lambda pairs: pairs[0], "list of PreferencePair"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_records_are_refused(planted: Any, spoil: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.find_vector(planted, spoil(varied_pairs(16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ["random_direction"]}, "no control"),
        ({"recipes": ["caa", "caa"]}, "one name"),
        ({"recipes": ["nothing"]}, "not known"),
        ({"kl": 0.0}, "kl=0"),
        ({"alphas": [-0.1, 0.1]}, "positive steps"),
        ({"layers": [99]}, "99"),
        ({"n_drawz": 3}, "n_drawz"),
        ({"n_draws": 1}, "n_draws=1"),
        ({"level": 95}, "level=95"),
        ({"neutral": []}, "no texts"),
        ({"budget": "free"}, "budget='free'"),
        ({"quantile": 0.95}, "budget='generated'"),
        ({"budget": "generated", "quantile": 1.5}, "quantile=1.5"),
        ({"budget": "generated", "neutral": ["a text"]}, "how many prompts"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    planted: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring.Run, "costs", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=message):
        gr.find_vector(planted, varied_pairs(16), **options)


def test_parts_have_nothing_in_common() -> None:
    pairs = varied_pairs(30)
    copies = [*pairs, *pairs[:3]]
    same_prompt = [replace(pair, chosen=" great great") for pair in pairs[:4]]
    for seed in range(20):
        parts = split_for_search([*copies, *same_prompt], seed)
        ids = [{record_id(r) for r in part} for part in (parts.build, parts.choose, parts.report)]
        prompts = [{r.prompt for r in part} for part in (parts.build, parts.choose, parts.report)]
        assert sum(map(len, ids)) == len(set().union(*ids)) == 34 == sum(parts.sizes.values())
        assert sum(map(len, prompts)) == len(set().union(*prompts))
        assert min(parts.sizes.values()) >= 6
        assert any("3 of 37 records are copies" in note for note in parts.notes)
    splits = [split_for_search(pairs, seed) for seed in (0, 0, 1)]
    assert splits[0].build == splits[1].build != splits[2].build


def test_the_fewest_records_fill_all_parts() -> None:
    assert split_for_search(varied_pairs(8), 0).sizes == {"build": 3, "choose": 2, "report": 3}


def test_responses_that_repeat_are_said(planted: Any) -> None:
    notes = split_for_search(planted_pairs(), 0).notes
    assert sum("have the same" in note for note in notes) == 2
    found = gr.find_vector(planted, planted_pairs()[:12], recipes=["caa", "random_direction"], **QUICK)
    assert all(note in found.verdict for note in found.notes)
    parts = {"build": varied_pairs(12)[:4], "choose": varied_pairs(12)[4:7], "report": varied_pairs(12)[7:]}
    assert any("word for word" in note for note in split_for_search(parts, 0).notes)


def test_intervals_by_hand() -> None:
    rng = np.random.default_rng(0)
    change, draws = rng.normal(1, 1, 9), rng.normal(0, 1, (5, 9))
    assert mean_interval(change, 0.9)[2:] == pytest.approx(stats.t.interval(0.9, 8, change.mean(), stats.sem(change)))
    found = above(change, draws, 0.95)
    assert found["above_control"] == pytest.approx(change.mean() - draws.mean())
    assert found["beaten"] == sum(d.mean() < change.mean() for d in draws)
    assert found["above_low"] < change.mean() - draws.mean() < found["above_high"]


def test_the_alpha_of_a_budget() -> None:
    """KL exactly quadratic in alpha: every budget is met exactly."""
    alphas = [0.05, 0.1, 0.2, 0.4]
    for wanted in (0.01, 0.07, 0.3):
        assert measuring.alpha_at(alphas, [3 * a**2 for a in alphas], 3 * wanted**2) == pytest.approx(wanted)
    assert measuring.alpha_at(alphas, [3 * a**2 for a in alphas], 9.0) == 0.4
    assert measuring.alpha_at(alphas, [0.01, np.nan, np.nan, np.nan], 0.05) == 0.05
    assert 0 < measuring.alpha_at(alphas, [np.nan] * 4, 0.05) < 0.05


def test_no_control_is_said(planted: Any) -> None:
    found = gr.find_vector(planted, varied_pairs(12), recipes=[copy_axis], **QUICK)
    assert "No control was run" in found.verdict


def test_every_control_can_be_named(planted: Any) -> None:
    names = ["random_direction", "orthogonal_direction", "shuffled_labels", "random_tokens"]
    found = gr.find_vector(planted, varied_pairs(12), recipes=["caa", *names], **{**QUICK, "n_draws": 2})
    controls = found.table[found.table["control"]]
    assert set(controls["recipe"]) == set(names)
    assert (controls["n_draws"] == 2).all()


def test_what_is_found_can_be_shown_and_saved(planted: Any, tmp_path: Path) -> None:
    found = gr.find_vector(planted, varied_pairs(16), recipes=[copy_axis, "random_direction"], **QUICK)
    shown = found._repr_html_()
    assert "copy_axis" in shown and "random_direction" in shown and found.examples[0].prompt in shown
    assert "from no steering to +alpha" in found.plot().axes[0].get_xlabel()
    loaded = gr.load_vectors(found.save(tmp_path / "v.safetensors"), planted)
    assert loaded.info["found"]["alpha"] == found.best.alpha
    assert torch.equal(loaded.directions, found.vectors["copy_axis"].at(list(found.best.layers)).directions)
    (example,) = found.examples
    assert gr.generate(planted, example.prompt, found.best.hooks(), max_new_tokens=4) == [example.steered]


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model("bridge")


def test_the_shell(planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in varied_pairs(12)]
    for row, part in zip(rows, ["build"] * 4 + ["choose"] * 3 + ["report"] * 5, strict=True):
        row["split"] = part
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("grains_tl.cli.main.load", lambda args: planted)
    out = tmp_path / "out"
    command = ["find", "--pairs", str(file), "--out", str(out), "--layers", "1,2", "--draws", "2", "--recipes"]
    assert main([*command, "caa,random_direction", "--split", "split"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} >= {"report.html", "table.csv", "vectors.safetensors", "results.jsonl"}
    assert "5 report records" in (out / "report.html").read_text()
    assert main([*command, "caa", "--split", "part"]) == 2
    assert "record 1 does not have this column" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["kl_optimal", "trained"])
def test_costs_on_a_recipes_own_texts_are_refused(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, pairs = planted_model("bridge"), planted_pairs()
    monkeypatch.setattr(gr.vectors.Fisher, "estimate", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=f"1 of the 13 neutral texts.*'{recipe}'.*neutral=12 or fewer"):
        gr.find_vector(planted, pairs, [recipe, "caa"], layers=[1], neutral=13)
