"""Which heads and MLPs carry a steering effect: attribution patching along the step, and what the best of them carry alone.

1. Run the records without steering and with it, and keep what every later head and MLP writes.
2. Take the gradient of the margin with respect to these at several points between the two runs, and average it.
3. Score each node: (steered - unsteered activation) . gradient, the integrated form of attribution patching.

``circuit_checks`` tests the ranking by exact freezing.

TransformerLens 4.3 has attribution patching between two prompts, with edges for models without grouped queries and without
the integrated form (``ig_steps > 1`` is not implemented there). This works by hooks on both of its major versions, for the
two runs of one prompt that a step makes. ``edges`` has the edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl._util.progress import progress_bar
from grains_tl._util.stats import mean_interval
from grains_tl.analysis.along_step import Points, both_runs, by_record, mean_gradients
from grains_tl.analysis.edges import Edge, edge_points, edge_scores, edges_between
from grains_tl.analysis.equal_kl import with_random_directions
from grains_tl.analysis.freezing import RANDOM, later_blocks
from grains_tl.analysis.holding import held, keep_values
from grains_tl.analysis.runs import batch_runner
from grains_tl.analysis.sites import act_name
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import hooks_for, score_batches
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import require_hook_names
from grains_tl.tokens.pairs import Records, TokenizedPair
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.steering import Steering

#: A head (part ``"head"``, layer, head) or an MLP (``"MLP"``, layer, -1).
Node = tuple[str, int, int]

#: How nodes are scored.
Scores = Literal["integrated", "gradient", "exact", "edges"]


@torch.inference_mode(False)
def steering_circuit(
    model: HookedModel,
    steering: Steering,
    pairs: Records,
    *,
    method: Scores = "integrated",
    n_steps: int = 5,
    n_random: int = 3,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    objective: Objective = "sum",
) -> pd.DataFrame:
    """The heads and MLPs after the steered layer that carry the change of the margin, strongest first.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: ``vectors.steering(alpha, layer)``.
        pairs: the records, tokenized or not.
        method: ``"integrated"``: change of the activation times the gradient of the margin, averaged over points between the
            unsteered and the steered run; ``"gradient"``: the gradient without steering alone; ``"exact"``: what the effect
            loses if the node alone is frozen (a run of the records per node); ``"edges"``: as ``"integrated"``, split by
            what reads the change: the input of one later attention layer or MLP, or of the logits.
        n_steps: points of ``"integrated"`` and ``"edges"``, a forward and a backward pass each.
        n_random: random directions of equal KL, whose circuits stand in the same table; 0 for none.
        texts: neutral texts to match the KL on; default the first 12 bundled ones.
        seed: of the random directions.
        objective: how response tokens are combined.

    Returns:
        One row per vector (``"steering"``, ``"random direction 1"``, ...) and node, by falling absolute score: ``vector``,
        ``rank`` (from 1), ``part`` (``"head"`` or ``"MLP"``), ``layer``, ``head`` (-1 for an MLP), ``score`` (nats, mean
        over records: what the node's change adds to the effect), ``low``, ``high`` (95 % over records), ``share`` of the
        whole ``effect``, ``kl`` (nats per token), ``n``. Scores do not add up to the effect: later nodes pass on
        what earlier ones changed. Of edges also ``to`` (``"attention"``, ``"MLP"`` or ``"logits"``) and ``to_layer`` (-1 for
        the logits), with ``"step"`` among the parts; the edges out of a node add up to its score, those out of the step to
        the effect, as ``n_steps`` grows.

    Raises:
        ValueError: steering at the last layer, no records, an unknown option; of edges: steering at several layers, models
            that do not add what heads and MLPs write to the residual stream as it is.
        KeyError: a model without the hook points.

    Examples:
        >>> nodes = steering_circuit(model, vectors.steering(0.1, 18), pairs)                       # doctest: +SKIP
        >>> nodes[nodes.vector == "steering"].head(5)[["part", "layer", "head", "score", "share"]]  # doctest: +SKIP
    """
    n_steps, n_random = whole("n_steps", n_steps, 1), whole("n_random", n_random, 0)
    if method not in get_args(Scores):
        raise OptionError(f"method={method!r}; expected one of {', '.join(get_args(Scores))}")
    tokenized, nodes, points = prepared(model, steering, pairs, objective)
    edges = _edges(steering, nodes) if method == "edges" else []
    points = edge_points(model, nodes) if edges else points
    steps, spent = with_random_directions(model, steering, n_random, texts, seed)
    scores = torch.zeros(len(steps), len(edges or nodes), len(tokenized))
    total = torch.zeros(len(steps), len(tokenized))
    with progress_bar(total=len(steps) * len(tokenized), desc="circuit", unit="record") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            for i, step in enumerate(steps):
                hooks = hooks_for(step, batch)
                places = [(i + 0.5) / n_steps for i in range(n_steps)] if method != "gradient" else [0.0]
                if method == "exact":
                    found, effect = _frozen_scores(model, batch, hooks, nodes, points)
                elif edges:
                    found, effect = edge_scores(model, batch, hooks, edges, points, places)
                else:
                    found, effect = _gradient_scores(model, batch, hooks, nodes, points, places)
                scores[i][:, group], total[i, group] = found, effect
                bar.update(len(group))
    names = ["steering", *(f"{RANDOM} {i}" for i in range(1, len(steps)))]
    values = zip(names, scores.double().numpy(), total.double().numpy(), spent, strict=True)
    labels = [_labels(*edge) for edge in edges] if edges else [_labels(node) for node in nodes]
    return pd.concat([_ranked(name, labels, own, effect, kl) for name, own, effect, kl in values], ignore_index=True)


# -- what is scored ---------------------------------------------------------------------------------------------------
def _edges(steering: Steering, nodes: Sequence[Node]) -> list[Edge]:
    if len(steering.layers) > 1:
        raise OptionError(f"edges of a step at the layers {list(steering.layers)}; expected a step at one layer")
    return edges_between(nodes, steering.layers[0])


def prepared(
    model: HookedModel, steering: Steering, pairs: Records, objective: Objective
) -> tuple[Sequence[TokenizedPair], list[Node], Points]:
    """The records, the nodes after the steered layer and their hook points, with everything checked."""
    nothing_after = "no head or MLP comes after it"
    tokenized, after = later_blocks("steering_circuit", model, steering, pairs, objective, nothing_after)
    points: dict[tuple[str, int], list[str]] = {}
    nodes: list[Node] = []
    for layer in after:
        points["head", layer], points["MLP", layer] = [act_name("z", layer)], [act_name("mlp_out", layer)]
        nodes += [*(("head", layer, head) for head in range(int(model.cfg.n_heads))), ("MLP", layer, -1)]
    require_hook_names(model, [(name, id) for own in points.values() for name in own])
    return tokenized, nodes, points


def _gradient_scores(
    model: HookedModel, batch: Batch, steering: FwdHooks, nodes: Sequence[Node], points: Points, places: Sequence[float]
) -> tuple[Float[Tensor, "node record"], Float[Tensor, "record"]]:
    """Change of each node's activation times the mean gradient at some places between the runs, and the whole effect."""
    kept, steered, effect = both_runs(model, batch, steering, points)
    mean = mean_gradients(model, batch, steering, points, places, act_name("resid_pre", nodes[0][1]))
    columns = {}
    for (part, layer), (name,) in points.items():
        product = ((steered[name] - kept[name]).float() * mean[name]).sum(-1)
        columns[part, layer] = product.sum(1) if part == "head" else product.sum(1, keepdim=True)  # [row, head or 1]
    rows = torch.stack([columns[part, layer][:, max(head, 0)] for part, layer, head in nodes])
    return by_record(rows, batch), effect.cpu()


def _frozen_scores(
    model: HookedModel, batch: Batch, steering: FwdHooks, nodes: Sequence[Node], points: Points
) -> tuple[Float[Tensor, "node record"], Float[Tensor, "record"]]:
    """What the effect loses if each node alone is frozen, and the whole effect."""
    run = batch_runner(model, batch, [name for name, _ in steering])
    kept: dict[str, Tensor] = {}
    base = run(keep_values(points, kept))
    whole_run = run(steering)
    lost = [whole_run - run([*steering, *held(frozenset([node]), points, kept)]) for node in nodes]
    return torch.stack(lost).cpu(), (whole_run - base).cpu()


# -- tables -----------------------------------------------------------------------------------------------------------
def _labels(node: Node, reader: tuple[str, int] | None = None) -> dict[str, Any]:
    own: dict[str, Any] = dict(zip(("part", "layer", "head"), node, strict=True))
    return own if reader is None else {**own, "to": reader[0], "to_layer": reader[1]}


def _ranked(
    name: str, labels: Sequence[dict[str, Any]], scores: NDArray[np.float64], effect: NDArray[np.float64], kl: float
) -> pd.DataFrame:
    total = float(effect.mean())
    rows: list[dict[str, Any]] = []
    for label, own in zip(labels, scores, strict=True):
        score, _, low, high = mean_interval(own)
        share = score / total if total else np.nan
        numbers = {"score": score, "low": low, "high": high, "share": share, "effect": total}
        rows.append({"vector": name, **label, **numbers, "kl": float(kl), "n": len(own)})
    table = pd.DataFrame(rows).sort_values("score", key=np.abs, ascending=False, kind="stable", ignore_index=True)
    table.insert(1, "rank", range(1, len(table) + 1))
    return table
