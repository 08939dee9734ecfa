"""The widget's menus and slider, driven as a browser drives them."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import grains_tl as gr
from tests.evaluate.test_sweep import vectors_of

PROMPT = "the film was good and"
CHAT: Any = [{"role": "system", "content": "the"}, {"role": "user", "content": "was the food bad ?"}]


@pytest.fixture
def explorer(model: Any) -> Any:
    pytest.importorskip("ipywidgets")
    vectors: Any = {"ours": vectors_of(), "both": vectors_of().steering(0.3, [0, 2], positions="generated")}
    return gr.explore(model, vectors, [PROMPT, CHAT], alphas=[-0.5, 0.5], max_new_tokens=6)


def expected(model: Any, explorer: Any) -> str:
    return gr.generate(model, explorer.prompt, explorer.steering, max_new_tokens=6)[0]


def test_every_menu_changes_what_is_shown(model: Any, explorer: Any) -> None:
    assert (explorer.prompt, explorer.steering.label) == (PROMPT, "vector, alpha +0.1, layer 1")
    seen = [explorer.shown.value]
    changes = [
        ("alpha", 0.5),
        ("layer", "2"),
        ("vector", "both"),
        ("typed", "the hotel was"),
        ("kind", "chat"),
        ("prompts", 1),
        ("attribute", False),
    ]
    for name, value in changes:
        getattr(explorer, name).value = value
        assert explorer.view.texts[1] == expected(model, explorer), name
        assert explorer.shown.value != seen[-1], name
        seen.append(explorer.shown.value)
    assert explorer.prompt == CHAT  # the system message is kept
    assert explorer.steering.label == "vector, alpha +0.5, layers 0, 2, generated"
    assert explorer.view.attribution is None
    explorer.prompts.value = 0
    assert explorer.prompt == PROMPT and explorer.kind.value == "text"


def test_a_prompt_that_cannot_be_run_is_said_and_left_again(model: Any, explorer: Any) -> None:
    for bad in ("", "film " * 70):
        explorer.typed.value = bad
        assert explorer.view is None and explorer.shown.value == "" and "computing" not in explorer.status.value
        explorer.typed.value = "the film"
        assert explorer.view is not None and explorer.view.texts[1] == expected(model, explorer)


def test_it_shows_itself_in_a_notebook(explorer: Any) -> None:
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in (bundle[0] if isinstance(bundle, tuple) else bundle)
    assert "alpha +0.1" in repr(explorer)


def test_one_prompt_has_no_menu_and_a_step_starts_at_its_own_alpha(bridge: Any) -> None:
    pytest.importorskip("ipywidgets")
    explorer: Any = gr.explore(bridge, vectors_of().steering(0.35, 2), CHAT, max_new_tokens=4, attribution=None)
    assert explorer.prompts not in explorer.box.children
    assert explorer.steering.label == "vector, alpha +0.35, layer 2" and explorer.prompt == CHAT


def test_without_ipywidgets_the_error_says_what_to_do(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"pip install 'grains-tl\[explore\]'.*static"):
        gr.explore(bridge, vectors_of(), PROMPT)
