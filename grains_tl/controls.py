"""What a steering vector must beat: random directions, random tokens, and the older recipe CAA. All of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from grains_tl.caching import Differences, Readout, read_out, read_out_responses
from grains_tl.masking import Masker, Selection, random_selection
from grains_tl.replacements import ImageMasker
from grains_tl.scoring import MAX_TOKENS
from grains_tl.tokens import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors import SteeringVectors, reduce_vectors


def random_direction_vectors(like: SteeringVectors, *, n_draws: int = 20, seed: int = 0) -> list[SteeringVectors]:
    """Directions drawn uniformly from the sphere, at the layers and norms of ``like``.

    Example:
        >>> like = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> [v.layers for v in random_direction_vectors(like, n_draws=2)]
        [(4, 5), (4, 5)]
    """
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(like.directions.shape)
    return [
        SteeringVectors.from_raw(
            torch.randn(shape, generator=generator),
            like.layers,
            like.resid_norms,
            {"method": "random_direction", "seed": seed, "draw": draw, "model": like.info.get("model")},
        )
        for draw in range(n_draws)
    ]


def random_token_differences(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    layers: Sequence[int],
    resid_norms: Float[Tensor, "layer"],
    n_draws: int = 20,
    seed: int = 0,
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    readout: Readout = "prompt_end",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[Differences]:
    """The method with its attribution replaced by chance: as many content tokens masked per record, drawn at random.

    As many patches and as many text tokens, where there is an image.

    Args:
        model, tokenized: the model and the building records.
        selections: the selections to imitate in number.
        layers: which layers (running stops above the highest).
        resid_norms: ``[layer]``, copied into the results.
        n_draws: number of draws; the whole prompts are run once for all of them.
        seed: of the draws.
        masker, image_masker, readout, max_tokens: as in ``collect_differences``.
        progress: show a bar over draws.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = read_out(model, tokenized, layers=layers, masker=masker, readout=readout, max_tokens=max_tokens)
    found = []
    for _ in tqdm(range(n_draws), desc="random tokens", unit="draw", disable=not progress):
        drawn = [
            random_selection(t.content, s, generator, t.is_image) for t, s in zip(tokenized, selections, strict=True)
        ]
        # both sides of all records in the same full batches
        both = read_out(
            model,
            [*tokenized, *tokenized],
            [*(s.toward_chosen for s in drawn), *(s.toward_rejected for s in drawn)],
            layers=layers,
            masker=masker,
            image_masker=image_masker,
            readout=readout,
            max_tokens=max_tokens,
        )
        up, down = whole - both[: len(tokenized)], whole - both[len(tokenized) :]
        found.append(Differences(up, down, tuple(layers), resid_norms))
    return found


def random_token_vectors(differences: Sequence[Differences], *, seed: int = 0) -> list[SteeringVectors]:
    """Mean-reduced vectors of ``random_token_differences``."""
    return [
        reduce_vectors(d, info={"method": "random_tokens", "seed": seed, "draw": draw})
        for draw, d in enumerate(differences)
    ]


def caa_differences(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    *,
    layers: Sequence[int],
    resid_norms: Float[Tensor, "layer"],
    max_tokens: int = MAX_TOKENS,
) -> Differences:
    """Contrastive activation addition (arXiv 2312.06681): h(prompt + chosen) - h(prompt + rejected), last token.

    Returned as ``Differences`` with the second side zero, so that it is reduced and resampled like the others.
    """
    found = read_out_responses(model, tokenized, layers=layers, max_tokens=max_tokens)
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
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(differences.toward_chosen)
    draws = [torch.randint(n, (n,), generator=generator).tolist() for _ in range(n_draws)]
    return [reduce_vectors(differences.subset(draw), **options) for draw in draws]  # type: ignore[arg-type]
