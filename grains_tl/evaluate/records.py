"""What steering does to every single record: one tidy table for any list of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.files import hash_of
from grains_tl._util.warn import warn_caller
from grains_tl.evaluate.measuring import BASE, SETTING, Slots, measure_responses, pair_batches
from grains_tl.evaluate.settings import Setting, require_settings
from grains_tl.evaluate.store import Checkpoint, open_checkpoint
from grains_tl.inference.batches import Batch
from grains_tl.inference.choices import choice_batches, tokenize_choices
from grains_tl.inference.objectives import Objective, require_objective
from grains_tl.records.choices import MultipleChoice
from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PreferencePair
from grains_tl.records.splits import Record, record_id
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering

#: What to give where a summary came.
PER_RECORD = "the per-record table of record_effects or sweep_records"


def record_effects(
    model: HookedModel,
    records: Iterable[Record],
    settings: Sequence[Setting | Steering | CombinedSteering],
    *,
    objective: Objective = "sum",
    checkpoint: str | Path | Checkpoint | None = None,
) -> pd.DataFrame:
    """Measure every record unsteered and under every setting.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        records: preference pairs, or ``MultipleChoice`` questions.
        settings: what to measure; ``grid`` makes them from vectors.
        objective: how response tokens are combined (``"sum"`` or ``"mean"`` for questions).
        checkpoint: a ``.jsonl`` file that receives every result when it is finished; a later call with the same model,
            records and settings takes them from there.

    Returns:
        One row per setting and record: ``vector``, ``draw``, ``positions``, ``layer``, ``alpha``, ``record`` (its place),
        ``record_id`` (a hash of its text, the same for swapped responses), and

        - ``base_margin``, ``margin``, ``change``: log p(chosen) - log p(rejected) in nats without and with steering, and
          the difference; for a question the log odds of its right against its wrong answers. With the ending ``_token``
          the same from log-probabilities per token of a response.
        - ``base_correct``, ``correct``: the likeliest right answer is likelier than every wrong one.
        - ``base_mc1``, ``mc1``, ``base_mc2``, ``mc2``: as in TruthfulQA (arXiv 2109.07958). For a pair ``mc1`` equals
          ``correct``, and ``mc2`` is the chosen response's share of the probability of the two.
        - ``win``, ``wrong_way``: the margin moved with, against the sign of alpha (a draw is neither).

        ``frame.attrs["records"]`` lists the hashes of all records, ``frame.attrs["tokens"]`` counts the input tokens of
        one pass over them that runs every response by itself.

    Raises:
        ValueError: bad records (before anything runs), settings without a ``key`` when there is a checkpoint, a
            checkpoint of another model, or a model that gives NaN.

    Examples:
        >>> frame = record_effects(model, pairs, grid({"ours": vectors}, [12], [0.2]))     # doctest: +SKIP
        >>> frame.sort_values("change").head()                  # the records it hurts     # doctest: +SKIP
    """
    given, settings = list(records), require_settings(model, settings)
    require_objective(objective)
    batches, responses, names = _prepared(model, given, objective)
    store = open_checkpoint(checkpoint, model)
    require_keys(store, settings)
    keys = [
        [hash_of([key, name]) for name in names] for key in [BASE, *(s.key or str(i) for i, s in enumerate(settings))]
    ]
    every = {key for row in keys for key in row}
    taken = len(every & store.rows.keys())
    if store.rows and not taken:
        warn_caller(
            f"{store.path} has {len(store.rows)} results, none of these records and settings; they are left alone",
        )
    measure_responses(model, batches, settings, keys, store, desc="steer")
    _warn_of_nan(settings, keys[1:], store)
    # [record][1 + setting, response]; row 0 is the unsteered model
    found = [np.array([store.rows[of_records[i]] for of_records in keys]) for i in range(len(given))]
    frame = pd.concat(
        [
            _rows(i, r, v, x, objective, settings)
            for i, (r, v, x) in enumerate(zip(given, found, responses, strict=True))
        ],
        ignore_index=True,
    )
    frame = frame.sort_values(["_setting", "record"], kind="stable", ignore_index=True).drop(columns="_setting")
    frame.attrs = {
        "records": sorted(set(frame["record_id"])),
        "objective": objective,
        "from_checkpoint": taken,
        # input tokens of a loop that runs every response by itself (the last token of a response is no input)
        "tokens": sum(len(r[0]) + len(response) - 1 for r in responses for response in r[1:]),
    }
    return frame


def _warn_of_nan(settings: Sequence[Setting], keys: Sequence[Sequence[str]], store: Checkpoint) -> None:
    of_settings = zip(settings, keys, strict=True)
    broken = [s for s, names in of_settings if not all(np.isfinite(store.rows[name]).all() for name in names)]
    if broken:
        warn_caller(
            f"{len(broken)} of {len(settings)} settings give NaN or infinite log-likelihoods (the first: layer "
            f"{broken[0].layer}, alpha {broken[0].alpha:g}); the step is too large for this model",
        )


def require_keys(store: Checkpoint, settings: Sequence[Setting]) -> None:
    """Refuse settings that a file could not tell apart from those of another call (ValueError)."""
    if store.path is not None and not all(s.key for s in settings):
        raise ValueError("a checkpoint needs settings with a key, which grid() gives; custom hooks cannot be resumed")


def require_columns(table: Any, columns: Sequence[str], wanted: str, name: str = "frame") -> None:
    """Refuse a table without some columns, or something else than a table (ValueError); ``wanted``: what to give."""
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"the {name} is a {type(table).__name__}; give {wanted}")
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"the {name} lacks {missing}; give {wanted}")


def two_sided(frame: pd.DataFrame) -> pd.DataFrame:
    """Half the difference between +alpha and -alpha: cancels what any push of that size does, whatever its direction.

    Args:
        frame: from ``record_effects``; settings that lack one of the signs are dropped.

    Returns:
        Rows of positive alpha only, and the columns that mean something for both signs together; the swing of the margin in
        nats is in ``swing`` (and in ``change``, from where ``summarize`` takes it), ``swing_token`` per token.

    Raises:
        ValueError: no setting was measured with both signs, or a frame without the columns of ``record_effects``.

    Examples:
        >>> found = record_effects(model, pairs, grid({"v": vectors}, alphas=[-0.2, 0.2]))     # doctest: +SKIP
        >>> two_sided(found)["swing"].mean()                                                  # doctest: +SKIP
    """
    by = [*SETTING, "draw", "record"]
    needed = [*by, "record_id", "base_margin", "base_margin_token", "change", "change_token"]
    require_columns(frame, needed, PER_RECORD)
    down = frame[frame["alpha"] < 0].assign(alpha=lambda f: -f["alpha"])
    both = frame[frame["alpha"] > 0].merge(down[[*by, "change", "change_token"]], on=by, suffixes=("", "_down"))
    if both.empty:
        raise ValueError(f"no setting with both signs; the alphas are {sorted(set(frame['alpha']))}")
    for name in ("change", "change_token"):
        both[name] = (both[name] - both.pop(f"{name}_down")) / 2
    both["win"], both["wrong_way"] = both["change"] > 0, both["change"] < 0
    out = both[[*by, "record_id", "base_margin", "base_margin_token", "change", "change_token", "win", "wrong_way"]]
    out = out.assign(swing=out["change"], swing_token=out["change_token"])
    out.attrs = {**frame.attrs, "estimand": "swing"}
    return out


def _prepared(
    model: HookedModel,
    records: list[Record],
    objective: Objective,
) -> tuple[Iterator[tuple[Slots, Batch]], list[list[tuple[int, ...]]], list[str]]:
    """What measuring needs of the records, and how a checkpoint names them.

    Returns:
        Batches with the (record, response) of each slot; the ids of prompt and responses of every record; a name of each
        record for the checkpoint, made of whatever its results depend on.
    """
    questions = [r for r in records if isinstance(r, MultipleChoice)]
    if questions and any(isinstance(r, PreferencePair) for r in records):
        raise ValueError("preference pairs and questions cannot be mixed; measure them separately")
    if questions:
        if objective == "single":
            raise ValueError("objective='single' is for preference pairs; use 'sum' or 'mean' for questions")
        asked = tokenize_choices(model, _questions(records))
        ids = [[t.prompt, *t.choices] for t in asked]
        return choice_batches(model, asked), ids, [hash_of([objective, r]) for r in ids]
    tokenized = tokenize_pairs(model, preference_pairs(records))
    ids = [[t.prompt, t.chosen, t.rejected] for t in tokenized]
    images = [[] if t.images is None else [t.images.digest] for t in tokenized]
    batches = pair_batches(model, tokenized, objective)
    return batches, ids, [hash_of([objective, r, *image]) for r, image in zip(ids, images, strict=True)]


def _questions(records: list[Record]) -> list[MultipleChoice]:
    """The records, none lost: one of another kind would shift the results of all after it."""
    for number, record in enumerate(records, start=1):
        if not isinstance(record, MultipleChoice):
            raise ValueError(f"record {number} is a {type(record).__name__} among questions; expected a MultipleChoice")
    return [r for r in records if isinstance(r, MultipleChoice)]


def _rows(
    number: int,
    record: Record,
    logprobs: NDArray[np.float64],
    tokens: list[tuple[int, ...]],
    objective: Objective,
    settings: Sequence[Setting],
) -> pd.DataFrame:
    """The rows of one record, from ``[1 + setting, response]`` log-likelihoods."""
    labels = np.array(record.labels if isinstance(record, MultipleChoice) else (True, False))
    lengths = np.array([len(ids) for ids in tokens[1:]])
    if objective == "mean" and isinstance(record, MultipleChoice):  # the batches of questions hold sums
        logprobs = logprobs / lengths
    per_token = logprobs / lengths if objective == "sum" else logprobs
    right, wrong = logprobs[:, labels], logprobs[:, ~labels]
    margin, margin_token = _log_odds(logprobs, labels), _log_odds(per_token, labels)
    scores = {
        "margin": margin,
        "margin_token": margin_token,
        "correct": right.max(-1) > wrong.max(-1),
        "mc1": right[:, 0] > wrong.max(-1),
        "mc2": np.exp(-np.logaddexp(0, -margin)),  # the sigmoid, without overflow
    }
    columns: dict[str, Any] = {name: [getattr(s, name) for s in settings] for name in [*SETTING, "draw"]}
    columns |= {"record": number, "record_id": record_id(record), "_setting": range(len(settings))}
    columns |= {f"base_{name}": np.repeat(values[:1], len(settings)) for name, values in scores.items()}
    columns |= {name: values[1:] for name, values in scores.items()}
    change = margin[1:] - margin[0]
    sign = np.sign([1.0 if np.isnan(s.alpha) else s.alpha for s in settings])
    columns |= {"change": change, "change_token": margin_token[1:] - margin_token[0]}
    columns |= {"win": change * sign > 0, "wrong_way": change * sign < 0}
    return pd.DataFrame(columns)


def _log_odds(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.logaddexp.reduce(scores[:, labels], axis=-1) - np.logaddexp.reduce(scores[:, ~labels], axis=-1)
