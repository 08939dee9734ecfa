"""A vector in terms of a sparse autoencoder's features. The algebra takes any decoder matrix; SAELens supplies one.

A vector is not put through the encoder: it lies far from the residuals an encoder was trained on, and may point against
features, which activations cannot (arXiv 2411.08790). It is regressed on a few decoder directions instead, of either
sign unless asked otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.vectors.steering_vectors import SteeringVectors


def load_sae(release: str, sae_id: str, *, device: str = "cpu") -> tuple[Any, int]:
    """A pretrained SAE from the Hugging Face hub through SAELens, and the layer whose vectors it fits.

    SAELens needs TransformerLens 3. Features are matched to ``resid_post``: an SAE on ``blocks.4.hook_resid_pre``
    belongs to layer 3.

    Args:
        release: name of the release in SAELens' table of pretrained SAEs.
        sae_id: name of the SAE within the release.
        device: where to put it.

    Returns:
        ``(sae, layer)``; ``sae.W_dec`` ``[d_sae, d_model]`` is the decoder that the functions here take.

    Raises:
        ImportError: SAELens is not installed (extra ``sae``).
        ValueError: an SAE that does not sit on the residual stream.

    Examples:
        >>> sae, layer = load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")      # doctest: +SKIP
        >>> decoder_cosines(vectors, sae.W_dec, layer=layer)                           # doctest: +SKIP
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise ImportError(
            "pretrained SAEs come through SAELens (TransformerLens 3 only): pip install 'grains-tl[sae]'; without it, give "
            "any decoder matrix [d_sae, d_model]"
        ) from error
    found = SAE.from_pretrained(release=release, sae_id=sae_id, device=device)
    sae = found[0] if isinstance(found, tuple) else found
    metadata = getattr(sae.cfg, "metadata", sae.cfg)
    return sae, layer_of(str(getattr(metadata, "hook_name", None) or getattr(sae.cfg, "hook_name", "")))


def layer_of(hook_name: str) -> int:
    """The layer whose ``resid_post`` an SAE's hook point is.

    Raises:
        ValueError: a hook point off the residual stream, or before block 0.

    Examples:
        >>> layer_of("blocks.4.hook_resid_pre"), layer_of("blocks.4.hook_resid_post")
        (3, 4)
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    layer = int(found.group(1)) - (found.group(2) == "pre") if found else -1
    if layer < 0:
        raise ValueError(f"an SAE on {hook_name!r}; vectors live on the residual stream after a block (resid_post)")
    return layer


def decoder_cosines(
    vectors: SteeringVectors, decoder: Float[Tensor, "d_sae d_model"], *, layer: int, n_top: int = 10
) -> pd.DataFrame:
    """The features whose decoder directions lie nearest to the vector, and to its opposite.

    Args:
        vectors: the directions.
        decoder: ``sae.W_dec``; the length of its rows does not matter.
        layer: whose direction.
        n_top: features in all, by absolute cosine.

    Returns:
        ``feature``, ``cosine``, ``z`` (cosine times sqrt(d_model): what chance gives is standard normal, and the
        largest of ``d_sae`` such numbers is about sqrt(2 ln d_sae)).

    Raises:
        ValueError: another ``d_model``, or a layer that is not stored.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[0.6, -0.8]]), (4,), torch.ones(1), torch.ones(1))
        >>> decoder_cosines(v, torch.eye(2), layer=4).feature.tolist()
        [1, 0]
    """
    unit, rows = _checked(vectors, decoder, layer)
    cosines = torch.from_numpy(rows @ unit)
    top = cosines.abs().topk(min(n_top, len(cosines))).indices
    table = pd.DataFrame({"feature": top.tolist(), "cosine": cosines[top].tolist()})
    return table.assign(z=table.cosine * len(unit) ** 0.5)


def sparse_decomposition(
    vectors: SteeringVectors,
    decoder: Float[Tensor, "d_sae d_model"],
    *,
    layer: int,
    n_features: int = 10,
    nonnegative: bool = False,
) -> pd.DataFrame:
    """The vector as a sum of a few decoder directions, chosen greedily (orthogonal matching pursuit).

    At each step the feature that fits the remainder best joins, and all coefficients are fitted again by least squares
    (nonnegative ones with ``nonnegative``). In d_model dimensions *any* direction is explained in part by the best k of
    many features: set ``explained`` beside that of ``random_direction_vectors``.

    Args:
        vectors: the directions.
        decoder: ``[d_sae, d_model]``.
        layer: whose direction.
        n_features: at most this many; fewer if the vector is explained before.
        nonnegative: only features the vector points along, never against.

    Returns:
        In the order of joining: ``feature``, ``coefficient`` in the final fit (of unit decoder rows, for the unit
        vector), ``cosine`` of the feature to the vector, ``explained`` share of the vector's square by the features
        so far.

    Raises:
        ValueError: another ``d_model``, a layer that is not stored, a bad ``n_features``.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[0.6, -0.8]]), (4,), torch.ones(1), torch.ones(1))
        >>> sparse_decomposition(v, torch.eye(2), layer=4, n_features=1).explained.round(2).tolist()
        [0.64]
    """
    from scipy.optimize import nnls

    unit, rows = _checked(vectors, decoder, layer)
    if not 1 <= n_features <= len(rows):
        raise ValueError(f"n_features={n_features}; it is between 1 and {len(rows)}, the number of features")
    picked: list[int] = []
    explained: list[float] = []
    coefficients = np.zeros(0)
    rest = unit
    while len(picked) < n_features and rest @ rest > 1e-10:
        fit = rows @ rest
        score = fit if nonnegative else np.abs(fit)
        score[picked] = -np.inf
        if score.max() <= 1e-8:  # nothing points that way any more
            break
        picked.append(int(score.argmax()))
        basis = rows[picked].T
        coefficients = nnls(basis, unit)[0] if nonnegative else np.linalg.lstsq(basis, unit, rcond=None)[0]
        rest = unit - basis @ coefficients
        explained.append(float(1 - rest @ rest))
    cosines = rows[picked] @ unit
    return pd.DataFrame({"feature": picked, "coefficient": coefficients, "cosine": cosines, "explained": explained})


def feature_vectors(
    like: SteeringVectors,
    decoder: Float[Tensor, "d_sae d_model"],
    features: Sequence[int] | pd.DataFrame,
    *,
    layer: int,
) -> SteeringVectors:
    """A feature, or a weighted sum of features, as a steering vector of the same layer and scale.

    Args:
        like: gives the layer's residual norm (the unit of ``alpha``) and the model it belongs to.
        decoder: ``[d_sae, d_model]``.
        features: feature numbers to add with equal weight, or a table from ``sparse_decomposition`` (its coefficients).
        layer: which layer.

    Returns:
        ``SteeringVectors`` with that one layer, to be steered with and swept like any other.

    Raises:
        ValueError: a feature the decoder does not have, a decoder of another width, or a layer that is not stored.

    Examples:
        >>> v = SteeringVectors(torch.tensor([[0.6, -0.8]]), (4,), torch.ones(1), torch.full((1,), 50.0))
        >>> feature_vectors(v, torch.eye(2), [0], layer=4).directions.tolist()
        [[1.0, 0.0]]
    """
    _, rows = _checked(like, decoder, layer)
    if isinstance(features, pd.DataFrame):
        numbers, weights = [int(f) for f in features.feature], features.coefficient.to_numpy(dtype=float)
    else:
        numbers, weights = [int(f) for f in features], np.ones(len(features))
    bad = [f for f in numbers if not 0 <= f < len(rows)]
    if bad or not numbers:
        raise ValueError(f"features {bad or 'none'}; the decoder has features 0 to {len(rows) - 1}")
    raw = torch.from_numpy(weights @ rows[numbers]).float()[None]
    info = {"method": "features", "features": numbers, "model": like.info.get("model")}
    return SteeringVectors.from_raw(raw, [layer], like.at([layer]).resid_norms, info, site=like.site)


def _checked(vectors: SteeringVectors, decoder: Tensor, layer: int) -> tuple[Any, Any]:
    """The unit vector and the decoder's unit rows, in double precision."""
    unit = vectors.at([layer]).directions[0].double().numpy()
    if decoder.ndim != 2 or decoder.shape[1] != len(unit):
        raise ValueError(
            f"a decoder of shape {tuple(decoder.shape)} for vectors of d_model {len(unit)}; [d_sae, {len(unit)}] is needed "
            "(SAELens: sae.W_dec)"
        )
    rows = decoder.detach().cpu().double().numpy()
    return unit, rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
