"""Baselines and controls on the residual stream, all with one signature: ``fn(records, generator) -> [layer, d_model]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.attribution.selection import Selection
from grains_tl.baselines.controls import mask_at_random, orthogonal_directions, shuffle_labels
from grains_tl.baselines.records import Baseline, BuildingRecords
from grains_tl.models.identity import model_identity
from grains_tl.models.running import require_layers
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


def caa(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """Contrastive activation addition (arXiv 2312.06681): the mean of h(prompt + chosen) - h(prompt + rejected)."""
    return records.response_differences.mean(0)


def icv(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """In-context vector (arXiv 2311.06668, section 3): one principal direction for all layers together.

    The response-end differences of a record are concatenated over the layers; the direction h that maximises the mean
    of (h . difference)^2 is cut into its layers again. Not centred, so that the mean shift is kept; its arbitrary sign is
    the mean difference's. We differ from the paper in that each layer's part is steered with at unit length, and in that
    the two texts share a prompt here.
    """
    flat = records.response_differences.flatten(1).double()
    first = torch.linalg.svd(flat, full_matrices=False).Vh[0]
    return (first * (first @ flat.mean(0))).view(records.response_differences.shape[1:]).float()


def prompt_mean(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """Difference of means over *prompts*: those after which the model leans to chosen, minus the others.

    A mass-mean direction (arXiv 2310.06824, section 5) at the last prompt token, with the label "unsteered margin above
    the records' median". It sees neither the response tokens, as CAA does, nor masked prompts, as GrAInS does: what is
    left is how prompts differ. A median split, because the sign of the margin says more of the two responses' lengths
    and word frequencies than of the prompt, and can be the same for all records.

    Raises:
        ValueError: fewer than two records, or all margins equal.
    """
    high = records.margins > records.margins.median()
    if not bool(high.any()):
        raise ValueError(
            f"prompt_mean splits the records at their median margin, and none of the {len(high)} lies above it; "
            "give at least two records with different margins"
        )
    return records.prompt_ends[high].mean(0) - records.prompt_ends[~high].mean(0)


def random_direction(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """A direction drawn uniformly from the sphere."""
    return torch.randn(len(records.layers), int(records.model.cfg.d_model), generator=generator)


def orthogonal_direction(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """A direction drawn uniformly from those at right angles to ``records.like`` (arXiv 2602.06801).

    Raises:
        ValueError: no ``like``, or not all layers in it.
    """
    if records.like is None:
        raise ValueError("orthogonal_direction needs the vectors it is to be orthogonal to: pass like=vectors")
    return orthogonal_directions(records.like.at(records.layers).directions, generator)


def shuffled_labels(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """Chosen and rejected swapped in a random half of the records: of ``records.differences``, or of CAA."""
    if records.differences is None:
        up = records.response_differences
        given = Differences(up, torch.zeros_like(up), records.layers, records.resid_norms)
    else:
        given = records.differences.at(records.layers)
    return reduce_vectors(shuffle_labels(given, generator)).raw


def random_tokens(records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """The method with its attribution replaced by chance: ``top_k`` random content tokens masked on each side.

    Raises:
        ValueError: a prompt with fewer than two content tokens.
    """
    short = [number for number, t in enumerate(records.tokenized, start=1) if t.n_content < 2]
    if short:
        raise ValueError(f"random_tokens needs two content tokens in each prompt; record {short[0]} has fewer")
    like = [_as_many(t, records.top_k) for t in records.tokenized]
    up, down = mask_at_random(
        records.model,
        records.tokenized,
        like,
        records.prompt_ends,
        generator,
        layers=records.layers,
        masker=records.masker,
    )
    return (up - down).mean(0)


def _as_many(pair: TokenizedPair, top_k: int) -> Selection:
    """A selection that masks ``top_k`` tokens on each side, or half of a short prompt."""
    k = tuple(range(min(top_k, pair.n_content // 2)))
    return Selection(k, k)


BASELINES: dict[str, Baseline] = {
    fn.__name__: fn
    for fn in (caa, icv, prompt_mean, random_direction, orthogonal_direction, shuffled_labels, random_tokens)
}

#: Those that are drawn at random: one draw says little.
CONTROLS = ("random_direction", "orthogonal_direction", "shuffled_labels", "random_tokens")


def baseline_draws(
    model: HookedModel,
    pairs: Iterable[PreferencePair],
    names: Sequence[str | Baseline] | None = None,
    *,
    layers: Sequence[int],
    n_draws: int = 20,
    seed: int = 0,
    **options: Any,
) -> dict[str, list[SteeringVectors]]:
    """Several draws of controls (or of any baseline), as ``compare_with_controls`` takes them.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        names: keys of ``BASELINES``, or functions of one's own with the same signature; default the ``CONTROLS``,
            ``"orthogonal_direction"`` only where there is a ``like``.
        layers: which layers.
        n_draws: draws of each; the read-outs that draws share are run once.
        seed: of the draws; every baseline draws from a generator of its own, so that a result does not depend on its
            neighbours.
        options: further attributes of ``BuildingRecords``: ``like``, ``differences``, ``top_k``, ``masker``.

    Returns:
        name -> vectors of unit length in the same ``alpha`` unit, so that one alpha is a step of one size for all.

    Raises:
        ValueError: before anything runs, for unknown names, bad records or layers, and missing or unfitting ``like``.

    Examples:
        >>> draws = baseline_draws(model, pairs, ["shuffled_labels"], layers=[12])     # doctest: +SKIP
        >>> len(draws["shuffled_labels"])                                              # doctest: +SKIP
        20
    """
    if names is None:
        names = [name for name in CONTROLS if name != "orthogonal_direction" or options.get("like") is not None]
    functions = _functions(names)
    if n_draws < 1:
        raise ValueError(f"n_draws={n_draws}; at least one draw is needed")
    wanted = tuple(require_layers(model, layers))
    records = BuildingRecords(model, tokenize_pairs(model, pairs), wanted, **options)
    _check(records, functions)
    made_for = model_identity(model, bare=True)
    drawn: dict[str, list[SteeringVectors]] = {}
    for name, function in functions.items():
        generator = torch.Generator().manual_seed(seed)
        info = {"method": name, "seed": seed, "n_records": len(records.tokenized), "model": made_for}
        drawn[name] = [
            SteeringVectors.from_raw(function(records, generator), wanted, records.resid_norms, {**info, "draw": draw})
            for draw in range(n_draws)
        ]
    return drawn


def baseline_vectors(
    model: HookedModel,
    pairs: Iterable[PreferencePair],
    names: Sequence[str | Baseline] = ("caa", "icv", "prompt_mean"),
    *,
    layers: Sequence[int],
    seed: int = 0,
    **options: Any,
) -> dict[str, SteeringVectors]:
    """Vectors of other recipes from the same records, and one draw of any control that is named.

    ``"caa"`` follows arXiv 2312.06681, ``"icv"`` 2311.06668, ``"prompt_mean"`` 2310.06824; the functions of this room say
    where they differ.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        names: keys of ``BASELINES``, or functions with the same signature.
        layers: which layers.
        seed: seed of the draws.
        options: further attributes of ``BuildingRecords`` (see ``baseline_draws``).

    Returns:
        name -> vectors of unit length, in the same ``alpha`` unit.

    Raises:
        ValueError: see ``baseline_draws``.

    Examples:
        >>> def first_record(records, generator):                       # a baseline of one's own is one short function
        ...     return records.response_differences[0]
        >>> found = baseline_vectors(model, pairs, ["caa", first_record], layers=[12])  # doctest: +SKIP
        >>> found["caa"].cosine(found["first_record"])                                  # doctest: +SKIP
        tensor([0.6021])
    """
    drawn = baseline_draws(model, pairs, names, layers=layers, n_draws=1, seed=seed, **options)
    return {name: vectors[0] for name, vectors in drawn.items()}


def _functions(names: Sequence[str | Baseline]) -> dict[str, Baseline]:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r}; a list of baselines is needed, such as ['caa', 'icv']")
    unknown = [n for n in names if isinstance(n, str) and n not in BASELINES]
    if unknown:
        raise ValueError(f"no baselines called {unknown}; there are {list(BASELINES)}, or pass a function")
    return {n if isinstance(n, str) else n.__name__: BASELINES[n] if isinstance(n, str) else n for n in names}


def _check(records: BuildingRecords, functions: dict[str, Baseline]) -> None:
    """Refuse what would fail only after long runs (ValueError)."""
    if "orthogonal_direction" in functions:
        orthogonal_direction(records, torch.Generator())
    if "shuffled_labels" in functions and records.differences is not None:
        missing = sorted(set(records.layers) - set(records.differences.layers))
        if missing or len(records.differences.toward_chosen) != len(records.tokenized):
            raise ValueError(
                f"differences of {len(records.differences.toward_chosen)} records at layers "
                f"{list(records.differences.layers)} do not fit {len(records.tokenized)} records at {list(records.layers)}"
            )
