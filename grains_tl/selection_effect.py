"""From chosen tokens to what their vector does: the last step by which attributions are judged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from grains_tl.caching import Differences, collect_differences
from grains_tl.controls import random_token_differences
from grains_tl.evaluate import effects, next_token_kl
from grains_tl.masking import Masker, Selection
from grains_tl.objectives import Objective
from grains_tl.replacements import ImageMasker
from grains_tl.scoring import MAX_TOKENS
from grains_tl.tokens import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors import reduce_vectors


def effect_of_selections(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Sequence[Selection]],
    evaluated: Sequence[TokenizedPair],
    *,
    layer: int,
    alpha: float = 0.2,
    n_draws: int = 0,
    seed: int = 0,
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    objective: Objective = "sum",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> tuple[Float[Tensor, "selection record"], Float[Tensor, "selection record"]]:
    """Steering by the mean-reduced vector of each selection, on other records.

    Args:
        model, tokenized: the model and the building records.
        selections: several choices of tokens, each one per building record.
        evaluated: the records to steer on.
        layer, alpha: where and how strongly (fraction of the residual norm).
        n_draws: random choices of as many tokens as in the first selection, appended to the results.
        seed: of these draws.
        masker, image_masker, objective, max_tokens: as in ``build_vectors``.
        progress: show bars.

    Returns:
        ``(effect, kl)``, each ``[selection + draw, record]`` in nats: half the change of the margin between +alpha and
        -alpha, and the mean over both signs of KL(steered || base) of the next token.
    """
    shared = {"layers": [layer], "masker": masker, "image_masker": image_masker, "max_tokens": max_tokens}
    differences: list[Differences] = [
        collect_differences(model, tokenized, own, progress=progress, **shared)  # type: ignore[arg-type]
        for own in selections
    ]
    if n_draws:
        differences += random_token_differences(
            model,
            tokenized,
            selections[0],
            resid_norms=differences[0].resid_norms,
            n_draws=n_draws,
            seed=seed,
            progress=progress,
            **shared,  # type: ignore[arg-type]
        )
    vectors = [reduce_vectors(d) for d in differences]
    _, effect = effects(model, evaluated, vectors, alpha, objective=objective, max_tokens=max_tokens, progress=progress)
    kl = [
        torch.stack([next_token_kl(model, evaluated, v.hooks(a), max_tokens=max_tokens) for a in (alpha, -alpha)])
        for v in tqdm(vectors, desc="cost", unit="vector", disable=not progress)
    ]
    return effect, torch.stack(kl).mean(1)
