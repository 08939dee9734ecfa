"""The search for a vector that steers, in five steps.

1. Split: some records to build on, some to choose on, some to report on.
2. Build: one vector per recipe and layer from the first part.
3. Calibrate: per recipe and layer, the alpha at which the KL on neutral text reaches the budget.
4. Choose: per recipe, the layer with the largest effect on the second part, at that alpha or at half of it.
5. Report: each recipe's choice on the third part, beside random directions that spend as much KL at the same layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of
from grains_tl._util.settings import settings as run_with
from grains_tl._util.warn import warn_caller
from grains_tl.evaluate.costs import cost_rows
from grains_tl.evaluate.store import open_checkpoint
from grains_tl.finding.measuring import Run, report, search
from grains_tl.finding.prediction import promise
from grains_tl.finding.records import split_for_search
from grains_tl.finding.result import Found, examples_of
from grains_tl.finding.verdict import with_verdicts
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.objectives import require_objective
from grains_tl.models.running import require_layers
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.records.pairs import PairLike, PreferencePair, plain_text
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of

#: Nats per token; beyond it a budget is taken for a mistake in its unit.
LARGE_KL = 2.0

#: Layers that are tried where none are named.
N_LAYERS = 8

#: What find_vector takes besides its own arguments, with the defaults.
OPTIONS: dict[str, Any] = {
    "n_draws": 8,
    "neutral": 5,
    "budget": "neutral",
    "quantile": None,
    "objective": "sum",
    "positions": "all",
    "level": 0.95,
    "n_examples": 3,
    "max_new_tokens": 40,
}


def find_vector(
    model: HookedModel,
    pairs: Iterable[PairLike] | Mapping[str, Iterable[PairLike]],
    recipes: Sequence[Recipe | str | RecipeFunction] = ("grains", "kl_optimal", "caa", "random_direction"),
    kl: float = 0.05,
    *,
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = (0.03, 0.1, 0.3),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Found:
    """From preference records to a vector that steers, with the evidence that it does, or that none does.

    The records are split in three. Each recipe builds on the first part, chooses its own layer and alpha within the KL
    budget on the second, and is measured on the third, against random directions at the same layer and KL.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: at least 8 different records, better 30 or more; or a mapping with your own parts ``"build"``, ``"choose"``
            and ``"report"``, for example with other wordings in the last.
        recipes: what to compare: names in ``gr.vectors.RECIPES``, recipes as values, or functions. Recipes that draw at
            random, such as ``"random_direction"``, are controls: they are drawn ``n_draws`` times at every chosen layer.
        kl: the budget: KL(steered || base) on neutral text, nats per token; see ``budget``.
        layers: which to try; default eight spread over the depth without the first two.
        alphas: steps at which the KL is measured, fractions of the layer's typical residual norm; between them it is
            interpolated to the alpha that spends the budget.
        seed: of the split and of the draws.
        checkpoint: a ``.jsonl`` file for finished measurements (attributions go beside it); the same call goes on there.
        options: ``n_draws`` (8) of each control; ``neutral`` (5): texts, or how many of the bundled ones; ``budget``
            (``"neutral"``): with ``"generated"`` the KL is taken along what each step writes, up to ``max_new_tokens``,
            behind ``neutral`` prompts of the choosing records, and ``quantile`` of its tokens counts (``None``: their mean);
            ``objective`` (``"sum"``); ``positions`` (``"all"``); ``level`` (0.95) of the intervals; ``n_examples`` (3)
            prompts to continue, up to ``max_new_tokens`` (40); ``max_tokens`` and ``progress`` as in ``gr.settings``.

    Returns:
        ``Found``: ``best`` (the steering), ``table`` (effects in nats), ``verdict``, ``examples``, ``plot()``.

    Raises:
        ValueError: before anything runs: too few records, a record in two parts or both ways round, unknown recipes or
            options, only controls, layers the model lacks, alphas or a budget that are not positive, neutral texts that a
            recipe is built with.

    Examples:
        >>> found = find_vector(model, load_pairs("pairs.jsonl"))                   # doctest: +SKIP
        >>> print(found.verdict)                                                    # doctest: +SKIP
        >>> generate(model, ["The film was"], found.best.hooks())                   # doctest: +SKIP
    """
    start = time.time()
    own = {name: options.pop(name, None) for name in ("max_tokens", "progress")}
    run = _run(model, options, kl=kl, alphas=alphas, seed=seed)
    recipes = _recipes(recipes)
    parts = split_for_search(pairs, seed)
    if run.budget == "generated":
        run.texts = _continuations(run, parts.choose)
    tried = tuple(require_layers(model, _spread(int(model.cfg.n_layers)) if layers is None else layers))
    tokenized = {name: tokenize_pairs(model, getattr(parts, name)) for name in parts.sizes}
    attributions = None if checkpoint is None else Path(f"{checkpoint}.attributions.jsonl")
    building = BuildingRecords(model, tokenized["build"], tried, attributions)
    for recipe in recipes:
        if not recipe.draws:
            recipe.check(building)
    _require_other_texts(recipes, building, cost_rows(model, run.texts))
    run.store = open_checkpoint(checkpoint, model)
    with run_with(**own):
        vectors = {recipe.name: recipe.build(building) for recipe in recipes if not recipe.draws}
        choices, searched = search(run, vectors, parts.choose)
        controls = [recipe for recipe in recipes if recipe.draws]
        table, effects = report(run, choices, controls, building, parts.report)
        table, best, verdict = with_verdicts(table, effects, choices, run, parts)
        chosen = choices[best]
        steering = chosen.steering(run.positions)
        texts = run.texts if not isinstance(run.texts, Continuations) else []
        if texts and (run.objective, run.positions) == ("sum", "all"):  # what the calibration is of
            verdict = "\n".join(filter(None, [verdict, promise(building, chosen.layer, run.kl, texts)]))
        examples = examples_of(model, parts.report, steering, run.n_examples, run.max_new_tokens)
    return Found(
        best=steering,
        table=table,
        verdict=verdict,
        examples=examples,
        vectors=vectors,
        effects=effects,
        search=searched,
        notes=parts.notes,
        about={
            **{"kl": kl, "seed": seed, "level": run.level, "positions": run.positions},
            **{"records": parts.sizes, "seconds": time.time() - start},
        },
    )


def _run(model: HookedModel, options: dict[str, Any], *, kl: float, alphas: Sequence[float], seed: int) -> Run:
    """All options, checked."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise OptionError(f"find_vector takes no {', '.join(unknown)}; its options are {', '.join(OPTIONS)}")
    given = {**OPTIONS, **options}
    if not finite("kl", kl) > 0:
        raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
    if kl > LARGE_KL:
        warn_caller(
            f"kl={kl:g} nats per token is a very large budget: such text is hardly the model's own any more. The default is "
            "0.05, and 0.2 is a strong step"
        )
    steps = sorted({finite("alpha", alpha) for alpha in listed("alphas", alphas)})
    if not steps or steps[0] <= 0:
        raise OptionError(f"alphas={list(alphas)}; expected positive steps such as [0.03, 0.1, 0.3]")
    if not 0 < finite("level", given["level"]) < 1:
        raise OptionError(f"level={given['level']}; expected a share between 0 and 1, such as 0.95")
    require_objective(given["objective"])
    for name, least in (("n_draws", 2), ("n_examples", 0), ("max_new_tokens", 0)):
        given[name] = whole(name, given[name], least)
    neutral = given.pop("neutral")
    _require_budget(given, neutral)
    texts = neutral_texts(neutral) if isinstance(neutral, int) else listed("neutral", neutral)
    return Run(model, texts, float(kl), tuple(steps), seed, **given)


def _require_budget(given: dict[str, Any], neutral: Any) -> None:
    """Refuse options of a budget that do not go together (OptionError)."""
    if given["budget"] not in ("neutral", "generated"):
        raise OptionError(f"budget={given['budget']!r}; expected 'neutral' or 'generated'")
    if given["budget"] == "neutral":
        if given["quantile"] is not None:
            raise OptionError(
                f"quantile={given['quantile']} counts tokens of generated text; give budget='generated' too"
            )
        return
    if not isinstance(neutral, int) or neutral < 1:
        raise OptionError(
            f"neutral={neutral!r} with budget='generated'; expected how many prompts to continue, such as 5"
        )
    if given["max_new_tokens"] < 1:
        raise OptionError("max_new_tokens=0 with budget='generated': nothing would be generated; give 20 or more")


def _continuations(run: Run, records: Sequence[PreferencePair]) -> Continuations:
    """What each step writes behind the first different prompts of some records, as many as there were neutral texts."""
    different = list({plain_text(r.prompt): r for r in reversed(records)}.values())[::-1][
        : len(cast("Sequence[str]", run.texts))
    ]
    images = [r.image for r in different]
    return Continuations(
        [r.prompt for r in different],
        run.max_new_tokens,
        quantile=run.quantile,
        images=images if any(image is not None for image in images) else None,
    )


def _require_other_texts(recipes: Sequence[Recipe], building: BuildingRecords, rows: Sequence[Sequence[int]]) -> None:
    """Refuse to measure a vector's cost on texts on which it was made cheap (OptionError)."""
    hashes = {hash_of(list(row)) for row in rows}
    for recipe in recipes:
        shared = hashes & recipe.texts_used(building)
        if shared:
            raise OptionError(
                f"{len(shared)} of the {len(rows)} neutral texts are among those that {recipe.name!r} is built with, so its "
                f"KL would look lower than it is; use neutral={COST_TEXTS} or fewer, or other texts"
            )


def _recipes(given: Sequence[Recipe | str | RecipeFunction]) -> list[Recipe]:
    if isinstance(given, (str, Recipe)) or callable(given):
        given = [given]
    recipes = [recipe_of(recipe) for recipe in given]
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise OptionError(
            f"recipes {names}: two have one name; give a recipe of your own as a function with another name"
        )
    if all(recipe.draws for recipe in recipes):
        raise OptionError(f"recipes {names}: expected at least one that is no control, such as 'caa' or 'grains'")
    return recipes


def _spread(n_layers: int) -> list[int]:
    """About eight layers over the depth; not the first two, where a residual holds little but its own token."""
    return spread_over(range(min(2, n_layers - 1), n_layers))


def spread_over(layers: Sequence[int]) -> list[int]:
    """At most eight of some layers, evenly, the first and the last among them.

    Examples:
        >>> spread_over([3, 5]), spread_over(range(2, 30))
        ([3, 5], [2, 6, 10, 14, 17, 21, 25, 29])
    """
    n = min(N_LAYERS, len(layers))
    return [layers[round((len(layers) - 1) * i / max(n - 1, 1))] for i in range(n)]
