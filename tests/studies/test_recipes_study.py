"""The recipes study: records, the search for a KL, intervals, resuming, and the tables."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate import grid, record_effects
from grains_tl.vectors.fisher import Fisher
from studies.recipes.bench import Bench, solve_alpha
from studies.recipes.cell import Cell, choose_layers, run_cell, write_about
from studies.recipes.directions import ATTRIBUTED, RECIPES, VARIANTS, direction
from studies.recipes.intervals import effects_of, estimate, read_cells, resampled
from studies.recipes.parts import Parts, contributions, token_gradients
from studies.recipes.report import parts_of
from studies.recipes.sets import SAMPLE, RecordSet, both_orders, other_wordings, record_set
from studies.recipes.tables import replaced, table_of

LAYERS = [0, 1]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Neutral texts that a tiny model with 64 positions can read."""
    texts = ["the film was good and the room was warm .", "we liked the soup and they liked the hotel room ."]
    monkeypatch.setattr(gr.records, "neutral_texts", lambda n=2: texts)
    return texts


def tiny_records() -> list[gr.PreferencePair]:
    words = [("good", "cold"), ("warm", "bad"), ("great", "awful"), ("good", "awful")] * 10
    return [
        gr.PreferencePair(f"the {thing} was {a} but the room was {b} . overall it was", " great", " awful")
        for (a, b), thing in zip(words, ["soup", "film", "hotel", "food"] * 10, strict=True)
    ]


def tiny_cell(bridge: Any, folder: Path) -> tuple[Cell, dict[str, torch.Tensor]]:
    pairs = tiny_records()
    records = RecordSet("reviews", pairs, pairs[:4], pairs[4:10], per_question=1)
    parts = contributions(bridge, pairs, LAYERS, folder / "parts.pt", half=False)
    rows = [list(range(3, 20)), list(range(5, 25))]
    fisher = Fisher.estimate(bridge, rows, layers=LAYERS, n_samples=40)
    bench = Bench(bridge, LAYERS, half=False)
    base = {"choose": bench.add("choose", records.choose), "test": bench.add("test", records.test)}
    (folder / "smollm2").mkdir(exist_ok=True)
    return Cell(bench, records, parts, fisher, LAYERS, folder / "smollm2" / "reviews.jsonl"), base


# -- records ----------------------------------------------------------------------------------------------------------
def test_both_orders_swap_the_answers_and_the_letters() -> None:
    first, second = both_orders("Is it?", "Yes", "No", chosen_first=False)
    assert "(A) Yes\n (B) No" in str(first.prompt)
    assert "(A) No\n (B) Yes" in str(second.prompt)
    assert (first.chosen, first.rejected, second.chosen, second.rejected) == ("B", "A", "A", "B")


@pytest.mark.parametrize("name", ["survival-instinct", "agreeableness"])
def test_letters_are_chosen_and_rejected_equally_often(name: str, tmp_path: Path) -> None:
    (tmp_path / "anthropic_evals").mkdir()
    rows = []
    for i in range(200):
        yes = i % 3 == 0
        row = {"question": f'Is it?\n"{i}"', "statement": str(i), "answer_matching_behavior": " Yes" if yes else " No"}
        if name == "survival-instinct":
            row["question"] = f"Question: number {i}?\n\nChoices:\n (A) Yes\n (B) No\n\nAnswer:"
            row["answer_matching_behavior"] = " (A)" if yes else " (B)"
        rows.append(json.dumps(row))
    (tmp_path / "anthropic_evals" / f"{name}.jsonl").write_text("\n".join(rows))
    records = record_set(name, tmp_path)
    samples = [records.build[i : i + SAMPLE] for i in range(0, len(records.build), SAMPLE)]
    for part in (*samples, records.choose, records.test):
        assert Counter(p.chosen for p in part) == Counter(p.rejected for p in part)
        assert len({str(p.prompt) for p in part}) == len(part)
    prompts = [{str(p.prompt) for p in part} for part in (records.build, records.choose, records.test)]
    assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2] and not prompts[0] & prompts[2]


def test_bundled_sets_do_not_mix_splits_and_others_need_data() -> None:
    records = record_set("reviews", None)
    assert {p.meta["split"] for p in records.build} == {"build"}
    assert {p.meta["split"] for p in records.test} == {"test"}
    assert records.n_samples * SAMPLE == len(records.build)
    with pytest.raises(ValueError, match="not bundled"):
        record_set("truthfulqa", None)


def test_other_wordings_share_no_word_with_the_sets_own() -> None:
    test = record_set("reviews", None).test
    own = {str(p.chosen).strip() for p in test} | {str(p.rejected).strip() for p in test}
    for record, new in zip(test, other_wordings(test), strict=True):
        assert new.prompt == record.prompt
        assert not {*str(new.chosen).split(), *str(new.rejected).split()} & own


# -- contributions and directions -------------------------------------------------------------------------------------
def test_directions_equal_what_the_package_builds(bridge: Any, tmp_path: Path) -> None:
    """Mean directions from contributions are those of ``build_vectors``."""
    pairs = tiny_records()
    parts = contributions(bridge, pairs, LAYERS, tmp_path / "parts.pt", half=False)
    fisher = Fisher.estimate(bridge, [list(range(3, 20))], layers=LAYERS, n_samples=40)
    options: dict[str, dict[str, Any]] = {"grains": {"top_k": 1}}
    for recipe in ("grains", "caa", "margin_gradient"):
        built = gr.build_vectors(bridge, pairs, recipe=recipe, layers=LAYERS, **options.get(recipe, {}))
        for column, layer in enumerate(LAYERS):
            own = direction(recipe, parts, column, layer, fisher)
            cosine = float(torch.nn.functional.cosine_similarity(own, built.directions[column], dim=0))
            assert cosine > 0.9999, (recipe, layer)
        assert torch.allclose(parts.norms, built.resid_norms, rtol=1e-4)


def test_contributions_are_read_again_only_for_the_same_records(bridge: Any, tmp_path: Path) -> None:
    pairs = tiny_records()
    first = contributions(bridge, pairs[:3], LAYERS, tmp_path / "parts.pt", half=False)
    again = contributions(bridge, pairs[:3], LAYERS, tmp_path / "parts.pt", half=False)
    assert torch.equal(first.caa, again.caa) and first.seconds == again.seconds
    assert len(contributions(bridge, pairs[:2], LAYERS, tmp_path / "parts.pt", half=False).scores) == 2


def test_every_recipe_and_control_gives_a_direction_and_controls_depend_on_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 0.3, -0.2])]
    masked = [torch.randn(3, 1, 6, generator=generator) for _ in scores]
    at, of = ([torch.randn(3, 1, 6, generator=generator) for _ in scores] for _ in range(2))
    gradients, caa = torch.randn(2, 1, 6, generator=generator), torch.randn(2, 1, 6)
    parts = Parts(scores, masked, at, of, gradients, caa, torch.ones(1), {})
    fisher = Fisher(
        torch.randn(40, 1, 6, generator=generator), torch.arange(2).repeat_interleave(20), torch.tensor([9, 9]), (4,)
    )
    for name in (*RECIPES, *VARIANTS, *ATTRIBUTED.values(), "random_direction"):
        found = direction(name, parts, 0, 4, fisher, seed=1)
        assert found.shape == (6,) and bool(torch.isfinite(found).all())
        same = torch.equal(found, direction(name, parts, 0, 4, fisher, seed=3))
        assert same == (name in (*RECIPES, *VARIANTS)), name
    expected = (masked[0][0, 0] - masked[0][1, 0] + masked[1][1, 0] - masked[1][2, 0]) / 2
    assert torch.allclose(direction("grains", parts, 0, 4, fisher), expected)
    expected = (at[0][0, 0] - at[0][1, 0] + at[1][1, 0] - at[1][2, 0]) / 2
    assert torch.allclose(direction("grains_at_token", parts, 0, 4, fisher), expected)
    # gradients point toward chosen at tokens of either sign
    expected = (of[0][0, 0] + of[0][1, 0] + of[1][1, 0] + of[1][2, 0]) / 2
    assert torch.allclose(direction("gradient_at_tokens", parts, 0, 4, fisher), expected)


def test_gradients_by_token_are_those_of_plain_autograd(bridge: Any) -> None:
    """Against a step added to one token of one block's output by a PyTorch hook."""
    (record,) = gr.tokens.tokenize_pairs(bridge, tiny_records()[:1])
    found = token_gradients(bridge, record, LAYERS)
    assert found.shape == (sum(record.content), len(LAYERS), int(bridge.cfg.d_model))
    token, layer = 3, 1
    place = [p for p, keep in enumerate(record.content) if keep][token]
    step = torch.zeros(int(bridge.cfg.d_model), requires_grad=True)

    def add(act: torch.Tensor, hook: Any) -> torch.Tensor:
        here = torch.zeros(act.shape[1], 1)
        here[place] = 1
        return act + here * step

    total = torch.zeros(())
    for sign, response in ((1, record.chosen), (-1, record.rejected)):
        ids = torch.tensor([[*record.prompt, *response]])
        logprobs = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]).log_softmax(-1)[0]
        for i, token_id in enumerate(response):
            total = total + sign * logprobs[len(record.prompt) + i - 1, token_id]
    (expected,) = torch.autograd.grad(total, step)
    assert torch.allclose(found[token, layer], expected, atol=1e-5)


# -- measuring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [1.2, 2.0, 2.8])
@pytest.mark.parametrize("guess", [0.001, 0.1, 1.0, None])
def test_solve_alpha_finds_the_budget_of_a_known_curve(power: float, guess: float | None) -> None:
    curve: list[tuple[float, float]] = []
    for budget in (0.05, 0.2):
        alpha = solve_alpha(lambda a: 7 * a**power, budget, curve, guess)
        assert alpha is not None and math.isclose(7 * alpha**power, budget, rel_tol=0.06)
    assert len(curve) < 9


def test_solve_alpha_says_when_a_budget_is_out_of_reach_and_recovers_from_infinity() -> None:
    assert solve_alpha(lambda a: 1e-4 * a, 0.05, [], 0.1) is None
    found = solve_alpha(lambda a: math.nan if a > 0.3 else 3 * a * a, 0.05, [], 2.0)
    assert found is not None and math.isclose(3 * found * found, 0.05, rel_tol=0.05)


def test_bench_gives_what_the_package_measures(
    bridge: Any, pairs: list[gr.PreferencePair], short_texts: list[str]
) -> None:
    """Changes equal ``record_effects``; the KL, where every token counts, equals ``text_costs``."""
    vectors = gr.build_vectors(bridge, pairs, recipe="caa", layers=[1])
    bench = Bench(bridge, LAYERS, half=False)
    base = bench.add("test", pairs)
    settings = grid({"caa": vectors}, [1], [0.3])
    table = record_effects(bridge, pairs, settings)
    assert np.allclose(bench.change(vectors, 0.3, "test"), table["change"], atol=1e-4)
    assert np.allclose(base, table["base_margin"], atol=1e-4)


def test_the_kl_is_that_of_every_third_token(bridge: Any, short_texts: list[str]) -> None:
    """Against plain runs with hooks."""
    vectors = gr.build_vectors(bridge, tiny_records(), recipe="caa", layers=[1])
    found = []
    for text in short_texts:
        ids = torch.tensor([bridge.tokenizer(text)["input_ids"]])
        base = bridge(ids).log_softmax(-1)
        steered = bridge.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.3)).log_softmax(-1)
        kl = (steered.exp() * (steered - base)).sum(-1)[0]
        found.append(kl[1 : len(kl) - 1 : 3])
    measured = Bench(bridge, LAYERS, half=False).kl(vectors, 0.3)
    assert math.isclose(measured, float(torch.cat(found).mean()), rel_tol=1e-3)


def test_a_cell_resumes_and_reports(bridge: Any, tmp_path: Path, short_texts: list[str]) -> None:
    cell, base = tiny_cell(bridge, tmp_path)
    best = run_cell(cell, n_random=2)
    lines = cell.out.read_text().splitlines()
    n_samples = cell.records.n_samples
    n_recipes = len(RECIPES) + len(VARIANTS)
    assert len(lines) == n_recipes * len(LAYERS) + n_samples * (n_recipes + 1 + 2 * len(ATTRIBUTED))
    assert best == choose_layers(cell) and set(best.values()) <= set(LAYERS)
    write_about(cell, "smollm2", best, base, tmp_path / "smollm2" / "reviews.json")

    cell.out.write_text("\n".join(lines[:5]) + "\n")  # as if killed
    again, _ = tiny_cell(bridge, tmp_path)
    assert len(again.done) == 5
    run_cell(again, n_random=2)
    assert [json.loads(x)["recipe"] for x in cell.out.read_text().splitlines()] == [
        json.loads(x)["recipe"] for x in lines
    ]

    table = table_of(tmp_path)
    assert set(table["recipe"]) == {*RECIPES, *VARIANTS, *ATTRIBUTED.values(), "random_direction"}
    own = table[(table["recipe"] == "caa") & (table["kl"] == 0.05)].iloc[0]
    ((_, rows),) = read_cells(tmp_path)
    effects = effects_of(rows, "caa", 0.05)
    assert effects is not None and math.isclose(own["effect"], effects.mean(), abs_tol=1e-9)
    assert own["low"] <= own["effect"] <= own["high"]
    assert "SmolLM2" in parts_of(tmp_path)["effects at 0.05"]


# -- intervals --------------------------------------------------------------------------------------------------------
def test_intervals_cover_the_truth_over_samples_and_records() -> None:
    """Planted variation over samples and over questions; a record-only interval would cover far less."""
    rng = np.random.default_rng(0)
    inside, narrow = 0, 0
    for trial in range(150):
        of_samples, of_questions = rng.normal(0, 1, (6, 1, 1)), rng.normal(0, 1, (1, 1, 10))
        effects = np.repeat(of_samples + of_questions + rng.normal(0, 0.3, (6, 1, 10)), 2, axis=2)
        found = estimate(effects, per_question=2, seed=trial)
        inside += found.low <= 0 <= found.high
        spread = 1.96 * effects.mean((0, 1)).std(ddof=1) / 20**0.5
        narrow += abs(found.mean) <= spread
    assert inside > 0.86 * 150 > narrow + 20


def test_paired_differences_are_narrower_than_unpaired_and_exact_for_a_shift() -> None:
    effects = np.random.default_rng(1).normal(0, 1, (5, 1, 12))
    found = estimate(effects + 0.5, 1, minus=effects)
    assert math.isclose(found.mean, 0.5, abs_tol=1e-9) and math.isclose(found.low, 0.5, abs_tol=1e-9)


def test_one_draw_equals_many_equal_draws_and_missing_budgets_are_said() -> None:
    effects = np.random.default_rng(2).normal(0, 1, (5, 1, 12))
    assert np.allclose(resampled(effects, 1), resampled(np.repeat(effects, 3, axis=1), 1))
    effects[2] = np.nan
    assert str(estimate(effects, 1)) == "not reached"
    rows = [
        {"stage": "test", "recipe": "caa", "sample": s, "draw": 0, "effects": {"test": [{"kl": 0.05, "change": c}]}}
        for s, c in enumerate([[1.0, 2.0], []])
    ]
    found = effects_of(rows, "caa", 0.05)
    assert found is not None and found.shape == (2, 1, 2) and np.isnan(found[1]).all()
    assert effects_of(rows, "grains", 0.05) is None
    rows.append({**rows[0], "draw": 1})
    ragged = effects_of(rows, "caa", 0.05)
    assert ragged is not None and ragged.shape == (2, 1, 2)


# -- page -------------------------------------------------------------------------------------------------------------
def test_parts_of_a_page_are_replaced_and_missing_markers_are_an_error() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert replaced(page, "x", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no part"):
        replaced(page, "z", "new")


def test_the_page_holds_what_the_raw_results_say() -> None:
    page = (DOCS / "recipes-study.md").read_text(encoding="utf-8")
    parts = parts_of(DOCS.parent / "studies" / "results" / "recipes")
    assert {"effects at 0.05", "minus caa at 0.05", "seconds"} <= parts.keys()
    for name, content in parts.items():
        assert replaced(page, name, content) == page, name
