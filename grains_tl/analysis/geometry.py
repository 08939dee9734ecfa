"""What a vector looks like without running the model: sizes, angles, stability, and the records that built it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution.selection import Selection
from grains_tl.attribution.words import spaced
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.reduce import Reduce, Side, check_reduction, reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


def vector_table(vectors: SteeringVectors, differences: Differences | None = None) -> pd.DataFrame:
    """Size of each layer's vector, its angle to the next, and how much of the differences it explains.

    Args:
        vectors: one direction per layer.
        differences: the per-record differences they were reduced from; adds the last three columns.

    Returns:
        One row per layer. ``norm``: length of the vector, residual units; ``resid_norm``: typical residual norm there;
        ``relative``: their ratio; ``cosine_next``: cosine to the next stored layer (NaN for the last). With
        differences, for the per-record d+ - d-: ``share``: part of their total square along the direction (uncentred);
        ``variance_share``: part of their variance around the mean along it; ``same_sign``: share of records on its
        positive side. A random direction has a share of 1/d_model and a ``same_sign`` of about 0.5.

    Raises:
        ValueError: differences that lack a layer of the vectors.

    Examples:
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.tensor([2.0, 3.0]), torch.full((2,), 50.0))
        >>> vector_table(v)[["layer", "norm", "relative"]].values.tolist()
        [[4.0, 2.0, 0.04], [5.0, 3.0, 0.06]]
    """
    units = vectors.directions.double()
    nearby = (units[1:] * units[:-1]).sum(-1).tolist()
    norm, scale = vectors.magnitudes.double(), vectors.resid_norms.double()
    table = pd.DataFrame(
        {
            "layer": list(vectors.layers),
            "norm": norm.tolist(),
            "resid_norm": scale.tolist(),
            "relative": (norm / scale).round(decimals=6).tolist(),
            "cosine_next": [*nearby, float("nan")],
        }
    )
    if differences is None:
        return table
    each = _per_record(differences, vectors)
    along = einsum(each, units, "record layer d, layer d -> record layer")
    centred = each - each.mean(0)
    spread = (along - along.mean(0)).square().sum(0)
    return table.assign(
        share=(along.square().sum(0) / each.square().sum((0, 2))).tolist(),
        variance_share=(spread / centred.square().sum((0, 2))).tolist(),
        same_sign=(along > 0).double().mean(0).tolist(),
    )


def cosine_map(vectors: SteeringVectors | Mapping[str, SteeringVectors], *, layer: int | None = None) -> pd.DataFrame:
    """Cosines between all layers of one vector, or between several vectors.

    Args:
        vectors: one set (layers against layers), or several by name.
        layer: with several, compare them at this layer alone; without it every layer of every vector is a row.

    Returns:
        A square table of cosines with labelled rows and columns; ``plotting.plot_cosines`` draws it. Two independent
        random directions have a cosine of about 0 +- 1/sqrt(d_model).

    Raises:
        ValueError: different ``d_model``, or a layer that a set does not have.

    Examples:
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> float(cosine_map(v).loc["4", "5"])
        0.0
    """
    named = {"": vectors} if isinstance(vectors, SteeringVectors) else dict(vectors)
    if len({v.directions.shape[1] for v in named.values()}) != 1:
        sizes = {name: v.directions.shape[1] for name, v in named.items()}
        raise ValueError(f"vectors of one d_model are needed to compare them; got {sizes}")
    labels, rows = [], []
    for name, v in named.items():
        for at in v.layers if layer is None else [layer]:
            labels.append(name if layer is not None and name else f"{name} {at}".strip())
            rows.append(v.at([at]).directions[0])
    units = torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1)
    return pd.DataFrame((units @ units.T).numpy(), index=labels, columns=labels)


def stability(
    differences: Differences, *, reduce: Reduce = "mean", side: Side = "both", n_draws: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Would other building records have given the same vector?

    A vector's cosine to its own bootstrap copies flatters it (pure noise has about 0.7 with the mean), so both figures
    compare disjoint records, and both are around 0 for noise.

    Args:
        differences: of the building records, at least four.
        reduce: ``"mean"``, ``"svd"`` or ``"pca"`` (see ``reduce_vectors``).
        side: which differences to use (see ``reduce_vectors``).
        n_draws: random halvings, and bootstrap draws.
        seed: of the draws.

    Returns:
        One row per layer. ``split_half``: mean cosine between the vectors of two random halves of the records;
        ``split_half_low``: its 5 % quantile over halvings; ``expected_cosine``: what that says about the whole vector's
        cosine to the one of endless records, sqrt(2 c / (1 + c)), for noise without a preferred direction (0 where c is
        not positive); ``sign_margin``: 5 % quantile, over bootstrap draws, of the cosine between the drawn records'
        vector and the mean difference of the records not drawn: below 0 the sign is not settled.

    Raises:
        ValueError: fewer than four records, or unknown options.

    Examples:
        >>> from grains_tl.vectors.differences import Differences
        >>> d = Differences(torch.ones(4, 1, 3), torch.zeros(4, 1, 3), (12,), torch.tensor([140.0]))
        >>> stability(d, n_draws=5)["split_half"].round(3).tolist()
        [1.0]
    """
    n = len(differences.toward_chosen)
    check_reduction(reduce, side, n)
    if n < 4:
        raise ValueError(f"{n} records; expected at least 4 to set two halves against each other")
    generator = torch.Generator().manual_seed(seed)
    halves, left_out = [], []

    def unit(records: Sequence[int], how: Reduce) -> Float[Tensor, "layer d_model"]:
        return reduce_vectors(differences.subset(records), reduce=how, side=side).directions.double()

    for _ in range(n_draws):
        order = torch.randperm(n, generator=generator).tolist()
        halves.append((unit(order[: n // 2], reduce) * unit(order[n // 2 :], reduce)).sum(-1))
        drawn = torch.randint(n, (n,), generator=generator).tolist()
        rest = sorted(set(range(n)) - set(drawn))
        if rest and len(set(drawn)) > 1:
            left_out.append((unit(drawn, reduce) * unit(rest, "mean")).sum(-1))
    cosines, out_of_bag = torch.stack(halves), torch.stack(left_out)
    mean = cosines.mean(0)
    expected = (2 * mean / (1 + mean)).clamp(min=0).sqrt()
    return pd.DataFrame(
        {
            "layer": list(differences.layers),
            "split_half": mean.tolist(),
            "split_half_low": cosines.quantile(0.05, dim=0).tolist(),
            "expected_cosine": expected.tolist(),
            "sign_margin": out_of_bag.quantile(0.05, dim=0).tolist(),
        }
    )


def building_records(
    vectors: SteeringVectors,
    differences: Differences,
    *,
    layer: int,
    tokenized: Sequence[TokenizedPair] | None = None,
    selections: Sequence[Selection] | None = None,
) -> pd.DataFrame:
    """Which records built the vector: each one's difference along the direction.

    Args:
        vectors: the steering vectors.
        differences: the differences that the vectors were reduced from.
        layer: which layer.
        tokenized: the building records; adds the column of prompts.
        selections: their masked tokens; adds the columns of tokens.

    Returns:
        One row per record, in their order. ``projection``: (d+ - d-) along the direction, residual units (for
        mean-reduced vectors their mean is the vector's norm); ``from_chosen``, ``from_rejected``: the parts of d+ and
        of -d-; ``cosine``: of d+ - d- to the direction. With records: ``prompt``; with selections: ``toward_chosen``
        and ``toward_rejected``, the tokens masked on either side.

    Raises:
        ValueError: a layer that is not stored, lists of different lengths, or records that are not tokenized.

    Examples:
        >>> from grains_tl.vectors.differences import Differences
        >>> from grains_tl.vectors.reduce import reduce_vectors
        >>> d = Differences(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), (12,), torch.tensor([140.0]))
        >>> building_records(reduce_vectors(d), d, layer=12)["cosine"].round(3).tolist()
        [1.0, 1.0]
    """
    unit = vectors.at([layer]).directions[0].double()
    row = differences.layers.index(layer) if layer in differences.layers else None
    if row is None:
        raise ValueError(f"the differences have no layer {layer}; stored are {list(differences.layers)}")
    up, down = differences.toward_chosen[:, row].double(), differences.toward_rejected[:, row].double()
    table = pd.DataFrame({"from_chosen": (up @ unit).tolist(), "from_rejected": (-down @ unit).tolist()})
    table.insert(0, "projection", table.from_chosen + table.from_rejected)
    table["cosine"] = (((up - down) @ unit) / (up - down).norm(dim=-1).clamp(min=1e-12)).tolist()
    for name, given in (("tokenized", tokenized), ("selections", selections)):
        if given is not None and len(given) != len(table):
            raise ValueError(f"{len(given)} {name} for {len(table)} differences; give those they were collected from")
    for number, pair in enumerate(tokenized or (), start=1):
        if not isinstance(pair, TokenizedPair):
            kind = type(pair).__name__
            raise ValueError(f"record {number} is a {kind}; expected a TokenizedPair: tokenize_pairs(model, pairs)")
    if tokenized is not None:
        table["prompt"] = ["".join(spaced(t.strings, t.starts_word)) for t in tokenized]
        if selections is not None:
            table["toward_chosen"] = [_words(t, s.toward_chosen) for t, s in zip(tokenized, selections, strict=True)]
            table["toward_rejected"] = [
                _words(t, s.toward_rejected) for t, s in zip(tokenized, selections, strict=True)
            ]
    return table


def building_tokens(
    vectors: SteeringVectors,
    differences: Differences,
    *,
    layer: int,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
) -> pd.DataFrame:
    """Which masked tokens built the vector: the projections of ``building_records``, gathered by token and side.

    The tokens of one side of a record are masked together, so each is given an equal part of that side's projection.

    Args:
        vectors: the steering vectors.
        differences: the differences that the vectors were reduced from.
        layer: which layer.
        tokenized: the building records, tokenized.
        selections: their masked tokens.

    Returns:
        One row per token and side, largest ``total`` first: ``token``, ``side``, ``count`` (records that masked it),
        ``mean`` and ``total`` projection, residual units. The totals add up to the sum of all projections.

    Examples:
        >>> building_tokens(vectors, differences, layer=21, tokenized=tokenized, selections=selections)     # doctest: +SKIP
    """
    table = building_records(vectors, differences, layer=layer, tokenized=tokenized, selections=selections)
    rows = []
    for pair, selection, up, down in zip(tokenized, selections, table.from_chosen, table.from_rejected, strict=True):
        for side, positions, value in (
            ("toward_chosen", selection.toward_chosen, up),
            ("toward_rejected", selection.toward_rejected, down),
        ):
            rows += [(pair.strings[p], side, value / len(positions)) for p in positions]
    found = pd.DataFrame(rows, columns=["token", "side", "projection"])
    grouped = found.groupby(["token", "side"]).projection.agg(count="count", mean="mean", total="sum")
    return grouped.reset_index().sort_values("total", ascending=False, ignore_index=True)


def _words(pair: TokenizedPair, positions: Sequence[int]) -> str:
    return " | ".join(pair.strings[p].strip() for p in positions)


def _per_record(differences: Differences, vectors: SteeringVectors) -> Float[Tensor, "record layer d_model"]:
    missing = sorted(set(vectors.layers) - set(differences.layers))
    if missing:
        raise ValueError(f"the differences lack layers {missing}; stored are {list(differences.layers)}")
    at = differences.at(vectors.layers)
    return (at.toward_chosen - at.toward_rejected).double()
