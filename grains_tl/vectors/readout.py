"""Residual activations at a read-out position, of the whole and of the masked prompt: all layers from one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl._util.progress import progress_bar
from grains_tl.attribution.field import run_batches
from grains_tl.attribution.sharing import can_share, prompt_batches
from grains_tl.hooks.cache import _norm_hooks, cache_hook, place_hook
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.sites import Site, site_width
from grains_tl.hooks.stand_ins import Replacements, hide, replacements
from grains_tl.inference.batches import Batch, by_token_budget, image_inputs, pad_rows
from grains_tl.models.precision import residual_exactness
from grains_tl.models.running import existing_layers, hooked, run_blocks
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel

#: Where the residual is read: at the prompt's last token (the paper), at the response's last token, or as the mean over
#: the response; the last two are averaged over the two responses. ``"attributed"``: at tokens that are named for each record
#: (those that are masked in the other run), as their mean.
Readout = Literal["prompt_end", "response_end", "response_mean", "attributed"]


def read_out(
    model: HookedModel,
    tokenized: Records,
    masked: Sequence[Sequence[int]] | None = None,
    *,
    layers: Sequence[int],
    mask: Mask | Masker = "mean_embedding",
    readout: Readout = "prompt_end",
    norms: list[Float[Tensor, "layer _"]] | None = None,
    places: Sequence[Sequence[int]] | None = None,
    site: Site = "resid_post",
) -> Float[Tensor, "record layer width"]:
    """Residuals of every record at the read-out position, with some of its prompt tokens taken out.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        masked: for every record the prompt positions to take out; ``None`` or empty for none.
        layers: which layers to keep; the result has them in this order.
        mask: what stands in for tokens and patches (``"attention"`` knocks both out).
        readout: where to read.
        norms: a list that receives the residual norms of the content tokens, ``[layer, token]`` per batch.
        places: for ``readout="attributed"``, each record's prompt positions to read at; zeros come from a record without.
        site: what is read: the residual stream after the block, or another activation of it.

    Returns:
        ``[record, layer, d_model]``, residual units (``"z"``: ``[record, layer, n_heads * d_head]``).

    Raises:
        ValueError: layers that do not exist, an unknown read-out, not one list of positions per record, or a position
            outside its prompt.

    Examples:
        >>> read_out(model, tokenized, layers=[12, 15]).shape     # doctest: +SKIP
        torch.Size([24, 2, 576])
    """
    tokenized = as_tokenized(model, tokenized)
    check_readout(readout)
    masked = [()] * len(tokenized) if masked is None else masked
    _require_places(tokenized, masked, "masked")
    if (readout == "attributed") != (places is not None):
        raise ValueError(
            f"readout={readout!r}, places={places!r}; 'attributed' needs places, and nothing else takes them"
        )
    if places is not None:
        _require_places(tokenized, places, "places")
        owner: Sequence[int] = range(len(tokenized))
        rows: Sequence[Any] = [(t.prompt, own) for t, own in zip(tokenized, places, strict=True)]
    else:
        owner, rows = zip(*((i, row) for i, t in enumerate(tokenized) for row in _rows(t, readout)), strict=True)
    mask = Mask.of(mask)
    needed = mask.text != "attention" and any(masked)
    stand_ins = replacements(model, tokenized, mask) if needed else None
    found = _run_rows(
        model,
        rows,
        [masked[i] for i in owner],
        [tokenized[i] for i in owner],
        owner=owner,
        stand_ins=stand_ins,
        layers=existing_layers(model, layers),
        norms=norms,
        site=site,
    )
    share = 1.0 if readout in ("prompt_end", "attributed") else 0.5
    out = torch.zeros(len(tokenized), *found.shape[1:])
    return out.index_add(0, torch.tensor(owner), share * found)


def read_out_responses(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    *,
    layers: Sequence[int],
    norms: list[Float[Tensor, "layer _"]] | None = None,
    site: Site = "resid_post",
) -> Float[Tensor, "record 2 layer width"]:
    """Residuals at the last token of prompt + chosen (0) and prompt + rejected (1), as CAA reads them.

    Where the model takes a mask for every pair of tokens, both responses follow one run of their prompt. A plain run of the
    longest record checks that; if it differs, or the model takes no such mask, every text runs in a row of its own.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized.
        layers: which layers to keep; the result has them in this order.
        norms: a list that receives the residual norms of the prompts' content tokens, ``[layer, token]`` per batch.
        site: what is read.

    Returns:
        ``[record, 2, layer, d_model]``, residual units.
    """
    layers = existing_layers(model, layers)
    # a batch holds what predicts a response's tokens: with one token more, that is the whole response
    longer = [replace(t, chosen=(*t.chosen, 0), rejected=(*t.rejected, 0)) for t in tokenized]
    everything = range(len(longer))
    if can_share(model, tokenized):
        found = _shared_ends(model, longer, layers, site)
        if found is not None:
            ends, own_norms = found
            if norms is not None:
                norms += own_norms
            return ends
    own_norms = []
    ends = _read_ends(model, longer, run_batches(model, longer, everything, "sum"), layers, own_norms, site)
    if norms is not None:
        norms += own_norms
    return ends


def _shared_ends(
    model: HookedModel, longer: Sequence[TokenizedPair], layers: list[int], site: Site
) -> tuple[Tensor, list[Tensor]] | None:
    """Read-outs and norms from rows that share their prompt; ``None`` where a plain run of one record differs."""
    norms: list[Tensor] = []
    index = max(range(len(longer)), key=lambda i: longer[i].longest)
    try:
        rows = prompt_batches(model, longer, range(len(longer)), "sum")
        found = _read_ends(model, longer, rows, layers, norms, site)
    except MODEL_ERRORS as error:  # an architecture that takes no such mask or positions
        require_from_outside(error)
        return None
    # in a shared row the second response is what could see too much, the longest what could see too little
    record = longer[index]
    sides = (0, 1) if len(record.chosen) > len(record.rejected) else (1,)
    alone = [replace(record, chosen=own, rejected=own) for own in (record.chosen, record.rejected)]
    plain = _read_ends(
        model,
        [alone[s] for s in sides],
        run_batches(model, [alone[s] for s in sides], range(len(sides)), "sum"),
        layers,
        [],
        site,
    )
    difference = (found[index, list(sides)] - plain[:, 0]).abs().amax(-1)
    size = plain[:, 0].abs().amax(-1)
    return (found, norms) if bool((difference <= residual_exactness(model) * size).all()) else None


def _read_ends(
    model: HookedModel,
    longer: Sequence[TokenizedPair],
    batches: Iterable[tuple[list[int], Batch]],
    layers: list[int],
    norms: list[Tensor],
    site: Site,
) -> Float[Tensor, "record 2 layer width"]:
    """Activations where the last token of each response is predicted; the norms of content tokens go into ``norms``."""
    out = torch.zeros(len(longer), 2, len(layers), site_width(model, site))
    with torch.no_grad(), progress_bar(total=len(longer), desc="cache", unit="record") as bar:
        for part, batch in batches:
            # targets come in the order of their response: the last of each slot
            slots = batch.target_slot.cpu()
            last = torch.zeros(2 * len(part), dtype=torch.long).scatter_reduce(
                0, slots, torch.arange(len(slots)), "amax"
            )
            rows, positions = batch.target_row[last], batch.keep[batch.target_keep[last]]
            store = torch.zeros(len(last), *out.shape[2:])
            owners = batch.record.tolist()
            contents = [longer[part[o]].content if o not in owners[:row] else () for row, o in enumerate(owners)]
            hooks = [*_norm_hooks(layers, contents, norms, site), *place_hook(layers, rows, positions, store, site)]
            with hooked(model, hooks):
                run_blocks(model, batch.ids, batch.attention_mask, max(layers) + 1, batch.inputs)
            out[part] = store.unflatten(0, (-1, 2))
            bar.update(len(part))
    return out


def _run_rows(
    model: HookedModel,
    rows: Sequence[tuple[tuple[int, ...], Sequence[int]]],
    masked: Sequence[Sequence[int]],
    records: Sequence[TokenizedPair],
    *,
    owner: Sequence[int],
    stand_ins: Replacements | None,
    layers: list[int],
    norms: list[Float[Tensor, "layer _"]] | None,
    site: Site,
) -> Float[Tensor, "row layer width"]:
    """Read-out of each row (ids, positions whose mean is read), with its masked positions taken out, in a few full batches.

    ``owner`` says which of ``stand_ins`` belongs to a row; without ``stand_ins`` masked tokens are knocked out of attention.
    """
    out = torch.zeros(len(rows), len(layers), site_width(model, site))
    with torch.no_grad(), progress_bar(total=len(rows), desc="cache", unit="run") as bar:
        for group in by_token_budget([len(ids) for ids, _ in rows]):
            ids, mask, offset = pad_rows(model, [rows[g][0] for g in group])
            weights = torch.zeros(ids.shape)
            for place, g in enumerate(group):
                _, read = rows[g]
                weights[place, list(read)] = 1.0 / max(1, len(read))
            store = torch.zeros(len(group), *out.shape[1:])
            taken = [masked[g] for g in group]
            hooks = hide(model, stand_ins, [owner[g] for g in group], taken, offset=offset, like=ids)
            if norms is not None:
                hooks = hooks + _norm_hooks(layers, [records[g].content for g in group], norms, site)
            inputs = image_inputs(model, [records[g].images for g in group], ids, offset)
            with hooked(model, hooks + cache_hook(layers, weights, store, site)):
                run_blocks(model, ids, mask, max(layers) + 1, inputs)
            out[group] = store
            bar.update(len(group))
    return out


def _require_places(tokenized: Sequence[TokenizedPair], given: Sequence[Sequence[int]], name: str) -> None:
    """Refuse lists that are not those of the records: wrong tokens would be taken out or read, or none (ValueError)."""
    if len(given) != len(tokenized):
        raise ValueError(
            f"{name} has {len(given)} lists of positions for {len(tokenized)} records; give one per record"
        )
    for number, (pair, positions) in enumerate(zip(tokenized, given, strict=True), start=1):
        bad = [p for p in positions if not 0 <= p < len(pair.prompt)]
        if bad:
            raise ValueError(
                f"record {number}: {name} has positions {bad}; its prompt has positions 0 to {len(pair.prompt) - 1}"
            )


def check_readout(readout: str) -> None:
    """Refuse an unknown read-out position (ValueError)."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout={readout!r}; expected one of {get_args(Readout)}")


def _rows(pair: TokenizedPair, readout: str) -> list[tuple[tuple[int, ...], range]]:
    """(ids, positions of the read-out)."""
    n = len(pair.prompt)
    if readout == "prompt_end":
        return [(pair.prompt, range(n - 1, n))]
    rows = [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
    return [(row, range(len(row) - 1 if readout == "response_end" else n, len(row))) for row in rows]
