"""What steering does to the margin: many settings on the same records, without running a lower layer twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl._util.settings import current
from grains_tl.evaluate.settings import Setting, _require_reach, require_settings
from grains_tl.evaluate.store import Checkpoint
from grains_tl.hooks.gate_run import after_reading
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import HooksForBatch, hooks_for, score_batches
from grains_tl.inference.objectives import Objective, kl_divergence, margins
from grains_tl.inference.restart import Restart, prepare_restart, restart_many
from grains_tl.models.running import forward_logits, stream_after
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: The columns that name a setting.
SETTING = ["vector", "positions", "layer", "alpha"]

#: What the rows of the unsteered model are called in a checkpoint.
BASE = "base"

#: (place of the record, place of the response) of every value that a batch gives.
Slots = list[tuple[int, int]]

Job = TypeVar("Job")


def measure(
    model: HookedModel,
    tokenized: Records,
    settings: Sequence[Setting | Steering | CombinedSteering],
    *,
    objective: Objective = "sum",
) -> tuple[Float[Tensor, "record 2"], Float[Tensor, "setting record 2"]]:
    """Log-likelihoods of both responses, unsteered and under every setting.

    Steering after layer l leaves the layers up to l alone, so each setting restarts from the residual cached there
    (equal to a full run to about 1e-5 nats; checked at the start, with full runs as the fallback).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        settings: what to measure.
        objective: how response tokens are combined.

    Returns:
        ``(base, steered)``: ``[record, 2]`` and ``[setting, record, 2]``, nats; column 0 chosen, 1 rejected.

    Raises:
        KeyError: a hook name that the model does not have.
        ValueError: no list of settings, a model that gives NaN, or hooks that act before their setting's layer, which is
            not run again.

    Examples:
        >>> settings = [Setting(12, vectors.hooks(0.2, [12]), vector="ours", alpha=0.2)]     # doctest: +SKIP
        >>> base, steered = measure(model, tokenized, settings)                             # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    settings = require_settings(model, settings)
    store = Checkpoint()
    keys = [[f"{row} {record}" for record in range(len(tokenized))] for row in range(1 + len(settings))]
    measure_responses(model, pair_batches(model, tokenized, objective), settings, keys, store, desc="measure")
    values = torch.tensor([store.rows[key] for of_setting in keys for key in of_setting])
    logprobs = rearrange(values, "(setting record) response -> setting record response", record=len(tokenized))
    return logprobs[0], logprobs[1:]


def pair_batches(
    model: HookedModel, tokenized: Sequence[TokenizedPair], objective: Objective
) -> Iterator[tuple[Slots, Batch]]:
    """Batches of preference pairs, and what each of their values belongs to; 0 is chosen, 1 rejected."""
    for group, batch in score_batches(model, tokenized, objective):
        yield [(i, side) for i in group for side in (0, 1)], batch


def measure_responses(
    model: HookedModel,
    batches: Iterable[tuple[Slots, Batch]],
    settings: Sequence[Setting],
    keys: Sequence[Sequence[str]],
    store: Checkpoint,
    *,
    desc: str,
) -> None:
    """Put the log-likelihoods of every record's responses into ``store``, unsteered and under every setting.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        batches: the records, with the (record, response) of each value.
        settings: what to measure.
        keys: ``[1 + setting][record]`` of the results; row 0 is the unsteered model.
        store: what it has is not measured again.
        desc: of the progress bar.

    Raises:
        ValueError: the unsteered model gives NaN.
    """

    def run(job: tuple[Slots, Batch], rows: Sequence[int]) -> Iterator[tuple[int, dict[int, list[float]]]]:
        slots, batch = job
        wanted = [row for row in rows if row]
        for k, logprobs in run_settings(model, batch, [settings[row - 1] for row in wanted]):
            values = _per_record(slots, logprobs.flatten().tolist())
            if k is None:
                _require_numbers(values)
            yield 0 if k is None else wanted[k], values

    jobs = ((sorted({i for i, _ in slots}), (slots, batch)) for slots, batch in batches)
    measure_missing([None, *settings], keys, jobs, run, store, item="record", desc=desc)


def measure_missing(
    rows: Sequence[Setting | None],
    keys: Sequence[Sequence[str]],
    jobs: Iterable[tuple[Sequence[int], Job]],
    run: Callable[[Job, Sequence[int]], Iterable[tuple[int, Mapping[int, list[float]]]]],
    store: Checkpoint,
    *,
    item: str,
    desc: str,
) -> None:
    """The loop behind every table: run what the store lacks, batch by batch, and keep each result as soon as it is there.

    Args:
        rows: what is measured: settings, or ``None`` for the unsteered model.
        keys: ``[row][item]`` of the results.
        jobs: batches, each with the items (records or texts) in it.
        run: from a batch and the rows that are wanted of it to ``(row, values by item)``, in any order.
        store: receives the results.
        item: what the items are called in the store's file.
        desc: of the progress bar.
    """
    settings = {row for row, setting in enumerate(rows) if setting is not None}
    with progress_bar(total=len(settings) * len(keys[0]) if keys else 0, desc=desc, unit="run") as bar:
        for items, job in jobs:
            wanted = [row for row, names in enumerate(keys) if any(names[i] not in store.rows for i in items)]
            bar.update(len(items) * len(settings.difference(wanted)))
            if not wanted:
                continue
            for row, values in run(job, wanted):
                setting, names = rows[row], keys[row]
                about = {"vector": BASE} if setting is None else about_setting(setting)
                new = {names[i]: i for i in items if names[i] not in store.rows}  # an item may be given twice
                store.append([(key, values[i], {**about, item: i}) for key, i in new.items()])
                bar.update(0 if setting is None else len(items))


def about_setting(setting: Setting) -> dict[str, Any]:
    """The columns of a table that say which setting a row is about."""
    return {name: getattr(setting, name) for name in [*SETTING, "draw"]}


def _per_record(slots: Slots, values: Sequence[float]) -> dict[int, list[float]]:
    """The values of each record's responses, in their order (a batch of questions may have a spare slot at the end)."""
    found: dict[int, list[float]] = {}
    for (i, _), value in zip(slots, values, strict=False):
        found.setdefault(i, []).append(value)
    return found


def _require_numbers(values: Mapping[int, Sequence[float]]) -> None:
    bad = [i + 1 for i, of_record in values.items() if not all(map(math.isfinite, of_record))]
    if bad:
        raise ValueError(f"the unsteered model gives NaN on record {bad[0]}; its weights or its dtype are broken")


def run_settings(
    model: HookedModel,
    batch: Batch,
    settings: Sequence[Setting],
) -> Iterator[tuple[int | None, Float[Tensor, "record 2"]]]:
    """Log-likelihoods of one batch: ``(None, base)`` first, then ``(index, logprobs)`` of every setting.

    Every setting restarts from the residual cached at its layer; settings of one layer share a pass as long as it stays
    under ``max_tokens``. Layers come in rising order, so that a run that is stopped has finished what it has yielded.
    """
    layers = [s.start for s in settings] or [0]
    read = [layer for s in settings for layer in s.read_layers]
    copies = copies_that_fit(batch.ids.numel()) > 1 and len(set(layers)) < len(layers)
    restart = prepare_restart(model, batch, [*layers, *read], copies=copies)
    yield None, restart.base
    for layer, group, hooks in shared_passes(settings, restart):
        if hooks is None:
            yield from ((i, restart.base) for i in group)
        else:
            yield from zip(group, restart_many(model, restart, layer, hooks), strict=True)


def shared_passes(
    settings: Sequence[Setting],
    restart: Restart,
) -> Iterator[tuple[int, list[int], list[FwdHooks] | None]]:
    """Which settings run together: ``(layer, their indices, their hooks)``; no hooks for those that change nothing.

    Layers come in rising order. Hooks above the setting's own layer would act on its neighbours too: those run alone.
    """
    size = copies_that_fit(restart.n_tokens) if restart.tiles else 1
    for layer in sorted({s.start for s in settings}):
        made = {i: hooks_for(s.hooks, restart.batch) for i, s in enumerate(settings) if s.start == layer}
        for i, hooks in made.items():
            _require_reach(layer, hooks)
            made[i] = after_reading(hooks, layer, restart.resid)
        idle = [i for i, hooks in made.items() if not hooks]
        alone = [i for i, hooks in made.items() if any(name != stream_after(layer) for name, _ in hooks)]
        shared = [i for i in made if i not in idle and i not in alone]
        if idle:
            yield layer, idle, None
        for group in [[i] for i in alone] + [shared[k : k + size] for k in range(0, len(shared), size)]:
            yield layer, group, [made[i] for i in group]


def copies_that_fit(n_tokens: int) -> int:
    """How many copies of a batch stay under the token budget, at least one."""
    return max(1, current().max_tokens // n_tokens)


def swings(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    vectors: Sequence[SteeringVectors],
    alpha: float,
    *,
    objective: Objective = "sum",
) -> tuple[Float[Tensor, "record"], Float[Tensor, "vector record"]]:
    """Half the change of the margin between +alpha and -alpha, for single-layer vectors.

    The two signs together cancel what any push of that size does to the margin, whatever its direction.

    Returns:
        ``(base, swings)``: unsteered margins ``[record]`` and swings ``[vector, record]``, nats.

    Raises:
        ValueError: vectors of several layers; take one with ``vectors.at([layer])``.
    """
    several = [v.layers for v in vectors if len(v.layers) != 1]
    if several:
        raise ValueError(f"swings takes vectors of one layer, got layers {several[0]}; use vectors.at([layer])")
    settings = [Setting.of(v.steering(sign * alpha)) for v in vectors for sign in (1, -1)]
    base, steered = measure(model, tokenized, settings, objective=objective)
    both = margins(steered).view(len(vectors), 2, len(tokenized))
    return margins(base), (both[:, 0] - both[:, 1]) / 2


def next_token_kl(
    model: HookedModel,
    tokenized: Records,
    fwd_hooks: HooksForBatch,
) -> Float[Tensor, "record"]:
    """KL(steered || base) of the next-token distribution at the end of each prompt, nats: what steering costs there.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.

    Returns:
        ``[record]``, nats.

    Examples:
        >>> next_token_kl(model, tokenized, vectors.steering(0.2, 24)).mean()    # doctest: +SKIP
        tensor(0.2214)
    """
    tokenized = as_tokenized(model, tokenized)
    out = torch.zeros(len(tokenized))
    with torch.no_grad():
        for group, batch in score_batches(model, tokenized):
            hooks = hooks_for(fwd_hooks, batch)
            last = batch.offset + batch.prompt_len - 1
            keep, place = last.unique(return_inverse=True)
            rows = torch.arange(len(last), device=last.device)
            base, steered = (
                forward_logits(model, batch.ids, batch.attention_mask, keep, h, batch.inputs)[rows, place]
                .float()
                .log_softmax(-1)
                for h in (None, hooks)
            )
            # a record with two rows has the same prompt in both
            out[torch.tensor(group)[batch.record.cpu()]] = kl_divergence(steered, base).cpu()
    return out
