"""What masking the selected tokens changes in the residual stream, record by record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.processes import ALONE, Processes
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.sites import Site
from grains_tl.models.running import require_layers
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.readout import Readout, read_out

#: Records whose activations are held at a time where only their mean is wanted.
CHUNK = 1024


@dataclass(frozen=True)
class Differences:
    """What masking changed in the residual stream, record by record.

    Attributes:
        toward_chosen: ``[record, layer, d_model]``, d+ = h(x) - h(x without I+).
        toward_rejected: ``[record, layer, d_model]``, d- = h(x) - h(x without I-).
        layers: the layer of each row of the second axis.
        resid_norms: ``[layer]`` median residual norm over the prompts' content tokens, the unit of ``alpha``.
        site: which activation of each block was read.

    Examples:
        >>> d = Differences(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), (12,), torch.tensor([140.0]))
        >>> (d.toward_chosen - d.toward_rejected).mean(0).shape
        torch.Size([1, 3])
    """

    toward_chosen: Float[Tensor, "record layer d_model"]
    toward_rejected: Float[Tensor, "record layer d_model"]
    layers: tuple[int, ...]
    resid_norms: Float[Tensor, "layer"]
    site: Site = "resid_post"

    def subset(self, records: Sequence[int]) -> Differences:
        """The same for some records (repeats allowed: a bootstrap sample)."""
        index = list(records)
        return replace(self, toward_chosen=self.toward_chosen[index], toward_rejected=self.toward_rejected[index])

    def at(self, layers: Sequence[int]) -> Differences:
        """The same for some of the layers."""
        rows = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            toward_chosen=self.toward_chosen[:, rows],
            toward_rejected=self.toward_rejected[:, rows],
            layers=tuple(layers),
            resid_norms=self.resid_norms[rows],
        )


def collect_differences(
    model: HookedModel,
    tokenized: Records,
    selections: Sequence[Selection],
    *,
    layers: Sequence[int] | None = None,
    mask: Mask | Masker = "mean_embedding",
    readout: Readout = "prompt_end",
) -> Differences:
    """The three activations of the paper (arXiv 2507.18043, section 3.2) for every record, as differences per layer.

    Three runs per record: whole, without the tokens toward chosen, without those toward rejected. A record without
    tokens on one side contributes zero there.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        selections: which tokens to mask, one per record.
        layers: default all.
        mask: as in ``read_out``.
        readout: as in ``read_out``.

    Returns:
        ``Differences``, both sides ``[record, layer, d_model]``, residual units.

    Raises:
        ValueError: as ``read_out``; also not one selection per record, or no content token in any prompt.

    Examples:
        >>> found = collect_differences(model, tokenized, selections, layers=[12, 15])     # doctest: +SKIP
        >>> vectors = reduce_vectors(found)                                                # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    layers = require_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    if len(selections) != len(tokenized):
        raise ValueError(f"{len(selections)} selections for {len(tokenized)} records; give one per record")
    up, down, norms = collect_with_norms(model, tokenized, selections, layers=layers, mask=mask, readout=readout)
    if not norms.shape[1]:
        raise ValueError("no prompt has a content token, so there is no residual norm to measure steps in")
    return Differences(up, down, tuple(layers), norms.median(dim=1).values)


def collect_with_norms(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    layers: Sequence[int],
    mask: Mask | Masker = "mean_embedding",
    readout: Readout = "prompt_end",
    site: Site = "resid_post",
) -> tuple[Float[Tensor, "record layer d_model"], Float[Tensor, "record layer d_model"], Float[Tensor, "layer token"]]:
    """``collect_differences`` in parts that can be joined: d+, d-, and the residual norm of every content token."""
    norms: list[Tensor] = []
    common: dict[str, Any] = {
        "layers": layers,
        "mask": mask,
        "readout": readout,
        "site": site,
    }
    ups, downs = [s.toward_chosen for s in selections], [s.toward_rejected for s in selections]
    at_tokens = readout == "attributed"
    whole = read_out(model, tokenized, norms=norms, **common, places=ups if at_tokens else None)
    up = _masked_difference(model, tokenized, whole, ups, common)
    if at_tokens:  # the other side is read at other tokens
        whole = read_out(model, tokenized, **common, places=downs)
    return up, _masked_difference(model, tokenized, whole, downs, common), torch.cat(norms, dim=1)


def _masked_difference(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    whole: Tensor,
    masked: Sequence[Sequence[int]],
    common: dict[str, Any],
) -> Tensor:
    difference = torch.zeros_like(whole)
    affected = [i for i, positions in enumerate(masked) if positions]
    if affected:
        records, gone = [tokenized[i] for i in affected], [masked[i] for i in affected]
        places = gone if common["readout"] == "attributed" else None
        difference[affected] = whole[affected] - read_out(model, records, gone, **common, places=places)
    return difference


def shared_differences(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    processes: Processes = ALONE,
    mean_only: bool = False,
    **options: Any,
) -> Differences:
    """``collect_differences`` of all records, each process doing its share; the same result in every process.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: all records.
        selections: the tokens to mask in each record.
        processes: this process and how many there are.
        mean_only: hold and hand over sums instead of records. The result then has one row per chunk of records, weighted
            so that the mean over its rows is the mean over the records: enough for ``reduce="mean"``, and a build of any
            number of records needs the memory of ``CHUNK`` of them.
        options: layers, mask, readout of ``collect_differences``, and the site that is read.

    Raises:
        ValueError: fewer records than processes.
    """
    n = len(tokenized)
    if n < processes.world:
        raise ValueError(f"{n} records for {processes.world} processes; start at most {n}")
    ups, downs, norms = [], [], []
    for part in _chunks(processes.share(n), CHUNK if mean_only else n):
        up, down, norm = collect_with_norms(
            model, [tokenized[i] for i in part], [selections[i] for i in part], **options
        )
        ups.append(up.sum(0, keepdim=True) if mean_only else up)
        downs.append(down.sum(0, keepdim=True) if mean_only else down)
        norms.append(norm)
    if mean_only:
        rows = processes.gather([(u, d) for u, d in zip(ups, downs, strict=True)])
        up, down = (torch.cat(side) * (len(rows) / n) for side in zip(*rows, strict=True))
    else:
        pairs = processes.gather_shares(list(zip(ups[0].unbind(0), downs[0].unbind(0), strict=True)))
        up, down = (torch.stack(side) for side in zip(*pairs, strict=True))
    all_norms = torch.cat(processes.gather([torch.cat(norms, dim=1)]), dim=1)
    layers = options.get("layers") or range(model.cfg.n_layers)
    norms_of = all_norms.median(dim=1).values
    return Differences(up, down, tuple(require_layers(model, layers)), norms_of, options.get("site", "resid_post"))


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def weighted_differences(
    differences: Differences, selections: Sequence[Selection], attributions: Sequence[Attribution]
) -> Differences:
    """Each record's d+ and d- times the summed scores of its masked tokens, relative to the mean over the records.

    Args:
        differences: one row per record.
        selections: the tokens that were masked.
        attributions: their scores.
    """
    sides = []
    for side in ("toward_chosen", "toward_rejected"):
        sizes = [
            float(a.scores[list(getattr(s, side))].sum().abs()) for a, s in zip(attributions, selections, strict=True)
        ]
        weight = torch.tensor(sizes, dtype=torch.float32)
        weight = weight / weight.mean() if bool(weight.any()) else torch.ones_like(weight)
        sides.append(getattr(differences, side) * weight[:, None, None])
    return replace(differences, toward_chosen=sides[0], toward_rejected=sides[1])
