"""f without some of the prompt's tokens: what leave-one-out, its relatives and every check of faithfulness need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl._util.progress import progress_bar
from grains_tl.attribution.field import require_finite, run_batches
from grains_tl.attribution.sharing import WORTH, Branch, branch, can_share, row_length, rows_of, shared_batches
from grains_tl.hooks.mask import Mask, Masker, mask_hook
from grains_tl.hooks.stand_ins import Replacements, hide, replacements
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import Objective
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.models.precision import exactness
from grains_tl.models.prompt_cache import PromptCache, empty_cache
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import FwdHooks, HookedModel

#: Positions to take out of one record's prompt.
Removal = tuple[int, Sequence[int]]


def values_without(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    removals: Sequence[Removal],
    *,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
) -> Float[Tensor, "removal"]:
    """f of a record without some of its prompt's tokens, nats; for many such removals in full batches.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        removals: ``(record, positions)`` each; no positions give f(x).
        objective: how response tokens are combined.
        mask: what stands in for a token or patch that is taken out.

    Examples:
        >>> values_without(model, tokenized, [(0, ()), (0, (3, 4))])   # doctest: +SKIP
        tensor([ 1.92, -0.35])
    """
    mask = Mask.of(mask)
    stand_ins = None if mask.text == "attention" else replacements(model, tokenized, mask)
    out = torch.zeros(len(removals))
    with torch.no_grad(), progress_bar(total=len(removals), desc="take out", unit="run") as bar:
        if stand_ins is not None:
            found = _values_in_shared_rows(model, tokenized, removals, objective, stand_ins, bar)
            if found is not None:
                return found
            bar.reset()
        runs = [record for record, _ in removals]
        for part, batch in run_batches(model, tokenized, runs, objective):
            owner = [runs[part[place]] for place in batch.record.tolist()]
            gone = [list(removals[part[place]][1]) for place in batch.record.tolist()]
            hooks = hide(model, stand_ins, owner, gone, offset=batch.offset, like=batch.ids)
            out[part] = _margins(model, batch, hooks)
            bar.update(len(part))
    require_finite(out, "the log-likelihood")
    return out


def _margins(model: HookedModel, batch: Batch, hooks: FwdHooks, *, plain: bool = False) -> Float[Tensor, "run"]:
    logprobs = batch_logprobs(model, batch, hooks, plain=plain)
    return (logprobs[:, 0] - logprobs[:, 1]).float().cpu()


def _values_in_shared_rows(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    removals: Sequence[Removal],
    objective: Objective,
    stand_ins: Replacements,
    bar: Any,
) -> Float[Tensor, "removal"] | None:
    """The same from rows that begin at the first token taken out; ``None`` if not worth it or not exact.

    f(x) is taken from plain runs, and branches of every record that take nothing out must give it too.
    """
    if not can_share(model, tokenized):
        return None
    records = sorted({record for record, _ in removals})
    branches = [branch(i, r, tokenized[r], gone) for i, (r, gone) in enumerate(removals) if gone]
    tokens = [sum(map(len, record.inputs)) for record in tokenized]
    plain = sum(tokens[record] for record, _ in removals)
    shared = row_length(tokenized, branches) + sum(tokens[record] for record in records)
    if shared > (1 - WORTH) * plain:
        return None
    out = torch.zeros(len(removals))
    for part, batch in run_batches(model, tokenized, records, objective):
        here = [records[i] for i in part]
        values, prompts = _run_prompts(model, batch, here)
        if prompts is None:
            return None
        whole = dict(zip(here, values.tolist(), strict=True))
        for i, (record, gone) in enumerate(removals):
            if record in whole and not gone:
                out[i] = whole[record]
        own = [one for one in branches if one.record in whole]
        checks = _checks(tokenized, here, len(removals))
        try:
            found = _branch_values(model, tokenized, [*own, *checks], objective, stand_ins, prompts)
        except MODEL_ERRORS as error:  # an architecture that takes no such cache, mask or positions
            require_from_outside(error)
            return None
        if not all(abs(found[one.run] - whole[one.record]) < exactness(model) for one in checks):
            return None
        for one in own:
            out[one.run] = found[one.run]
        bar.update(sum(record in whole for record, _ in removals))
    require_finite(out, "the log-likelihood")
    return out


def _checks(tokenized: Sequence[TokenizedPair], records: Sequence[int], number: int) -> list[Branch]:
    """Branches that take nothing out: the last token of every prompt, and the last quarter of the longest prompt."""
    checks = [branch(number + i, record, tokenized[record], ()) for i, record in enumerate(records)]
    longest = max(records, key=lambda record: len(tokenized[record].prompt))
    return [*checks, Branch(number + len(checks), longest, (), 3 * len(tokenized[longest].prompt) // 4)]


def _run_prompts(
    model: HookedModel, batch: Batch, records: Sequence[int]
) -> tuple[Float[Tensor, "record"], PromptCache | None]:
    """f(x) of every record of a batch, and what its prompts left behind; ``None`` if nothing can go on from that."""
    cache = empty_cache()
    noted = replace(batch, inputs={**batch.inputs, "past_key_values": cache, "use_cache": True})
    try:
        values = _margins(model, noted, [])
    except MODEL_ERRORS as error:
        require_from_outside(error)
        return torch.zeros(len(records)), None
    row = {records[place]: r for r, place in enumerate(batch.record.tolist())}
    n_rows, n_pos = batch.ids.shape
    return values, PromptCache.of(cache, row, n_rows, n_pos, int(model.cfg.n_layers))


def _branch_values(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    branches: Sequence[Branch],
    objective: Objective,
    stand_ins: Replacements,
    prompts: PromptCache,
) -> dict[int, float]:
    """f of every branch, by its run."""
    found: dict[int, float] = {}
    plain = runs_plain(model)
    rows = rows_of(tokenized, branches)
    for part, batch, hidden in shared_batches(model, tokenized, rows, objective, prompts=prompts):
        hooks = mask_hook(model, hidden, replacement=stand_ins.text)
        found |= zip(part, _margins(model, batch, hooks, plain=plain).tolist(), strict=True)
    return found


def leave_out_scores(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    objective: Objective,
    mask: Mask | Masker,
) -> tuple[list[Tensor], list[float]]:
    """f(x) - f(x without a group), shared equally by the group's tokens (NaN where no group is); and f(x).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        groups: for every record, the groups of positions to take out together; single tokens for leave-one-out.
        objective: how response tokens are combined.
        mask: what replaces a token or patch.
    """
    removals: list[Removal] = [(r, ()) for r in range(len(tokenized))]
    removals += [(r, group) for r, own in enumerate(groups) for group in own]
    found = values_without(model, tokenized, removals, objective=objective, mask=mask)
    values = found[: len(tokenized)].tolist()
    scores = [torch.full((len(t.prompt),), float("nan")) for t in tokenized]
    for (record, group), value in zip(removals[len(tokenized) :], found[len(tokenized) :].tolist(), strict=True):
        scores[record][list(group)] = (values[record] - value) / len(group)
    return scores, values


def leave_k_out_scores(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    units: Sequence[Sequence[Sequence[int]]],
    generators: Sequence[torch.Generator],
    *,
    k: int,
    n_draws: int,
    objective: Objective,
    mask: Mask | Masker,
) -> tuple[list[Tensor], list[float]]:
    """The additive model that fits f best when k units at a time are taken out, by least squares.

    Words that stand in for each other look useless one by one; taken out together they show. With fewer draws than units
    the smallest scores that fit are returned.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        units: for every record the groups of positions that may be taken out.
        generators: one per record.
        k: units taken out together (at most all but one).
        n_draws: forward passes per record.
        objective: how response tokens are combined.
        mask: what replaces a token or patch.
    """
    removals: list[Removal] = [(r, ()) for r in range(len(tokenized))]
    designs = []
    for record, own in enumerate(units):
        # nothing to take out, nothing to draw from
        n = n_draws if own else 0
        design = _balanced_draws(len(own), min(k, max(1, len(own) - 1)), n, generators[record])
        designs.append(design)
        removals += [
            (record, [p for u, out in enumerate(row) if out for p in own[u]]) for row in design.bool().tolist()
        ]
    found = values_without(model, tokenized, removals, objective=objective, mask=mask)
    values = found[: len(tokenized)].tolist()
    scores, begin = [], len(tokenized)
    for record, (own, design) in enumerate(zip(units, designs, strict=True)):
        drops = values[record] - found[begin : begin + len(design)]
        begin += len(design)
        row = torch.full((len(tokenized[record].prompt),), float("nan"))
        scores.append(row)
        if not own:
            continue
        # the smallest solution that fits; the float64 driver that allows rank deficiency
        fitted = torch.linalg.lstsq(design.double(), drops.double()[:, None], driver="gelsd").solution[:, 0].float()
        for unit, score in zip(own, fitted.tolist(), strict=True):
            row[list(unit)] = score / len(unit)
    return scores, values


def _balanced_draws(n: int, k: int, n_draws: int, generator: torch.Generator) -> Float[Tensor, "draw unit"]:
    """Random subsets of size k in which every unit stands almost equally often: consecutive pieces of permutations."""
    order: list[int] = []
    design = torch.zeros(n_draws, n)
    for row in range(n_draws):
        chosen: list[int] = []
        while len(chosen) < k:
            if not order:
                order = torch.randperm(n, generator=generator).tolist()
            later = [u for u in order if u in chosen]
            order = [u for u in order if u not in chosen]
            if order:
                chosen.append(order.pop())
            order += later
        design[row, chosen] = 1.0
    return design
