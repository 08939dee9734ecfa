"""A direction read as words: through the final norm and the unembedding, and against the token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.hooks.sites import residual_space_only
from grains_tl.models.precision import full_precision
from grains_tl.models.running import device_of, embed_tokens
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.words import through_unembedding


def lens_logits(model: HookedModel, vectors: SteeringVectors) -> Float[Tensor, "layer vocab"]:
    """Logits of each layer's direction as if it were the whole final residual (logit lens of a direction).

    The final norm divides by the size of what it is given, so the direction's own length drops out: it is read at the
    length of a whole residual. A small step of ``alpha`` final residual norms along the direction changes the logits by
    about ``alpha`` times these (the direct effect only: what later layers add is not in them). Half the difference of
    +direction and -direction is taken, so that the biases of norm and unembedding drop out, and the mean over the
    vocabulary is removed, since only differences of logits mean something.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: one direction per layer.

    Returns:
        ``[layer, vocab]``, on the CPU.

    Raises:
        ValueError: vectors of another model.

    Examples:
        >>> lens_logits(model, vectors)[0].topk(5).indices        # doctest: +SKIP
    """
    residual_space_only("the logit lens", vectors.site)
    vectors.require_match(model)
    return through_unembedding(model, vectors.directions)


def logit_lens(
    model: HookedModel, vectors: SteeringVectors, *, layers: Sequence[int] | None = None, n_top: int = 8
) -> pd.DataFrame:
    """The tokens that a step along each direction promotes most, and those it demotes most.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: the steering vectors.
        layers: default all stored.
        n_top: tokens on either side.

    Returns:
        ``layer``, ``side`` (``"up"`` or ``"down"``), ``rank`` from 1, ``token``, ``token_id``, ``logit`` (nats up
        to the scale in ``lens_logits``), ``z`` (logit over the standard deviation across the vocabulary: the largest of
        49 000 normal draws is about 4.2, so less than that says nothing).

    Examples:
        >>> logit_lens(model, vectors, layers=[24]).pivot(index="rank", columns="side", values="token")  # doctest: +SKIP
    """
    chosen = vectors.at(vectors.layers if layers is None else layers)
    logits = lens_logits(model, chosen)
    return _top_both_ways(model, logits, chosen.layers, n_top, "logit").assign(
        z=lambda t: t.logit / t.layer.map(dict(zip(chosen.layers, logits.std(-1).tolist(), strict=True)))
    )


def embedding_neighbours(
    model: HookedModel,
    vectors: SteeringVectors,
    *,
    layers: Sequence[int] | None = None,
    n_top: int = 8,
    space: Literal["embed", "unembed"] = "embed",
) -> pd.DataFrame:
    """Tokens whose embedding lies nearest to the direction, and to its opposite, by cosine.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: the steering vectors.
        layers: default all stored.
        n_top: tokens on either side.
        space: ``"embed"``: rows of the token embedding; ``"unembed"``: each token's gradient through the unembedding,
            without the final norm's weights. They are the same where the model ties them.

    Returns:
        ``layer``, ``side``, ``rank``, ``token``, ``token_id``, ``cosine``. The mean embedding is removed first: it is
        common to all tokens and would decide every cosine.

    Raises:
        ValueError: unknown ``space``, ``n_top`` out of range, a layer that is not stored, or vectors of another model.

    Examples:
        >>> embedding_neighbours(model, vectors, layers=[24])["token"].tolist()     # doctest: +SKIP
    """
    if space not in ("embed", "unembed"):
        raise ValueError(f"space={space!r}; expected 'embed' or 'unembed'")
    chosen = vectors.at(vectors.layers if layers is None else layers)
    residual_space_only("embedding_neighbours", chosen.site)
    chosen.require_match(model)
    units = chosen.directions.to(device_of(model))
    if space == "embed":
        table = embed_tokens(model, torch.arange(int(model.cfg.d_vocab), device=units.device)).float()
    else:
        # one basis vector per row gives the columns of the unembedding, whatever class holds it
        basis = torch.eye(units.shape[1], device=units.device, dtype=_dtype(model))[None]
        unembed: Any = model.unembed
        with torch.no_grad(), full_precision(model):
            table = (unembed(basis) - unembed(0 * basis))[0].float().T
    table = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    with full_precision(model):
        cosines = (units @ table.T).cpu()
    return _top_both_ways(model, cosines, chosen.layers, n_top, "cosine")


def _dtype(model: HookedModel) -> torch.dtype:
    return next(model.parameters()).dtype


def _top_both_ways(
    model: HookedModel, values: Float[Tensor, "layer vocab"], layers: Sequence[int], n_top: int, name: str
) -> pd.DataFrame:
    if not 1 <= n_top <= values.shape[-1]:
        raise ValueError(f"n_top={n_top}; it is between 1 and {values.shape[-1]}, the size of the vocabulary")
    rows: list[dict[str, Any]] = []
    for layer, line in zip(layers, values, strict=True):
        for side, sign in (("up", 1), ("down", -1)):
            found = (sign * line).topk(n_top)
            for rank, (value, token_id) in enumerate(zip(found.values.tolist(), found.indices.tolist(), strict=True)):
                token = model.tokenizer.decode([token_id])
                row = {"layer": layer, "side": side, "rank": rank + 1, "token": token, "token_id": token_id}
                rows.append({**row, name: sign * value})
    return pd.DataFrame(rows)
