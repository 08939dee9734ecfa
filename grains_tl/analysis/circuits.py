"""Which heads and MLPs carry a steering effect: attribution patching along the step, and what the best of them carry alone.

1. Run the records without steering and with it, and keep what every later head and MLP writes.
2. Take the gradient of the margin with respect to these at several points between the two runs, and average it.
3. Score each node: (steered - unsteered activation) . gradient, the integrated form of attribution patching.

``circuit_checks`` tests the ranking by exact freezing.

TransformerLens 4.3 has attribution patching between two prompts, with edges for models without grouped queries and without
the integrated form (``ig_steps > 1`` is not implemented there). A step between two runs of one prompt needs neither, so this
works by hooks on both of its major versions; edges are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from grains_tl.analysis.equal_kl import with_random_directions
from grains_tl.analysis.freezing import RANDOM, later_blocks
from grains_tl.analysis.holding import held, keep_values
from grains_tl.analysis.patching import as_leaf
from grains_tl.analysis.runs import batch_runner
from grains_tl.analysis.sites import act_name
from grains_tl.inference.batches import Batch
from grains_tl.inference.logprobs import batch_logprobs, hooks_for, score_batches
from grains_tl.inference.objectives import Objective, margins
from grains_tl.models.running import require_hook_names
from grains_tl.models.state import autograd
from grains_tl.tokens.pairs import Records, TokenizedPair
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.steering import Steering

#: A head (part ``"head"``, layer, head) or an MLP (``"MLP"``, layer, -1).
Node = tuple[str, int, int]

#: How nodes are scored.
Scores = Literal["integrated", "gradient", "exact"]

#: Hook points by part and layer.
Points = Mapping[tuple[str, int], list[str]]


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
            loses if the node alone is frozen (a run of the records per node).
        n_steps: points of ``"integrated"``, a forward and a backward pass each.
        n_random: random directions of equal KL, whose circuits stand in the same table; 0 for none.
        texts: neutral texts to match the KL on; default the first 12 bundled ones.
        seed: of the random directions.
        objective: how response tokens are combined.

    Returns:
        One row per vector (``"steering"``, ``"random direction 1"``, ...) and node, by falling absolute score: ``vector``,
        ``rank`` (from 1), ``part`` (``"head"`` or ``"MLP"``), ``layer``, ``head`` (-1 for an MLP), ``score`` (nats, mean
        over records: what the node's change adds to the effect), ``low``, ``high`` (95 % over records), ``share`` of the
        whole ``effect``, ``kl`` (nats per token), ``n``. Scores do not add up to the effect: later nodes pass on
        what earlier ones changed.

    Raises:
        ValueError: steering at the last layer, no records, an unknown option.
        KeyError: a model without the hook points.

    Examples:
        >>> nodes = steering_circuit(model, vectors.steering(0.1, 18), pairs)                       # doctest: +SKIP
        >>> nodes[nodes.vector == "steering"].head(5)[["part", "layer", "head", "score", "share"]]  # doctest: +SKIP
    """
    if method not in get_args(Scores):
        raise OptionError(f"method={method!r}; expected one of {', '.join(get_args(Scores))}")
    n_steps, n_random = whole("n_steps", n_steps, 1), whole("n_random", n_random, 0)
    tokenized, nodes, points = prepared(model, steering, pairs, objective)
    steps, spent = with_random_directions(model, steering, n_random, texts, seed)
    scores = torch.zeros(len(steps), len(nodes), len(tokenized))
    total = torch.zeros(len(steps), len(tokenized))
    with progress_bar(total=len(steps) * len(tokenized), desc="circuit", unit="record") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            for i, step in enumerate(steps):
                hooks = hooks_for(step, batch)
                if method == "exact":
                    found, effect = _frozen_scores(model, batch, hooks, nodes, points)
                else:
                    places = [(i + 0.5) / n_steps for i in range(n_steps)] if method == "integrated" else [0.0]
                    found, effect = _gradient_scores(model, batch, hooks, nodes, points, places)
                scores[i][:, group], total[i, group] = found, effect
                bar.update(len(group))
    names = ["steering", *(f"{RANDOM} {i}" for i in range(1, len(steps)))]
    values = zip(names, scores.double().numpy(), total.double().numpy(), spent, strict=True)
    return pd.concat([_ranked(name, nodes, own, effect, kl) for name, own, effect, kl in values], ignore_index=True)


# -- scores -----------------------------------------------------------------------------------------------------------
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
    kept: dict[str, Tensor] = {}
    steered: dict[str, Tensor] = {}
    with torch.no_grad():
        base = margins(batch_logprobs(model, batch, keep_values(points, kept)))
        effect = margins(batch_logprobs(model, batch, [*steering, *keep_values(points, steered)])) - base
    names = list(kept)
    mean = {name: torch.zeros_like(kept[name], dtype=torch.float32) for name in names}
    leaf = [(act_name("resid_pre", nodes[0][1]), as_leaf)]
    for place in places:
        live: dict[str, Tensor] = {}
        with autograd(model):
            hooks = [*_part_of(steering, place), *leaf, *_keep_live(points, live)]
            found = margins(batch_logprobs(model, batch, hooks))
            gradients = torch.autograd.grad(found.sum(), [live[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            mean[name] += gradient.float() / len(places)
    columns = {}
    for (part, layer), (name,) in points.items():
        product = ((steered[name] - kept[name]).float() * mean[name]).sum(-1)
        columns[part, layer] = product.sum(1) if part == "head" else product.sum(1, keepdim=True)  # [row, head or 1]
    rows = torch.stack([columns[part, layer][:, max(head, 0)] for part, layer, head in nodes])
    zeros = torch.zeros(len(nodes), batch.n_records, device=rows.device)
    return zeros.index_add(1, batch.record.to(rows.device), rows).cpu(), effect.cpu()


def _part_of(steering: FwdHooks, share: float) -> FwdHooks:
    """The same step, a share of the way: of any operator."""

    def part(fn: Any) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            return act + share * (fn(act, hook=hook) - act)

        return hook_fn

    return [(name, part(fn)) for name, fn in steering]


def _keep_live(points: Points, store: dict[str, Tensor]) -> FwdHooks:
    """Hooks that keep activations with their graph."""

    def keep(name: str) -> Any:
        def hook_fn(act: Tensor, hook: Any) -> Tensor:
            store[name] = act
            return act  # a bridge may hand over a reshaped view: returning it keeps it on the path of the gradient

        return hook_fn

    return [(name, keep(name)) for own in points.values() for name in own]


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
def _ranked(
    name: str, nodes: Sequence[Node], scores: NDArray[np.float64], effect: NDArray[np.float64], kl: float
) -> pd.DataFrame:
    total = float(effect.mean())
    rows: list[dict[str, Any]] = []
    for (part, layer, head), own in zip(nodes, scores, strict=True):
        score, _, low, high = mean_interval(own)
        where = {"vector": name, "part": part, "layer": layer, "head": head}
        share = score / total if total else np.nan
        numbers = {"score": score, "low": low, "high": high, "share": share, "effect": total}
        rows.append({**where, **numbers, "kl": float(kl), "n": len(own)})
    table = pd.DataFrame(rows).sort_values("score", key=np.abs, ascending=False, kind="stable", ignore_index=True)
    table.insert(1, "rank", range(1, len(table) + 1))
    return table
