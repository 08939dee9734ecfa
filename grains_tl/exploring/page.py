"""The explorer as one file: every view computed beforehand, a little script to choose among them, no network."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grains_tl._util import html
from grains_tl._util.files import hash_of, write_atomically
from grains_tl._util.progress import progress_bar
from grains_tl.attribution.groups import spaced
from grains_tl.attribution.result import Attribution
from grains_tl.exploring.views import METER, STRONGEST, Menu, View, Views, at_alpha
from grains_tl.models.identity import model_identity
from grains_tl.plotting.html import page
from grains_tl.records.pairs import plain_text
from grains_tl.types import Text

TITLE = "Steering explorer"


def write_page(
    target: Path,
    views: Views,
    menu: Menu,
    prompts: Sequence[Text],
    alphas: Sequence[float],
    *,
    budget: float,
    attributed: bool,
) -> Path:
    """Compute all views and write the page.

    Args:
        target: the file.
        views: computes them.
        menu: vectors and layers.
        prompts: to continue.
        alphas: in rising order, with 0.
        budget: that the meter marks, nats per token.
        attributed: with scores of the prompt tokens.
    """
    steps = {
        name: {layers: [at_alpha(s, a) for a in alphas] for layers, s in own.items()} for name, own in menu.items()
    }
    every = [step for own in steps.values() for line in own.values() for step in line]
    views.costs(every)  # all at once: what is below a layer is run once
    vectors = []
    with progress_bar(total=len(every) * len(prompts), desc="explore", unit="view") as bar:
        for name, own in steps.items():
            layers = []
            for label, line in own.items():
                found = []
                for step in line:
                    found.append(views.views(prompts, step, attributed=attributed))
                    bar.update(len(prompts))
                layers.append(
                    {
                        "name": label,
                        "kl": [_rounded(one[0].kl) for one in found],
                        "views": [[_packed(one[p]) for one in found] for p in range(len(prompts))],
                    }
                )
            vectors.append({"name": name, "about": _about(line[0]), "layers": layers})
    data = {
        "prompts": [_prompt(prompt) for prompt in prompts],
        "alphas": list(alphas),
        "vectors": vectors,
        "budget": budget,
        "meter": METER,
        "strongest": STRONGEST,
        "method": views.method.name if attributed else None,
        "start": _start(vectors, alphas, budget, menu),
    }
    model = str(model_identity(views.model, bare=True).get("name", "model"))
    about = f"{model}; greedy continuations of up to {views.max_new_tokens} tokens, computed beforehand."
    return write_atomically(target, _page(data, about).encode())


def _page(data: dict[str, Any], about: str) -> str:
    # a script element ends at "</script", wherever it stands, and "<!--" changes how it is read
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    nonce = hash_of(packed)
    body = _file("explorer.html").replace("ABOUT", html.text(about)).replace("TITLE", TITLE)
    body += f'<script type="application/json" id="data">{packed}</script>\n'
    body += f'<script nonce="{nonce}">{_file("explorer.js")}</script>'
    return page(TITLE, body, nonce=nonce, style=_file("explorer.css"))


def _file(name: str) -> str:
    return (importlib.resources.files("grains_tl.data_files") / name).read_text(encoding="utf-8")


def _packed(view: View) -> dict[str, Any]:
    """A view in few characters; texts as the page shows them, so that invisible characters are named."""
    packed: dict[str, Any] = {
        name: [[html.revealed(token), _rounded(change)] for token, change in tokens]
        for name, tokens in (("base", view.base), ("steered", view.steered))
    }
    packed |= {"kl": _rounded(view.text_kl), "repetition": _rounded(view.repetition), "changed": view.changed}
    return packed | {"tokens": None if view.attribution is None else _scores(view.attribution)}


def _scores(a: Attribution) -> list[list[Any]]:
    """The user's words with their scores; the template's tokens have none and are left out."""
    texts = spaced(a.tokens, () if a.starts_word is None else a.starts_word.tolist())
    rows = zip(texts, a.scores.tolist(), a.content.tolist(), strict=True)
    return [[html.revealed(text), _rounded(score)] for text, score, content in rows if content]


def _prompt(prompt: Text) -> list[list[str]]:
    """Who says what; plain text is said by nobody."""
    if isinstance(prompt, str):
        return [["", html.revealed(prompt)]]
    return [[html.revealed(str(m.get("role", ""))), html.revealed(plain_text([m]))] for m in prompt]


def _about(step: Any) -> str:
    scope = step.positions if isinstance(step.positions, str) else "masked"
    return f"operator {step.operator}, positions {scope}"


def _start(vectors: Sequence[Any], alphas: Sequence[float], budget: float, menu: Menu) -> list[int]:
    """Where the page begins: the step of a ``Steering``, or the largest within the budget, at a layer in the middle."""
    first = next(iter(menu.values()))
    layer = len(first) // 2
    own = round(list(first.values())[layer].alpha, 6)
    if own in alphas and own != 0:
        return [0, 0, layer, list(alphas).index(own)]
    within = [i for i, kl in enumerate(vectors[0]["layers"][layer]["kl"]) if kl is not None and kl <= budget]
    return [0, 0, layer, max(within, default=len(alphas) - 1)]


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
