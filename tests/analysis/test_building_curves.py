"""Learning curves and transfer tables say what building and measuring by hand gives, on records that were held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl._util.stats import crossed_interval, mean_interval
from grains_tl.analysis import learning_curve, transfer
from grains_tl.analysis.transfers import _sides
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.recipes import recipe_of
from tests.conftest import CHAT_TEMPLATE, tiny_model
from tests.helpers.planted import planted_model, planted_pairs

LAYER = 0


def effect_by_hand(model: Any, vectors: gr.SteeringVectors, alpha: float, test: Any) -> np.ndarray:
    before, after = (gr.score_pairs(model, test, hooks) for hooks in (None, vectors.steering(alpha, LAYER)))
    return ((after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])).numpy()


def alpha_at(model: Any, vectors: gr.SteeringVectors, kl: float = 0.05) -> float:
    """Where the KL on the neutral texts reaches the budget, by halving an interval."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        costs = gr.evaluate.text_costs(model, [vectors.steering(middle, LAYER)], gr.records.neutral_texts(5))
        over = np.average(costs["kl"], weights=costs["n_tokens"]) > kl
        low, high = (low, middle) if over else (middle, high)
    return (low + high) / 2


def test_the_curve_of_all_records_is_the_vector_built_by_hand(model: Any) -> None:
    pairs = planted_pairs()
    table = learning_curve(model, pairs[:12], pairs[12:], layer=LAYER, recipe="caa", sizes=[3, 12], n_draws=2)
    assert table["size"].tolist() == [0, 3, 12] and table["n_draws"].tolist() == [5, 2, 1]
    row = table.set_index("size").loc[12]
    by_hand = effect_by_hand(
        model, gr.build_vectors(model, pairs[:12], recipe="caa", layers=[LAYER]), row["alpha"], pairs[12:]
    )
    mean, _, low, high = mean_interval(by_hand.astype(float))
    assert [row["effect"], row["low"], row["high"]] == pytest.approx([mean, low, high], abs=2e-4)
    assert row["cosine"] == pytest.approx(1)
    assert table["kl"].to_numpy() == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("recipe", ["caa", "grains", "margin_gradient", "prompt_mean"])
def test_a_part_of_the_records_builds_what_those_records_alone_build(bridge: Any, recipe: str) -> None:
    pairs = planted_pairs()
    records = BuildingRecords(bridge, tokenize_pairs(bridge, pairs), (1,))
    places = [2, 5, 7, 11]
    part = records.part(places)
    found = recipe_of(recipe).build(part)
    alone = gr.build_vectors(bridge, [pairs[i] for i in places], recipe=recipe, layers=[1])
    assert float(found.cosine(alone)[0]) == pytest.approx(1, abs=1e-5)
    assert torch.equal(part.resid_norms, records.resid_norms)


def test_more_records_come_closer_to_the_vector_of_all() -> None:
    model, pairs = planted_model("bridge"), planted_pairs()
    table = learning_curve(model, pairs[:24], pairs[24:], layer=0, recipe="grains", sizes=[2, 12, 24], n_draws=3)
    curve = table[table["vector"] == "grains"]
    assert curve["cosine"].is_monotonic_increasing and curve["cosine"].iloc[-1] == pytest.approx(1)
    assert (curve["effect"] > table.set_index("size").effect[0]).all()
    fig = gr.plotting.plot_learning_curve(table)
    assert list(fig.axes[0].get_lines()[-1].get_ydata()) == pytest.approx(curve["effect"].tolist())


def test_a_resumed_curve_runs_no_response_again(bridge: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pairs, file = planted_pairs(), tmp_path / "curve.jsonl"
    kwargs: dict[str, Any] = {"layer": LAYER, "recipe": "margin_gradient", "sizes": [2, 6], "n_draws": 2, "n_random": 1}
    first = learning_curve(bridge, pairs[:6], pairs[6:12], **kwargs, checkpoint=file)
    size = file.stat().st_size, Path(f"{file}.attributions.jsonl").stat().st_size
    again = learning_curve(bridge, pairs[:6], pairs[6:12], **kwargs, checkpoint=file)
    assert (file.stat().st_size, Path(f"{file}.attributions.jsonl").stat().st_size) == size
    assert first.equals(again)


def test_curves_refuse_what_would_flatter_them(bridge: Any, unchecked: None) -> None:
    pairs = planted_pairs()
    with pytest.raises(ValueError, match="1 of the test records are building records"):
        learning_curve(bridge, pairs[:6], pairs[5:], layer=LAYER)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"sizes": [3, 9]}, "from 1 to 6"),
        ({"sizes": []}, "from 1 to 6"),
        ({"n_draws": 0}, "n_draws=0"),
        ({"kl": 0}, "kl=0"),
        ({"layer": 9}, "9"),
        ({"draws": 3}, "draws"),
        ({"recipe": "cca"}, "cca"),
    ]
    for wrong, words in wrongs:
        with pytest.raises(ValueError, match=words):
            learning_curve(bridge, pairs[:6], pairs[6:], **{"layer": LAYER, **wrong})
    with pytest.raises(ValueError, match="0 building and 3 test"):
        learning_curve(bridge, [], pairs[:3], layer=LAYER)


# -- transfer ---------------------------------------------------------------------------------------------------------
def two_sets() -> dict[str, list[gr.PreferencePair]]:
    """The same prompts with two wordings of the responses."""
    pairs = planted_pairs()
    other = [gr.PreferencePair(p.prompt, " very great", " very awful") for p in pairs]
    return {"words": pairs, "others": other}


def test_transfer_is_the_matrix_by_hand_on_held_out_prompts(bridge: Any) -> None:
    sets = two_sets()
    table = transfer(bridge, sets, layer=LAYER, recipe="caa", share=0.25, n_random=2)
    assert len(table) == 6 and set(table["built_on"]) == {"words", "others", "random direction"}
    building, testing = _sides(sets, None, 0.25, 0)
    aside = {p.prompt for p in testing["words"]}
    assert {p.prompt for p in testing["others"]} == aside and len(aside) == 9
    assert not aside & {p.prompt for own in building.values() for p in own}
    vectors = {k: gr.build_vectors(bridge, own, recipe="caa", layers=[LAYER]) for k, own in building.items()}
    rows = table.set_index(["built_on", "measured_on"])
    assert rows.loc[("words", "words"), "share"] == pytest.approx(1)
    cosine = float(vectors["words"].cosine(vectors["others"])[0])
    assert rows.loc[("words", "others"), "cosine"] == pytest.approx(cosine, abs=1e-5)
    by_hand = effect_by_hand(bridge, vectors["words"], alpha_at(bridge, vectors["words"]), testing["others"])
    assert rows.loc[("words", "others"), "effect"] == pytest.approx(by_hand.mean(), rel=0.1)
    low, high = rows.loc[("words", "others"), ["low", "high"]]
    assert low < rows.loc[("words", "others"), "effect"] < high
    fig = gr.plotting.plot_transfer(table)
    grid = np.asarray(fig.axes[0].images[0].get_array())
    assert grid[0, 1] == pytest.approx(rows.loc[("words", "others"), "effect"])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()][-1] == "random direction"


def test_another_chat_template_is_measured_and_put_back() -> None:
    model = tiny_model("bridge")
    pairs = [
        gr.PreferencePair([{"role": "user", "content": str(p.prompt)}], "great", "awful") for p in planted_pairs()[:8]
    ]
    bare = (
        "{% for m in messages %}{{ ('yes ' if m['role'] == 'assistant' else '') + m['content'] + ' . ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'yes ' }}{% endif %}"
    )
    vector = gr.SteeringVectors.from_raw(torch.ones(1, 32), [LAYER], torch.tensor([3.0]))
    table = transfer(
        model,
        {"chat": pairs[:4]},
        test={"chat": pairs[4:]},
        layer=LAYER,
        recipe=lambda records, generator: vector.directions,
        templates={"bare": bare},
        n_random=0,
    )
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert table["template"].tolist() == ["own", "bare"]
    own, other = table["effect"]
    assert own != pytest.approx(other, abs=1e-3)
    plain = [gr.PreferencePair(f"{p.prompt} . yes", " great", " awful") for p in planted_pairs()[4:8]]
    by_text = transfer(
        model,
        {"chat": pairs[:4]},
        test={"chat": plain},
        layer=LAYER,
        recipe=lambda records, generator: vector.directions,
        n_random=0,
    )
    assert other == pytest.approx(by_text["effect"][0], abs=1e-4)


def test_transfer_refuses_what_it_cannot_mean(bridge: Any, unchecked: None) -> None:
    pairs = planted_pairs()
    for sets, more, words in [
        (pairs, {}, "mappings"),
        ({}, {}, "mappings"),
        ({"a": pairs[:1]}, {}, "no records to (build|measure) on"),
        ({"a": pairs}, {"share": 1.0}, "share=1.0"),
        ({"a": pairs}, {"templates": {"x": CHAT_TEMPLATE}}, "plain text"),
        ({"a": pairs}, {"test": {"a": pairs[:3]}}, "3 of the test records"),
        ({"random direction": pairs}, {}, "another name"),
    ]:
        with pytest.raises(ValueError, match=words):
            transfer(bridge, sets, layer=LAYER, recipe="caa", **more)  # type: ignore[arg-type]


def test_the_interval_over_draws_and_records_holds_what_it_promises() -> None:
    """Simulated: the true mean lies in about 95 % of the intervals, never much less."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        values = rng.normal(0, 1, (5, 1)) + rng.normal(0, 2, (1, 20)) + rng.normal(0, 1, (5, 20))
        _, low, high = crossed_interval(values)
        inside += low < 0 < high
    assert 0.93 < inside / 1000 < 0.995
