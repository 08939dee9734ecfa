"""Lenses of a vector against what steering does: the tokens it promotes in context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import rank_correlation
from grains_tl.analysis.equal_kl import with_random_directions
from grains_tl.analysis.lens import _top_both_ways
from grains_tl.evaluate.costs import cost_rows
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.inference.batches import by_token_budget, text_batch
from grains_tl.inference.logprobs import hooks_for, target_logits
from grains_tl.models.jacobian_lens import load_lens
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.words import through_unembedding

RANDOM = "random direction"

#: Tokens of text whose logits are held at a time.
PIECE = 256


def promoted_tokens(
    model: HookedModel, steering: Steering, *, texts: Sequence[str] | None = None, n_top: int = 8
) -> pd.DataFrame:
    """The tokens that steering promotes in context and those it demotes: a mean over every position of neutral texts.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: ``vectors.steering(alpha, layer)``.
        texts: default the first bundled neutral texts.
        n_top: tokens on either side.

    Returns:
        ``side`` (``"up"`` or ``"down"``), ``rank`` from 1, ``token``, ``token_id``, ``change``: of the logit, less the mean
        over the vocabulary, nats.

    Raises:
        ValueError: something else than a steering, no texts or too short ones, ``n_top`` out of range.

    Examples:
        >>> promoted_tokens(model, vectors.steering(0.1, 18)).query("side == 'up'").token.tolist()   # doctest: +SKIP
    """
    change = _change_in_context(model, [_required(steering)], texts)
    return _top_both_ways(model, change, [max(steering.layers)], n_top, "change").drop(columns="layer")


def lens_agreement(
    model: HookedModel,
    steering: Steering,
    *,
    lens: Any = None,
    texts: Sequence[str] | None = None,
    n_top: int = 20,
    n_random: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """How well a lens foretells which tokens steering promotes, beside the same for random directions of equal KL.

    The truth is the change of the next-token distribution on neutral texts (``promoted_tokens``). The logit lens reads the
    vector through the final norm and the unembedding; a Jacobian lens maps it to the last block's output first.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``; with a Jacobian lens a bridge of TransformerLens 4.3.
        steering: of one layer, on the residual stream after it.
        lens: a ``transformer_lens.tools.analysis.JacobianLens`` or its file; without one the logit lens stands alone.
        texts: default the first bundled neutral texts.
        n_top: of the most promoted and of the most demoted tokens, for the overlaps.
        n_random: random directions.
        seed: of the directions.

    Returns:
        One row per vector (``"steering"``, ``"random direction"``), draw and ``lens``: ``rank_correlation`` over the
        vocabulary, ``overlap_up`` and ``overlap_down`` (shares of the ``n_top`` tokens; chance gives ``n_top`` over the size
        of the vocabulary), ``kl`` of the step (NaN without random directions).

    Raises:
        ImportError: a lens file without TransformerLens 4.3.
        ValueError: steering at several layers or at another site, a lens that was not fitted for the layer.

    Examples:
        >>> table = lens_agreement(model, vectors.steering(0.1, 18), lens="lens.pt")          # doctest: +SKIP
        >>> table.groupby(["vector", "lens"]).mean(numeric_only=True)                         # doctest: +SKIP
    """
    (layer,) = _one_layer(_required(steering))
    residual_stream_only("lens_agreement", steering.vectors.site)
    size = int(model.cfg.d_vocab)
    if not 1 <= whole("n_top", n_top) <= size:
        raise OptionError(f"n_top={n_top}; it is between 1 and {size}, the size of the vocabulary")
    fitted = load_lens(lens) if isinstance(lens, (str, Path)) else lens
    if fitted is not None and layer not in fitted.source_layers:
        raise OptionError(f"the lens was not fitted for layer {layer}; it has {list(fitted.source_layers)}")
    steps, spent = with_random_directions(model, steering, whole("n_random", n_random, 0), texts, seed)
    truth = _change_in_context(model, steps, texts)
    rows = []
    for i, step in enumerate(steps):
        # a negative step promotes what the direction demotes
        sign = -1.0 if step.alpha < 0 else 1.0
        unit = sign * step.vectors.at([layer]).directions.float().cpu()
        read = {"logit lens": through_unembedding(model, unit)[0]}
        if fitted is not None:
            read["Jacobian lens"] = through_unembedding(model, _moved(fitted, unit, layer))[0]
        for name, logits in read.items():
            about = {"vector": RANDOM if i else "steering", "draw": i - 1, "lens": name, "kl": float(spent[i])}
            rows.append({**about, **_agreement(logits, truth[i], n_top)})
    return pd.DataFrame(rows)


def _moved(lens: Any, unit: Float[Tensor, "1 d_model"], layer: int) -> Float[Tensor, "1 d_model"]:
    moved = lens.transport(unit, layer).detach().float().cpu()
    return cast("Tensor", moved / moved.norm().clamp(min=1e-30))


def _agreement(logits: Float[Tensor, "vocab"], truth: Float[Tensor, "vocab"], n_top: int) -> dict[str, float]:
    def overlap(sign: float) -> float:
        tops = [set((sign * values).topk(n_top).indices.tolist()) for values in (logits, truth)]
        return len(tops[0] & tops[1]) / n_top

    correlation = rank_correlation(logits.double().numpy(), truth.double().numpy())
    return {"rank_correlation": float(correlation), "overlap_up": overlap(1.0), "overlap_down": overlap(-1.0)}


def _change_in_context(
    model: HookedModel, steps: Sequence[Steering], texts: Sequence[str] | None
) -> Float[Tensor, "step vocab"]:
    """Mean change of the logits over every predicted position, less its mean over the vocabulary, nats, on the CPU."""
    rows = cost_rows(model, neutral_texts(COST_TEXTS) if texts is None else texts)
    total = torch.zeros(len(steps), int(model.cfg.d_vocab), dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for group in by_token_budget([len(row) for row in rows], max_tokens=PIECE):
            batch = text_batch(model, [rows[i] for i in group])
            base = target_logits(model, batch).float().log_softmax(-1)
            count += len(base)
            for i, step in enumerate(steps):
                changed = target_logits(model, batch, hooks_for(step, batch)).float().log_softmax(-1)
                total[i] += (changed - base).sum(0).double().cpu()
    mean = total / count
    return (mean - mean.mean(-1, keepdim=True)).float()


def _required(steering: Any) -> Steering:
    if not isinstance(steering, Steering):
        raise OptionError(f"steering is a {type(steering).__name__}; expected vectors.steering(alpha, layer)")
    return replace(steering)


def _one_layer(steering: Steering) -> tuple[int]:
    if len(steering.layers) != 1:
        raise OptionError(
            f"steering at layers {list(steering.layers)}; a lens reads one layer: vectors.steering(alpha, 18)"
        )
    return (steering.layers[0],)
