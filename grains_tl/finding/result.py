"""What a search returns: the steering, the evidence, and texts to read."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util import html
from grains_tl.evaluate.generations import marked_words
from grains_tl.inference.generation import generate
from grains_tl.records.pairs import PreferencePair, plain_text
from grains_tl.tokens.prompts import prompt_inputs
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class Example:
    """A prompt of a report record and how the model goes on.

    Attributes:
        prompt: as text.
        base: without steering.
        steered: with it.
    """

    prompt: str
    base: str
    steered: str


@dataclass(frozen=True, eq=False, repr=False)
class Found:
    """The result of ``find_vector``.

    Attributes:
        best: the steering with the largest effect among those that steer; where nothing steers, of all.
        table: the report. One row per recipe: ``recipe``, ``layer``, ``alpha``, ``effect`` (mean change of the margin over
            the report records from no steering to +alpha, nats), ``low``, ``high`` (interval over records, for all recipes
            together), ``kl`` (nats per token), ``n``, ``verdict``, and ``above_control``, ``above_low``, ``above_high``
            (difference from the strongest control, nats) and ``beaten`` (draws with less effect) of ``n_draws``. One row per
            control and chosen layer, with ``control`` true: mean over draws, and the range of the draws. ``share`` and
            ``share_low``: the effect over the best known at that layer per root of the KL, as ``effect_at_kl`` has them;
            what ``kl_optimal`` states counts if it is among the recipes.
        verdict: what steers, against which controls, and what is stronger; or that nothing does, and what to try. One
            sentence a line, those about the records last.
        examples: continuations of report prompts without and with ``best``.
        vectors: by recipe, at every layer that was tried.
        effects: by recipe and layer: ``[record]`` changes of the margin, of controls ``[draw, record]``, nats.
        search: effects on the choosing records, by recipe, layer and alpha.
        notes: sentences about the records.
        about: ``kl``, ``seed``, ``level``, ``positions``, ``records`` in each part, ``seconds``.

    Examples:
        >>> found = find_vector(model, pairs)                            # doctest: +SKIP
        >>> print(found.verdict)                                         # doctest: +SKIP
        >>> found.save("refusal.safetensors")                            # doctest: +SKIP
    """

    best: Steering
    table: pd.DataFrame
    verdict: str
    examples: tuple[Example, ...]
    vectors: Mapping[str, SteeringVectors]
    effects: Mapping[tuple[str, int], NDArray[np.float64]]
    search: pd.DataFrame
    notes: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def steers(self) -> bool:
        """Whether any recipe moves the margin further than the controls."""
        return bool((self.table["verdict"] == "steers").any())

    def plot(self) -> Any:
        """Every recipe's effect with its interval, and the single draws of the controls; a matplotlib ``Figure``."""
        rows = self.table[~self.table["control"]]
        named = rows.assign(vector=rows["recipe"] + ", layer " + rows["layer"].astype(str))
        controls = self.table[self.table["control"]]
        draws = {
            f"{name}, layer {layer}": self.effects[name, layer].mean(1).tolist()
            for name, layer in zip(controls["recipe"], controls["layer"], strict=True)
        }
        # named as text: plotting is above this package
        figure = importlib.import_module("grains_tl.plotting").plot_controls(named, draws)
        figure.axes[0].set_xlabel("effect: change of the margin from no steering to +alpha, nats")  # no half of a swing
        return figure

    @property
    def evidence(self) -> dict[str, Any]:
        """What the report says of ``best``, as plain data, for ``vectors.push_to_hub(repo, evidence=found)``."""
        return evidence_of(self.table.iloc[0], self.best, float(self.about["level"]), self.verdict)

    def save(self, path: str | Path) -> Path:
        """Write the best vector with its alpha and evidence; ``load_vectors(path).chosen`` is ``best`` again."""
        row = self.table.iloc[0].to_dict()
        found = {
            name: row[name] for name in ("recipe", "layer", "alpha", "effect", "low", "high", "kl", "n", "verdict")
        }
        vectors = self.vectors[row["recipe"]].at([int(row["layer"])])
        return replace(self.best, vectors=replace(vectors, info={**vectors.info, "found": found})).save(path)

    def __repr__(self) -> str:
        return f"Found({self.best.label}; {self.verdict.splitlines()[0]})"

    def _repr_html_(self) -> str:
        first, *more = self.verdict.splitlines()
        read = [html.fold(f"{len(self.examples)} continuations", self.examples_html())] if self.examples else []
        return html.frame(html.title(first), self.table_html(), *(html.note(sentence) for sentence in more), *read)

    def table_html(self) -> str:
        """The report's table, for a page."""
        heads = ["recipe", "layer", "alpha", "effect", "low", "high", "KL", "records", "verdict"]
        rows, styles = [], []
        largest = float(np.nanmax(np.abs(self.table["effect"])))
        for row in self.table.to_dict("records"):
            numbers = [html.number(row["layer"], "d"), html.number(row["alpha"], ".3g")]
            numbers += [html.signed(row[name]) for name in ("effect", "low", "high")] + [html.number(row["kl"], ".3f")]
            said = f"control, {int(row['n_draws'])} draws" if row["control"] else row["verdict"]
            rows.append([html.text(row["recipe"]), *numbers, html.number(row["n"], "d"), html.text(said)])
            styles.append(["", "", "", html.tint(row["effect"], largest), *[""] * 5])
        about = "effect: change of log p(chosen) - log p(rejected) on the report records, nats"
        return html.table(heads, rows, numbers=range(1, 8), marked=[0], styles=styles) + html.note(about)

    def examples_html(self) -> str:
        """The continuations, with a tint on the words that steering changes."""
        rows = [[html.text(e.prompt, 300), html.text(e.base), marked_words(e.base, e.steered)] for e in self.examples]
        top = ["vertical-align:top"] * 3
        return html.table(["prompt", "without steering", "with steering"], rows, styles=[top] * len(rows))


def evidence_of(row: pd.Series, steering: Steering, level: float, verdict: str) -> dict[str, Any]:
    """A row of the report and the steering it is about, as plain data: what was chosen, effect, cost, controls, verdict."""
    numbers = ("effect", "low", "high", "kl", "n", "above_control", "above_low", "above_high", "beaten", "n_draws")
    values = {name: float(row[name]) for name in numbers if name in row}
    counts = {
        name: int(values[name]) for name in ("n", "beaten", "n_draws") if values.get(name, math.nan) == values[name]
    }
    known = {name: value for name, value in values.items() if value == value}
    about = {"recipe": str(row["recipe"]), "steers": bool(row["verdict"] == "steers"), "level": level}
    return {**about, "chosen": steering.choice, **known, **counts, "verdict": verdict.splitlines()}


def examples_of(
    model: HookedModel, records: Sequence[PreferencePair], steering: Steering, n: int, max_new_tokens: int
) -> tuple[Example, ...]:
    """Continuations of the first ``n`` different prompts, shorter where the model's context is; none if it is full."""
    different = list({plain_text(r.prompt): r for r in reversed(records)}.values())[::-1][:n]
    if not different or max_new_tokens < 1:
        return ()
    longest = max(len(prompt_inputs(model, r.prompt, r.image)[0]) for r in different)
    length = min(max_new_tokens, int(model.cfg.n_ctx) - longest)
    if length < 1:
        return ()
    prompts, images = [r.prompt for r in different], [r.image for r in different]
    pictures = images if any(image is not None for image in images) else None
    base, steered = (
        generate(model, prompts, hooks, max_new_tokens=length, images=pictures) for hooks in (None, steering)
    )
    return tuple(Example(plain_text(prompt), a, b) for prompt, a, b in zip(prompts, base, steered, strict=True))
