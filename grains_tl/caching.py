"""Residual activations at a read-out position, of the whole and of the masked prompt: all layers from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from grains_tl.batches import by_token_budget, image_inputs, pad_rows
from grains_tl.masking import Masker, Selection
from grains_tl.models import existing_layers, hooked, require_layers, resid_post, run_blocks
from grains_tl.replacements import ImageMasker, Replacements, hide, replacements
from grains_tl.scoring import MAX_TOKENS
from grains_tl.tokens import Records, TokenizedPair, as_tokenized
from grains_tl.types import FwdHooks, HookedModel

#: Where the residual is read: at the prompt's last token (the paper), at the response's last token, or as the mean over
#: the response; the last two are averaged over the two responses.
Readout = Literal["prompt_end", "response_end", "response_mean"]


@dataclass(frozen=True)
class Differences:
    """What masking changed in the residual stream, record by record.

    Attributes:
        toward_chosen: ``[record, layer, d_model]``, d+ = h(x) - h(x without I+).
        toward_rejected: ``[record, layer, d_model]``, d- = h(x) - h(x without I-).
        layers: the layer of each row of the second axis.
        resid_norms: ``[layer]`` median residual norm over the prompts' content tokens, the unit of ``alpha``.

    Example:
        >>> d = Differences(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), (12,), torch.tensor([140.0]))
        >>> (d.toward_chosen - d.toward_rejected).mean(0).shape
        torch.Size([1, 3])
    """

    toward_chosen: Float[Tensor, "record layer d_model"]
    toward_rejected: Float[Tensor, "record layer d_model"]
    layers: tuple[int, ...]
    resid_norms: Float[Tensor, "layer"]

    def subset(self, records: Sequence[int]) -> Differences:
        """The same for some records (repeats allowed: a bootstrap sample)."""
        index = list(records)
        return Differences(self.toward_chosen[index], self.toward_rejected[index], self.layers, self.resid_norms)

    def at(self, layers: Sequence[int]) -> Differences:
        """The same for some of the layers."""
        rows = [self.layers.index(layer) for layer in layers]
        return Differences(
            self.toward_chosen[:, rows], self.toward_rejected[:, rows], tuple(layers), self.resid_norms[rows]
        )


def cache_hook(
    layers: Sequence[int], weights: Float[Tensor, "batch pos"], store: Float[Tensor, "batch layer d_model"]
) -> FwdHooks:
    """Hooks that keep one weighted read-out of ``resid_post`` per row and layer, and nothing else.

    Args:
        layers: which layers.
        weights: ``[batch, pos]``; one-hot to read one position, 1/n over n positions for their mean.
        store: ``[batch, layer, d_model]``, filled by the run.

    Returns:
        ``[(name, fn)]``, one per layer.

    Raises:
        ValueError: during the run, weights that do not fit the activations.

    Example:
        >>> store = torch.zeros(1, 2, 576)                                             # doctest: +SKIP
        >>> model.run_with_hooks(ids, fwd_hooks=cache_hook([5, 6], weights, store))    # doctest: +SKIP
    """

    def keep(row: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            if weights.shape != act.shape[:2]:
                raise ValueError(f"weights {tuple(weights.shape)} do not fit activations {tuple(act.shape)}")
            # weights keep their precision: 1/n is no half-precision number, and differences of means are small
            store[:, row] = (weights.to(act.device)[..., None] * act.detach()).sum(1).to(store)

        return hook_fn

    return [(resid_post(layer), keep(row)) for row, layer in enumerate(layers)]


def read_out(
    model: HookedModel,
    tokenized: Records,
    masked: Sequence[Sequence[int]] | None = None,
    *,
    layers: Sequence[int],
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    readout: Readout = "prompt_end",
    norms: list[Float[Tensor, "layer token"]] | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Float[Tensor, "record layer d_model"]:
    """Residuals of every record at the read-out position, with some of its prompt tokens taken out.

    Args:
        model, tokenized: the model and the records, tokenized or not.
        masked: for every record the prompt positions to take out; ``None`` or empty for none.
        layers: which layers to keep; the result has them in this order.
        masker: how tokens are taken out.
        image_masker: what stands in for a patch (with the masker ``"attention"`` patches are knocked out too).
        readout: where to read.
        norms: a list that receives the residual norms of the content tokens, ``[layer, token]`` per batch.
        max_tokens: token budget of one pass.
        progress: show a bar.

    Returns:
        ``[record, layer, d_model]``, residual units.

    Raises:
        ValueError: layers that do not exist, an unknown read-out, not one list of positions per record, or a position
            outside its prompt.

    Example:
        >>> read_out(model, tokenized, layers=[12, 15]).shape     # doctest: +SKIP
        torch.Size([24, 2, 576])
    """
    tokenized = as_tokenized(model, tokenized)
    check_readout(readout)
    masked = [()] * len(tokenized) if masked is None else masked
    _require_places(tokenized, masked)
    owner, rows = zip(*((i, row) for i, t in enumerate(tokenized) for row in _rows(t, readout)), strict=True)
    needed = masker != "attention" and any(masked)
    stand_ins = replacements(model, tokenized, masker, image_masker) if needed else None
    found = _run_rows(
        model,
        rows,
        [masked[i] for i in owner],
        [tokenized[i] for i in owner],
        owner=owner,
        stand_ins=stand_ins,
        layers=existing_layers(model, layers),
        norms=norms,
        max_tokens=max_tokens,
        progress=progress,
    )
    share = 1.0 if readout == "prompt_end" else 0.5
    out = torch.zeros(len(tokenized), *found.shape[1:])
    return out.index_add(0, torch.tensor(owner), share * found)


def read_out_responses(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    *,
    layers: Sequence[int],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Float[Tensor, "record 2 layer d_model"]:
    """Residuals at the last token of prompt + chosen (0) and prompt + rejected (1), as CAA reads them."""
    rows = [row for t in tokenized for row in _rows(t, "response_end")]
    found = _run_rows(
        model,
        rows,
        [()] * len(rows),
        [t for t in tokenized for _ in range(2)],
        owner=range(len(rows)),
        stand_ins=None,
        layers=existing_layers(model, layers),
        norms=None,
        max_tokens=max_tokens,
        progress=progress,
    )
    return found.view(len(tokenized), 2, *found.shape[1:])


def _run_rows(
    model: HookedModel,
    rows: Sequence[tuple[tuple[int, ...], int]],
    masked: Sequence[Sequence[int]],
    records: Sequence[TokenizedPair],
    *,
    owner: Sequence[int],
    stand_ins: Replacements | None,
    layers: list[int],
    norms: list[Float[Tensor, "layer token"]] | None,
    max_tokens: int,
    progress: bool,
) -> Float[Tensor, "row layer d_model"]:
    """Read-out of each row (ids, first position read), with its masked positions taken out, in a few full batches.

    ``owner`` says which of ``stand_ins`` belongs to a row; without ``stand_ins`` masked tokens are knocked out of attention.
    """
    out = torch.zeros(len(rows), len(layers), int(model.cfg.d_model))
    with torch.no_grad(), tqdm(total=len(rows), desc="cache", unit="run", disable=not progress) as bar:
        for group in by_token_budget([len(ids) for ids, _ in rows], max_tokens):
            ids, mask, offset = pad_rows(model, [rows[g][0] for g in group])
            weights = torch.zeros(ids.shape)
            for place, g in enumerate(group):
                sequence, start = rows[g]
                weights[place, start : len(sequence)] = 1.0 / (len(sequence) - start)
            store = torch.zeros(len(group), *out.shape[1:])
            taken = [masked[g] for g in group]
            hooks = hide(model, stand_ins, [owner[g] for g in group], taken, offset=offset, like=ids)
            if norms is not None:
                hooks = hooks + _norm_hooks(layers, [records[g].content for g in group], norms)
            inputs = image_inputs(model, [records[g].images for g in group], ids, offset)
            with hooked(model, hooks + cache_hook(layers, weights, store)):
                run_blocks(model, ids, mask, max(layers) + 1, inputs)
            out[group] = store
            bar.update(len(group))
    return out


def collect_differences(
    model: HookedModel,
    tokenized: Records,
    selections: Sequence[Selection],
    *,
    layers: Sequence[int] | None = None,
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    readout: Readout = "prompt_end",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Differences:
    """The three activations of the paper (arXiv 2507.18043, section 3.2) for every record, as differences per layer.

    Three runs per record: whole, without the tokens toward chosen, without those toward rejected. A record without
    tokens on one side contributes zero there.

    Args:
        model, tokenized: the model and the records, tokenized or not.
        selections: which tokens to mask, one per record.
        layers: default all.
        masker, image_masker, readout, max_tokens, progress: as in ``read_out``.

    Returns:
        ``Differences``, both sides ``[record, layer, d_model]``, residual units.

    Raises:
        ValueError: as ``read_out``; also not one selection per record, or no content token in any prompt.

    Example:
        >>> found = collect_differences(model, tokenized, selections, layers=[12, 15])     # doctest: +SKIP
        >>> vectors = reduce_vectors(found)                                                # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    layers = require_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    if len(selections) != len(tokenized):
        raise ValueError(f"{len(selections)} selections for {len(tokenized)} records; give one per record")
    up, down, norms = collect_with_norms(
        model,
        tokenized,
        selections,
        layers=layers,
        masker=masker,
        image_masker=image_masker,
        readout=readout,
        max_tokens=max_tokens,
        progress=progress,
    )
    if not norms.shape[1]:
        raise ValueError("no prompt has a content token, so there is no residual norm to measure steps in")
    return Differences(up, down, tuple(layers), norms.median(dim=1).values)


def collect_with_norms(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    layers: Sequence[int],
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    readout: Readout = "prompt_end",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> tuple[Float[Tensor, "record layer d_model"], Float[Tensor, "record layer d_model"], Float[Tensor, "layer token"]]:
    """``collect_differences`` in parts that can be joined: d+, d-, and the residual norm of every content token."""
    norms: list[Tensor] = []
    common: dict[str, Any] = {
        "layers": layers,
        "masker": masker,
        "image_masker": image_masker,
        "readout": readout,
        "max_tokens": max_tokens,
    }
    whole = read_out(model, tokenized, norms=norms, progress=progress, **common)
    up = _masked_difference(model, tokenized, whole, [s.toward_chosen for s in selections], progress, common)
    down = _masked_difference(model, tokenized, whole, [s.toward_rejected for s in selections], progress, common)
    return up, down, torch.cat(norms, dim=1)


def _require_places(tokenized: Sequence[TokenizedPair], masked: Sequence[Sequence[int]]) -> None:
    """Refuse lists that are not those of the records: the wrong tokens would go, or none (ValueError)."""
    if len(masked) != len(tokenized):
        raise ValueError(f"{len(masked)} lists of masked positions for {len(tokenized)} records; give one per record")
    for number, (pair, positions) in enumerate(zip(tokenized, masked, strict=True), start=1):
        bad = [p for p in positions if not 0 <= p < len(pair.prompt)]
        if bad:
            raise ValueError(
                f"record {number}: masked positions {bad}; its prompt has positions 0 to {len(pair.prompt) - 1}"
            )


def check_readout(readout: str) -> None:
    """Refuse an unknown read-out position (ValueError)."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout={readout!r}; it is one of {get_args(Readout)}")


def _masked_difference(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    whole: Tensor,
    masked: Sequence[Sequence[int]],
    progress: bool,
    common: dict[str, Any],
) -> Tensor:
    difference = torch.zeros_like(whole)
    affected = [i for i, positions in enumerate(masked) if positions]
    if affected:
        records = [tokenized[i] for i in affected]
        without = read_out(model, records, [masked[i] for i in affected], progress=progress, **common)
        difference[affected] = whole[affected] - without
    return difference


def _rows(pair: TokenizedPair, readout: Readout) -> list[tuple[tuple[int, ...], int]]:
    """(ids, first position of the read-out); the read-out ends with the row."""
    if readout == "prompt_end":
        return [(pair.prompt, len(pair.prompt) - 1)]
    rows = [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
    if readout == "response_end":
        return [(row, len(row) - 1) for row in rows]
    return [(row, len(pair.prompt)) for row in rows]


def _norm_hooks(
    layers: Sequence[int], contents: Sequence[Sequence[bool]], norms: list[Float[Tensor, "layer token"]]
) -> FwdHooks:
    found: dict[int, Tensor] = {}

    def keep(place: int) -> Any:
        def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            content = torch.zeros(act.shape[:2], dtype=torch.bool, device=act.device)
            for row, flags in enumerate(contents):
                content[row, : len(flags)] = torch.tensor(flags, device=act.device)
            found[place] = act.detach()[content].float().norm(dim=-1).cpu()
            if len(found) == len(layers):
                norms.append(torch.stack([found[i] for i in range(len(layers))]))

        return hook_fn

    return [(resid_post(layer), keep(place)) for place, layer in enumerate(layers)]
