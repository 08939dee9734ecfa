"""The response words in a vector: taken out of it, so that what is left cannot raise them directly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl.hooks.sites import residual_space_only
from grains_tl.models.precision import full_precision
from grains_tl.models.running import device_of, final_norm
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Basis vectors that go through the unembedding at a time.
ROWS = 64


def without_words(
    model: HookedModel, vectors: SteeringVectors, pairs: Iterable[PairLike], *, n_tokens: int = 32
) -> SteeringVectors:
    """Vectors without the directions that raise or lower the response words through the unembedding.

    Each token of the responses has a direction in the residual stream along which the final norm and the unembedding
    raise its logit. These are projected out. What is left changes the words' logits only through later layers, so a
    vector whose effect is gone has raised its own words and nothing else. For questions answered by a letter, or by Yes
    and No, it takes the letters out.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: the steering vectors.
        pairs: records whose responses' tokens are taken out, usually the building records.
        n_tokens: at most so many different tokens, the most frequent ones first; never more than a quarter of d_model,
            because that many directions say more of the residual stream than of the words.

    Returns:
        The vectors, at unit length again and with the magnitude that is left; ``info["without_tokens"]`` lists the token
        ids, and ``info["length_left"]`` what share of its length each layer's vector has kept.

    Raises:
        ValueError: vectors of another model, no records, or a vector that lies in the words' directions altogether.

    Examples:
        >>> rest = without_words(model, vectors, building_pairs)                       # doctest: +SKIP
        >>> rest.info["length_left"]                                                   # doctest: +SKIP
        [0.94]
    """
    whole("n_tokens", n_tokens, 1)
    residual_space_only("without_words", vectors.site)
    vectors.require_match(model)
    counts = Counter(token for t in tokenize_pairs(model, pairs) for token in (*t.chosen, *t.rejected))
    n = min(n_tokens, max(1, vectors.directions.shape[1] // 4))
    tokens = sorted(counts, key=lambda token: (-counts[token], token))[:n]
    basis = torch.linalg.svd(token_directions(model, tokens).double(), full_matrices=False)
    kept = basis.Vh[1e-6 * basis.S[0] < basis.S]
    own = vectors.directions.double().cpu()
    rest = own - own @ kept.T @ kept
    left = rest.norm(dim=-1)
    gone = [layer for layer, size in zip(vectors.layers, left.tolist(), strict=True) if size < 1e-4]
    if gone:
        raise OptionError(
            f"the vector at layers {gone} consists of the response words' directions; nothing is left of it"
        )
    directions = (rest / left[:, None]).to(vectors.directions)
    info = {**vectors.info, "without_tokens": tokens, "length_left": [round(size, 4) for size in left.tolist()]}
    return replace(
        vectors, directions=directions, magnitudes=vectors.magnitudes * left.to(vectors.magnitudes), info=info
    )


def token_directions(model: HookedModel, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """Along which a residual's final norm and unembedding raise each token's logit above the vocabulary's mean.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokens: token ids.

    Returns:
        ``[token, d_model]`` on the CPU, up to one common scale.
    """
    d_model = int(model.cfg.d_model)
    columns = []
    for start in range(0, d_model, ROWS):
        rows = torch.eye(d_model, device=device_of(model))[start : start + ROWS]
        columns.append(through_unembedding(model, rows)[:, list(tokens)])
    return torch.cat(columns).T


def through_unembedding(model: HookedModel, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits of directions as ``lens_logits`` defines them, on the CPU."""
    # at the length of a residual with mean square 1 the norm's epsilon does not matter
    scaled = (directions * directions.shape[-1] ** 0.5).to(device_of(model), next(model.parameters()).dtype)
    unembed: Any = model.unembed
    with torch.no_grad(), full_precision(model):
        up, down = (unembed(final_norm(model, h[:, None]))[:, 0].float() for h in (scaled, -scaled))
    logits = (up - down) / 2
    return (logits - logits.mean(-1, keepdim=True)).cpu()
