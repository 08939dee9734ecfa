"""Pictures and the report: they are written, say what they measure, and nothing in the data can act."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from grains_tl.attribution.result import Attribution
from grains_tl.demo.text_report import report_html, write_report
from grains_tl.plotting.effects import plot_controls, plot_layers
from grains_tl.plotting.style import figure_png
from grains_tl.plotting.tokens import plot_tokens, show_tokens

EVIL = ("<script>alert(1)</script>", "</script>", "<img/src=x/onerror=alert(2)>", "<!--<script>")
PROMPTS = (
    "Our| soup| was| delicious|,| but| the| waiter| was| rude| from| start| to| end|.| Overall|,| the| even|ing| was",
    "Despite| a| gorgeous| view| of| the| harbour|,| the| fish| on| my| plate| was| ranc|id|.| All| in| all|,| it| was",
    "They| sat| us| in| a| noisy| corridor|,| then| served| the| juic|iest| lamb| of| the| year|.| The| night| was",
)
WEIGHTS = {" delicious": 1.42, " rude": -1.71, " gorgeous": 0.96, " ranc": -0.83, " noisy": -0.55, "iest": 0.38}
VECTORS = {
    "leave_one_out": 0.92,
    "integrated_gradients": 0.71,
    "caa": 0.84,
    "random tokens": 0.4,
    "random direction": 0.02,
}


def fake_set(name: str = "sentiment", sign: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A plausible set of results; ``sign`` makes it a negative one."""
    rng = random.Random(seed)

    def example(line: str) -> dict[str, Any]:
        tokens = line.split("|")
        scores = [WEIGHTS.get(t, rng.gauss(0, 0.08)) for t in tokens]
        return {
            **{"method": "leave_one_out", "tokens": tokens, "scores": scores, "content": [True] * len(tokens)},
            **{"objective": sum(scores), "baseline_objective": None, "gap": None},
            **{"chosen": " wonderful", "rejected": " terrible"},
        }

    layers = range(0, 30, 3)
    kinds = {"random tokens": "2.5-97.5 % of draws", "random direction": "2.5-97.5 % of draws", "caa": "test records"}
    verb = "yes" if sign > 0 else "no"
    prompt = "The room was small, but the staff could not have been kinder. Overall, our stay was"
    draws = {v: [rng.gauss(sign * VECTORS[v], 0.15) for _ in range(20)] for v in VECTORS if "e_o" in v or "r" in v[:1]}
    return {
        "name": name,
        "about": "Mixed reviews with one good and one bad thing; does the model end on the good one?",
        "n": {"build": 88, "choose": 24, "test": 104, "test_for_draws": 52},
        "base": {"margin": -0.31, "margin_se": 0.2, "accuracy": 0.52},
        "tokens": [example(line) for line in PROMPTS],
        "attribution": [
            {"method": "integrated_gradients", "median_relative_gap": 0.021, "seconds": 71.3, "n": 88},
            {"method": "leave_one_out", "median_relative_gap": None, "seconds": 40.2, "n": 88},
        ],
        "sweep": [
            {
                **{"vector": v, "layer": layer, "alpha": 0.2, "se": 0.09, "n": 24},
                "effect": sign * VECTORS[v] * math.exp(-(((layer - 15) / 8) ** 2)) + rng.gauss(0, 0.04),
            }
            for v in ("leave_one_out", "integrated_gradients", "caa")
            for layer in layers
        ],
        "chosen": {"layer": 15, "alpha": 0.2},
        "table": [
            {
                **{"vector": v, "effect": sign * e, "se": 0.07, "low": sign * e - 0.21, "high": sign * e + 0.24},
                "interval": kinds.get(v, "bootstrap over building records"),
                **{"n_draws": 0 if v == "caa" else 20, "n": 52 if v.startswith("random") else 104},
                "p_random_tokens": None if v.startswith("random") else 0.048,
            }
            for v, e in VECTORS.items()
        ],
        "draws": draws,
        "cost": {
            "kl": 0.05,
            "curve": [
                {
                    **{"vector": v, "positions": "all", "layer": 18, "alpha": a, "kl": a**2, "kl_se": a**2 / 8},
                    **{"effect": sign * 9 * a * VECTORS[v], "effect_se": 0.1},
                }
                for v in ("leave_one_out", "caa")
                for a in (0.1, 0.2, 0.3)
            ],
            "at_kl": [
                {
                    **{"vector": v, "layer": 18, "alpha": 0.22, "effect": sign * 2 * VECTORS[v], "se": 0.1, "n": 24},
                    **{"low": 0.4, "high": 0.9, "difference": 0.3, "difference_low": -0.1, "difference_high": None},
                }
                for v in ("leave_one_out", "caa")
            ],
        },
        "continuations": [
            {"prompt": prompt, "alpha": -0.2, "text": " a disappointment. We paid a lot and slept badly, and the"},
            {"prompt": prompt, "alpha": 0.0, "text": " fine. We would stay again if the price were right.\n\nThe"},
            {"prompt": prompt, "alpha": 0.2, "text": " wonderful! We loved every minute of it and will be back"},
            {"prompt": "The film was", "alpha": -0.2, "text": " a waste of time."},
            {"prompt": "The film was", "alpha": 0.2, "text": " a delight from start to finish."},
        ],
        "headline": f"The vector {verb} steers {name}: {sign * 0.52:.2f} nats.",
        "verdict": f"attribution beats random tokens: {verb}, by {sign * 0.52:.2f} nats (95 % interval over 20 draws)",
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "settings": {"model": "smollm2", "top_k": 4, "reduce": "mean", "operator": "add_renorm", "seed": 0},
        "versions": {"grains-tl": "0.1.0", "transformer-lens": "4.3.0", "torch": "2.13.0"},
        "seconds": 812.4,
        "sets": [fake_set(), fake_set("misconceptions", -1.0, 1)],
    }


def attribution(tokens: list[str], scores: list[float], gap: float | None = None) -> Attribution:
    n = len(tokens)
    mask = torch.ones(n, dtype=torch.bool)
    return Attribution(torch.tensor(scores), tokens, mask, ~mask, gap, 1.25, 0.5, "integrated_gradients")


def texts(fig: Any) -> list[str]:
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text)]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text outside scripts, and script bodies."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [""], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def poisoned(value: Any) -> Any:
    """Every string of the results with markup in it, wherever data may stand; keys that name columns stay."""
    if isinstance(value, str):
        return value + "".join(EVIL)
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    return value


def test_report_is_one_file_with_every_verdict(results: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(results, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "nothing else, no temporary file"
    page = Page(path.read_text(encoding="utf-8"))
    for one in results["sets"]:
        assert page.text.count(one["headline"]) == page.text.count(one["verdict"]) == 1
        assert page.text.index(one["headline"]) < page.text.index("How to read this") < page.text.index(one["verdict"])
        assert one["about"] in page.text
    for words in ("half the change of the margin", "bootstrap", "standard error", "completeness gap", "smollm2", "812"):
        assert words in page.text


def test_report_loads_nothing(results: dict[str, Any]) -> None:
    html = report_html(results)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            target = attributes.get(name) or ""
            assert target == "" or target.startswith(("data:image/png;base64,", "#")), (tag, name, target[:80])
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "url(" not in style and "@import" not in style
    assert not any(re.search(r"^\s*import\b|unpkg", s, re.M) for s in page.scripts)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_prompts_are_shown_without_scripts_in_a_small_file(results: dict[str, Any]) -> None:
    html = report_html(results)
    page = Page(html)
    assert not any(tag == "script" for tag, _ in page.elements) and len(html) < 800_000
    images = [a for t, a in page.elements if t == "img"]
    assert len(images) == 2 * 3 and all(a.get("alt") for a in images)
    for one in results["sets"]:
        for example in one["tokens"]:
            assert example["chosen"].strip() in page.text


def test_words_that_steering_changes_are_marked(results: dict[str, Any]) -> None:
    html = report_html(results)
    assert re.search(r'<span style="background:[^"]*">wonderful!</span>', html)
    assert not re.search(r'<span style="background:[^"]*">fine\.</span>', html)


def test_data_cannot_act(results: dict[str, Any]) -> None:
    """The same elements as without the markup, and the markup is there to be read."""
    clean = Page(report_html(results))
    bad = poisoned(results)
    for one in bad["sets"]:
        one["draws"] = {name + "".join(EVIL): values for name, values in one["draws"].items()}
    bad["settings"] = {name + "".join(EVIL): value for name, value in bad["settings"].items()}
    html = report_html(bad)
    page = Page(html)
    # a tint on a changed word is a span, and here all words are changed
    assert [t for t, _ in page.elements if t != "span"] == [t for t, _ in clean.elements if t != "span"]
    assert all(set(a) <= {"style", "title"} for t, a in page.elements if t == "span")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for words in EVIL:
        assert page.text.count(words) > 20


def test_widget_keeps_tokens_readable() -> None:
    tokens = ["<|im_start|>", " a", "&lt;", " b\n", "<b>"]
    shown = show_tokens(tokens, [0.5, math.nan, -2.0, math.inf, 0.0], renderer="circuitsvis")
    for html in (shown.local_src, shown.cdn_src):
        call = html[html.rindex("render(") :]
        props = json.loads(re.search(r"\{\"tokens\".*\}", call).group())  # type: ignore[union-attr]
        assert props["tokens"][0] == "\u2039|im_start|\u203a" and props["tokens"][4] == "\u2039b\u203a"
        assert props["tokens"][2] != "&lt;" and props["tokens"][2].replace("\u200b", "") == "&lt;"
        assert props["values"] == [0.5, 0.0, -2.0, 0.0, 0.0]
        assert (props["minValue"], props["maxValue"]) == (-2.0, 2.0)
        assert html.startswith("<div") and html.index("></div>") < html.index("<script")  # the div is closed
    with pytest.raises(ValueError, match="5 tokens but 1 scores"):
        show_tokens(tokens, [1.0])
    with pytest.raises(ValueError, match="need scores"):
        show_tokens(tokens)


def test_missing_numbers_are_dashes(results: dict[str, Any]) -> None:
    none = itertools.cycle([None, math.nan])

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items()}
        if isinstance(value, list):
            return [without(v) for v in value]
        return next(none) if isinstance(value, float) else value

    one = without(results["sets"][0])
    one["sweep"] = [{**row, "alpha": 0.2} for row in one["sweep"]]
    one["continuations"] = results["sets"][0]["continuations"]
    text = Page(report_html({**results, "sets": [one]})).text
    assert "\N{EN DASH}" in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_alpha_of_the_comparison_is_named_where_it_is_not_the_chosen_one(results: dict[str, Any]) -> None:
    one = results["sets"][0]
    one["sweep"] += [{**row, "alpha": 0.4, "n": 77} for row in one["sweep"]]
    for settings, alpha, n in (({}, "0.4", 77), ({"alpha": 0.2}, "0.2", 24)):
        one["chosen"] = {"layer": 15, "alpha": 0.4}
        text = Page(report_html({**results, "settings": settings, "sets": [one]})).text
        assert f"Effects at layer 15 with alpha {alpha}" in text
        assert f"over layers at alpha {alpha} on the records for choosing (n = {n})" in text


def test_empty_parts_are_said_to_be_empty(results: dict[str, Any]) -> None:
    one = results["sets"][0]
    for part in ("tokens", "attribution", "sweep", "table", "continuations"):
        one[part] = []
    one["draws"] = {}
    text = Page(report_html(results)).text
    for words in ("No example records", "No layers", "No vectors", "No continuations"):
        assert words in text


def test_missing_keys_are_named_before_anything_is_written(results: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(results)
    del broken["sets"][1]["verdict"]
    with pytest.raises(ValueError, match=r"sets.*1.*verdict"):
        write_report(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_do_not_stop_the_report(results: dict[str, Any], tmp_path: Path) -> None:
    results["sets"][0]["tokens"][0]["tokens"][3] = "\ud83d"
    results["sets"][0]["continuations"][0]["text"] = "\ud83d"
    assert write_report(results, tmp_path).is_file()


def test_figures_have_units_and_leave_matplotlib_alone(results: dict[str, Any]) -> None:
    def settings() -> dict[str, Any]:
        return {k: v for k, v in matplotlib.rcParams.copy().items() if k != "backend"}  # looking at it chooses one

    before, one = settings(), results["sets"][0]
    layers = plot_layers(pd.DataFrame(one["sweep"]), 15)
    controls = plot_controls(pd.DataFrame(one["table"]), one["draws"])
    tokens = plot_tokens(attribution([" good", " film"], [1.0, math.nan], gap=-0.03))
    for fig in (layers, controls, tokens):
        assert figure_png(fig).startswith(b"\x89PNG")
    assert before == settings()
    assert "nats" in layers.axes[0].get_ylabel() and "layer" in layers.axes[0].get_xlabel()
    assert "nats" in controls.axes[0].get_xlabel()
    assert any("integrated_gradients" in t and "+1.25 nats" in t and "\u22120.03 nats" in t for t in texts(tokens))
    assert any("chosen layer 15" in t for t in texts(layers))


def test_a_dark_style_does_not_reach_the_figures(results: dict[str, Any]) -> None:
    frame = pd.DataFrame(results["sets"][0]["sweep"])
    plain = figure_png(plot_layers(frame))
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "font.size": 30.0}):
        assert figure_png(plot_layers(frame)) == plain


def test_figures_show_themselves_in_notebooks() -> None:
    fig = plot_tokens(attribution([" good"], [1.0]))
    png, size = fig._repr_png_()
    assert png.startswith(b"\x89PNG") and size["width"] == pytest.approx(768)


def test_plot_layers_draws_the_numbers_it_was_given() -> None:
    frame = pd.DataFrame(
        {"layer": [6, 0, 3], "vector": ["$x_"] * 3, "effect": [0.5, None, 0.1], "se": [0.1, 0.1, None]}
    )
    fig = plot_layers(frame)
    line = fig.axes[0].lines[1]  # after the zero line
    np.testing.assert_array_equal(line.get_xdata(), [0, 3, 6])
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 0.1, 0.5])
    assert "$x_" in texts(fig) and figure_png(fig)
    with pytest.raises(ValueError, match=r"several rows for layer 0 of '\$x_'"):
        plot_layers(pd.concat([frame, frame[1:2]]))
    with pytest.raises(ValueError, match=r"missing: \['se'\]"):
        plot_layers(frame.drop(columns="se"))
    with pytest.raises(ValueError, match="missing: rows"):
        plot_layers(frame[:0])


def test_plot_controls_keeps_every_draw() -> None:
    frame = pd.DataFrame({"vector": ["a", "b"], "effect": [0.5, None], "low": [0.1, None], "high": [0.9, None]})
    fig = plot_controls(frame, {"a": [0.4, 0.6], "only draws": [0.0, math.nan, 0.2]})
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "only draws"]
    dots = [c.get_offsets() for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes()) == 1]
    assert sorted(float(x) for d in dots for x in np.ma.getdata(d)[:, 0] if np.isfinite(x)) == [0.0, 0.2, 0.4, 0.5, 0.6]


def test_plot_tokens_draws_tokens_as_they_stand() -> None:
    tokens = ["<|im_start|>", "user", "\n", " $x^2$", " ", "\x00", "\u202e", " \u4f60", "w" * 300, "\ufffd"]
    fig = plot_tokens(attribution(tokens, [0.1] * len(tokens)))
    assert figure_png(fig)
    drawn = texts(fig)
    assert {"<|im_start|>", "\u21b5", "$x^2$", "\u2423", "\\x00", "\\u202e"} <= set(drawn)
    assert figure_png(plot_tokens(attribution([], [])))
    assert figure_png(plot_tokens(attribution([" word"] * 600, [0.0] * 600)))
