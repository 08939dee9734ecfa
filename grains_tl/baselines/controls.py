"""What a steering vector must beat: chance directions, chance tokens, chance labels, and the recipe CAA. Unit length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.progress import progress_bar
from grains_tl.attribution.selection import Selection, random_selection
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.readout import Readout, read_out, read_out_responses
from grains_tl.vectors.reduce import reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


def random_direction_vectors(like: SteeringVectors, *, n_draws: int = 20, seed: int = 0) -> list[SteeringVectors]:
    """Directions drawn uniformly from the sphere, at the layers and norms of ``like``.

    Args:
        like: gives layers, norms and the unit of ``alpha``.
        n_draws: how many to draw.
        seed: seed of the draws.

    Returns:
        ``n_draws`` vectors, directions ``[layer, d_model]`` of unit length.

    Examples:
        >>> like = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> [v.layers for v in random_direction_vectors(like, n_draws=2)]
        [(4, 5), (4, 5)]
    """
    return _drawn_like(
        like, "random_direction", lambda g: torch.randn(like.directions.shape, generator=g), n_draws, seed
    )


def _drawn_like(
    like: SteeringVectors, method: str, draw: Callable[[torch.Generator], Tensor], n_draws: int, seed: int
) -> list[SteeringVectors]:
    """Draws at the layers and norms of ``like``, all from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return [
        SteeringVectors.from_raw(
            draw(generator),
            like.layers,
            like.resid_norms,
            {"method": method, "seed": seed, "draw": number, "model": like.info.get("model")},
            site=like.site,
        )
        for number in range(n_draws)
    ]


def orthogonal_directions(
    directions: Float[Tensor, "layer d_model"], generator: torch.Generator
) -> Float[Tensor, "layer d_model"]:
    """In each layer a unit direction drawn uniformly from those at right angles to the given one."""
    unit = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    drawn = torch.randn(unit.shape, generator=generator, dtype=torch.float64).to(unit.device)
    drawn = drawn - (drawn * unit).sum(-1, keepdim=True) * unit
    return (drawn / drawn.norm(dim=-1, keepdim=True)).float()


def orthogonal_direction_vectors(like: SteeringVectors, *, n_draws: int = 20, seed: int = 0) -> list[SteeringVectors]:
    """Directions drawn at right angles to ``like`` in each layer, at its norms: same step, nothing of its direction.

    Such perturbations do nearly as well as the vector in some published set-ups (arXiv 2602.06801).

    Args:
        like: what to be at right angles to; gives layers, norms and the unit of ``alpha``.
        n_draws: how many to draw.
        seed: seed of the draws.

    Returns:
        ``n_draws`` vectors, directions ``[layer, d_model]`` of unit length.

    Examples:
        >>> like = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> v = orthogonal_direction_vectors(like, n_draws=1)[0]
        >>> v.cosine(like).abs().max().item() < 1e-6
        True
    """
    return _drawn_like(like, "orthogonal_direction", lambda g: orthogonal_directions(like.directions, g), n_draws, seed)


def shuffle_labels(differences: Differences, generator: torch.Generator) -> Differences:
    """Chosen and rejected swapped in a random half of the records, from the differences alone: no model is run.

    Swapping the responses of a record turns the sign of its f, so its two sides change places (exact for methods whose
    scores turn their sign with f, as all of this package do, and for CAA). Of an odd number of records the smaller or
    the larger half is swapped by the toss of a coin: every record is swapped with probability one half.
    """
    n = len(differences.toward_chosen)
    n_swapped = (n + int(torch.randint(2, (), generator=generator))) // 2
    swap = torch.zeros(n, dtype=torch.bool)
    swap[torch.randperm(n, generator=generator)[:n_swapped]] = True
    where = swap.to(differences.toward_chosen.device)[:, None, None]
    up, down = differences.toward_chosen, differences.toward_rejected
    return replace(
        differences, toward_chosen=torch.where(where, down, up), toward_rejected=torch.where(where, up, down)
    )


def shuffled_label_vectors(
    differences: Differences, *, n_draws: int = 20, seed: int = 0, **options: str
) -> list[SteeringVectors]:
    """Vectors from the same differences with the labels of a random half of the records swapped (``shuffle_labels``).

    What a method finds where there is nothing to find: the records, the masking and the reduction are all as they were.

    Args:
        differences: of the building records.
        n_draws: number of shuffles.
        seed: of the draws.
        options: passed to ``reduce_vectors``: ``reduce``, ``side``.

    Returns:
        ``n_draws`` vectors, directions ``[layer, d_model]`` of unit length.

    Examples:
        >>> g = torch.Generator().manual_seed(1)
        >>> d = Differences(torch.randn(6, 1, 3, generator=g), torch.zeros(6, 1, 3), (4,), torch.ones(1))
        >>> [v.info["draw"] for v in shuffled_label_vectors(d, n_draws=2)]
        [0, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        reduce_vectors(
            shuffle_labels(differences, generator),
            info={"method": "shuffled_labels", "seed": seed, "draw": draw},
            **options,  # type: ignore[arg-type]
        )
        for draw in range(n_draws)
    ]


def random_token_differences(
    model: HookedModel,
    tokenized: Records,
    selections: Sequence[Selection],
    *,
    layers: Sequence[int],
    resid_norms: Float[Tensor, "layer"],
    n_draws: int = 20,
    seed: int = 0,
    mask: Mask | Masker = "mean_embedding",
    readout: Readout = "prompt_end",
    spare_end: bool = False,
) -> list[Differences]:
    """The method with its attribution replaced by chance: as many content tokens masked per record, drawn at random.

    As many patches and as many text tokens, where there is an image.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the building records, tokenized or not.
        selections: the selections to imitate in number.
        layers: which layers (running stops above the highest).
        resid_norms: ``[layer]``, copied into the results.
        n_draws: number of draws; the whole prompts are run once for all of them.
        seed: of the draws.
        mask: as in ``collect_differences``.
        readout: as in ``collect_differences``.
        spare_end: as in ``select_tokens``; give it what the selections were made with.

    Returns:
        ``n_draws`` times ``Differences``, both sides ``[record, layer, d_model]``, residual units.

    Examples:
        >>> draws = random_token_differences(
        ...     model, tokenized, selections, layers=[12], resid_norms=found.resid_norms, n_draws=5)     # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    generator = torch.Generator().manual_seed(seed)
    whole = read_out(model, tokenized, layers=layers, mask=mask, readout=readout)
    common: dict[str, Any] = {
        "layers": layers,
        "mask": mask,
        "readout": readout,
    }
    return [
        Differences(
            *mask_at_random(model, tokenized, selections, whole, generator, spare_end=spare_end, **common),
            tuple(layers),
            resid_norms,
        )
        for _ in progress_bar(range(n_draws), desc="random tokens", unit="draw")
    ]


def mask_at_random(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    whole: Float[Tensor, "record layer d_model"],
    generator: torch.Generator,
    *,
    spare_end: bool = False,
    **options: Any,
) -> tuple[Float[Tensor, "record layer d_model"], Float[Tensor, "record layer d_model"]]:
    """One draw of ``random_token_differences``: d+ and d- of random tokens, given the read-out of the whole prompts.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the building records.
        selections: the selections to imitate.
        whole: ``read_out`` of the unmasked prompts with the same ``options``.
        generator: of the draw.
        spare_end: leave the prompt's last token alone.
        options: passed to ``read_out``: ``layers``, ``mask``, ``readout``, ``site``.
    """
    contents = [[*t.content[:-1], t.content[-1] and not spare_end] for t in tokenized]
    drawn = [
        random_selection(content, s, generator, t.is_image)
        for content, t, s in zip(contents, tokenized, selections, strict=True)
    ]
    # both sides of all records in the same full batches
    positions = [*(s.toward_chosen for s in drawn), *(s.toward_rejected for s in drawn)]
    both = read_out(model, [*tokenized, *tokenized], positions, **options)
    return whole - both[: len(tokenized)], whole - both[len(tokenized) :]


def random_token_vectors(differences: Sequence[Differences], *, seed: int = 0) -> list[SteeringVectors]:
    """Mean-reduced vectors of ``random_token_differences``."""
    return [
        reduce_vectors(d, info={"method": "random_tokens", "seed": seed, "draw": draw})
        for draw, d in enumerate(differences)
    ]


def caa_differences(
    model: HookedModel,
    tokenized: Records,
    *,
    layers: Sequence[int],
    resid_norms: Float[Tensor, "layer"],
) -> Differences:
    """Contrastive activation addition (arXiv 2312.06681): h(prompt + chosen) - h(prompt + rejected), last token.

    Returned as ``Differences`` with the second side zero, so that it is reduced and resampled like the others.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records, tokenized or not.
        layers: which layers.
        resid_norms: ``[layer]`` the unit of ``alpha``, copied into the result.

    Returns:
        ``Differences``: ``toward_chosen`` ``[record, layer, d_model]``, residual units; ``toward_rejected`` zeros.

    Examples:
        >>> caa = reduce_vectors(caa_differences(model, tokenized, layers=[12], resid_norms=norms))     # doctest: +SKIP
    """
    tokenized = as_tokenized(model, tokenized)
    found = read_out_responses(model, tokenized, layers=layers)
    difference = found[:, 0] - found[:, 1]
    return Differences(difference, torch.zeros_like(difference), tuple(layers), resid_norms)


def bootstrap_vectors(
    differences: Differences, *, n_draws: int = 20, seed: int = 0, **options: str
) -> list[SteeringVectors]:
    """Vectors from resampled building records (with replacement): the uncertainty that test records do not show.

    Args:
        differences: of the building records.
        n_draws: number of resamples.
        seed: of the draws.
        options: passed to ``reduce_vectors``: ``reduce``, ``side``.

    Returns:
        ``n_draws`` vectors of unit length per layer, with the layers and norms of ``differences``.

    Examples:
        >>> d = Differences(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), (12,), torch.tensor([140.0]))
        >>> [v.layers for v in bootstrap_vectors(d, n_draws=2)]
        [(12,), (12,)]
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(differences.toward_chosen)
    draws = [torch.randint(n, (n,), generator=generator).tolist() for _ in range(n_draws)]
    return [reduce_vectors(differences.subset(draw), **options) for draw in draws]  # type: ignore[arg-type]
