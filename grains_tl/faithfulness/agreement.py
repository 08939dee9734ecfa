"""Do scores agree: between methods, between seeds, and (they should not) with those of a model of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from grains_tl._util import stats
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.methods import METHODS
from grains_tl.attribution.result import Attribution
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel


def rank_correlation(a: Attribution, b: Attribution) -> float:
    """Spearman's correlation of two sets of scores over the content tokens; NaN if one of them is constant.

    Examples:
        >>> one = Attribution(torch.tensor([.5, -1., 2.]), ["a", "b", "c"], torch.tensor([True] * 3),
        ...                   torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> rank_correlation(one, one)
        1.0
    """
    if len(a.scores) != len(b.scores):
        raise ValueError(f"attributions of {len(a.scores)} and {len(b.scores)} tokens; expected two of the same prompt")
    x, y = (s.scores[a.content].nan_to_num(0.0).double().numpy() for s in (a, b))
    return round(stats.rank_correlation(x, y), 12)


def rank_agreement(found: Mapping[str, Sequence[Attribution]]) -> pd.DataFrame:
    """Mean rank correlation of every two methods (or seeds, or models) over the same records.

    Args:
        found: name -> one attribution per record.

    Returns:
        Columns ``a``, ``b``, ``spearman`` (mean over records), ``se``, ``n`` (records where both have an order).

    Raises:
        ValueError: different numbers of records.

    Examples:
        >>> one = Attribution(torch.tensor([.5, -1., 2.]), ["a", "b", "c"], torch.tensor([True] * 3),
        ...                   torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> rank_agreement({"one": [one], "same": [one]})["spearman"].tolist()
        [1.0]
    """
    sizes = {name: len(own) for name, own in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"numbers of records differ: {sizes}; compare the same records")
    rows = []
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            values = np.array([rank_correlation(x, y) for x, y in zip(found[a], found[b], strict=True)])
            rows.append({"a": a, "b": b, **_mean(values)})
    return pd.DataFrame(rows)


def agreement_map(frame: pd.DataFrame) -> pd.DataFrame:
    """``rank_agreement``'s pairs as a square table with 1 on its diagonal; ``plot_cosines(..., label=...)`` draws it.

    Args:
        frame: columns ``a``, ``b`` and ``spearman``.

    Returns:
        Square table, names by names, no unit.

    Examples:
        >>> agreement_map(pd.DataFrame({"a": ["one"], "b": ["other"], "spearman": [0.5]})).values.tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    table = pd.DataFrame(np.eye(len(names)), names, names)
    for a, b, value in zip(frame["a"], frame["b"], frame["spearman"], strict=True):
        table.loc[a, b] = table.loc[b, a] = value
    return table


def seed_agreement(
    model: HookedModel,
    pairs: Sequence[PairLike],
    *,
    method: Method | str,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Any,
) -> pd.DataFrame:
    """``rank_agreement`` of one method with itself under other random draws; 1 for methods that draw nothing.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: records (see ``attribute``).
        method: its name, or the method as a value.
        seeds: at least two.
        options: further arguments of ``attribute``.

    Returns:
        Columns as ``rank_agreement``; correlations have no unit.

    Raises:
        ValueError: fewer than two different seeds.

    Examples:
        >>> seed_agreement(model, pairs, method="leave_k_out", seeds=(0, 1))     # doctest: +SKIP
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds={tuple(seeds)}; expected at least two different ones")
    tokenized = tokenize_pairs(model, pairs)
    found = {f"seed {seed}": attribute_all(model, tokenized, **_with_seed(method, seed), **options) for seed in seeds}
    return rank_agreement(found)


def _with_seed(method: Method | str, seed: int) -> dict[str, Any]:
    """The method as arguments of ``attribute_all``, with this seed where it draws at random."""
    kind = type(method) if isinstance(method, Method) else METHODS.get(method, Method)
    if not kind.draws:
        return {"method": method}
    if isinstance(method, Method):
        return {"method": replace(method, seed=seed)}  # type: ignore[call-arg]  # methods that draw have it
    return {"method": method, "seed": seed}


def random_weights_check(
    model: HookedModel,
    pairs: Sequence[PairLike],
    *,
    methods: Sequence[Method | str] = ("leave_one_out", "gradient_x_input"),
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Sanity check (arXiv 1810.03292): scores must change when the model's blocks are made random.

    A method whose ranks survive does not explain what the model learned. Every weight matrix of a block is exchanged for
    Gaussian noise of the same mean and spread while the second scores are computed; the given weights themselves are not
    written to, and are back in place afterwards, also after an error.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: records (see ``attribute``).
        methods: names of the methods to check, or methods as values.
        layers: blocks to randomise, default all.
        seed: of the noise.
        options: further arguments of ``attribute``.

    Returns:
        One row per method: ``method``, ``spearman``: correlation with the scores on the real weights (mean over records;
        near 0 is right), ``se``, ``n``.

    Examples:
        >>> random_weights_check(model, pairs, methods=["leave_one_out"])     # doctest: +SKIP
    """
    tokenized = tokenize_pairs(model, pairs)
    chosen = range(int(model.cfg.n_layers)) if layers is None else layers
    rows = []
    for method in methods:
        real = attribute_all(model, tokenized, method=method, **options)
        with random_weights(model, chosen, seed):
            other = attribute_all(model, tokenized, method=method, **options)
        values = np.array([rank_correlation(x, y) for x, y in zip(real, other, strict=True)])
        rows.append({"method": method if isinstance(method, str) else method.name, **_mean(values)})
    return pd.DataFrame(rows)


@contextmanager
def random_weights(model: HookedModel, layers: Sequence[int] | range, seed: int) -> Iterator[None]:
    """Inside, the matrices of these blocks are Gaussian noise of the same mean and standard deviation.

    The parameters point at other storage meanwhile: nothing is copied back, so they return bit for bit.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [(p, p.data) for layer in layers for p in model.blocks[layer].parameters() if p.ndim >= 2]
    noise: dict[int, Tensor] = {}
    try:
        for parameter, weight in kept:
            # two parameters may share one storage: they get one noise
            if weight.data_ptr() not in noise:
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                noise[weight.data_ptr()] = weight.mean() + weight.std() * drawn
            parameter.data = noise[weight.data_ptr()]
        yield
    finally:
        for parameter, weight in kept:
            parameter.data = weight


def _mean(values: np.ndarray) -> dict[str, float]:
    known = values[~np.isnan(values)]
    return {
        "spearman": float(known.mean()) if len(known) else float("nan"),
        "se": stats.standard_error(known),
        "n": len(known),
    }


def mean_agreement(found: Sequence[Attribution], reference: Sequence[Attribution]) -> float:
    """Mean rank correlation with a reference, over the records where both have an order."""
    return _mean(np.array([rank_correlation(x, y) for x, y in zip(found, reference, strict=True)]))["spearman"]


def random_attributions(tokenized: Sequence[TokenizedPair], generator: torch.Generator) -> list[Attribution]:
    """Scores drawn by chance: the baseline that any method must beat."""
    return [
        Attribution(
            scores=torch.randn(len(t.prompt), generator=generator),
            tokens=list(t.strings),
            content=torch.tensor(t.content),
            is_image=torch.tensor(t.is_image),
            gap=None,
            objective=float("nan"),
            baseline_objective=None,
            method="random_tokens",
            steps=0,
        )
        for t in tokenized
    ]
