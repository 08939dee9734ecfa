"""What an explorer shows is what plain runs give, and asking again runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.attribution.methods import LeaveOneOut
from grains_tl.exploring.views import Views, menu_of, view_html
from grains_tl.inference.logprobs import response_logprobs
from grains_tl.records.loading import neutral_texts
from tests.evaluate.test_sweep import vectors_of

PROMPT = "the film was good and"
CHAT = [{"role": "user", "content": "was the food bad ?"}]


def views_of(model: Any) -> Views:
    return Views(model, 6, LeaveOneOut())


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["text", "chat"])
def test_a_view_is_what_plain_runs_give(model: Any, prompt: Any) -> None:
    step = vectors_of().steering(0.5, 1)
    view = views_of(model).view(prompt, step, attributed=True)
    base, steered = (gr.generate(model, prompt, hooks, max_new_tokens=6)[0] for hooks in (None, step))
    assert view.changed and view.texts == (base, steered)
    for text, tokens in ((base, view.base), (steered, view.steered)):
        rows = response_logprobs(model, prompt, text, step)
        assert [change for _, change in tokens] == pytest.approx((rows["after"] - rows["before"]).tolist(), abs=1e-4)
    costs = gr.evaluate.text_costs(model, [step], neutral_texts(5))
    assert view.kl == pytest.approx(np.average(costs["kl"], weights=costs["n_tokens"]), rel=1e-5)
    assert view.attribution is not None
    likelier = [response_logprobs(model, prompt, text)["before"].sum() for text in (steered, base)]
    assert view.attribution.objective == pytest.approx(likelier[0] - likelier[1], abs=1e-3)
    assert torch.equal(view.attribution.scores.isnan(), ~view.attribution.content)  # the template has no score


def test_no_step_changes_nothing(bridge: Any) -> None:
    view = views_of(bridge).view(PROMPT, vectors_of().steering(0.0, 1), attributed=True)
    assert not view.changed and view.attribution is None
    assert (view.kl, view.text_kl) == (0, 0) and all(change == 0 for _, change in (*view.base, *view.steered))
    assert "does not change the text" in view_html(view, 0.05)


def test_what_was_computed_is_kept(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    views, calls = views_of(bridge), []
    for name in ("generate", "text_costs", "attribute"):
        real = getattr(gr.exploring.views, name)  # type: ignore[attr-defined]

        def counted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"grains_tl.exploring.views.{name}", counted)
    steps = [vectors_of().steering(alpha, 1) for alpha in (0.4, 0.5)]
    first = [views.view(PROMPT, step, attributed=True) for step in steps]
    before = list(calls)
    assert [views.view(PROMPT, step, attributed=True).steered for step in steps] == [one.steered for one in first]
    assert calls == before and before.count("generate") == 3  # the unsteered text once


def test_the_page_of_a_view_escapes_data(bridge: Any) -> None:
    view = views_of(bridge).view("the <b>film</b> was", vectors_of().steering(0.5, 1), attributed=True)
    page = view_html(view, 0.05)
    assert "<b>film" not in page and "<script" not in page and "budget 0.05" in page and "background:#" in page


def test_what_can_be_explored() -> None:
    vectors = vectors_of()
    assert {name: list(steps) for name, steps in menu_of(vectors, None).items()} == {"vector": ["0", "1", "2"]}
    assert list(menu_of(vectors, [2])["vector"]) == ["2"]
    both = {"one": vectors, "two": vectors.steering(0.3, [0, 2], operator="add", positions="generated")}
    menu = menu_of(both, None)
    assert list(menu["two"]) == ["0, 2"]
    assert (menu["two"]["0, 2"].operator, menu["two"]["0, 2"].positions) == ("add", "generated")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vectors": {}}, "no vectors"),
        ({"vectors": [1.0]}, "list"),
        ({"vectors": {"a": "b"}}, "'a' are a str"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["film", ""]}, "prompt 2"),
        ({"prompts": "film " * 60}, "context"),
        ({"alphas": []}, "no alphas"),
        ({"alphas": [float("nan")]}, "alpha"),
        ({"layers": [7]}, "7"),
        ({"layers": []}, "layers"),
        ({"kl": 0}, "kl=0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"attribution": "magic"}, "magic"),
        ({"static": "."}, "folder"),
        ({"vectors": gr.SteeringVectors.from_raw(torch.ones(1, 8), [0], torch.ones(1))}, "d_model 8"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("grains_tl.exploring.views.generate", lambda *a, **k: pytest.fail("ran"))
    call: dict[str, Any] = {"vectors": vectors_of(), "prompts": PROMPT, "static": tmp_path / "page.html", **change}
    with pytest.raises(ValueError, match=said):
        gr.explore(bridge, **call)
    assert not list(tmp_path.iterdir())
