"""The page holds every view, shows them in a browser without a network, and text stays text."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import grains_tl as gr
from tests.evaluate.test_sweep import vectors_of
from tests.helpers.chromium import needs_browser, opened

HOSTILE = (
    "the film </script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\"> \u202e was"
)
CHAT = [{"role": "system", "content": "the"}, {"role": "user", "content": "was the food bad ?"}]
PROMPTS: list[Any] = ["the film was good and", HOSTILE, CHAT]
ALPHAS = [-0.4, 0.2, 0.5]
NAMES = ["ours", "both </script>"]


def vectors_by_name() -> dict[str, Any]:
    return dict(zip(NAMES, (vectors_of(), vectors_of().steering(0.3, [0, 2])), strict=True))


@pytest.fixture(scope="module")
def page(bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "page.html"
    made = gr.explore(bridge, vectors_by_name(), PROMPTS, static=target, alphas=ALPHAS, max_new_tokens=6)
    assert made == target
    return target


def data_of(page: Path) -> Any:
    (packed,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(packed)


def words(dom: str, id: str) -> str:
    """The text inside the innermost element that has an id."""
    found = re.search(rf'<(\w+)[^>]* id="{id}"[^>]*>(.*?)</\1>', dom, re.S)
    assert found, id
    return unescape(re.sub(r"<.*?>", "", found[2]))


def test_every_view_is_what_plain_runs_give(bridge: Any, page: Path) -> None:
    data = data_of(page)
    assert data["alphas"] == [-0.4, 0.0, 0.2, 0.5] and [v["name"] for v in data["vectors"]] == NAMES
    assert [[layer["name"] for layer in v["layers"]] for v in data["vectors"]] == [["0", "1", "2"], ["0, 2"]]
    plain, compared = gr.generate(bridge, PROMPTS, max_new_tokens=6), 0
    for vector, steps in zip(data["vectors"], ([[0], [1], [2]], [[0, 2]]), strict=True):
        for layer, numbers in zip(vector["layers"], steps, strict=True):
            for a, alpha in enumerate(data["alphas"]):
                hooks = vectors_of().steering(alpha, numbers) if alpha else None
                texts = gr.generate(bridge, PROMPTS, hooks, max_new_tokens=6)
                for p, text in enumerate(texts):
                    view = layer["views"][p][a]
                    if "they" not in text:  # which this tokenizer does not give back
                        assert "".join(token for token, _ in view["steered"]) == text
                        compared += 1
                    assert view["changed"] == (text != plain[p])
                    assert (view["tokens"] is None) == (not view["changed"])
            assert layer["kl"][1] == 0 and all(kl > 0 for kl in layer["kl"][:1] + layer["kl"][2:])
    assert compared > 30


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(
        r"(?:src|href)=|https?:|@import|url\(",
        re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S),
    )
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert text.count("<script") == 2 and len(text) < 100_000


@needs_browser
@pytest.mark.parametrize("state", [(0, 0, 1, 3), (1, 0, 2, 0), (2, 1, 0, 2), (0, 0, 0, 1)])
def test_a_browser_shows_the_view_that_the_address_names(page: Path, state: tuple[int, ...]) -> None:
    p, v, n, a = state
    data, dom = data_of(page), opened(page, ",".join(map(str, state)))
    layer = data["vectors"][v]["layers"][n]
    view = layer["views"][p][a]
    for side in ("base", "steered"):
        assert words(dom, side) == "".join(token for token, _ in view[side])
    assert f"{layer['kl'][a]:.3f} nats" in words(dom, "price")
    assert words(dom, "step").replace("\N{MINUS SIGN}", "-") == f"{data['alphas'][a]:+g}".replace(
        "+0", "0", data["alphas"][a] == 0
    )
    assert NAMES[v] in words(dom, "about")
    said = [["prompt", PROMPTS[p]]] if isinstance(PROMPTS[p], str) else [[m["role"], m["content"]] for m in CHAT]
    assert words(dom, "said").startswith(said[0][0]) and said[-1][1].replace("\u202e", r"\u202e") in dom_text(
        dom, "said"
    )
    shown = "".join(token for token, _ in view["tokens"] or [])
    assert words(dom, "tokens") == (shown or "(nothing)")


def dom_text(dom: str, id: str) -> str:
    """The text from an element to the next section."""
    return unescape(re.sub(r"<.*?>", "", dom.split(f'id="{id}"')[1].split("<section")[0]))


@needs_browser
def test_text_of_a_model_never_becomes_markup(page: Path) -> None:
    dom = opened(page, "1,1,0,3")
    assert "<title>Steering explorer</title>" in dom and "<img" not in dom
    assert "&lt;/script&gt;" in dom and r"\u202e" in dom


@needs_browser
@pytest.mark.parametrize("address", ["", "9,9,9,9", "a,b,c,d", "1", "-1,0,0,0", "0.5,0,0,0"])
def test_any_address_shows_something(page: Path, address: str) -> None:
    assert words(opened(page, address), "base")


@needs_browser
def test_menus_slider_and_table_choose(page: Path, tmp_path: Path) -> None:
    """Events as a person's hand makes them, by a script that is let in beside the page's own."""
    data = data_of(page)
    nonce = re.search(r'nonce="(\w+)"', page.read_text("utf-8"))
    assert nonce
    script = f"""<script nonce="{nonce[1]}">
    const set = (id, value, kind) => {{
      const e = document.getElementById(id);
      e.value = value;
      e.dispatchEvent(new Event(kind));
    }};
    const shown = () => document.getElementById("steered").textContent;
    const seen = [];
    set("alpha", 3, "input"); seen.push(shown());
    set("layer", 2, "change"); seen.push(shown());
    set("vector", 1, "change"); seen.push(shown());
    set("prompt", 2, "change"); seen.push(shown());
    document.querySelector("#grid button").click(); seen.push(shown());
    document.title = JSON.stringify([seen, location.hash, document.querySelectorAll("#grid button.here").length]);
    </script></body>"""
    copy = tmp_path / "driven.html"
    copy.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    title = re.search(r"<title>(.*?)</title>", opened(copy, "0,0,0,0"))
    assert title
    seen, address, here = json.loads(unescape(title[1]))
    places = [(0, 0, 0, 3), (0, 0, 2, 3), (0, 1, 0, 3), (2, 1, 0, 3), (2, 1, 0, 0)]
    wanted = [
        "".join(token for token, _ in data["vectors"][v]["layers"][n]["views"][p][a]["steered"])
        for p, v, n, a in places
    ]
    assert seen == wanted and (address, here) == ("#2,1,0,0", 1)


def test_a_page_without_attribution(bridge: Any, tmp_path: Path) -> None:
    page = gr.explore(
        bridge, vectors_of(), "the film", static=tmp_path / "p.html", alphas=[0.2], layers=[1], attribution=None
    )
    data = data_of(page)
    assert data["method"] is None and data["vectors"][0]["layers"][0]["views"][0][0]["tokens"] is None
