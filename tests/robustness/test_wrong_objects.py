"""The object next to the one that was meant: taken where there is no doubt, else refused in words, not by a traceback."""

# mypy: disable-error-code="arg-type, list-item, dict-item"
# values of the wrong type are what this file is about
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.plotting.style import figure_png

pytestmark = pytest.mark.usefixtures("unchecked")  # as a user meets it: without the run-time type checks


@pytest.fixture(scope="module")
def made(bridge: Any) -> Any:
    """Vectors, and the tables of a small sweep with its costs."""
    pairs = gr.load_pairs(
        [
            {"prompt": "this film was very", "chosen": " good", "rejected": " bad"},
            {"prompt": "the food was not", "chosen": " great", "rejected": " awful"},
            {"prompt": "we liked this hotel and it was", "chosen": " warm", "rejected": " cold"},
        ]
    )
    vectors = gr.build_vectors(bridge, pairs, top_k=1, progress=False)
    settings = gr.evaluate.grid({"v": vectors}, [1], [-0.2, 0.2])
    records, costs = (
        gr.evaluate.record_effects(bridge, pairs, settings),
        gr.evaluate.text_costs(bridge, settings, ["the film was good"]),
    )
    return SimpleNamespace(
        model=bridge,
        pairs=pairs,
        vectors=vectors,
        settings=settings,
        records=records,
        costs=costs,
        table=gr.evaluate.summarize(records, costs),
    )


# -- settings ----------------------------------------------------------------------------------------------------------

MEASURES = {
    "text_costs": lambda m, s: gr.evaluate.text_costs(m.model, s, ["the film was good"]),
    "record_effects": lambda m, s: gr.evaluate.record_effects(m.model, m.pairs, s),
    "measure": lambda m, s: gr.evaluate.measure(m.model, m.pairs, s),
}


@pytest.mark.parametrize("name", MEASURES)
def test_settings_that_are_none(made: Any, name: str) -> None:
    call = MEASURES[name]
    with pytest.raises(ValueError, match=r"setting 1 is a tuple; .*grid\(.*Setting\(layer, hooks\)"):
        call(made, made.vectors.hooks(0.2, [1]))
    with pytest.raises(ValueError, match="settings are one Setting; a list is needed"):
        call(made, made.settings[0])
    with pytest.raises(ValueError, match=r"settings are one SteeringVectors; .*grid\("):
        call(made, made.vectors)
    with pytest.raises(ValueError, match=r"settings are one Steering; .*grid\("):
        call(made, made.vectors.steering(0.2, 1))
    with pytest.raises(ValueError, match=r"settings are one function; .*grid\("):
        call(made, lambda batch: [])


def test_settings_from_a_generator(made: Any) -> None:
    expected = MEASURES["text_costs"](made, made.settings)
    pd.testing.assert_frame_equal(MEASURES["text_costs"](made, (s for s in made.settings)), expected)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_summary_where_records_are_needed(made: Any) -> None:
    wanted = (
        r"the frame lacks \[.*'record', 'record_id'.*\]; give the per-record table of record_effects or sweep_records"
    )
    with pytest.raises(ValueError, match=wanted):
        gr.evaluate.two_sided(made.table)
    with pytest.raises(ValueError, match=r"the frame lacks .* give the per-record table"):
        gr.evaluate.effect_at_kl(made.table, made.costs)
    with pytest.raises(ValueError, match=r"the table of costs lacks .*'text'.*; give the per-text table of text_costs"):
        gr.evaluate.effect_at_kl(made.records, made.table)
    for call in (gr.evaluate.two_sided, gr.evaluate.summarize, lambda both: gr.evaluate.effect_at_kl(both, made.costs)):
        with pytest.raises(ValueError, match="the frame is a tuple; give the per-record table"):
            call((made.records, made.costs))


# -- ablation ----------------------------------------------------------------------------------------------------------


def test_layers_of_an_ablation(made: Any) -> None:
    with pytest.raises(ValueError, match=r"layers=1; expected a list: layers=\[1\]"):
        gr.analysis.ablate_hooks(made.vectors, 1)
    for layers in ([-1], [0, -2]):
        with pytest.raises(ValueError, match="layers are counted from 0"):
            gr.analysis.ablate_hooks(made.vectors, layers, from_layer=1)
    with pytest.raises(ValueError, match=r"layers \[-1\] do not exist"):
        gr.analysis.ablation_table(made.model, made.pairs, made.vectors, layers=[-1])
    with pytest.raises(ValueError, match=r"layers=1; expected a list: layers=\[1\]"):
        gr.analysis.ablation_table(made.model, made.pairs, made.vectors, layers=1)


def test_a_layer_is_a_set_of_one(made: Any) -> None:
    tables = [
        gr.analysis.ablation_table(made.model, made.pairs, made.vectors, layers=layers, n_random=1)
        for layers in ([[1], [0, 2]], [1, [0, 2]])
    ]
    assert list(tables[0].layers) == ["1", "1", "0, 2", "0, 2"]
    pd.testing.assert_frame_equal(*tables)


def test_building_records_have_no_model_to_tokenize_with(made: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(made.model, made.pairs)
    found = gr.baselines.caa_differences(made.model, tokenized, layers=[1], resid_norms=torch.ones(1))
    chosen = [gr.attribution.Selection((1,), (2,))] * len(tokenized)
    for call in (gr.analysis.building_records, gr.analysis.building_tokens):
        call(made.vectors, found, layer=1, tokenized=tokenized, selections=chosen)
        with pytest.raises(ValueError, match=r"record 1 is a PreferencePair; .*tokenize_pairs\(model, pairs\)"):
            call(made.vectors, found, layer=1, tokenized=made.pairs, selections=chosen)


# -- figures -----------------------------------------------------------------------------------------------------------

SHARES = torch.tensor([0.0, 0.5, 1.0])
CURVES = gr.faithfulness.Curves(SHARES, torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.5, 2.0]]))
PROBES = gr.analysis.Probes(
    pd.DataFrame({"layer": [1, 2], "accuracy": [0.7, 0.8], "se": [0.1, 0.1], "floor": [0.5, 0.5], "floor_high": 0.6}),
    torch.eye(2),
    torch.eye(2),
    (1, 2),
    torch.eye(2),
)
COMPARISON = gr.evaluate.Comparison(
    pd.DataFrame({"vector": ["v"], "effect": [2.0], "low": [1.0], "high": [3.0]}),
    {"v": [1.9, 2.2], "random": [0.1]},
    torch.ones(2),
    {},
)
ATTRIBUTION = gr.Attribution(
    torch.tensor([0.5, -1.0]),
    [" good", " bad"],
    torch.tensor([True] * 2),
    torch.tensor([False] * 2),
    None,
    1.5,
    None,
    "leave_one_out",
)


def test_figures_of_whole_results(made: Any) -> None:
    assert figure_png(gr.plotting.plot_probes(PROBES)) == figure_png(gr.plotting.plot_probes(PROBES.frame))
    assert figure_png(gr.plotting.plot_curves(CURVES)) == figure_png(gr.plotting.plot_curves({"curves": CURVES}))
    whole = figure_png(gr.plotting.plot_controls(COMPARISON))
    assert whole == figure_png(gr.plotting.plot_controls(COMPARISON.table, COMPARISON.draws))
    assert whole != figure_png(gr.plotting.plot_controls(COMPARISON, {"v": [1.0]}))  # draws that are given come first


def test_layers_of_a_sweep(made: Any) -> None:
    table = gr.sweep(made.model, made.vectors, made.pairs, alphas=[0.2], progress=False)
    fig = gr.plotting.plot_layers(table)
    assert fig.axes[0].get_ylabel() == "effect: change of the margin, nats"
    band, line = fig.axes[0].collections[0], fig.axes[0].lines[-1]
    assert list(line.get_ydata()) == pytest.approx(list(table.sort_values("layer").effect))
    top = band.get_paths()[0].get_extents().y1
    assert top == pytest.approx((table.effect + 1.96 * table.effect_se).max())
    assert "half the change" in gr.plotting.plot_layers(table.rename(columns={"effect_se": "se"})).axes[0].get_ylabel()
    assert gr.plotting.plot_layers(table, label="mine").axes[0].get_ylabel() == "mine"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: gr.plotting.plot_cosines(m.vectors),
            r"analysis.cosine_map\(vectors\), got SteeringVectors",
        ),
        (lambda m: gr.plotting.plot_probes(m.vectors), r"fit_probes.*got SteeringVectors"),
        (lambda m: gr.plotting.plot_curves([CURVES]), r"got list; pass \{name: curves\("),
        (
            lambda m: gr.plotting.plot_curves({"a": ATTRIBUTION}),
            r"'a': expected curves, got Attribution; pass \{name: curves\(",
        ),
        (lambda m: gr.plotting.plot_tokens([ATTRIBUTION] * 2), r"got list: plot_tokens\(attributions\[0\]\)"),
        (lambda m: gr.plotting.plot_tokens([" a", " b"]), r"show_tokens\(tokens, scores\)"),
        (
            lambda m: gr.plotting.plot_controls(COMPARISON.table),
            r"draws=None; .*plot_controls\(found.table, found.draws\)",
        ),
        (
            lambda m: gr.plotting.plot_controls(m.vectors, {}),
            r"columns .*'effect', 'low'.*got SteeringVectors",
        ),
        (
            lambda m: gr.plotting.plot_layers(m.vectors),
            r"columns .*'layer', 'effect'.*got SteeringVectors",
        ),
        (lambda m: gr.plotting.plot_layers(m.table.drop(columns="effect_se")), r"missing: \['se'\]"),
    ],
)
def test_figures_of_something_else(made: Any, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(made)
