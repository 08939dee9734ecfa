"""Is a steering circuit one: what its first nodes carry alone, what is left without them, and what circuits share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl._util.progress import progress_bar
from grains_tl._util.stats import mean_interval, rank_correlation
from grains_tl.analysis.circuits import Node, prepared
from grains_tl.analysis.freezing import RANDOM
from grains_tl.analysis.holding import Frozen, held, keep_values
from grains_tl.analysis.runs import batch_runner
from grains_tl.inference.logprobs import hooks_for, score_batches
from grains_tl.inference.objectives import Objective
from grains_tl.models.running import resid_post
from grains_tl.tokens.pairs import Records
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering


@torch.inference_mode(False)
def circuit_faithfulness(
    model: HookedModel,
    steering: Steering,
    pairs: Records,
    nodes: pd.DataFrame,
    *,
    sizes: Sequence[int] | None = None,
    n_random: int = 3,
    seed: int = 0,
    objective: Objective = "sum",
) -> pd.DataFrame:
    """How much of a steering effect the first k nodes of a ranking carry: alone, and how much is left without them.

    Freezing is exact. Nodes that are frozen write what they write without steering; the step itself and the final norm stay,
    so that no node at all leaves the direct path. Beside the ranking stand as many nodes drawn at random.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: as in ``steering_circuit``.
        pairs: the records, tokenized or not; better others than those the nodes were ranked on.
        nodes: from ``steering_circuit``; of a table of several vectors the rows of ``"steering"``.
        sizes: numbers of nodes; default 0, 1, 2, 3, 5, 8, 13, ... and all.
        n_random: random orders of the nodes; 0 for none.
        seed: of these.
        objective: how response tokens are combined.

    Returns:
        One row per ``order`` (``"circuit"``, ``"random nodes"``) and ``size``: ``kept`` (effect with all other nodes frozen,
        nats, mean over records), ``kept_low``, ``kept_high`` (95 % over records; of random nodes over orders),
        ``kept_share`` of the whole effect, ``left`` (effect with these nodes frozen), ``left_low``, ``left_high``,
        ``left_share``, ``total``, ``n``.

    Raises:
        ValueError: a table that does not rank this model's nodes after the steered layer, sizes that do not exist.

    Examples:
        >>> curve = circuit_faithfulness(model, steering, others, nodes)        # doctest: +SKIP
        >>> gr.plotting.plot_circuit(nodes, curve)                              # doctest: +SKIP
    """
    n_random = whole("n_random", n_random, 0)
    tokenized, known, points = prepared(model, steering, pairs, objective)
    ranked = _ranking(nodes, known)
    numbers = _sizes(sizes, len(ranked))
    rng = np.random.default_rng(seed)
    orders = [ranked, *([ranked[i] for i in rng.permutation(len(ranked))] for _ in range(n_random))]
    everything = frozenset(ranked)
    plan: list[Frozen] = []  # per order and size: all but the first k, then these alone
    for order in orders:
        for size in numbers:
            first = frozenset(order[:size])
            plan += [everything - first, first]
    wanted = list(dict.fromkeys([frozenset(), *plan]))
    effects = torch.zeros(len(wanted), len(tokenized))
    with progress_bar(total=effects.numel(), desc="faithfulness", unit="run") as bar:
        for group, batch in score_batches(model, tokenized, objective):
            run = batch_runner(model, batch, [resid_post(min(steering.layers))])
            kept: dict[str, Tensor] = {}
            base, own = run(keep_values(points, kept)), hooks_for(steering, batch)
            for i, frozen in enumerate(wanted):
                effects[i, group] = (run(own + held(frozen, points, kept)) - base).cpu()
                bar.update(len(group))
    by_set = dict(zip(wanted, effects.double().numpy(), strict=True))
    total = by_set[frozenset()]
    values = np.array([by_set[frozen] for frozen in plan]).reshape(len(orders), len(numbers), 2, len(tokenized))
    rows = _curve("circuit", numbers, values[0], total)
    return pd.DataFrame(
        rows + (_curve("random nodes", numbers, values[1:].mean(-1).transpose(1, 2, 0), total) if n_random else [])
    )


def circuit_overlap(circuits: Mapping[str, pd.DataFrame], *, n_top: int = 10) -> pd.DataFrame:
    """How much the circuits of several vectors share, and those of random directions.

    Args:
        circuits: tables of ``steering_circuit`` by name, of the same model and layer, all of nodes or all of edges. Their
            random directions are pooled.
        n_top: how many of the strongest nodes or edges make a circuit.

    Returns:
        One row per pair of names ``a``, ``b`` (``"random direction"`` among them, mean over draws and pairs of draws):
        ``jaccard`` (nodes in both over nodes in either, of the first ``n_top``), ``chance`` (its mean for circuits drawn at
        random), ``correlation`` (Spearman's, of the scores), ``size_correlation`` (of their absolute values), ``n_pairs``.

    Raises:
        ValueError: tables of different nodes, fewer than one node, no table.

    Examples:
        >>> circuit_overlap({"grains": nodes, "caa": other}, n_top=10)             # doctest: +SKIP
    """
    n_top = whole("n_top", n_top, 1)
    scores: dict[str, list[pd.Series]] = {}
    for name, table in circuits.items():
        for vector, own in _checked(table).groupby("vector", sort=False):
            place = [name for name in ("part", "layer", "head", "to", "to_layer") if name in own.columns]
            column = own.set_index(place)["score"]
            scores.setdefault(str(name) if vector == "steering" else RANDOM, []).append(column)
    if not scores:
        raise ValueError("no circuits; expected tables of steering_circuit by name")
    first = next(iter(scores.values()))[0]
    if any(set(s.index) != set(first.index) for several in scores.values() for s in several):
        raise ValueError("the circuits have different nodes; expected those of one model and one steered layer")
    rows = []
    for a, b in itertools.combinations_with_replacement(scores, 2):
        same = list(itertools.combinations(scores[a], 2)) if a == b else list(itertools.product(scores[a], scores[b]))
        if same:
            found = np.array([_overlap(x, y.reindex(x.index), n_top) for x, y in same]).mean(0)
            columns = ("jaccard", "correlation", "size_correlation")
            numbers = dict(zip(columns, found.tolist(), strict=True))
            rows.append({"a": a, "b": b, **numbers, "chance": _chance(len(first), n_top), "n_pairs": len(same)})
    return pd.DataFrame(rows)


# -- rankings and rows ------------------------------------------------------------------------------------------------
def _checked(table: pd.DataFrame) -> pd.DataFrame:
    columns = ["vector", "rank", "part", "layer", "head", "score"]
    if not isinstance(table, pd.DataFrame) or not set(columns) <= set(table.columns):
        raise ValueError(
            f"a circuit is a {type(table).__name__} without {columns}; expected a table of steering_circuit"
        )
    return table


def _ranking(table: pd.DataFrame, known: Sequence[Node]) -> list[Node]:
    """The nodes of a table by rank; ValueError if they are not those of the model after the layer."""
    own = _checked(table)
    if "to" in own.columns:
        raise ValueError("the table ranks edges; expected one of steering_circuit with another method than 'edges'")
    own = own[own["vector"] == "steering"].sort_values("rank", kind="stable")
    ranked = [(str(r.part), int(r.layer), int(r.head)) for r in own.itertuples()]
    if len(ranked) != len(known) or set(ranked) != set(known):
        raise ValueError(
            f"the table ranks {len(ranked)} nodes of 'steering', and {len(known)} heads and MLPs come after the steered "
            "layer; expected the table of steering_circuit for this model and layer"
        )
    return ranked


def _sizes(sizes: Sequence[int] | None, n: int) -> list[int]:
    if sizes is None:
        found, step = [0, 1], 2
        while step < n:
            found.append(step)
            step = max(step + 1, round(step * 1.6))
        return sorted({*found, n})
    numbers = sorted({whole("size", size, 0) for size in sizes})
    if not numbers or numbers[-1] > n:
        raise OptionError(f"sizes={list(sizes)}; expected numbers from 0 to {n}, the number of nodes")
    return numbers


def _curve(
    order: str, sizes: Sequence[int], values: NDArray[np.float64], total: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Rows from ``[size, kept or left, record or order]``."""
    rows, whole_effect = [], float(total.mean())
    for size, both in zip(sizes, values, strict=True):
        row: dict[str, Any] = {"order": order, "size": size}
        for name, own in zip(("kept", "left"), both, strict=True):
            mean, _, low, high = mean_interval(own)
            share = mean / whole_effect if whole_effect else np.nan
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_share": share}
        rows.append({**row, "total": whole_effect, "n": len(total)})
    return rows


def _overlap(a: pd.Series, b: pd.Series, n_top: int) -> tuple[float, float, float]:
    top = [set(s.abs().nlargest(n_top).index) for s in (a, b)]
    jaccard = len(top[0] & top[1]) / len(top[0] | top[1])
    x, y = a.to_numpy(dtype=float), b.to_numpy(dtype=float)
    return jaccard, rank_correlation(x, y), rank_correlation(np.abs(x), np.abs(y))


def _chance(n_nodes: int, n_top: int) -> float:
    """Mean Jaccard index of two circuits of ``n_top`` nodes drawn at random."""
    from scipy.stats import hypergeom  # a second to import

    top = min(n_top, n_nodes)
    shared = np.arange(top + 1)
    return float((hypergeom.pmf(shared, n_nodes, top, top) * shared / (2 * top - shared)).sum())
