"""What steering costs: divergence and perplexity on neutral text, and knowledge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util.checks import listed
from grains_tl._util.files import hash_of
from grains_tl._util.settings import current
from grains_tl._util.settings import settings as run_with
from grains_tl._util.warn import warn_caller
from grains_tl.evaluate.generated import MAX_LOGITS, generated_costs
from grains_tl.evaluate.measuring import about_setting, measure_missing, shared_passes
from grains_tl.evaluate.records import require_keys
from grains_tl.evaluate.settings import Setting, require_settings
from grains_tl.evaluate.store import Checkpoint, open_checkpoint
from grains_tl.inference.batches import Batch, by_token_budget, text_batch
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.generation import encode_prompts
from grains_tl.inference.objectives import kl_divergence
from grains_tl.inference.restart import prepare_restart, restart_logits
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.types import HookedModel
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.manifest import texts_used
from grains_tl.vectors.steering import Steering

#: What is kept of a text under a setting, per predicted token.
MEASURES = ["kl", "base_nll", "nll", "agreement"]

#: Texts to measure a cost on: given ones, the bundled ones (``None``), or what the steered model writes.
CostTexts = Sequence[str] | Continuations | None


def cost_rows(model: HookedModel, texts: CostTexts = None) -> list[list[int]]:
    """The texts (or prompts) of ``text_costs`` as token ids, for a caller that has long work to do before it.

    Raises:
        ValueError: no texts, one of fewer than two tokens, or one longer than the context; the message names it (from 1).
    """
    if isinstance(texts, Continuations):
        return [ids for ids, _ in encode_prompts(model, texts.prompts, texts.images)]
    rows = []
    for number, text in enumerate(neutral_texts() if texts is None else listed("texts", texts), start=1):
        try:
            rows.append(prompt_ids(model, text))
        except ValueError as error:
            raise ValueError(f"text {number}: {error}") from None
        if len(rows[-1]) < 2:
            raise ValueError(f"text {number} has fewer than two tokens, so nothing in it is predicted")
    if not rows:
        raise ValueError("no texts; expected at least one")
    return rows


def kl_per_token(costs: pd.DataFrame, n_settings: int) -> NDArray[np.float64]:
    """``[setting]`` mean KL over the tokens of all texts, nats, from a table of costs in the order of its settings."""
    kl, weight = (costs[name].to_numpy(dtype=float).reshape(n_settings, -1) for name in ("kl", "n_tokens"))
    return np.average(kl, axis=1, weights=weight)


def text_costs(
    model: HookedModel,
    settings: Sequence[Setting | Steering | CombinedSteering],
    texts: CostTexts = None,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
) -> pd.DataFrame:
    """What each setting does to the prediction of ordinary text.

    A scope such as ``"prompt"`` takes the first half of a text as the prompt; the averages are over the whole text.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        settings: what to measure; ``grid`` makes them from vectors.
        texts: default ``neutral_texts()``. ``inference.Continuations(prompts)`` for what each setting writes itself: the
            tokens are then the generated ones, ``text`` is the prompt, and ``budget`` says what ``kl`` is a number of.
        checkpoint: as in ``record_effects``; the same file can serve both.

    Returns:
        One row per setting and text: ``vector``, ``draw``, ``positions``, ``layer``, ``alpha``, ``text`` (its place),
        ``n_tokens`` (predicted tokens), and means over these: ``kl`` = KL(steered || base) of the next-token
        distribution, ``base_nll`` and ``nll`` = -log p of the text's own token without and with steering (all nats),
        ``agreement`` (share of tokens where both have the same likeliest token). ``summarize(frame, costs)`` gives the
        perplexities exp(nll).

    Raises:
        ValueError: no texts, one of fewer than two tokens, or one longer than the context, no list of settings, or
            settings without a ``key`` when there is a checkpoint; before anything runs.

    Warns:
        UserWarning: a text that a vector was built with.

    Examples:
        >>> costs = text_costs(model, grid({"ours": vectors}, [12], [0.1, 0.2]))       # doctest: +SKIP
        >>> costs.groupby("alpha")["kl"].mean()                                        # doctest: +SKIP
    """
    settings = require_settings(model, settings)
    steered = [(s.vector, s.hooks) for s in settings if isinstance(s.hooks, (Steering, CombinedSteering))]
    vectors = {f"{name}{n or ''}": p.vectors.info for name, one in steered for n, p in enumerate(one.parts)}
    warn_of_own_texts(vectors, cost_rows(model, texts))
    return cost_table(model, settings, texts, checkpoint=checkpoint)


def warn_of_own_texts(infos: Mapping[str, Mapping[str, Any]], rows: Sequence[Sequence[int]]) -> None:
    """Say so when a vector was made cheap on the very texts that its cost is measured on.

    Args:
        infos: ``info`` of vectors by name.
        rows: token ids of the texts.

    Warns:
        UserWarning: naming the vector, how many texts, and which to use.
    """
    hashes = {hash_of(list(row)) for row in rows}
    for name, info in infos.items():
        shared = hashes & texts_used(info)
        if shared:
            warn_caller(
                f"{len(shared)} of the {len(rows)} neutral texts were used to build {name!r}, so its cost looks lower than "
                f"it is; measure on others, by default neutral_texts({COST_TEXTS})",
            )


def cost_table(
    model: HookedModel,
    settings: Sequence[Setting | Steering | CombinedSteering],
    texts: CostTexts = None,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
) -> pd.DataFrame:
    """``text_costs`` for a caller that has asked already whether the vectors were built with these texts."""
    rows = cost_rows(model, texts)
    settings = require_settings(model, settings)
    store = open_checkpoint(checkpoint, model)
    require_keys(store, settings)
    if isinstance(texts, Continuations):
        return generated_costs(model, settings, texts, store)
    names = [hash_of(row) for row in rows]
    keys = [[hash_of(["cost", s.key or str(k), name]) for name in names] for k, s in enumerate(settings)]

    def run(texts: Sequence[int], wanted: Sequence[int]) -> Iterator[tuple[int, dict[int, list[float]]]]:
        batch = text_batch(model, [rows[i] for i in texts])
        for k, values in _measured(model, batch, [settings[k] for k in wanted]):
            yield wanted[k], dict(zip(texts, values.tolist(), strict=True))

    budget = max(1, min(current().max_tokens, MAX_LOGITS // int(model.cfg.d_vocab)))
    with run_with(max_tokens=budget), torch.no_grad():
        jobs = ((group, group) for group in by_token_budget([len(row) for row in rows]))
        measure_missing(settings, keys, jobs, run, store, item="text", desc="cost")
    table = [
        {
            **about_setting(s),
            "text": i,
            "n_tokens": len(rows[i]) - 1,
            **dict(zip(MEASURES, store.rows[keys[k][i]], strict=True)),
        }
        for k, s in enumerate(settings)
        for i in range(len(rows))
    ]
    frame = pd.DataFrame(table)
    frame.attrs = {"tokens": sum(map(len, rows))}
    return frame


def _measured(
    model: HookedModel,
    batch: Batch,
    settings: Sequence[Setting],
) -> Iterator[tuple[int, Float[Tensor, "text measure"]]]:
    """``(index of the setting, [text, measure])`` for one batch."""
    several = batch.ids.numel() * 2 <= current().max_tokens
    layers = [layer for s in settings for layer in (s.start, *s.read_layers)]
    restart = prepare_restart(model, batch, layers, copies=several)
    (base_logits,) = restart_logits(model, restart, max(restart.resid), [[]])
    base = base_logits.float().log_softmax(-1)
    for layer, group, hooks in shared_passes(settings, restart):
        if hooks is None:
            yield from ((k, _compared(base, base, batch)) for k in group)
            continue
        for k, logits in zip(group, restart_logits(model, restart, layer, hooks), strict=True):
            yield k, _compared(base, logits.float().log_softmax(-1), batch)


def _compared(
    base: Float[Tensor, "target vocab"], steered: Float[Tensor, "target vocab"], batch: Batch
) -> Float[Tensor, "text measure"]:
    kl = kl_divergence(steered, base)
    nll = [-x.gather(-1, batch.target_id[:, None])[:, 0] for x in (base, steered)]
    same = (base.argmax(-1) == steered.argmax(-1)).float()
    per_token = torch.stack([kl, *nll, same], dim=-1)
    n_texts = len(batch.ids)
    total = torch.zeros(n_texts, len(MEASURES), device=kl.device).index_add(0, batch.target_slot, per_token)
    count = torch.zeros(n_texts, device=kl.device).index_add(0, batch.target_slot, torch.ones_like(kl))
    return (total / count[:, None]).cpu()
