"""Does a vector carry over: built from one set of records, measured on the others, at equal KL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError, RecordError
from grains_tl._util.files import hash_of
from grains_tl._util.stats import crossed_interval, mean_interval
from grains_tl.analysis.building_curves import RANDOM, EqualCost, beside, built, curve_options, require_apart
from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PairLike, PreferencePair
from grains_tl.tokens.images import template_owner
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords, record_file
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of
from grains_tl.vectors.steering_vectors import SteeringVectors

#: What the model's own chat template is called in the table.
OWN = "own"


def transfer(
    model: HookedModel,
    sets: Mapping[str, Iterable[PairLike]],
    *,
    layer: int,
    recipe: Recipe | str | RecipeFunction = "grains",
    test: Mapping[str, Iterable[PairLike]] | None = None,
    share: float = 0.5,
    templates: Mapping[str, str] | None = None,
    kl: float = 0.05,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """A vector from each set of records, measured on every set: other topics, other wordings, another chat template.

    Unless ``test`` is given, part of the prompts is set aside for measuring. A prompt is on one side for all sets, so that
    sets may be wordings of the same records.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        sets: records to build on, by name.
        layer: where is steered.
        recipe: a name in ``gr.vectors.RECIPES``, a recipe as a value, or a function.
        test: records to measure on, by name; then all of ``sets`` is built on.
        share: of the prompts that are set aside for measuring.
        templates: chat templates (Jinja) by name: vectors built under the model's own one are measured under these too. The
            prompts must be messages.
        kl: what every vector costs, nats per token of neutral text.
        checkpoint: a ``.jsonl`` file for finished measurements (attributions and gradients go beside it).
        options: ``n_random`` (5) random directions; ``seed`` (0) of split and directions; ``objective`` (``"sum"``).

    Returns:
        One row per building set, and one for random directions, on each test set and template: ``built_on``,
        ``measured_on``, ``template`` (``"own"`` or a name), ``effect`` (mean change of the margin, nats), ``low``, ``high``
        (95 % interval over test records, of random directions over draws too), ``share`` (of what the set's own vector does
        there under the own template), ``cosine`` (to that vector), ``kl``, ``n``.

    Raises:
        ValueError: before anything runs: no sets, a side of a set left empty, test records among the building records,
            templates for prompts that are plain text.

    Examples:
        >>> table = transfer(model, {"films": films, "hotels": hotels}, layer=18, recipe="caa")      # doctest: +SKIP
        >>> gr.plotting.plot_transfer(table)                                                         # doctest: +SKIP
    """
    given = curve_options(options)
    run = EqualCost.of(model, layer, kl, given["objective"], checkpoint)
    building, testing = _sides(sets, test, share, given["seed"])
    _require_messages(model, testing, templates)
    chosen = recipe_of(recipe)
    with record_file(beside(checkpoint)) as file:
        vectors = {}
        for name, own in building.items():
            records = BuildingRecords(model, tokenize_pairs(model, own), (run.layer,), file)
            chosen.check(records)
            vectors[name] = built(chosen, records)
    placebo = run.random(next(iter(vectors.values())), given["n_random"], given["seed"])
    steps, spent = run.steps([*vectors.values(), *placebo])
    rows = []
    for measured_on, records_there in testing.items():
        for template, text in {OWN: None, **(templates or {})}.items():
            with _chat_template(model, text):
                effects = run.effects(steps, records_there)
            where = {"measured_on": measured_on, "template": template}
            rows += [{**where, **row} for row in _column(vectors, vectors.get(measured_on), effects, spent)]
    return _with_shares(pd.DataFrame(rows))


def _column(
    vectors: Mapping[str, SteeringVectors],
    there: SteeringVectors | None,
    effects: NDArray[np.float64],
    spent: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """The rows of one test set: each building set, then the random directions together; ``there``: its own vector."""
    rows: list[dict[str, Any]] = []
    for (name, vector), own, kl in zip(vectors.items(), effects, spent, strict=False):
        effect, _, low, high = mean_interval(own)
        cosine = np.nan if there is None else float(vector.cosine(there)[0])
        about = {"cosine": cosine, "kl": float(kl), "n": len(own)}
        rows.append({"built_on": name, "effect": effect, "low": low, "high": high, **about})
    n = len(vectors)
    if len(effects) > n:
        effect, low, high = crossed_interval(effects[n:])
        about = {"cosine": np.nan, "kl": float(spent[n:].mean()), "n": effects.shape[1]}
        rows.append({"built_on": RANDOM, "effect": effect, "low": low, "high": high, **about})
    return rows


def _with_shares(table: pd.DataFrame) -> pd.DataFrame:
    """``share``: of the effect of the set's own vector, under the own template; NaN where it has none."""
    own = table[(table["built_on"] == table["measured_on"]) & (table["template"] == OWN)]
    reference = table["measured_on"].map(own.set_index("measured_on")["effect"])
    columns = ["built_on", "measured_on", "template", "effect", "low", "high", "share", "cosine", "kl", "n"]
    return table.assign(share=table["effect"] / reference)[columns]


# -- sides and templates ----------------------------------------------------------------------------------------------
def _sides(
    sets: Mapping[str, Iterable[PairLike]], test: Mapping[str, Iterable[PairLike]] | None, share: float, seed: int
) -> tuple[dict[str, list[PreferencePair]], dict[str, list[PreferencePair]]]:
    """Records to build on and to measure on, by name."""
    if not isinstance(sets, Mapping) or not sets or not (test is None or isinstance(test, Mapping)):
        raise OptionError("sets and test are mappings from names to records: {'films': pairs, 'hotels': others}")
    building = {str(name): preference_pairs(records) for name, records in sets.items()}
    if RANDOM in building:
        raise OptionError(f"a set is named {RANDOM!r}, which the table keeps for its placebo; give another name")
    if test is not None:
        testing = {str(name): preference_pairs(records) for name, records in test.items()}
    else:
        if not 0 < finite("share", share) < 1:
            raise OptionError(f"share={share}; expected a part of the prompts between 0 and 1, such as 0.5")
        prompts = sorted({_prompt(r) for records in building.values() for r in records})
        order = np.random.default_rng(seed).permutation(len(prompts))
        aside = {prompts[i] for i in order[: round(share * len(prompts))]}
        testing = {name: [r for r in records if _prompt(r) in aside] for name, records in building.items()}
        building = {name: [r for r in records if _prompt(r) not in aside] for name, records in building.items()}
    for side, there in (("build on", building), ("measure on", testing)):
        for name, records in there.items():
            if not records:
                raise RecordError(f"set {name!r} has no records to {side}; give more different prompts, or test=")
    require_apart([r for own in building.values() for r in own], [r for own in testing.values() for r in own])
    return building, testing


def _prompt(record: PreferencePair) -> str:
    return hash_of([record.prompt])


def _require_messages(
    model: HookedModel, testing: Mapping[str, Sequence[PreferencePair]], templates: Mapping[str, str] | None
) -> None:
    if not templates:
        return
    if OWN in templates:
        raise OptionError(f"a template is named {OWN!r}, which is the model's own; give another name")
    for name, records in testing.items():
        plain = sum(isinstance(record.prompt, str) for record in records)
        if plain:
            raise OptionError(
                f"{plain} of {len(records)} prompts of set {name!r} are plain text, on which a chat template does nothing; "
                "give prompts as messages, or leave templates out"
            )
    for text in templates.values():
        with _chat_template(model, text):
            for records in testing.values():
                tokenize_pairs(model, records)


@contextlib.contextmanager
def _chat_template(model: HookedModel, text: str | None) -> Iterator[None]:
    """Another chat template for a while; ``None`` for the model's own."""
    owner = template_owner(model)
    before = owner.chat_template
    try:
        if text is not None:
            owner.chat_template = text
        yield
    finally:
        owner.chat_template = before
