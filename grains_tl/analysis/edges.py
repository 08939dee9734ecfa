"""Edges of a steering circuit: what the change of one node does through the input of one later part.

The residual stream is a sum, so a part that reads it sees the step and the changes of all earlier heads and MLPs added up.
The gradient that arrives through one part alone is that of the stream before the part less that after it. Times the change
that one node writes, it is the score of the edge. The edges out of a node add up to the node's own score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.analysis.along_step import Points, both_runs, by_record, mean_gradients
from grains_tl.analysis.sites import act_name
from grains_tl.inference.batches import Batch
from grains_tl.models.running import require_hook_names
from grains_tl.types import FwdHooks, HookedModel

#: Who writes (part, layer, head) and who reads (part, layer); the logits have layer -1.
Edge = tuple[tuple[str, int, int], tuple[str, int]]


def edges_between(nodes: Sequence[tuple[str, int, int]], steered: int) -> list[Edge]:
    """All edges from the step and the nodes to the attention and MLP inputs after them, and to the logits.

    Examples:
        >>> [edge for edge in edges_between([("head", 5, 0), ("MLP", 5, -1)], 4) if edge[0][0] == "head"]
        [(('head', 5, 0), ('MLP', 5)), (('head', 5, 0), ('logits', -1))]
    """
    layers = list(dict.fromkeys(layer for _, layer, _ in nodes))
    readers = [*((part, layer) for layer in layers for part in ("attention", "MLP")), ("logits", -1)]
    writers = [("step", steered, -1), *nodes]
    return [(writer, reader) for writer in writers for reader in readers if _before(writer, reader)]


def _before(writer: tuple[str, int, int], reader: tuple[str, int]) -> bool:
    part, layer, _ = writer
    return reader[0] == "logits" or layer < reader[1] or (part == "head" and reader == ("MLP", layer))


def edge_points(model: HookedModel, nodes: Sequence[tuple[str, int, int]]) -> Points:
    """Hook points that edges need; ValueError for blocks whose attention and MLP read the same stream side by side."""
    if getattr(model.cfg, "parallel_attn_mlp", False):
        raise ValueError(
            "attention and MLP of this model read the same residual stream side by side; use method='integrated'"
        )
    layers = list(dict.fromkeys(layer for _, layer, _ in nodes))
    points: dict[tuple[str, int], list[str]] = {("start", layers[0]): [act_name("resid_pre", layers[0])]}
    for layer in layers:
        points["head", layer] = [act_name("z", layer)]
        points["attention", layer] = [act_name("attn_out", layer)]
        points["MLP", layer] = [act_name("mlp_out", layer)]
    points["end", layers[-1]] = [act_name("resid_post", layers[-1])]
    require_hook_names(model, [(name, id) for own in points.values() for name in own])
    return points


def edge_scores(
    model: HookedModel, batch: Batch, steering: FwdHooks, edges: Sequence[Edge], points: Points, places: Sequence[float]
) -> tuple[Float[Tensor, "edge record"], Float[Tensor, "record"]]:
    """Change that each writer makes times the mean gradient through each reader's input, and the whole effect, nats."""
    kept, steered, effect = both_runs(model, batch, steering, points)
    change = {site: (steered[name] - kept[name]).float() for site, (name,) in points.items()}
    whole_precision = all(act.dtype in (torch.float32, torch.float64) for act in kept.values())
    written = _written(model, change, 0.01 if whole_precision else 0.3)
    needed = {site: own for site, own in points.items() if site[0] not in ("head", "end")}
    start = next(own[0] for (part, _), own in points.items() if part == "start")
    through = _through(needed, mean_gradients(model, batch, steering, needed, places, start))
    rows = torch.stack([(written[writer] * through[reader]).sum((1, 2)) for writer, reader in edges])
    return by_record(rows, batch), effect.cpu()


def _written(
    model: HookedModel, change: Mapping[tuple[str, int], Tensor], most: float
) -> dict[tuple[str, int, int], Tensor]:
    """What the step, each head and each MLP add to the change of the residual stream, ``[row, pos, d_model]``."""
    blocks: Any = model.blocks
    found: dict[tuple[str, int, int], Tensor] = {}
    sites = {part: [layer for p, layer in change if p == part] for part in ("start", "MLP", "end")}
    found["step", sites["start"][0] - 1, -1] = total = change["start", sites["start"][0]]
    for layer in sites["MLP"]:
        matrix = blocks[layer].attn.W_O.detach().float()  # [head, d_head, d_model]
        heads = [change["head", layer][:, :, head] @ own for head, own in enumerate(matrix.to(total.device))]
        _require_sum(
            sum(heads), change["attention", layer], most, f"the attention output of block {layer}", "its heads"
        )
        found |= {("head", layer, head): own for head, own in enumerate(heads)}
        found["MLP", layer, -1] = change["MLP", layer]
        total = total + change["attention", layer] + change["MLP", layer]
    _require_sum(total, change["end", sites["end"][0]], most, "the residual stream", "attention and MLP outputs")
    return found


def _require_sum(total: Any, wanted: Tensor, most: float, what: str, of: str) -> None:
    """ValueError unless a change is the sum of its parts at most positions; at a few with huge activations it is rounded."""
    length = wanted.norm(dim=-1)
    changed = length > 1e-3 * length.amax()
    if not bool(changed.any()):
        return
    error = float(((total - wanted).norm(dim=-1)[changed] / length[changed]).median())
    if error > most:
        raise ValueError(
            f"the change of {what} is not the sum of what {of} write ({error:.0%} of it is not), as with norms after "
            "attention or MLP; use method='integrated'"
        )


def _through(points: Points, gradients: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """Gradient through each reader's input alone: that of the stream before the part less that after it."""
    at = {site: gradients[name] for site, (name,) in points.items()}
    layers = [layer for part, layer in points if part == "MLP"]
    before, found = at["start", layers[0]], {}
    for layer in layers:
        found["attention", layer] = before - at["attention", layer]
        found["MLP", layer] = at["attention", layer] - at["MLP", layer]
        before = at["MLP", layer]
    return {**found, ("logits", -1): before}
