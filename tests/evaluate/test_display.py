"""Effects, choices, vectors and probes in a notebook: small, escaped; a selection of a table is a plain DataFrame."""

from __future__ import annotations

import pickle
from typing import Any

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl._util import html
from grains_tl.analysis.probes import fit_probes
from grains_tl.evaluate.display import EffectTable
from tests._util.test_html import HOSTILE, Reader


def effects(names: tuple[str, ...] = ("ours",), layers: range = range(3, 6)) -> pd.DataFrame:
    rows = [
        {"vector": name, "positions": "all", "layer": layer, "alpha": alpha, "draw": -1, "record": r, "change": change}
        for name in names
        for layer in layers
        for alpha in (-0.2, 0.2)
        for r, change in enumerate((alpha * 9 + 0.1, alpha * 11, alpha * 10))
    ]
    return gr.evaluate.summarize(pd.DataFrame(rows))


def test_a_sweep_shows_layers_and_alphas_and_is_a_plain_table_otherwise() -> None:
    frame = effects(("ours", "caa"))
    found = Reader(frame._repr_html_())
    for shown in ("12 cells, 3 records", "ours", "caa", "alpha +0.2", "+2.03", "all columns"):
        assert shown in found.data, shown
    assert ("title", "+1.65 to +2.41, steers") in found.attributes
    assert type(frame[frame.layer == 3]) is pd.DataFrame and type(frame.sort_values("effect")) is pd.DataFrame
    pd.testing.assert_frame_equal(pd.DataFrame(frame), pickle.loads(pickle.dumps(frame)).copy())
    assert repr(frame) == repr(pd.DataFrame(frame))


def test_a_sweep_of_thirty_layers_is_small_apart_from_the_folded_table() -> None:
    frame = effects(layers=range(30))
    assert len(frame._repr_html_()) - len(pd.DataFrame(frame)._repr_html_()) < 15_000


@pytest.mark.parametrize("change", [{"layer": 1}, {"effect": None}])
def test_a_table_that_is_no_grid_is_shown_as_pandas_does(change: dict[str, Any]) -> None:
    frame = pd.DataFrame(effects()).assign(**{k: v for k, v in change.items() if v is not None})
    frame = frame.drop(columns=[k for k, v in change.items() if v is None])
    assert EffectTable(frame)._repr_html_() == frame._repr_html_()
    assert EffectTable(frame.iloc[:0])._repr_html_() == frame.iloc[:0]._repr_html_()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_are_only_text(hostile: str) -> None:
    frame = effects((hostile,))
    frame.attrs["records"] = ["a", "b"]
    choice = gr.choose(frame)
    info = {"method": hostile, "model": {"name": hostile}, "n_records": 3}
    vectors = gr.SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0), info)
    steering = vectors.steering(0.2, 4)
    for page in (frame._repr_html_(), choice._repr_html_(), vectors._repr_html_(), steering._repr_html_()):
        found = Reader(page)
        assert not {"script", "img"} & set(found.tags)
        assert not any(name.startswith("on") for name, _ in found.attributes)
        assert hostile in found.data


def test_choice_vectors_and_probes_say_what_they_are() -> None:
    frame = effects()
    frame.attrs["records"] = [f"{i:064x}" for i in range(400)]
    choice = gr.choose(frame)
    assert len(repr(choice)) < 250 and "\n" not in repr(choice)
    assert "400 records" in Reader(choice._repr_html_()).data
    vectors = gr.SteeringVectors(torch.eye(2), (4, 5), torch.tensor([5.0, 10.0]), torch.full((2,), 50.0))
    shown = Reader(vectors._repr_html_()).data
    assert "10 %" in shown and "20 %" in shown and "2 layers, d_model 2" in shown
    steering = vectors.steering(0.2, [4, 5], positions="last")
    assert repr(steering) == f"Steering({steering.label})"
    table = Reader(steering._repr_html_()).data
    assert "+10.00" in table and "positions last" in table  # 0.2 of 50
    raw = Reader(vectors.steering(2.0, [5], scale="raw")._repr_html_()).data
    assert "+20.00" in raw and "own length" in raw
    features = torch.randn(12, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    probes = fit_probes(features, [3, 7], n_shuffles=2)
    assert len(repr(probes)) < 120 and "layers [3, 7]" in repr(probes)
    shown = Reader(probes._repr_html_()).data
    assert html.number(probes.frame.accuracy[0]) in shown and "12 records" in shown


def test_vectors_with_their_model_say_what_they_promote(bridge: Any) -> None:
    raw = torch.eye(3, 32)
    vectors = gr.SteeringVectors.from_raw(raw, (0, 1, 2), torch.full((3,), 6.0))
    lens = gr.analysis.logit_lens(bridge, vectors, n_top=2)
    shown = Reader(gr.plotting.show_vectors(vectors, bridge, n_top=2).html).data
    assert "promotes" in shown and all(token.strip() in shown for token in lens.token)
    assert "promotes" not in Reader(gr.plotting.show_vectors(vectors).html).data
