"""From an attribution of each prompt to how strongly each of its positions is steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.result import Attribution
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.weights import Weighted
from grains_tl.inference.batches import prompt_key
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import HookedModel


def prompt_weights(
    model: HookedModel,
    records: Records,
    *,
    method: Method | str = "gradient_x_input",
    floor: float = 0.0,
    after: float = 1.0,
    mask: Mask | Masker = "mean_embedding",
    shuffle_seed: int | None = None,
    attributions: Sequence[Attribution] | None = None,
    **fields: Any,
) -> Weighted:
    """Weights that steer positions which push toward rejected more than others, by each record's own attribution.

    A position's weight is ``floor`` plus its share of all that pushes toward rejected, scaled so that the weights of a
    prompt add up to its number of positions, as those of uniform steering do. Special tokens have no share. A prompt in
    which nothing pushes toward rejected is steered uniformly.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        records: preference records, tokenized or not; images count with their patches.
        method: an attribution method: ``"gradient_x_input"`` takes one pass and its gradient, ``"leave_one_out"`` is exact.
        floor: part of the strength that all positions have alike, from 0 to 1; at 1 the weights are uniform.
        after: the weight behind the prompt.
        mask: as in ``attribute``.
        shuffle_seed: permute the scores among the content tokens of each prompt first: weights of the same sum and sizes at
            random places, the control of the true ones.
        attributions: of these records, where they are there already; ``method`` and ``mask`` are then left aside.
        fields: as in ``attribute``.

    Returns:
        ``Weighted`` for ``vectors.steering(alpha, layers, positions=...)``, for any batch of these prompts. Two records with
        one prompt (and image) share the mean of their weights.

    Raises:
        ValueError: a floor outside 0 to 1, or what ``attribute`` refuses.

    Examples:
        >>> weights = prompt_weights(model, pairs, method="leave_one_out")                    # doctest: +SKIP
        >>> generate(model, prompts, vectors.steering(0.2, 12, positions=weights))            # doctest: +SKIP
    """
    if not 0 <= floor <= 1:
        raise OptionError(f"floor={floor}; expected a share from 0 (all by attribution) to 1 (uniform)")
    tokenized = as_tokenized(model, records)
    if not tokenized:
        raise ValueError("no records; give at least one")
    if attributions is None:
        attributions = attribute_all(model, tokenized, method=method, mask=mask, **fields)
    wrong = [
        n for n, (t, a) in enumerate(zip(tokenized, attributions, strict=False), 1) if len(t.prompt) != len(a.scores)
    ]
    if len(attributions) != len(tokenized) or wrong:
        raise ValueError(
            f"{len(attributions)} attributions for {len(tokenized)} records"
            + (f", and that of record {wrong[0]} has another number of tokens" if wrong else "")
            + "; give those of these records, in their order"
        )
    by_prompt: dict[tuple[int | str, ...], list[Tensor]] = {}
    for number, (record, attribution) in enumerate(zip(tokenized, attributions, strict=True)):
        generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed * 100_003 + number)
        by_prompt.setdefault(prompt_key(record.prompt, record.images), []).append(
            _weights(attribution, floor, generator)
        )
    means = {ids: torch.stack(rows).mean(0).tolist() for ids, rows in by_prompt.items()}
    name = "attributed" if shuffle_seed is None else "shuffled"
    return Weighted(means, after, name)


def _weights(attribution: Attribution, floor: float, generator: torch.Generator | None) -> Float[Tensor, "pos"]:
    content = attribution.content.bool().cpu()
    pushes = (-attribution.scores.nan_to_num(0.0)).clamp_min(0).double().cpu().masked_fill(~content, 0.0)
    if generator is not None:
        places = content.nonzero()[:, 0]
        pushes[places] = pushes[places[torch.randperm(len(places), generator=generator)]]
    n, total = len(pushes), float(pushes.sum())
    share = pushes * (n / total) if total > 0 else torch.ones(n, dtype=torch.float64)
    return floor + (1 - floor) * share
