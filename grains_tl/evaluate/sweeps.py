"""Vectors x layers x alphas x scopes: what each cell does to a set of records, as a tidy table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from typing_extensions import Unpack

from grains_tl._util.checks import listed
from grains_tl._util.settings import RunOptions, with_settings
from grains_tl.evaluate.costs import cost_rows, cost_table, warn_of_own_texts
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Vectors, grid, named_vectors
from grains_tl.evaluate.store import open_checkpoint
from grains_tl.evaluate.summary import summarize
from grains_tl.hooks.operators import Operator
from grains_tl.hooks.steer import Positions
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import require_layers
from grains_tl.records.loading import neutral_texts
from grains_tl.records.pairs import PreferencePair
from grains_tl.records.splits import Record
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors


@with_settings
def sweep(
    model: HookedModel,
    vectors: Vectors,
    pairs: Iterable[Record],
    *,
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = (-0.2, 0.2),
    operator: Operator = "add_renorm",
    positions: Positions | Sequence[Positions] = "all",
    objective: Objective = "sum",
    neutral: Sequence[str] | int | Continuations | None = None,
    checkpoint: str | Path | None = None,
    **run: Unpack[RunOptions],
) -> pd.DataFrame:
    """Steer at one layer at a time and see what happens to the margin, and what it costs.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: from ``build_vectors``, or several by name.
        pairs: records to measure on (or ``MultipleChoice`` questions): ``choose`` a cell here, ``report_choice`` on others.
        layers: default all stored.
        alphas: steps, fractions of the layer's typical residual norm; give both signs to see what any push does.
        operator: as in ``SteeringVectors.hooks``.
        positions: a scope or several of them: ``"all"``, ``"prompt"``, ``"generated"``, ``"last"``.
        objective: how response tokens are combined.
        neutral: texts to measure the cost on, or how many of the bundled ones; ``None`` leaves the cost out.
            ``inference.Continuations(prompts, quantile=0.95)`` measures it on what each setting writes itself.
        checkpoint: a ``.jsonl`` file that receives every result when it is finished. The same call with the same file goes
            on where it stopped, and a larger grid computes what is new.
        run: ``max_tokens`` (token budget of one pass; settings of one layer share a pass as long as they fit) and
            ``progress`` (show bars), as in ``settings``.

    Returns:
        One row per vector, scope, layer and alpha: ``vector``, ``positions``, ``layer``, ``alpha``, ``effect`` (mean
        paired change of the margin, nats) with ``effect_se``, ``low``, ``high`` and ``verdict``, ``wrong_way``,
        ``accuracy``, ``margin``, ``base_margin``, ``n``, with ``neutral`` also ``kl``, ``perplexity`` and the other
        columns of ``summarize``, and the ``operator`` and ``objective`` of the call. ``sweep_records`` has the same per
        record. ``frame.attrs`` holds ``token_layers`` (tokens times blocks that were run), ``naive_token_layers`` (what a
        loop over settings, records and responses runs), and the hashes of the records.

    Raises:
        ValueError: bad records, a layer that is not stored, vectors of another model; before anything runs.

    Examples:
        >>> frame = sweep(model, vectors, pairs, layers=[6, 12, 18], alphas=[-0.2, 0.2])   # doctest: +SKIP
        >>> frame.pivot(index="layer", columns="alpha", values="effect")                  # doctest: +SKIP
        >>> choice = choose(sweep(model, vectors, pairs, neutral=10), max_kl=0.1)          # doctest: +SKIP
    """
    found, costs = sweep_records(
        model,
        vectors,
        pairs,
        layers=layers,
        alphas=alphas,
        operator=operator,
        positions=positions,
        objective=objective,
        neutral=neutral,
        checkpoint=checkpoint,
    )
    return summarize(found, costs)


@with_settings
def sweep_records(
    model: HookedModel,
    vectors: Vectors,
    pairs: Iterable[Record],
    *,
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = (-0.2, 0.2),
    operator: Operator = "add_renorm",
    positions: Positions | Sequence[Positions] = "all",
    objective: Objective = "sum",
    neutral: Sequence[str] | int | Continuations | None = None,
    checkpoint: str | Path | None = None,
    **run: Unpack[RunOptions],
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """``sweep`` before it is summarized: ``(record_effects, text_costs)``, the second ``None`` without ``neutral``.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: one, or several by name.
        pairs: the records to measure on.
        layers: default all that a vector has.
        alphas: step sizes, fractions of the layer's typical residual norm.
        operator: how the step is applied (see ``SteeringVectors.hooks``).
        positions: one scope, or several to compare (see ``SteeringVectors.hooks``).
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"`` (see ``attribute``).
        neutral: texts to measure the cost on, or how many of the bundled ones, or ``inference.Continuations``.
        checkpoint: a ``.jsonl`` file; an interrupted sweep resumes from it.
        run: ``max_tokens`` (token budget of one pass) and ``progress`` (show bars), as in ``settings``.

    Returns:
        Two tables: one row per record and setting (nats), and one per text and setting (nats per token).

    Raises:
        ValueError: as ``sweep``: no records or one alone, no vectors, vectors of another model, layers the model lacks.

    Warns:
        UserWarning: a neutral text that a vector was built with.

    Examples:
        >>> found, costs = sweep_records(model, {"ours": a, "caa": b}, pairs, neutral=10)    # doctest: +SKIP
        >>> effect_at_kl(found, costs, kl=0.05, against="caa")                               # doctest: +SKIP
    """
    if isinstance(pairs, PreferencePair):
        raise ValueError("records are a PreferencePair; expected a list of PreferencePair: [pair] for one")
    if isinstance(pairs, (str, Path)):
        raise ValueError(f"records are the path {str(pairs)!r}; read them first: gr.load_pairs({str(pairs)!r})")
    records = listed("records", pairs)
    if not isinstance(vectors, (SteeringVectors, Mapping)):
        raise ValueError(
            f"vectors are a {type(vectors).__name__}; SteeringVectors (load_vectors(path)) or {{name: SteeringVectors}} "
            "are needed"
        )
    named = named_vectors(vectors)
    for one in named.values():
        one.require_match(model)
    settings = grid(named, layers, alphas, operator=operator, positions=positions)
    require_layers(model, [s.layer for s in settings])
    texts = neutral_texts(neutral) if isinstance(neutral, int) else neutral
    if texts is not None:
        warn_of_own_texts(
            {n: v.info for n, v in named.items()}, cost_rows(model, texts)
        )  # also refused now, not after the records have run
    with counted_token_layers(model) as count:
        store = open_checkpoint(checkpoint, model)
        found = record_effects(model, records, settings, objective=objective, checkpoint=store)
        costs = None
        if texts is not None:
            costs = cost_table(model, settings, texts, checkpoint=store)
    loop = found.attrs.pop("tokens") + (0 if costs is None else costs.attrs["tokens"])
    found.attrs |= {
        "operator": operator,
        "token_layers": sum(count),
        "naive_token_layers": loop * (len(settings) + 1) * int(model.cfg.n_layers),
    }
    return found, costs


@contextmanager
def counted_token_layers(model: HookedModel) -> Iterator[list[int]]:
    """Tokens (padding included) that pass through a block, one entry per call of a block.

    Examples:
        >>> with counted_token_layers(model) as count:               # doctest: +SKIP
        ...     score_pairs(model, tokenized)                        # doctest: +SKIP
        >>> sum(count)                                               # doctest: +SKIP
    """
    count: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        resid = args[0] if args else kwargs["hidden_states"]
        count.append(resid.shape[0] * resid.shape[1])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in model.blocks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
